"""What runs beside a class's own forward: something put on a class of torch.nn or on one module is never overlooked."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from helpers import randomize
from safety import agrees, usual
from torch import Tensor, nn

from fxfuse.ops.modules import runs

EXAMPLE = torch.randn(2, 4, 8, 7, dtype=torch.float64)


def between_siblings(layer: nn.Module) -> nn.Module:
    """Two convolutions of one tensor with `layer` behind each: they merge where it is known what the layer does."""
    parts = {"p": nn.Conv2d(4, 1, 1), "q": nn.Conv2d(4, 1, 1), "u": layer, "v": layer}
    return usual(lambda s, x: s.u(s.p(x)) * s.v(s.q(x)).mean((-1, -2), keepdim=True), **parts)


def before_norm(layer: nn.Module) -> nn.Module:
    return usual(lambda s, x: s.b(s.m(s.p(x))), m=layer)


def after_norm(layer: nn.Module) -> nn.Module:
    """A pool behind a batch norm, of which a slice of the channels is read."""
    return usual(lambda s, x: s.m(s.b(s.p(x)))[:, 1:].flatten(1).sum(1), m=layer)


def doubled(self: Any, x: Tensor, *rest: Any) -> Tensor:
    return x * 2 + 1


def transposed(self: Any, x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def written(self: Any, x: Tensor) -> Tensor:
    return x.add_(1)


# the layer, where it stands, and what is put on its class in place of which method
ON_CLASSES: dict[str, tuple[Any, Any, str, Any]] = {
    "relu": (nn.ReLU, between_siblings, "forward", lambda s, x: x.tanh()),
    "relu that writes": (nn.ReLU, between_siblings, "forward", written),
    "selu": (nn.SELU, between_siblings, "forward", doubled),
    "identity": (nn.Identity, before_norm, "forward", doubled),
    "identity that writes": (nn.Identity, before_norm, "forward", written),
    "dropout": (nn.Dropout, before_norm, "forward", doubled),
    "max pool": (lambda: nn.MaxPool2d(2), after_norm, "forward", transposed),
    "average pool": (lambda: nn.AvgPool2d(3, 1), before_norm, "forward", doubled),
    "batch norm": (lambda: nn.BatchNorm2d(4), before_norm, "forward", doubled),
    "convolution": (lambda: nn.Conv2d(4, 4, 1), before_norm, "forward", doubled),
    "a method of convolutions": (lambda: nn.Conv2d(4, 4, 1), before_norm, "_conv_forward", doubled),
    "flatten": (nn.Flatten, after_norm, "forward", transposed),
    "call": (nn.ReLU, between_siblings, "__call__", doubled),
}


@pytest.mark.parametrize("name", ON_CLASSES)
def test_what_is_put_on_a_class_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, place, method, replacement = ON_CLASSES[name]
    layer = make()
    assert runs(layer) is type(layer)
    owner = (
        next(c for c in type(layer).__mro__ if method in vars(c) and c is not nn.Module) if method[:2] != "__" else None
    )
    monkeypatch.setattr(owner or type(layer), method, replacement, raising=False)
    assert runs(layer) is None
    agrees(place(layer).double(), examples=EXAMPLE)
    monkeypatch.undo()
    assert runs(layer) is type(layer)


def test_known_layers_let_their_siblings_merge() -> None:
    for layer in (nn.ReLU(), nn.ReLU6(), nn.SELU()):
        agrees(between_siblings(layer), examples=EXAMPLE, fires=True)


def test_what_a_base_class_is_given_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU6 has its forward from Hardtanh."""
    monkeypatch.setattr(nn.Hardtanh, "forward", doubled)
    assert runs(nn.ReLU6()) is None
    agrees(between_siblings(nn.ReLU6()), examples=EXAMPLE)


# what is put on one module
ON_MODULES: dict[str, tuple[Any, Any, str, Any]] = {
    "forward": (nn.ReLU, between_siblings, "forward", doubled),
    "_conv_forward": (lambda: nn.Conv2d(4, 4, 1), before_norm, "_conv_forward", doubled),
    "_call_impl": (nn.Identity, before_norm, "_call_impl", doubled),
}


@pytest.mark.parametrize("name", ON_MODULES)
def test_what_is_put_on_a_module_runs(name: str) -> None:
    make, place, method, replacement = ON_MODULES[name]
    layer = make()
    layer.__dict__[method] = MethodType(replacement, layer)
    assert runs(layer) is None
    agrees(place(layer).double(), examples=EXAMPLE)


def test_a_compiled_module_is_not_what_its_class_says() -> None:
    layer = nn.ReLU()
    layer.compile()
    assert runs(layer) is None


def test_what_nobody_calls_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).double()
    monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda self: None)
    monkeypatch.setattr(nn.ReLU, "extra_repr", lambda self: "here")
    agrees(model, fires=True)
    assert runs(model[2]) is nn.ReLU


def test_a_number_of_another_type_is_not_taken_for_the_tensor_of_a_replaced_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a replaced forward gives need not keep the dtype, so nothing behind it is scaled in the old one."""
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.relu().to(torch.int32))
    agrees(usual(lambda s, x: s.p(x) + s.r(s.a(x)) * s.f, r=nn.ReLU(), f=torch.rand(1, 4, 1, 1)))
