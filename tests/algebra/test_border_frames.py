"""Frames: a biased pointwise layer before a padded one is one convolution and one small map, equal to the bit.

The pattern is forced, so that a law is tested whether it pays or not; what pays is at the end.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from affine_trees import CONVS, NORMS, Affine, Builder, Concat, Select, Sum, Target
from exactly import exactly
from fxfuse.patterns.border import framed, needs_frame
from helpers import count, randomize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_profiles import few
from law_cases import BN2, C2, EVERY, GEOMETRIES, ONE, Build, check, flip, inputs, integers, layout, pad, seq
from safety import model_of
from torch import Tensor, nn

import fxfuse
from fxfuse.algebra.operator import Operator, pointwise

FRAMED = {"conv": 2, "add": 1}  # the convolution, that of the frame, and their sum
PADDED = [n for n, fields in GEOMETRIES.items() if fields.get("padding", "valid") != "valid"]
ZEROS = [n for n in PADDED if "padding_mode" not in GEOMETRIES[n]]


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("geometry", ZEROS)
def test_batch_norm_before_a_zero_padded_convolution_joins_it(geometry: str, rank: int) -> None:
    fields = {"kernel_size": 3} | GEOMETRIES[geometry]
    check(lambda: seq(NORMS[rank](4), CONVS[rank](4, 8, **fields)), inputs(4, rank), FRAMED)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("geometry", ZEROS)
@pytest.mark.parametrize("groups", (1, 2))
def test_a_biased_pointwise_convolution_before_a_zero_padded_one_joins_it(
    geometry: str, rank: int, groups: int
) -> None:
    fields = {"kernel_size": 3} | GEOMETRIES[geometry]
    build = lambda: seq(CONVS[rank](6, 4, 1, groups=groups), CONVS[rank](4, 8, **fields), NORMS[rank](8))  # noqa: E731
    check(build, inputs(6, rank), FRAMED)


@pytest.mark.parametrize("geometry", [n for n in PADDED if n not in ZEROS])
def test_other_paddings_need_no_frame(geometry: str) -> None:
    """They repeat what is inside, which the layer before has made already."""
    fields = {"kernel_size": 3} | GEOMETRIES[geometry]
    check(lambda: seq(C2(4, 6, 1), BN2(6), C2(6, 5, **fields)), inputs(4, 2), ONE)


def one(**fields: Any) -> nn.Module:
    """A pointwise layer with a bias."""
    return C2(4, 6, 1, **fields)


LAWS: dict[str, Build] = {
    "shift": lambda: seq(Affine(1, 3, 2), C2(4, 5, 3, padding=1)),
    "shift a channel": lambda: seq(BN2(4), Affine(2, torch.tensor([2.0, -1.0, 4.0, 0.0]), 2), C2(4, 5, 3, padding=1)),
    "several before": lambda: seq(BN2(4), one(), Affine(2, 3, 2), C2(6, 5, 3, padding=1), BN2(5)),
    "uneven sides": lambda: seq(one(), pad(1, 2, 0, 3), C2(6, 5, 3)),
    "one side": lambda: seq(one(), pad(0, 0, 0, 1), C2(6, 5, 2)),
    "uneven sides, strided, dilated": lambda: seq(one(), pad(3, 1, 2, 0), C2(6, 5, 3, 2, dilation=2)),
    "pad of 2": lambda: seq(one(), pad(1, 1, 1, 1, value=2.0), C2(6, 5, 3)),
    "pad of 2 without a bias": lambda: seq(C2(4, 6, 1, bias=False), nn.ConstantPad2d(1, 2.0), C2(6, 5, 3)),
    "pad of 2, uneven": lambda: seq(BN2(4), nn.ConstantPad2d((2, 0, 1, 1), 2.0), C2(4, 5, 3, 2)),
    "one axis": lambda: seq(one(), C2(6, 5, (1, 3), padding=(0, 1))),
    "another axis has taps": lambda: seq(C2(4, 6, (1, 3)), C2(6, 5, (3, 1), padding=(1, 0))),
    "both have taps along one axis": lambda: seq(C2(4, 6, (1, 2), dilation=2), C2(6, 5, (3, 2), padding=(1, 0))),
    "strided before": lambda: seq(one(stride=2), C2(6, 5, 3, padding=1)),
    "strided before, strided": lambda: seq(one(stride=(2, 3)), C2(6, 5, 3, 2, padding=2)),
    "wide padding": lambda: seq(one(), C2(6, 5, 2, padding=4)),
    "padded pointwise": lambda: seq(one(), C2(6, 5, 1, padding=2)),
    "depthwise": lambda: seq(one(), C2(6, 6, 5, padding=2, groups=6)),
    "depth multiplier": lambda: seq(one(), C2(6, 12, 3, padding=1, groups=6)),
    "groups 2 -> groups 3": lambda: seq(one(groups=2), C2(6, 3, 3, padding=1, groups=3)),
    "padded pool": lambda: seq(one(), nn.AvgPool2d(4, 2, 1)),
    "padded pool, then a convolution": lambda: seq(BN2(4), nn.AvgPool2d(2, 1, 1), C2(4, 5, 2)),
    "flip and shuffle": lambda: seq(one(), flip(), nn.ChannelShuffle(3), C2(6, 5, 3, padding=1)),
    "slice before": lambda: seq(one(), Select(1, 4), C2(3, 5, 3, padding=1)),
    "slice after": lambda: seq(one(), C2(6, 5, 3, padding=1), Select(1, 3)),
    "every second channel after": lambda: seq(BN2(4), C2(4, 8, 3, padding=1, groups=2), Select(0, 8, 2)),
    "then pointwise": lambda: seq(one(), C2(6, 5, 3, padding=1), C2(5, 3, 1), BN2(3)),
    "then a kernel": lambda: seq(BN2(4), C2(4, 5, 3, padding=1), C2(5, 3, 2)),
    "then a pool": lambda: seq(one(), C2(6, 4, 3, padding=1), nn.AvgPool2d(2)),
    "then a grouped kernel": lambda: seq(one(), C2(6, 4, 3, 2, padding=1), C2(4, 6, 2, groups=2)),
    "sum": lambda: Sum([seq(one(), C2(6, 5, 3, padding=1)), C2(4, 5, 1)], [2]),
    "sum of two framed": lambda: Sum([seq(BN2(4), C2(4, 5, k, padding=k // 2)) for k in (3, 5)], [-1]),
    "sum, one axis each": lambda: Sum(
        [seq(one(), C2(6, 5, k, padding="same")) for k in ((1, 3), (3, 1), (4, 1), (1, 1))], [1, -1, 2]
    ),
    "sum, dilated and dense": lambda: Sum(
        [seq(one(), C2(6, 5, 3, padding=2, dilation=2)), seq(BN2(4), C2(4, 5, 3, padding=1))], [1]
    ),
    "sum, padded pointwise": lambda: Sum(
        [seq(one(), C2(6, 5, 1, padding=1)), seq(BN2(4), C2(4, 5, 3, padding=2))], [1]
    ),
    "sum, strided": lambda: Sum([seq(BN2(4), C2(4, 5, k, 2, padding=k // 2)) for k in (3, 7)], [3]),
    "sum with the input and a pool": lambda: Sum(
        [nn.Identity(), seq(BN2(4), C2(4, 4, 4, padding="same")), seq(BN2(4), pad(1, 2, 1, 2), nn.AvgPool2d(4, 1))],
        [1, -1],
    ),
    "sum, then batch norm": lambda: seq(Sum([seq(one(), C2(6, 5, 3, padding=1)), C2(4, 5, 1)], [1]), BN2(5)),
    "sum of sums": lambda: Sum(
        [Sum([seq(BN2(4), C2(4, 4, 3, padding=1)), BN2(4)], [2]), seq(one(), C2(6, 4, 5, padding=2))], [-1]
    ),
    "shuffle before a grouped one": lambda: seq(nn.ChannelShuffle(2), C2(4, 6, 1, groups=2), C2(6, 5, 3, padding=1)),
    "shuffle, depthwise, dilated": lambda: seq(
        nn.ChannelShuffle(2), C2(4, 4, 1, 2, groups=4), BN2(4), C2(4, 5, 3, padding=1, dilation=2)
    ),
    "concatenated": lambda: Concat([seq(one(), C2(6, 2, 3, padding=1)), C2(4, 3, 5, padding=2), nn.Identity()]),
    "concatenated pieces": lambda: Concat([seq(BN2(2), C2(2, 3, 3, padding=1)) for _ in range(2)], [2, 2]),
    "concatenated, then pointwise": lambda: seq(
        Concat([seq(BN2(4), C2(4, 2, k, padding=k // 2)) for k in (1, 3)]), C2(4, 5, 1)
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws(name: str) -> None:
    check(LAWS[name], inputs(4, 2), FRAMED, **layout(name))


@pytest.mark.parametrize("size", ((1, 1), (1, 6), (2, 1), (3, 2)), ids=str)
@pytest.mark.parametrize("name", [n for n in LAWS if not re.search("pool|taps|kernel|dilated$|uneven$|one side", n)])
def test_maps_smaller_than_the_kernel(name: str, size: tuple[int, int]) -> None:
    check(LAWS[name], [integers((2, 4, *size)), integers((1, 4, 5, 4))], FRAMED, **layout(name))


def test_a_border_filled_with_another_value_a_channel() -> None:
    """Diverse Branch Block's padding, with a value that is not what the batch norm gives."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.pad(self.n(x), [1, 2, 1, 1])
        value = (self.n.bias * 2 + 1).view(1, -1, 1, 1)
        y[:, :, :1, :] = value
        y[:, :, -1:, :] = value
        y[:, :, :, :1] = value
        y[:, :, :, -2:] = value
        out: Tensor = self.c(y)
        return out

    check(lambda: model_of(forward, n=BN2(4), c=C2(4, 5, 3)), inputs(4, 2), FRAMED)


REFUSED: dict[str, tuple[Build, str]] = {
    "a padded layer before": (lambda: seq(C2(4, 6, 1, padding=1), C2(6, 5, 3, padding=1)), "not the bias of the first"),
    "taps along the padded axis": (lambda: seq(C2(4, 6, 3), C2(6, 5, 3, padding=1)), "more than one tap"),
    "another axis padded before": (
        lambda: seq(C2(4, 6, (1, 3), padding=(0, 1)), C2(6, 5, (3, 1), padding=(1, 0))),
        "not the bias of the first",
    ),
    "a frame, then padding along another axis": (
        lambda: seq(BN2(4), C2(4, 6, (1, 3), padding=(0, 1)), C2(6, 5, (3, 1), padding=(1, 0))),
        "two paddings of different values",
    ),
    "a frame, then the same again": (
        lambda: seq(BN2(4), C2(4, 6, 1, padding=1), C2(6, 5, 3, padding=1)),
        "two paddings of different values",
    ),
    "a frame beside a reflection": (
        lambda: Sum([seq(BN2(4), C2(4, 5, 3, padding=1)), C2(4, 5, 3, padding=1, padding_mode="reflect")], [1]),
        "different modes or values",
    ),
    "a frame beside a padding of 2": (
        lambda: Sum([seq(BN2(4), C2(4, 5, 3, padding=1)), seq(nn.ConstantPad2d(1, 2.0), C2(4, 5, 3))], [1]),
        "different modes or values",
    ),
    "after a transposed convolution": (
        lambda: seq(nn.ConvTranspose2d(4, 6, 1), C2(6, 5, 3, padding=1)),
        "after a transposed convolution",
    ),
    "transposed": (lambda: seq(BN2(4), nn.ConvTranspose2d(4, 5, 3, padding=1)), "before a transposed convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_frame_is_refused(name: str) -> None:
    build, reason = REFUSED[name]
    fused = check(build, inputs(4, 2), None)
    reasons = [r.reason for r in fxfuse.report(fused).refused]
    assert any(reason in r for r in reasons), reasons


def test_an_identity_before_a_padding_needs_no_frame() -> None:
    check(lambda: seq(nn.Dropout(), nn.ConstantPad2d(1, 2.0), C2(4, 5, 3)), inputs(4, 2), ONE)


def test_before_a_deformable_convolution_there_is_no_frame() -> None:
    """Its taps read between positions, in bounds and out."""
    norm = pointwise("scale", "batch_norm", 2, 4, bias=True)
    warp = Operator("warp", "conv", 2, 4, 5, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert not needs_frame(norm, warp)
    assert isinstance(framed(norm, warp), fxfuse.Refusal)


def test_a_value_that_is_read_elsewhere_stays() -> None:
    forward = lambda s, x: s.c(s.n(x)).sum() + s.n(x).sum()  # noqa: E731
    model = randomize(model_of(forward, n=one(), c=C2(6, 5, 3, padding=1)).double(), integer=True)
    read_twice = lambda s, x: (lambda y: s.c(y).sum() + y.sum())(s.n(x))  # noqa: E731
    other = randomize(model_of(read_twice, n=one(), c=C2(6, 5, 3, padding=1)).double(), integer=True)
    for x in inputs(4, 2):
        exactly(model, *inputs(4, 2), examples=x, patterns=EVERY)
        exactly(other, *inputs(4, 2), examples=x, patterns=EVERY, fires=False)


def plus_one(x: Tensor) -> Tensor:
    x = x * 1
    x += 1
    return x


SHARED: dict[str, Any] = {
    "padded and not": lambda s, x: (lambda y: s.c(y) + s.e(y))(s.n(plus_one(x.abs()))),
    "padded in two ways": lambda s, x: (lambda y: s.c(y) + s.d(y))(F.avg_pool2d(s.n(x.relu()), 2)),
    "a padded pointwise layer before": lambda s, x: (lambda y: s.c(s.f(y)) + s.c(y))(s.g(x)),
    "a padding before": lambda s, x: (lambda y: s.c(s.f(y)) + s.c(y))(F.pad(x, (1, 0))),
}


@pytest.mark.parametrize("patterns", [None, EVERY], ids=["", "forced"])
@pytest.mark.parametrize("name", SHARED)
def test_a_value_that_layers_with_and_without_a_frame_read(name: str, patterns: Any) -> None:
    layers = {"n": BN2(4), "c": C2(4, 4, 3, padding=1), "d": C2(4, 4, 3, padding=1, padding_mode="circular")}
    layers |= {"e": C2(4, 4, 1), "f": C2(4, 4, 1), "g": C2(4, 4, 1, padding=1, bias=False)}
    model = randomize(model_of(SHARED[name], **layers).double(), integer=True)
    for examples in (None, inputs(4, 2)[0]):
        exactly(model, *inputs(4, 2), examples=examples, patterns=patterns, tolerance=1e-12)


@st.composite
def framed_models(draw: Any) -> tuple[nn.Module, tuple[int, int]]:
    """Branches of pointwise layers, a padded convolution or pool, and what can follow; summed or concatenated."""
    spatial = draw(st.sampled_from((2, 2, 1, 3)))
    builder = Builder(draw, spatial, nonlinear=False, slices=True)
    target = Target(4, builder.pick(4, 6), builder.pick(1, 1, 2, 3), builder.pick(0, 0, 1, -1))

    def branch() -> nn.Module:
        width = builder.pick(4, 2, 6)
        first = CONVS[spatial](4, width, 1, groups=builder.pick(1, 2), bias=builder.pick(True, True, False))
        before = builder.pick(
            seq(builder._norm(Target(4, 4)), builder._filled(first)),
            seq(builder._filled(first), builder._scale(Target(width, width))),
        )
        after = builder.pick(nn.Identity(), builder._norm(Target(target.out, target.out)))
        return seq(before, builder._conv(Target(width, target.out, target.stride, target.grow)), after)

    branches = [branch() for _ in range(builder.pick(1, 2, 3))]
    join = builder.pick(Sum(list(branches), [builder.pick(1, -1, 2) for _ in branches[1:]]), Concat(branches))
    return seq(join).double().eval(), (4, spatial)


@few(80)
@given(framed_models())
def test_random_branches_with_frames_are_exact(case: tuple[nn.Module, tuple[int, int]]) -> None:
    model, (channels, spatial) = case
    tensors = [integers((b, channels, *size[:spatial]), b) for b, size in ((2, (7, 9, 6)), (1, (8, 5, 7)))]
    try:
        expected = [model(x) for x in tensors]
    except RuntimeError:  # a map smaller than a kernel or a reflection
        return
    for patterns in (EVERY, None):
        fused = fxfuse.optimize(model, tensors[0], patterns=patterns)
        assert all(torch.equal(fused(x), y) for x, y in zip(tensors, expected, strict=True))
        again = fxfuse.optimize(fused, tensors[0], patterns=patterns)
        assert all(torch.equal(again(x), y) for x, y in zip(tensors, expected, strict=True))


def pair(width: int) -> nn.Module:
    return randomize(seq(C2(4, width, 1), C2(width, 4, 3, padding=1)))


def test_a_frame_is_counted_once_for_the_batch() -> None:
    """Apart 16 + 144 multiply-accumulates a position; merged 144, and 36 for the frame of all samples."""
    notes = fxfuse.report(fxfuse.optimize(pair(4), torch.randn(1, 4, 9, 8)))
    assert not notes.fired and notes.refused[0].reason == "exact, but merged it would cost more"
    assert notes.refused[0].detail == "180 instead of 160 per output position, 36 of it for the border"
    assert notes.refused[0].remedy == 'patterns=["border!"] merges it all the same'
    fired = fxfuse.report(fxfuse.optimize(pair(4), torch.randn(8, 4, 9, 8))).fired[0]
    assert fired.patterns == ("border",) and fired.after == "conv2d 4->4 k3x3 p1 + border"
    assert (fired.macs_before, fired.macs_after) == (160 * 8 * 72, 144 * 8 * 72 + 36 * 72)
    assert not fxfuse.report(fxfuse.optimize(pair(4))).fired  # nobody said how many samples


def test_what_a_frame_costs_decides() -> None:
    assert fxfuse.report(fxfuse.optimize(pair(8))).by_pattern == {"border": 1}
    assert not fxfuse.report(fxfuse.optimize(pair(8), patterns=["-border"])).fired
    assert not fxfuse.report(fxfuse.optimize(pair(8), cost="nodes")).fired  # a convolution for a convolution
    assert fxfuse.report(fxfuse.optimize(pair(8), cost="params")).by_pattern == {"border": 1}
    assert fxfuse.report(fxfuse.plan(pair(8)) and fxfuse.optimize(pair(8))).fired == fxfuse.plan(pair(8)).fired


@pytest.mark.parametrize("groups", (1, 8))
def test_a_batch_norm_alone_is_not_worth_a_frame(groups: int) -> None:
    """Its multiply-adds are not counted, and it takes as long as the frame: measured 0.8 to 1.2 of the time."""
    model = randomize(seq(BN2(8), C2(8, 8, 3, padding=1, groups=groups)))
    report = fxfuse.report(fxfuse.optimize(model, torch.randn(2, 8, 9, 8)))
    assert not report.fired
    per = 9 * 64 // groups
    refusal = next(r for r in report.refused if r.reason == "exact, but merged it would cost more")
    assert refusal.detail == f"{per + 36} instead of {per} per output position, 36 of it for the border"
    lonely = next(r for r in report.refused if r.reason.startswith("batch_norm follows no"))
    assert "(exact with a frame, but it would cost more)" in lonely.detail
    forced = fxfuse.optimize(model, torch.randn(2, 8, 9, 8), patterns=["border!"])
    assert count(forced, torch.randn(2, 8, 9, 8))["bn"] == 0
