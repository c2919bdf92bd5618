"""What tests of laws share: short names of layers, geometries, integer inputs of two sizes, and the check itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from affine_trees import Function
from exactly import exactly
from helpers import randomize
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
SLICED = {"views": "eager returns a part of the channels, which becomes a layer of its own"}


def integers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def inputs(channels: int, spatial: int) -> list[Tensor]:
    """Two batches of different size, height and width."""
    return [integers((2 - i, channels, *size), i) for i, size in enumerate(SIZES[spatial])]


def check(
    build: Build, tensors: list[Tensor], executed: dict[str, int] | None, patterns: Any = EVERY, **options: Any
) -> Any:
    """The rewrite is exact on every tensor and executes what is said, and nothing else of `LAYERS`."""
    model = randomize(build().double(), integer=True)
    options = {"examples": tensors[0], "patterns": patterns, "counts": executed, "of": LAYERS} | options
    return exactly(model, *tensors, **options)


def layout(name: str) -> dict[str, Any]:
    """What a case cannot hold."""
    return {"without": SLICED} if re.search(r"slice( of one group| after)?$|every second channel after$", name) else {}


def counted(words: str) -> dict[str, int]:
    """`conv 2 add 1` as numbers of operators."""
    names = words.split()
    return dict(zip(names[::2], map(int, names[1::2]), strict=True))


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


def exact(
    model: nn.Module, shape: tuple[int, ...] = (2, 12, 7, 5), example_inputs: Any = None, **options: Any
) -> tuple[Any, Any]:
    """The optimized model, checked on two batches, with its report; captured again the same way it does not change."""
    x, y = (integers((batch, *shape[1:]), seed) for seed, batch in enumerate((shape[0], shape[0] + 1)))
    fused = exactly(model, x, y, examples=example_inputs, **options)
    if "capture" in options:
        assert not fxfuse.report(fxfuse.optimize(fused, example_inputs, **options)).fired
    return fused, fxfuse.report(fused)


def merged(report: Any) -> int:
    return int(report.by_pattern.get("siblings", 0))
