"""What tests of laws share: short names of layers, geometries, integer inputs of two sizes, and the check itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from affine_trees import Function
from helpers import assert_untouched, count, fingerprint, randomize
from torch import Tensor, nn

import fxfuse

NAMES = ("avg_pool", "border", "concat", "conv_bn", "conv_chain", "identity", "parallel_conv")
EVERY = tuple(f"{name}!" for name in NAMES)
LAYERS = ("conv", "linear", "bn", "add", "sub", "mul", "div", "cat", "pool", "flip", "index", "neg")
Build = Callable[[], nn.Module]
Forward = Callable[[Any, Tensor], Any]
Case = tuple[Forward, dict[str, nn.Module], str]  # what a forward of these parts executes afterwards
SIZES = {0: ((), ()), 1: ((9,), (6,)), 2: ((9, 7), (6, 11)), 3: ((5, 4, 6), (4, 6, 3))}
C2, BN2, LINEAR = nn.Conv2d, nn.BatchNorm2d, nn.Linear
ONE = {"conv": 1}


def integers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def inputs(channels: int, spatial: int) -> list[Tensor]:
    """Two batches of different size, height and width."""
    return [integers((2 - i, channels, *size), i) for i, size in enumerate(SIZES[spatial])]


def optimized(build: Build, tensors: list[Tensor], patterns: Any) -> tuple[nn.Module, Any]:
    """The model and its rewrite, which is exact on every tensor and leaves the model alone."""
    model = randomize(build().double(), integer=True)
    expected, before = [model(x) for x in tensors], fingerprint(model)
    fused = fxfuse.optimize(model, tensors[0], patterns=patterns)
    for x, y in zip(tensors, expected, strict=True):
        assert torch.equal(fused(x), y)
    assert_untouched(model, before)
    return model, fused


def check(build: Build, tensors: list[Tensor], executed: dict[str, int]) -> None:
    """The rewrite is exact on every tensor, executes what is said and leaves the model alone."""
    _, fused = optimized(build, tensors, EVERY)
    counts = count(fused, tensors[0])
    assert {name: counts[name] for name in LAYERS if counts[name]} == executed, fxfuse.report(fused)


def pad(*amounts: int, mode: str = "constant", value: float | None = None) -> nn.Module:
    return Function(F.pad, amounts, mode, value)


def flip() -> nn.Module:
    return Function(torch.flip, [1])


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "pointwise": {"kernel_size": 1},
    "even": {"kernel_size": 4, "padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "strided, dilated": {"stride": 2, "dilation": 2, "padding": 3},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4},
    "same": {"padding": "same"},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"kernel_size": 2, "dilation": 3, "padding": "same"},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
}


class Numbers(nn.Module):
    """A convolution and arithmetic with a constant of some shape."""

    def __init__(self, shape: tuple[int, ...], formula: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.formula = C2(4, 4, 3, padding=1), formula
        self.register_buffer("c", torch.tensor([2.0, -0.5, 4.0, -1.0])[: max(1, *shape, 1)].reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self.conv(x), self.c)


def exact(model: nn.Module, shape: tuple[int, ...] = (2, 12, 7, 5), **options: Any) -> tuple[nn.Module, Any]:
    """The optimized model, equal to eager on two inputs, with its report; optimizing it again changes nothing."""
    before = fingerprint(model)
    fused = fxfuse.optimize(model, **options)
    for seed, batch in enumerate((shape[0], shape[0] + 1)):
        x = integers((batch, *shape[1:]), seed)
        with torch.no_grad():
            got, want = fused(x.clone()), model(x.clone())
        for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, want)), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    assert_untouched(model, before)
    assert not fxfuse.report(fxfuse.optimize(fused, **options)).fired
    return fused, fxfuse.report(fused)


def merged(report: Any) -> int:
    return int(report.by_pattern.get("siblings", 0))
