"""Half precision: folds are computed in float64 and rounded once, and refused where the dtype cannot hold them.

The truth is the same model, with the same weights and inputs, run in float64. Eager's own error against it is
what rounding costs anyway; the fused model may not be worse.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize, relative_error
from safety import agrees, model_of
from torch import Tensor, nn

import fxfuse

DTYPES = [torch.float16, torch.bfloat16]
SEEDS = 8
WIDE = 16


def conv(into: int, out: int, kernel: int, **options: Any) -> nn.Module:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def norm() -> nn.Module:
    return nn.BatchNorm2d(WIDE)


def branches() -> nn.Module:
    parts = {"a": conv(WIDE, WIDE, 3), "p": conv(WIDE, WIDE, 1), "b": norm(), "n": norm(), "i": norm()}
    return model_of(lambda s, x: s.b(s.a(x)) + s.n(s.p(x)) + s.i(x), **parts)


def scaled() -> nn.Module:
    factor, shift = torch.rand(WIDE, 1, 1) + 0.5, torch.randn(WIDE, 1, 1)
    return model_of(
        lambda s, x: (s.a(x) * s.factor + s.shift) * 0.37, a=conv(WIDE, WIDE, 3), factor=factor, shift=shift
    )


def siblings() -> nn.Module:
    parts = {"a": conv(WIDE, WIDE, 3), "p": conv(WIDE, WIDE, 3), "b": norm(), "n": norm()}
    return model_of(lambda s, x: torch.cat([s.b(s.a(x)), s.n(s.p(x))], 1), **parts)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "conv, norm": lambda: nn.Sequential(conv(WIDE, WIDE, 3), norm()),
    "depthwise, norm": lambda: nn.Sequential(conv(WIDE, WIDE, 3, groups=WIDE), norm()),
    "transposed, norm": lambda: nn.Sequential(nn.ConvTranspose2d(WIDE, WIDE, 3), norm()),
    "norm, conv": lambda: nn.Sequential(norm(), nn.Conv2d(WIDE, WIDE, 3)),
    "chain": lambda: nn.Sequential(conv(WIDE, WIDE, 1), norm(), nn.Conv2d(WIDE, 4, 3)),
    "chain of linears": lambda: nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 4)),
    "conv, pool": lambda: nn.Sequential(conv(WIDE, WIDE, 1), nn.AvgPool2d(2)),
    "branches": branches,
    "scaled": scaled,
    "siblings": siblings,
}


def half(block: str, dtype: torch.dtype, seed: int) -> Any:
    torch.manual_seed(seed)
    return randomize(BLOCKS[block](), seed).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_error_is_no_larger_than_eagers_own(block: str, dtype: torch.dtype) -> None:
    errors = []
    for seed in range(SEEDS):
        model = half(block, dtype, seed)
        x = torch.randn(4, WIDE, 9, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)
        fused = fxfuse.optimize(model)
        assert fxfuse.report(fused).fired, fxfuse.report(fused)
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(x.double())
            got = fused(x)
            assert got.dtype == dtype
            errors.append((relative_error(got, truth), relative_error(model(x), truth)))
    ours, eager = (statistics.fmean(e) for e in zip(*errors, strict=True))
    assert ours <= 1.25 * eager, f"{ours:.2e} against {eager:.2e}"
    assert max(o / e for o, e in errors) <= 1.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_weights_are_computed_in_double_precision_and_rounded_once(block: str, dtype: torch.dtype) -> None:
    model = half(block, dtype, 0)
    rounded, wide = fxfuse.optimize(model), fxfuse.optimize(copy.deepcopy(model).double())
    for name, tensor in wide.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], tensor.to(dtype)), name


def pair(first: nn.Module, second: nn.Module, dtype: torch.dtype = torch.float16, **fields: Any) -> Any:
    """Two layers whose parameters are set to numbers: `first_weight=`, `second_running_var=`, ..."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(first, second)
    state = model.state_dict()
    with torch.no_grad():
        for name, value in fields.items():
            layer, _, attribute = name.partition("_")
            state[f"{('first', 'second').index(layer)}.{attribute}"].copy_(torch.as_tensor(value))
    return model.to(dtype).eval()


def rows(*scales: float) -> Tensor:
    """A 3x3 weight from four channels to four, the rows of such sizes."""
    signs = torch.randint(0, 2, (4, 4, 3, 3), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * torch.tensor(scales).view(-1, 1, 1, 1)


def kernel() -> nn.Module:
    return nn.Conv2d(4, 4, 3)


NONE = torch.zeros(4)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "overflow": (
        lambda: pair(kernel(), nn.BatchNorm2d(4), first_weight=rows(1, 2, 3, 4), second_weight=torch.full((4,), 2e4)),
        "not finite in torch.float16", r"the largest is 8e\+04, the limit 6.55e\+04",
    ),
    "overflow of the bias": (
        lambda: pair(
            kernel(), nn.BatchNorm2d(4), second_running_mean=torch.full((4,), 3e4), second_weight=torch.full((4,), 3.0)
        ),
        "not finite in torch.float16", r"the largest is 9e\+04, the limit 6.55e\+04",
    ),
    "not finite before": (
        lambda: pair(kernel(), nn.BatchNorm2d(4), first_weight=rows(1, 2, float("inf"), 4)),
        "not finite in torch.float16", "the model has such already",
    ),
    "an output channel lost": (
        lambda: pair(
            kernel(), nn.BatchNorm2d(4), first_weight=rows(1, 1, 1e-4, 1), first_bias=NONE,
            second_weight=torch.tensor([1, 1, 1e-4, 1]),
        ),
        "too small for torch.float16", r"1 of 4 output channels; the weights of channel 2 reach 1e-08, .* 6.1e-05",
    ),
    "an output channel subnormal": (
        lambda: pair(
            kernel(), nn.BatchNorm2d(4), first_weight=rows(1, 1, 1e-2, 1e-2), first_bias=NONE,
            second_weight=torch.tensor([1, 1, 1e-3, 2e-3]),
        ),
        "too small for torch.float16", r"2 of 4 output channels; the weights of channel 2 reach 1e-05, .* 6.1e-05",
    ),
    "an input channel lost": (
        lambda: pair(
            nn.BatchNorm2d(4), kernel(), first_weight=torch.tensor([1, 1e-4, 1, 1]), first_bias=NONE,
            second_weight=rows(*[1e-3] * 4),
        ),
        "too small for torch.float16", "1 of 4 input channels; the weights of channel 1 reach 1e-07",
    ),
    "an input channel of a group lost": (
        lambda: pair(
            nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), first_weight=torch.tensor([1, 1, 1e-4, 1]),
            first_bias=NONE, second_weight=rows(*[1e-3] * 4)[:, :2],
        ),
        "too small for torch.float16", "1 of 4 input channels; the weights of channel 2 reach 1e-07",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_half_precision_cannot_hold_is_refused_with_its_numbers(case: str) -> None:
    build, reason, detail = REFUSED[case]
    fused = agrees(build(), draw=lambda s, g: torch.randn(s, generator=g).half(), fires=False, refused=reason)
    (refusal,) = [r for r in fxfuse.report(fused).refused if reason in r.reason]
    assert re.search(detail, refusal.detail), refusal
    assert bool(refusal.remedy) == (case != "not finite before")
    wide = fxfuse.report(fxfuse.optimize(build().float())).fired
    assert bool(wide) == (case != "not finite before")


def test_a_channel_that_is_zero_anyway_is_no_loss() -> None:
    gamma = torch.tensor([1.0, 0.0, -2.0, 1.0])
    for model in (
        pair(kernel(), nn.BatchNorm2d(4), second_weight=gamma),
        pair(nn.BatchNorm2d(4), kernel(), first_weight=gamma),
    ):
        agrees(model, draw=lambda s, g: torch.randn(s, generator=g).half(), tolerance=5e-3, fires=True)


def test_bfloat16_holds_what_float16_does_not() -> None:
    for name, (build, _, _) in REFUSED.items():
        if name != "not finite before":
            assert fxfuse.report(fxfuse.optimize(build().bfloat16())).fired, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes_are_kept_apart(dtype: torch.dtype) -> None:
    """A half-precision layer whose result is widened again is not what a wide layer would give."""
    parts = {"a": kernel().to(dtype), "b": nn.BatchNorm2d(4), "p": nn.Conv2d(4, 4, 1)}
    model = randomize(model_of(lambda s, x: s.p(s.b(s.a(x.to(dtype)).float())), **parts))
    fused = agrees(model, draw=lambda s, g: torch.randn(s, generator=g), tolerance=1e-5)
    assert [f.path for f in fxfuse.report(fused).fired] == ["p"]
    assert fused.a.weight.dtype == dtype and fused.p.weight.dtype == torch.float32
