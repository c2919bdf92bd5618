"""Models called in many ways: what goes in and comes out, call after call, compared with eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from exactly import Call, Step, alike, holds, reported
from helpers import randomize
from safety import model_of
from torch import Tensor, nn

import fxfuse


def pairs(forward: Callable[..., Any], **parts: Any) -> Any:
    """A module with this forward and three children of a convolution and a batch norm: `one`, `two`, `side`."""
    for name in ("one", "two", "side"):
        parts[name] = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    return randomize(model_of(forward, **parts)).double()


def tensors(count: int = 1, seed: int = 0) -> list[list[Tensor]]:
    """Inputs of several batch sizes and extents; `count` of them for each call."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, 5, 6), (1, 4, 7, 4), (3, 4, 6, 6), (2, 4, 5, 6))
    return [[torch.randn(s, generator=random, dtype=torch.float64) for _ in range(count)] for s in shapes]


def called(*builders: Callable[..., tuple[Any, Any]], count: int = 1) -> list[Call]:
    """Calls made of fresh inputs, the builders in turn."""
    inputs = tensors(count)
    rounds = max(len(inputs), len(builders))
    return [Call(*builders[i % len(builders)](*inputs[i % len(inputs)])) for i in range(rounds)]


def same_calls(
    model: nn.Module,
    calls: Sequence[Call],
    fires: bool | None = None,
    tolerance: float = 1e-12,
    without: Mapping[str, str] | None = None,
) -> Any:
    """`exactly` for calls of every kind, without gradients."""
    if model.training:
        model.eval()
    fused = holds(model, [Step(Call(*call)) for call in calls], tolerance=tolerance, without=without)
    reported(fxfuse.report(fused), fires)
    return fused


def same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    """The same containers of the same classes, with tensors that agree."""
    alike(got, want, tolerance)
