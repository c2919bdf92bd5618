"""A counterexample for each condition of each law: it is left alone, and the report says why.

The patterns are forced, so that no case is refused merely because it would not pay.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from affine_trees import Affine, Concat, Sum
from exactly import exactly
from helpers import count, randomize
from law_cases import BN2, C2, EVERY, LAYERS, Numbers, check, flip, inputs, integers, pad, seq
from torch import Tensor, nn

import fxfuse

Build = Callable[[], nn.Module]
BORDER = "pads what a kernel of more than one tap made"
RING = "pads with a value that is not the bias of the first"
BARE = (*EVERY[:1], *EVERY[2:], "-border")  # without frames
SIZES = "different output sizes"
MODES = "different modes or values"


def refused(build: Build, reason: str, tensors: list[Tensor], patterns: tuple[str, ...] = EVERY) -> None:
    """Nothing is executed otherwise than before, outputs are equal, and `reason` is in the report."""
    ran = count(randomize(build().double()), tensors[0])
    fused = check(build, tensors, {name: ran[name] for name in LAYERS}, patterns)
    reasons = [r.reason for r in fxfuse.report(fused).refused]
    assert any(re.search(reason, r) for r in reasons), reasons


BORDERS: dict[str, tuple[Build, str]] = {
    "biased 1x1 before a padded 3x3": (lambda: seq(C2(4, 6, 1), C2(6, 5, 3, padding=1)), RING),
    "biased 1x1 before one padded side": (lambda: seq(C2(4, 6, 1), pad(0, 0, 0, 1), C2(6, 5, 2)), RING),
    "biased 1x1 before padding with another value": (
        lambda: seq(C2(4, 6, 1), pad(1, 1, 1, 1, value=2.0), C2(6, 5, 3)),
        RING,
    ),
    "unbiased 1x1 before padding with a value": (
        lambda: seq(C2(4, 6, 1, bias=False), nn.ConstantPad2d(1, 2.0), C2(6, 5, 3)),
        RING,
    ),
    "biased 1x1 before a padded pool": (lambda: seq(C2(4, 6, 1), nn.AvgPool2d(4, 2, 1)), RING),
    "3x3 before a padded 3x3": (lambda: seq(C2(4, 6, 3, bias=False), C2(6, 5, 3, padding=1)), BORDER),
    "3x1 before one padded along it": (
        lambda: seq(C2(4, 6, (3, 1), bias=False), C2(6, 5, (3, 3), padding=(1, 0))),
        BORDER,
    ),
    "same before same": (lambda: seq(C2(4, 6, 2, padding="same"), C2(6, 5, 2, padding="same")), BORDER),
    "pool before a padded 3x3": (lambda: seq(nn.AvgPool2d(2, 1), C2(4, 5, 3, padding=1)), BORDER),
    "dilated before padded": (lambda: seq(C2(4, 6, 2, dilation=3), C2(6, 5, 3, padding=1)), BORDER),
    "batch norm before a padded 3x3": (lambda: seq(BN2(4), C2(4, 5, 3, padding=1)), RING),
    "batch norm before 'same'": (lambda: seq(BN2(4), C2(4, 5, 3, padding="same")), RING),
    "shift before a padded 3x3": (lambda: seq(Affine(2, 3, 2), C2(4, 5, 3, padding=1)), RING),
    "two paddings of different values": (
        lambda: seq(nn.ConstantPad2d(1, 2.0), C2(4, 5, 3, padding=1)),
        "two paddings of different values",
    ),
    "a reflection inside of zeros": (
        lambda: seq(nn.ReflectionPad2d(1), C2(4, 5, 3, padding=1)),
        "two paddings of different values",
    ),
    "zeros inside of a reflection": (
        lambda: seq(nn.ZeroPad2d(1), C2(4, 5, 3, padding=1, padding_mode="reflect")),
        "reflect padding after a stride or another padding",
    ),
    "circular padding of no width": (
        lambda: seq(C2(4, 6, 1), C2(6, 5, 1, padding_mode="circular")),
        "copies its input",
    ),
    "a stride before circular padding": (
        lambda: seq(C2(4, 6, 1, 2), C2(6, 5, 3, padding=1, padding_mode="circular")),
        "circular padding after a stride or another padding",
    ),
    "3x3 after a transposed convolution": (
        lambda: seq(nn.ConvTranspose2d(4, 6, 2, 2), C2(6, 5, 3)),
        "after a transposed convolution only a pointwise",
    ),
    "biased 1x1 before a transposed convolution": (
        lambda: seq(C2(4, 6, 1), nn.ConvTranspose2d(6, 5, 2, 2)),
        "before a transposed convolution only a pointwise",
    ),
    "batch norm before a transposed convolution": (
        lambda: seq(BN2(4), nn.ConvTranspose2d(4, 5, 3, padding=1)),
        "before a transposed convolution only a pointwise",
    ),
}


@pytest.mark.parametrize("name", BORDERS)
def test_the_border_forbids_a_chain(name: str) -> None:
    build, reason = BORDERS[name]
    refused(build, reason, inputs(4, 2), BARE if reason == RING else EVERY)


def crop(low: int, high: int) -> nn.Module:
    return pad(low, high, low, high)


JOINS: dict[str, tuple[Build, str]] = {
    "different sizes that broadcast": (lambda: Sum([C2(4, 5, (6, 1)), C2(4, 5, (9, 1))], [1]), SIZES),
    "different strides": (lambda: Sum([C2(4, 5, 1, 2), C2(4, 5, (9, 7), 1)], [1]), "different strides"),
    "different strides, one size": (
        lambda: Sum([C2(4, 5, (9, 7), 2), C2(4, 5, (9, 7), 3)], [1]),
        "different strides",
    ),
    "different modes": (
        lambda: Sum([C2(4, 5, 3, padding=1), C2(4, 5, 3, padding=1, padding_mode="reflect")], [1]),
        MODES,
    ),
    "different pad values": (
        lambda: Sum([seq(crop(1, 1), C2(4, 5, 3)), seq(nn.ConstantPad2d(1, 2.0), C2(4, 5, 3))], [1]),
        MODES,
    ),
    "reflections of different sides": (
        lambda: Sum([C2(4, 5, k, padding="same", padding_mode="reflect") for k in ((1, 3), (3, 1))], [1]),
        "needs more reflect padding",
    ),
    "one channel that broadcasts": (
        lambda: Sum([C2(4, 5, 3, padding=1), C2(4, 1, 1)], [1]),
        "different channel counts",
    ),
    "transposed beside ordinary": (
        lambda: Sum([nn.ConvTranspose2d(4, 5, 3, padding=1), C2(4, 5, 3, padding=1)], [1]),
        "transposed convolution beside an ordinary",
    ),
    "transposed of two geometries": (
        lambda: Sum([nn.ConvTranspose2d(4, 5, 3, padding=1), nn.ConvTranspose2d(4, 5, 5, padding=2)], [1]),
        "transposed convolutions of different geometry",
    ),
    "concatenated modes": (
        lambda: Concat([C2(4, 5, 3, padding=1), C2(4, 5, 3, padding=1, padding_mode="circular")]),
        MODES,
    ),
    "concatenated transposed": (
        lambda: Concat([nn.ConvTranspose2d(4, 5, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)]),
        "transposed convolutions are not concatenated",
    ),
}


@pytest.mark.parametrize("name", JOINS)
def test_branches_that_do_not_add_up(name: str) -> None:
    build, reason = JOINS[name]
    first = integers((2, 4, 9, 7))
    fixed = "size" in name or "strides" in name
    refused(build, reason, [first, integers((3, 4, 9, 7), 1) if fixed else inputs(4, 2)[1]])


@pytest.mark.parametrize(
    ("pool", "reason"),
    (
        (lambda: nn.AvgPool2d(4, 2, 1, count_include_pad=False), "count_include_pad=False"),
        (lambda: nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
        (lambda: nn.AvgPool2d(2, divisor_override=8), "divisor_override"),
    ),
    ids=("count_include_pad", "ceil_mode", "divisor_override"),
)
def test_pools_that_are_no_convolution(pool: Build, reason: str) -> None:
    refused(lambda: seq(C2(4, 6, 1, bias=False), pool()), reason, [integers((2, 4, 9, 7)), integers((1, 4, 6, 11))])
    refused(lambda: seq(pool(), C2(4, 6, 1)), reason, [integers((2, 4, 9, 7)), integers((1, 4, 6, 11))])


@pytest.mark.parametrize("shape", ((4,), (1, 4), (1, 1, 4), (1, 1, 1, 4)), ids=str)
@pytest.mark.parametrize("formula", (lambda y, c: y * c, lambda y, c: y + c), ids=("y*c", "y+c"))
def test_a_constant_along_the_width_is_not_for_the_channels(formula: Any, shape: tuple[int, ...]) -> None:
    """Also where the width, the height and the number of channels are the same number."""
    tensors = [integers((2, 4, 4, 4)), integers((1, 4, 7, 4))]
    refused(lambda: Numbers(shape, formula), "act on different axes", tensors)


class Wide(nn.Module):
    """A convolution times a constant along two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = C2(4, 4, 3, padding=1)
        self.register_buffer("c", integers((4, 1, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.c


def test_a_constant_along_two_axes_is_no_factor() -> None:
    refused(Wide, "varies along more than the channel axis", [integers((2, 4, 4, 4)), integers((1, 4, 7, 4))])


class Twice(nn.Module):
    """The convolution's own output is read beside the normalized one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = C2(4, 4, 3, padding=1), BN2(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y).relu() + y.relu()


class Flat(nn.Module):
    """Concatenated along the height instead of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = C2(4, 4, 3, padding=1), C2(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], 2)


OTHERS: dict[str, tuple[Build, str]] = {
    "the layer's output is read elsewhere": (Twice, "read elsewhere"),
    "another axis": (Flat, "not the channel axis"),
    "batch statistics": (lambda: seq(C2(4, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)), "statistics"),
    "groups in another order": (
        lambda: seq(C2(4, 6, 3, groups=2), flip()),
        "gather channels before a grouped",
    ),
    "channels gathered before groups": (
        lambda: seq(nn.ChannelShuffle(2), C2(4, 4, 3, groups=4)),
        "gather channels before a grouped",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_conditions(name: str) -> None:
    build, reason = OTHERS[name]
    tensors = [(x > 0).double() * 4 for x in inputs(4, 2)] if "statistics" in reason else inputs(4, 2)
    refused(build, reason, tensors)


def test_layers_of_two_dtypes_stay_apart() -> None:
    fused = fxfuse.optimize(seq(C2(4, 6, 1), BN2(6).double()).eval(), patterns=EVERY)
    assert not fxfuse.report(fused).fired
    assert any("different dtypes" in r.reason for r in fxfuse.report(fused).refused)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "root": lambda v: torch.sqrt(v * v),
    "twice": lambda v: v * 2,
    "flipped": lambda v: v.flip([0]),
}


class BorderFill(nn.Module):
    """Diverse Branch Block's padding: what comes before gives `value` on zeros, so the border gets it."""

    def __init__(self, kind: str = "exact", before: str = "norm") -> None:
        super().__init__()
        self.before = BN2(4) if before == "norm" else C2(4, 4, 1)
        self.kind, self.conv = kind, C2(4, 5, 3)

    def value(self) -> Tensor:
        b = self.before
        if isinstance(b, C2):
            v = b.bias
        else:
            v = b.bias - b.running_mean * b.weight / torch.sqrt(b.running_var + b.eps)
        return CHANGES.get(self.kind, lambda v: v)(v).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value()
        y = F.pad(self.before(x), [1, 1, 1, 1])
        y[:, :, 0:1, :] = value
        if self.kind == "read before":
            extra = y.sum()
        y[:, :, -1:, :] = value + 1 if self.kind == "one side differs" else value
        y[:, :, :, 0:1] = value
        if self.kind != "one side missing":
            y[:, :, :, (-2 if self.kind == "two columns" else -1) :] = value
        out = self.conv(y)
        if self.kind == "read before":
            return out + extra
        return out + y.sum() if self.kind == "read elsewhere" else out


@pytest.mark.parametrize("before", ("norm", "conv"))
def test_a_border_filled_with_the_bias_is_a_padding(before: str) -> None:
    check(lambda: BorderFill(before=before), inputs(4, 2), {"conv": 1})


NEAR = (*CHANGES, "read before", "one side differs", "one side missing", "two columns")


@pytest.mark.parametrize("before", ("norm", "conv"))
@pytest.mark.parametrize("kind", NEAR)
def test_what_is_nearly_a_filled_border_is_left_alone(kind: str, before: str) -> None:
    model = randomize(BorderFill(kind, before).double(), integer=True)
    for patterns in (BARE, EVERY):  # with a frame some are exact
        fires = None if patterns == EVERY else False
        exactly(model, *inputs(4, 2), examples=inputs(4, 2)[0], patterns=patterns, fires=fires)


@pytest.mark.parametrize("before", ("norm", "conv"))
def test_a_filled_border_that_is_read_elsewhere_stays_apart_from_that_convolution(before: str) -> None:
    model = randomize(BorderFill("read elsewhere", before).double(), integer=True)
    convs = {"conv": 1 if before == "norm" else 2}
    exactly(model, *inputs(4, 2), examples=inputs(4, 2)[0], patterns=EVERY, counts=convs)


DEAR: dict[str, tuple[Build, str]] = {
    "depthwise -> pointwise": (lambda: seq(C2(8, 8, 3, groups=8), C2(8, 8, 1)), "conv_chain"),
    "3x3 -> 3x3": (lambda: seq(C2(8, 8, 3), C2(8, 8, 3)), "conv_chain"),
    "depthwise + 1x1": (lambda: Sum([C2(8, 8, 3, padding=1, groups=8), C2(8, 8, 1)], [1]), "parallel_conv"),
    "distant dilations": (lambda: Sum([C2(8, 8, 3, 1, d, d) for d in (1, 5)], [1]), "parallel_conv"),
    "cat of mixed kernels": (lambda: Concat([C2(8, 4, 3, padding=1), C2(8, 4, 1)]), "concat"),
    "pool -> conv": (lambda: seq(nn.AvgPool2d(2), C2(8, 8, 1)), "avg_pool"),
    "depthwise + shuffled x": (lambda: Sum([C2(8, 8, 3, 1, 1, 1, 8), nn.ChannelShuffle(2)], [1]), "identity"),
}


@pytest.mark.parametrize("name", DEAR)
def test_what_costs_more_is_left_alone_unless_forced(name: str) -> None:
    build, pattern = DEAR[name]
    tensors = [integers((2, 8, 9, 12)), integers((1, 8, 12, 10))]
    refused(build, "would cost more", tensors, tuple(e[:-1] for e in EVERY))
    model = randomize(build().double(), integer=True)
    notes = fxfuse.report(fxfuse.optimize(model, tensors[0])).refused
    assert any(f'patterns=["{pattern}!"]' in n.remedy for n in notes)
    forced = exactly(model, *tensors, examples=tensors[0], patterns=[f"{pattern}!", *(e[:-1] for e in EVERY)])
    assert pattern in fxfuse.report(forced).by_pattern
