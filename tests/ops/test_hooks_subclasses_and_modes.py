"""Hooks, subclasses, parametrizations, shared and written weights, modes; and the life of the result."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from safety import agrees, model_of, normal, pickled, usual
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxfuse

Forward = Callable[..., Any]
Pair = namedtuple("Pair", "y x")


def pairs() -> Any:
    """Two containers of a convolution and a batch norm each."""
    first = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return randomize(nn.Sequential(first, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))).double()


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, i, o: o * 2),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda m, i, k, o: o * 2, with_kwargs=True),
    "always": lambda m: m.register_forward_hook(lambda m, i, o: o * 2, always_call=True),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(lambda m, i, k: ((i[0] * 2,), k), with_kwargs=True),
}
PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "conv": lambda m: m[0][0],
    "bn": lambda m: m[0][1],
    "container": lambda m: m[0],
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", PLACES)
def test_hooks_run(place: str, hook: str) -> None:
    model = pairs()
    HOOKS[hook](PLACES[place](model))
    fused = agrees(model, fires=True)
    fired = [f.path for f in fxfuse.report(fused).fired]
    assert fired == ["1.0"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_model_itself_run(hook: str) -> None:
    model = pairs()
    HOOKS[hook](model)
    fused, x = fxfuse.optimize(model), normal((2, 4, 6, 5), torch.Generator())
    for candidate in (fused, copy.deepcopy(fused)):
        assert relative_error(candidate(x), model(x)) < 1e-12


def test_instance_forwards_run() -> None:
    for place, forward in (
        ("conv", lambda self, x: F.conv2d(x, self.weight) * 3),
        ("container", lambda self, x: self[1](self[0](x)) * 3),
    ):
        model = pairs()
        target: Any = PLACES[place](model)
        target.forward = MethodType(forward, target)
        assert [f.path for f in fxfuse.report(agrees(model)).fired] == ["1.0"]


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Doubled(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class Squared(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) ** 2


class Scaled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class PlainConv(nn.Conv2d):
    """Nothing but another name."""


class PlainNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=0.1)


@pytest.mark.parametrize(
    ("conv", "norm", "fires"),
    [
        (Standardized, nn.BatchNorm2d, True),
        (Doubled, nn.BatchNorm2d, True),
        (Squared, nn.BatchNorm2d, False),
        (nn.Conv2d, Scaled, False),
        (PlainConv, PlainNorm, True),
    ],
)
def test_subclasses_are_what_they_compute(conv: Any, norm: Any, fires: bool) -> None:
    agrees(randomize(nn.Sequential(conv(4, 4, 3), norm(4))).double(), fires=fires)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def pruned() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


def parametrized() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    parametrize.register_parametrization(conv, "weight", Twice())
    return conv


def old(function: Callable[[nn.Module], Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(nn.Conv2d(4, 4, 3))  # type: ignore[no-any-return]


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "parametrization": parametrized,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "old weight_norm": lambda: old(torch.nn.utils.weight_norm),
    "old spectral_norm": lambda: old(torch.nn.utils.spectral_norm),
    "pruned": pruned,
}


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights(case: str) -> None:
    model = nn.Sequential(COMPUTED[case](), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[1].running_var.fill_(0.3)
    model.double().eval()
    x = normal((2, 4, 6, 5), torch.Generator())
    for _ in range(2):  # a call replaces the computed weight
        fused = fxfuse.optimize(model)
        assert [f.path for f in fxfuse.report(fused).fired] == ["3"]
        assert relative_error(fused(x), model(x)) < 1e-12
    assert fxfuse.report(fxfuse.optimize(model, x, verify=True)).max_error is not None


def tied() -> nn.Module:
    model = usual(lambda s, x: s.b(s.a(x)) * s.n(s.o(x)), o=nn.Conv2d(4, 4, 3, padding=1))
    model.o.weight = model.a.weight
    return model


def weight_written(self: Any, x: Tensor) -> Tensor:
    self.a.weight.data.mul_(0.5)
    return self.b(self.a(x))


def weight_replaced(self: Any, x: Tensor) -> Tensor:
    self.a.weight.data.copy_(self.w)
    return self.b(self.a(x))


def statistics_written(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    self.b.running_mean.mul_(0.9)
    return y


BY_BATCH = "statistics of the batch"
WEIGHTS: dict[str, tuple[Forward, bool | None, str]] = {
    "read": (lambda s, x: s.b(s.a(x)) * s.a.weight.sum(), True, ""),
    "doubled": (lambda s, x: s.b(F.conv2d(x, s.a.weight * 2, s.a.bias)) * s.a(x), True, ""),
    "centred": (lambda s, x: s.b(F.conv2d(x, s.a.weight - s.a.weight.mean((1, 2, 3), True))), True, ""),
    "rounded": (lambda s, x: s.b(F.conv2d(x, s.a.weight.half().to(torch.float64))), True, ""),
    "masked rows": (lambda s, x: torch.cat([F.conv2d(x, s.a.weight[s.keep]), s.a(x)[:, :, 1:-1, 1:-1]], 1), False, ""),
    "nonzero rows": (lambda s, x: F.conv2d(x, s.a.weight[s.keep.nonzero().squeeze(1)]) * 2, False, ""),
    "chosen rows": (lambda s, x: F.conv2d(x, s.a.weight[[3, 1]]) * 2, True, ""),
    "compared": (lambda s, x: s.a(x) * torch.equal(s.a.weight, s.w), None, ""),
    "asked": (lambda s, x: s.a(x) * s.keep[0].is_nonzero() * s.a.weight.requires_grad, None, ""),
    "item": (lambda s, x: s.a(x) * s.b.weight[0].item(), None, ""),
    "size": (lambda s, x: s.a(x) * s.a.weight.shape[0] ** -0.5, True, ""),
    "random": (lambda s, x: s.a(x) * torch.bernoulli(s.odds), None, ""),
    "written": (weight_written, False, "the forward itself writes its weights"),
    "replaced": (weight_replaced, False, "the forward itself writes its weights"),
    "statistics written": (statistics_written, False, "the forward itself writes its weights"),
    "training": (lambda s, x: F.batch_norm(s.a(x), s.b.running_mean, s.b.running_var, training=True), False, BY_BATCH),
    "without": (lambda s, x: F.batch_norm(s.a(x), None, None, training=True), False, BY_BATCH),
    "functional": (lambda s, x: F.batch_norm(s.a(x), s.b.running_mean, s.b.running_var, eps=0.3), True, ""),
    "dropout": (lambda s, x: F.dropout(s.b(s.a(x)), 0.5), True, ""),
    "dropout between": (lambda s, x: s.b(F.dropout(s.a(x), 0.5)), False, ""),
    "dropout in eval mode": (lambda s, x: s.b(F.dropout(s.a(x), 0.5, s.training)), True, ""),
    "noise": (lambda s, x: s.b(s.a(x)) + torch.rand_like(x), True, ""),
    "namedtuple": (lambda s, x: Pair(s.b(s.a(x)), x), True, ""),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_and_modes(case: str) -> None:
    forward, fires, refused = WEIGHTS[case]
    keep, w = torch.tensor([True, False, True, True]), torch.randn(4, 4, 3, 3, generator=torch.Generator())
    model = usual(forward, w=w.double(), odds=torch.full((4, 1, 1), 0.5))
    model.register_buffer("keep", keep)
    agrees(model, fires=fires, refused=refused)


def test_tied_weights_and_a_module_of_two_names() -> None:
    agrees(tied(), fires=True)
    model = usual(lambda s, x: s.b(s.a(x)))
    model.again = model.a
    agrees(model, fires=True)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Dropout])
def test_a_layer_left_in_training_mode(kind: Any) -> None:
    class Kept(nn.Sequential):
        def eval(self) -> Any:  # returns None, as some models do
            super().eval()
            self[1].train()

    model = Kept(nn.Conv2d(4, 4, 3), kind(4) if kind is nn.BatchNorm2d else kind(0.5), nn.BatchNorm2d(4))
    randomize(model)
    agrees(model.double(), fires=False)


def test_a_scripted_and_a_compiled_layer_run() -> None:
    inner = pairs()[0].eval()
    agrees(nn.Sequential(torch.jit.script(inner), copy.deepcopy(inner)), fires=True)
    compiled = nn.Sequential(torch.compile(inner, backend="eager"), copy.deepcopy(inner)).eval()
    x = normal((1, 4, 9, 9), torch.Generator())
    assert relative_error(fxfuse.optimize(compiled)(x), compiled(x)) < 1e-12


def test_meta_models_need_no_numbers() -> None:
    x = torch.ones(1, 4, 5, 5, device="meta")
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).to("meta").eval()
    for given in (None, x):
        fused = fxfuse.optimize(model, given)
        assert fxfuse.report(fused).fired and fused(x).shape == (1, 4, 3, 3)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_requires_grad_and_gradients(frozen: tuple[int, ...]) -> None:
    model = pairs()[0]
    for index in frozen:
        model[index].requires_grad_(False)
    fused = agrees(model, fires=True)
    x, y = (normal((2, 4, 5, 5), torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    model(x).sin().sum().backward()
    fused(y).sin().sum().backward()
    assert relative_error(y.grad, x.grad) < 1e-12


def test_the_result_trains_and_shares_nothing() -> None:
    model, x = pairs(), normal((2, 4, 6, 5), torch.Generator())
    fused = fxfuse.optimize(model)
    ours = {t.untyped_storage().data_ptr() for t in fused.state_dict().values()}
    assert not ours & {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    expected = model(x)
    step = torch.optim.SGD(fused.train().parameters(), 0.01)
    fused(x).square().mean().backward()
    step.step()
    assert not torch.equal(fused(x), expected) and torch.equal(model(x), expected)


LIVES: dict[str, Callable[[Any, Tensor], Any]] = {
    "pickle": lambda f, x: pickled(f)(x),
    "deepcopy": lambda f, x: copy.deepcopy(f)(x),
    "state_dict": lambda f, x: (lambda g: (g.load_state_dict(f.state_dict()), g(x))[1])(copy.deepcopy(f)),
    "script": lambda f, x: torch.jit.script(f)(x),
    "export": lambda f, x: torch.export.export(f, (x,)).module()(x),
    "again": lambda f, x: fxfuse.optimize(f)(x),
    "graph module": lambda f, x: fxfuse.optimize(torch.fx.symbolic_trace(f))(x),
    "float": lambda f, x: copy.deepcopy(f).to(torch.float32)(x.float()).double(),
}


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.filterwarnings("ignore")
def test_the_result_lives_on(life: str) -> None:
    model, x = pairs(), normal((2, 4, 6, 5), torch.Generator())
    fused = fxfuse.optimize(model)
    assert relative_error(LIVES[life](fused, x), model(x)) < (1e-6 if life == "float" else 1e-12)
    again = fxfuse.optimize(fused)
    assert not fxfuse.report(again).fired
    for kept in (pickled(fused), copy.deepcopy(fused)):
        assert fxfuse.report(kept) == fxfuse.report(fused)


def test_errors_say_what_to_do() -> None:
    model, x = pairs(), normal((1, 4, 5, 5), torch.Generator())
    errors: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "not function", lambda: fxfuse.optimize(lambda x: x)),
        (ValueError, r"call model.eval\(\) first", lambda: fxfuse.optimize(pairs().train())),
        (ValueError, "unknown pattern 'no'; known: .*conv_bn", lambda: fxfuse.optimize(model, patterns=["no"])),
        (ValueError, "unknown cost 'no'; known: macs", lambda: fxfuse.optimize(model, cost="no")),
        (ValueError, "needs example_inputs", lambda: fxfuse.optimize(model, verify=True)),
        (ValueError, "does not run on example_inputs: .*channels", lambda: fxfuse.optimize(model, x[:, :3])),
        (ValueError, "does not run on example_inputs: too many positional", lambda: fxfuse.optimize(model, (x, x))),
    ]
    for kind, text, act in errors:
        with pytest.raises(kind, match=text):
            act()


def test_verify_draws_the_same_numbers_for_both() -> None:
    model = usual(lambda s, x: F.dropout(s.b(s.a(x))) + torch.rand_like(x))
    state = torch.get_rng_state()
    report = fxfuse.report(fxfuse.optimize(model, normal((1, 4, 5, 5), torch.Generator()), verify=True))
    assert report.max_error is not None and report.max_error < 1e-12
    assert torch.equal(state, torch.get_rng_state())


def test_a_weight_too_small_for_its_dtype_is_not_folded() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        for tensor, value in ((model[0].weight, 1e-4), (model[1].weight, 1e-3), (model[1].running_var, 1.0)):
            tensor.fill_(value)
        for tensor in (model[0].bias, model[1].bias, model[1].running_mean):
            tensor.zero_()
    agrees(model.half(), draw=lambda s, g: torch.randn(s, generator=g).half(), tolerance=2e-2, fires=False)


def test_channels_last_weights_keep_their_strides() -> None:
    agrees(pairs().to(memory_format=torch.channels_last), fires=True)


def test_models_of_every_name() -> None:
    assert fxfuse.report(fxfuse.optimize(model_of(lambda s, x: x).eval())).fired == ()
