"""Kinds of tensors, layers and names that are rare: handled like any other, or left alone with the reason."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from exactly import MISSED
from helpers import randomize, relative_error
from safety import agrees, model_of, normal, pickled, usual
from torch import Tensor, nn

import fxfuse
from fxfuse.planning.fusing import STEPS


def complex_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


COMPLEX: dict[str, tuple[Callable[..., Any], bool | None]] = {
    "two convolutions": (lambda s, x: s.c(x) + s.d(x), True),
    "a real factor": (lambda s, x: s.c(x) * 2 + 1, True),
    "a real constant": (lambda s, x: s.c(x) * s.k, True),
    "a complex constant": (lambda s, x: s.c(x) * s.z, None),
    "an imaginary factor": (lambda s, x: s.c(x) * 2j, None),
    "real parts": (lambda s, x: torch.view_as_real(s.c(x)) * 2, False),
    "conjugated": (lambda s, x: s.c(x).conj() * 2, None),
}


@pytest.mark.parametrize("case", COMPLEX)
def test_complex_models(case: str) -> None:
    forward, fires = COMPLEX[case]
    parts: dict[str, Any] = {n: nn.Conv2d(4, 4, 3, dtype=torch.complex128) for n in "cd"}
    parts |= {"k": torch.rand(4, 1, 1).double(), "z": complex_of((4, 1, 1), torch.Generator())}
    without = MISSED if case == "a real factor" else None
    agrees(model_of(forward, **parts), draw=complex_of, fires=fires, without=without)


REAL_FIRST: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "x, layer": ("concat", lambda s, x: torch.cat([x, s.c(x)], 1)),
    "factor, layer": ("concat", lambda s, x: torch.cat([x * 2 + 1, s.c(x)], 1)),
    "flip, layer": ("concat", lambda s, x: torch.cat([x.flip(1), s.c(x)], 1)),
    "factor and shift before": ("conv_bn", lambda s, x: s.c(x * 2 + 1)),
    "constants before": ("conv_bn", lambda s, x: s.c((x + s.k) * s.k)),
    "before a grouped layer": ("conv_bn", lambda s, x: s.g((x - 1) * s.k)),
}


@pytest.mark.parametrize("case", REAL_FIRST)
def test_something_real_before_or_beside_a_complex_layer(case: str) -> None:
    pattern, forward = REAL_FIRST[case]
    parts: dict[str, Any] = {n: nn.Conv2d(4, 4, 1, groups=g, dtype=torch.complex128) for n, g in (("c", 1), ("g", 2))}
    model, x = (
        model_of(forward, **parts, k=torch.rand(4, 1, 1).double()).eval(),
        complex_of((2, 4, 6, 5), torch.Generator()),
    )
    fused = fxfuse.optimize(model, x, patterns=["concat!", "conv_bn!", "conv_chain"])
    assert pattern in fxfuse.report(fused).by_pattern and relative_error(fused(x), model(x)) < 1e-14


def test_a_real_model_made_complex() -> None:
    agrees(usual(lambda s, x: s.b(s.a(x)) * 2j), fires=True)
    agrees(usual(lambda s, x: s.b(s.a(x)) + s.z, z=complex_of((4, 1, 1), torch.Generator())), fires=True)


def test_layers_quantized_dynamically_run_as_they_are() -> None:
    model = usual(lambda s, x: s.l(s.b(s.a(x)).mean((2, 3))), l=nn.Linear(4, 4)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantization.quantize_dynamic(model, {nn.Linear})
    fused, x = fxfuse.optimize(quantized), normal((2, 4, 5, 5), torch.Generator()).float()
    assert fxfuse.report(fused).fired and type(fused.l) is type(quantized.l)
    assert relative_error(fused(x), quantized(x)) < 1e-2  # a step of the quantized input, if one value crosses it


def test_layers_quantized_statically_run_as_they_are() -> None:
    stubs = {"q": quantization.QuantStub(), "d": quantization.DeQuantStub()}
    model: Any = usual(lambda s, x: s.b(s.a(s.d(s.p(s.q(x))))), **stubs).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (model.q, model.p, model.d):
            part.qconfig = quantization.get_default_qconfig("fbgemm")
        quantization.prepare(model, inplace=True)
        model(torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)))
        quantization.convert(model, inplace=True)
    fused, x = fxfuse.optimize(model), torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    assert [f.path for f in fxfuse.report(fused).fired] == ["a"]
    assert relative_error(fused(x), model(x)) < 1e-5


class Named(Tensor):
    """A tensor subclass that gives its own kind."""


def test_tensor_subclasses_as_inputs_give_what_eager_gives() -> None:
    model = usual(lambda s, x: s.b(s.a(x)) + x)
    x = normal((2, 4, 5, 5), torch.Generator()).as_subclass(Named)
    for examples in (None, x):
        fused = fxfuse.optimize(model, examples)
        assert type(fused(x)) is type(model(x)) is Named
        assert relative_error(fused(x).as_subclass(Tensor), model(x).as_subclass(Tensor)) < 1e-12


def test_weights_of_a_tensor_subclass_are_left_alone() -> None:
    model = usual(lambda s, x: s.n(s.p(s.b(s.a(x)))))
    model.a.weight = nn.Parameter(model.a.weight.detach().as_subclass(Named))
    fused, x = fxfuse.optimize(model), normal((2, 4, 5, 5), torch.Generator())
    assert [f.path for f in fxfuse.report(fused).fired] == ["p"]
    assert type(fused(x)) is type(model(x)) is Named
    assert relative_error(fused(x).as_subclass(Tensor), model(x).as_subclass(Tensor)) < 1e-12


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).double()
    fused, x = fxfuse.optimize(model), normal((2, 4, 6, 5), torch.Generator())
    assert fxfuse.report(fused).fired and not any(p.is_inference() for p in fused.parameters())
    fused(x).sum().backward()
    with torch.inference_mode():
        assert relative_error(fused(x), model(x)) < 1e-12


def doubles_output(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data.mul_(2)


def doubles_input(module: nn.Module, args: Any) -> None:
    args[0].data.mul_(2)


def reads(module: nn.Module, args: Any, output: Tensor) -> None:
    module.seen = output.detach().sum()


@pytest.mark.parametrize("hook", [doubles_output, doubles_input, reads])
@pytest.mark.parametrize("place", ["a", "p", "b"])
def test_hooks_that_write_where_they_stand(place: str, hook: Any) -> None:
    model: Any = usual(lambda s, x: s.n(s.p(x)) + s.b(s.a(x + 0)) + x)
    layer = getattr(model, place)
    (layer.register_forward_pre_hook if hook is doubles_input else layer.register_forward_hook)(hook)
    agrees(model, fires=True)


@pytest.mark.parametrize("place", ["a", ""])
def test_backward_hooks_run(place: str) -> None:
    model, calls = usual(lambda s, x: s.n(s.p(s.b(s.a(x))))), list[str]()
    model.get_submodule(place).register_full_backward_hook(lambda module, grads, outputs: calls.append(place))
    fused, x = fxfuse.optimize(model), normal((2, 4, 5, 5), torch.Generator()).requires_grad_()
    assert fxfuse.report(fused).fired
    fused(x).sum().backward()
    assert calls == [place]


class Tripled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Renamed(nn.Linear):
    """Nothing but another name."""


def test_linear_subclasses_are_what_they_compute() -> None:
    for kind, fires in ((Tripled, True), (Renamed, True)):
        model = model_of(lambda s, x: s.m(s.l(x)) * 2, l=kind(4, 6), m=nn.Linear(6, 4))
        agrees(model.double(), ((2, 4), (3, 5, 4)), fires=fires)


def test_sparse_weights_are_left_alone() -> None:
    weight = nn.Parameter(torch.eye(4, dtype=torch.float64).to_sparse(), requires_grad=False)
    parts: dict[str, Any] = {"l": nn.Linear(4, 6), "m": nn.Linear(6, 4), "w": weight}
    model = model_of(lambda s, x: torch.sparse.mm(s.w, s.m(s.l(x)) * 2) + torch.sparse.mm(s.w, x), **parts).double()
    fused, x = fxfuse.optimize(model.eval()), normal((4, 4), torch.Generator())
    assert fxfuse.report(fused).fired and fused.w.layout is torch.sparse_coo
    assert relative_error(fused(x), model(x)) < 1e-12


class Keywords(nn.Module):
    """Layers under names that Python keeps for itself, which the code of a graph cannot say."""

    def __init__(self) -> None:
        super().__init__()
        pair = {"class": nn.Conv2d(4, 4, 3), "if": nn.BatchNorm2d(4)}
        self.heads = nn.ModuleDict(pair | {"class_": nn.Sigmoid(), "a-b": nn.Conv2d(4, 4, 1), "None": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for name in ("class", "if", "class_", "a-b", "None"):
            x = self.heads[name](x)
        return x


def test_layers_of_every_name() -> None:
    model = randomize(Keywords()).double()
    examples = torch.ones(1, 4, 5, 5, dtype=torch.float64)
    fused = agrees(model, ((2, 4, 6, 5), (1, 4, 7, 5)), fires=True, examples=examples)
    assert fxfuse.report(fxfuse.optimize(model, examples, verify=True)).max_error is not None
    assert relative_error(pickled(fused)(examples), model(examples)) < 1e-12
    with torch.no_grad():
        model.heads["class"].weight.mul_(2)
        model.heads["None"].weight.mul_(2)
    assert relative_error(fxfuse.refresh(fused, model)(examples), model(examples)) < 1e-12


LONG: dict[str, Any] = {
    "x * k": lambda x, k: x * k,
    "x + x": lambda x, k: x + x,
    "x + x.relu()": lambda x, k: x + x.relu() - x,
    "x += k": operator.iadd,
    "k.size(0) + x.size(0)": lambda x, k: x * ((x.size(0) + k.size(0)) // (x.size(0) + k.size(0))),
}


@pytest.mark.parametrize("name", LONG)
def test_a_chain_longer_than_the_stack(name: str) -> None:
    """Every question about a value is answered from those before it, however many there are."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.k = nn.Parameter(torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            for _ in range(sys.getrecursionlimit() // 2):
                x = LONG[name](x, self.k)
            return x if isinstance(x, Tensor) else self.conv(x)

    model = Chain().double().eval()
    with torch.no_grad():
        model.conv.weight.round_()
        model.conv.bias.round_()
    fused, x = fxfuse.optimize(model), torch.arange(30.0).double().reshape(1, 3, 5, 2)
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("join", ["sum", "cat"])
def test_more_branches_than_one_operator_takes(join: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1 + i % 2 * 2, padding=i % 2) for i in range(STEPS + 3))

        def forward(self, x: Tensor) -> Tensor:
            outputs = [conv(x) for conv in self.convs]
            return torch.cat(outputs, 1) if join == "cat" else sum(outputs[1:], outputs[0])

    model = randomize(Wide().double(), integer=True)
    fused = fxfuse.optimize(model, patterns=["parallel_conv", "concat!"])
    for x in (torch.arange(70.0).double().reshape(1, 2, 5, 7), torch.ones(2, 2, 4, 3).double()):
        assert torch.equal(fused(x), model(x))
    assert 2 <= fxfuse.report(fused).after.ops["conv"] <= 4
