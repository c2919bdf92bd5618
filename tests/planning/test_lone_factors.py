"""Factors and shifts that stand alone: residual scales, temperatures, normalizer-free scalars, input normalisation.

Numbers are integers and powers of two, so that outputs are equal to the bit; what stays says why.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize
from law_cases import EVERY, inputs, integers
from safety import model_of
from torch import Tensor, nn

import fxfuse


def scaled_residual(self: Any, x: Tensor) -> Tensor:
    """The blocks of Inception-ResNet: a projection, made small, is added to what it came from."""
    mixed = torch.cat([self.a(x), self.b(x)], 1).relu()
    return (x + self.wide(mixed) * 0.125).relu()


def normalizer_free(self: Any, x: Tensor) -> Tensor:
    """A block of Brock et al. 2021: gain of the activation, expected deviation beta, residual alpha, skip-init gain."""
    y = F.relu(x) * 2.0 * 0.5
    shortcut = self.a(y)
    out = self.c(F.relu(self.b(y)).mul_(2.0))
    return out * self.gain * 0.25 + shortcut


def temperature(self: Any, x: Tensor) -> Tensor:
    """Of attention over kernels (Chen et al. 2020)."""
    return (self.p(self.a(x.mean((2, 3), keepdim=True)).relu()) / 4).flatten(1)


def learned_temperature(self: Any, x: Tensor) -> Tensor:
    return self.p(self.a(x).relu()) / self.gain


def parts() -> dict[str, Any]:
    layers = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "bc"} | {name: nn.Conv2d(4, 4, 1) for name in "ap"}
    return {**layers, "wide": nn.Conv2d(8, 4, 1), "gain": nn.Parameter(torch.tensor(0.5))}


CASES: dict[str, tuple[Any, dict[str, int]]] = {
    "scaled residual": (lambda s, x: s.p(scaled_residual(s, x)) / 2, {"conv": 4, "add": 1, "cat": 1}),
    "normalizer-free": (normalizer_free, {"conv": 3, "add": 1}),
    "learned temperature": (learned_temperature, {"conv": 2}),
    "two residual scales": (lambda s, x: s.b(x.relu()) * s.gain + s.c(x.sigmoid()) / 4, {"conv": 2, "add": 1}),
    "layer scale behind dropout": (lambda s, x: s.gain * F.dropout(s.b(x), 0.1, False), {"conv": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_factors_join_the_layers_beside_them(name: str) -> None:
    forward, executed = CASES[name]
    only = ("conv_bn", "identity")
    tensors = [x.sign() if "two" in name else x for x in inputs(4, 2)]
    model = randomize(model_of(forward, **parts()).double(), integer=True)
    with torch.no_grad():
        model.gain.fill_(0.5)
    of, tolerance = ("conv", "add", "cat", "mul", "mul_", "div"), 1e-14 if "two" in name else 0.0
    exactly(model, *tensors, examples=tensors[0], patterns=only, counts=executed, of=of, tolerance=tolerance)


def test_a_temperature_joins_the_last_layer_of_attention() -> None:
    model = randomize(model_of(temperature, **parts())).double()
    fused = fxfuse.optimize(model)
    x = inputs(4, 2)[0]
    assert torch.allclose(fused(x), model(x), rtol=1e-13) and count(fused, x)["div"] == 0


class Normalized(nn.Module):
    """Input normalisation as torchvision writes it, then a stem."""

    def __init__(self, padding: int, stride: int, shape: tuple[int, ...] = (1, 3, 1, 1)) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([1.0, -2.0, 3.0]).reshape(shape), persistent=False)
        self.register_buffer("std", torch.tensor([0.5, 2.0, 4.0]).reshape(shape), persistent=False)
        self.stem = nn.Conv2d(3, 6, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem((x - self.mean) / self.std).relu()
        return out


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 3])
def test_input_normalisation_joins_a_stem_that_does_not_pad(stride: int, shape: tuple[int, ...]) -> None:
    model = randomize(Normalized(0, stride, shape).double(), integer=True)
    tensors = [integers((2, 3, 9, 11)), integers((1, 3, 12, 9), 1)]
    fused = exactly(model, *tensors, examples=tensors[0], counts={"conv": 1, "sub": 0, "div": 0})
    with pytest.raises(AssertionError, match="for a batch of 3 channels"):
        fused(tensors[0][:, :1])  # eager makes three channels of one


def test_input_normalisation_before_a_padded_stem_takes_a_frame_if_asked_to() -> None:
    model = randomize(Normalized(1, 2).double(), integer=True)
    tensors = [integers((2, 3, 9, 11)), integers((1, 3, 12, 9), 1)]
    framed = {"conv": 2, "add": 1, "sub": 0, "div": 0}
    exactly(model, *tensors, examples=tensors[0], patterns=EVERY, counts=framed)
    # three channels only: the frame is a third of the convolution; and the factor needs no frame
    kept = exactly(model, *tensors, examples=tensors[0], counts={"sub": 1, "div": 0})
    (refusal,) = fxfuse.report(kept).refused
    assert refusal.detail == "189 instead of 162 per output position, 27 of it for the border"


def test_input_normalisation_without_example_inputs_says_what_is_missing() -> None:
    report = fxfuse.report(fxfuse.optimize(randomize(Normalized(0, 1))))
    assert {r.reason for r in report.refused} == {"a constant meets a tensor of unknown dtype, which it may promote"}
    assert all("example_inputs" in r.remedy for r in report.refused)


NORMS: dict[str, Any] = {
    "module": lambda s, x: s.head(s.norm(x)),
    "function": lambda s, x: s.head(F.layer_norm(x, (4,), s.norm.weight, s.norm.bias)),
    "several readers": lambda s, x: s.head(s.norm(x)) + s.other((lambda y: y)(s.norm(x))),
    "permuted": lambda s, x: s.conv(s.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_keeps_its_affine_and_says_so(name: str) -> None:
    layers = {"norm": nn.LayerNorm(4), "head": nn.Linear(4, 3), "other": nn.Linear(4, 3), "conv": nn.Conv2d(4, 3, 1)}
    model = randomize(model_of(NORMS[name], **layers)).double()
    fused = exactly(model, *(torch.randn(2 + i, 4, 5 + i, 4, dtype=torch.float64) for i in range(2)))
    notes = [r for r in fxfuse.report(fused).refused if "layer_norm keeps its weight and bias" in r.reason]
    assert notes and all(n.where == "norm" and n.detail.startswith("read by ") and not n.remedy for n in notes)


def test_layer_norm_that_no_layer_reads_or_without_weights_is_not_mentioned() -> None:
    for forward, norm in (
        (lambda s, x: s.norm(x).relu(), nn.LayerNorm(4)),
        (NORMS["module"], nn.LayerNorm(4, 1e-5, False)),
    ):
        model = model_of(forward, norm=norm, head=nn.Linear(4, 3)).eval()
        assert "layer_norm" not in str([r.reason for r in fxfuse.report(fxfuse.optimize(model)).refused])


def both(y: Tensor, self: Any) -> Tensor:
    return self.b(y).relu() * self.p(y).sigmoid()


SHARED: dict[str, tuple[Any, dict[str, int]]] = {
    "a factor a channel": (lambda s, x: both(x.relu() * s.k, s), {}),
    "a factor and a pool": (lambda s, x: both(F.avg_pool2d(x.relu() * s.k, 3, 1), s), {}),
    "a shift": (lambda s, x: both(s.n(x.relu()), s), {"bn": 1}),
    "a factor and a shift": (lambda s, x: both(x.relu() * s.k + 3, s), {"mul": 1, "add": 1}),
    "a border of another value": (lambda s, x: both(F.pad(x.relu() * s.k, (1, 1, 1, 1), value=3.0), s), {"mul": 1}),
    "a border of zeros by itself": (lambda s, x: both(F.pad(x.relu() * s.k, (1, 2, 0, 1)), s), {"mul": 1}),
    "a mirrored border": (lambda s, x: (lambda y: s.m(y).relu() * s.p(y).relu())(x.relu() * s.k), {}),
    "a mirrored border and a shift": (lambda s, x: (lambda y: s.m(y).relu() * s.p(y).relu())(s.n(x.relu())), {}),
    "another reader": (lambda s, x: (lambda y: both(y, s) * y.sigmoid())(x.relu() * s.k), {"mul": 1}),
}


@pytest.mark.parametrize("name", SHARED)
def test_padded_layers_share_a_factor_but_no_shift(name: str) -> None:
    forward, kept = SHARED[name]
    mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    extra = {"n": nn.BatchNorm2d(4), "m": mirrored, "k": nn.Parameter(torch.ones(1, 4, 1, 1))}
    model = randomize(model_of(forward, **parts(), **extra).double(), integer=True)
    with torch.no_grad():
        model.k.copy_(torch.tensor([0.5, -2.0, 4.0, -1.0]).view(1, 4, 1, 1))
    tensors, products = inputs(4, 2), 1 + (name == "another reader")
    executed = {n: kept.get(n, 0) + products * (n == "mul") for n in ("mul", "add", "bn")}
    exactly(model, *tensors, examples=tensors[0], counts=executed)


JOINED: dict[str, Any] = {
    "summed": lambda s, y: s.b(s.a(y)) + s.p(y),
    "side by side": lambda s, y: torch.cat([s.b(s.a(y)), s.p(y)], 1),
    "summed with it": lambda s, y: s.b(s.a(y)) + s.p(y) + s.c(y.relu()),
    "in two joins": lambda s, y: (s.b(s.a(y)) + s.p(y)) * (s.c(s.a(y)) - s.p(y)),
}


@pytest.mark.parametrize("past", ["itself", "a reshape"])
@pytest.mark.parametrize("name", JOINED)
def test_a_shared_shift_that_one_branch_cannot_take_stays_before_all(name: str, past: str) -> None:
    """A batch norm before a 1x1 that could take it, but had rather be one with the padded layer after it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.n(x.relu())
        out: Tensor = JOINED[name](self, y if past == "itself" else y.reshape(y.size(0), 4, -1, 1))
        return out

    model = randomize(model_of(forward, **parts(), n=nn.BatchNorm2d(4)).double(), integer=True)
    model.a.bias = None
    for examples in (None, inputs(4, 2)[0]):
        exactly(model, *inputs(4, 2), examples=examples)
