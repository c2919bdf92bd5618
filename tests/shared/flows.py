"""Models called in many ways: what goes in and comes out, call after call, compared with eager."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from helpers import assert_untouched, fingerprint, randomize, relative_error
from safety import model_of
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.copying import copied

Call = tuple[tuple[Any, ...], dict[str, Any]]


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


def called(*builders: Callable[..., Call], count: int = 1) -> list[Call]:
    """Calls made of fresh inputs, the builders in turn."""
    inputs = tensors(count)
    rounds = max(len(inputs), len(builders))
    return [builders[i % len(builders)](*inputs[i % len(inputs)]) for i in range(rounds)]


def same_calls(model: nn.Module, calls: Sequence[Call], fires: bool | None = None, tolerance: float = 1e-12) -> Any:
    """The optimized model does what eager does in every call, and the model stays as it was."""
    if model.training:
        model.eval()
    before = fingerprint(model)
    fused = fxfuse.optimize(model)
    if fires is not None:
        assert bool(fxfuse.report(fused).fired) == fires, fxfuse.report(fused)
    truth = copied(model)
    for args, kwargs in calls:
        want, theirs = _run(truth, args, kwargs)
        got, ours = _run(fused, args, kwargs)
        same(got, want, tolerance)
        same(ours, theirs, tolerance)  # what was written to the inputs
    assert_untouched(model, before)
    return fused


def _run(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    given = copy.deepcopy((args, kwargs))
    torch.manual_seed(0)
    with torch.no_grad():
        return model(*given[0], **given[1]), given


def same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    """The same containers of the same classes, with tensors that agree."""
    assert type(got) is type(want), f"{type(got)} instead of {type(want)}"
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype and relative_error(got, want) <= tolerance
    elif isinstance(want, Mapping):
        assert list(got) == list(want)
        same([*got.values()], [*want.values()], tolerance)
    elif dataclasses.is_dataclass(want):
        same(vars(got), vars(want), tolerance)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b, tolerance)
    else:
        assert got == want
