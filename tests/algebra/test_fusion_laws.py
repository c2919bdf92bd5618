"""Every law of the algebra, on numbers for which float64 is exact: outputs must be equal to the bit.

Each case is a model, two input shapes and what is executed after the rewrite. All patterns are forced,
so that a law is tested whether it pays or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from affine_trees import CONVS, NORMS, TRANSPOSED, Affine, Concat, Function, Select, Sum
from helpers import randomize
from law_cases import BN2, C2, GEOMETRIES, LINEAR, ONE, Build, Numbers, check, flip, inputs, integers, layout, pad, seq
from torch import Tensor, nn

import fxfuse


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_batch_norm_after_a_convolution_joins_it(geometry: str, rank: int) -> None:
    fields = {"kernel_size": 3} | GEOMETRIES[geometry]
    check(lambda: seq(CONVS[rank](4, 8, **fields), NORMS[rank](8)), inputs(4, rank), ONE)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("geometry", [name for name, fields in GEOMETRIES.items() if not fields.get("padding")])
def test_batch_norm_before_an_unpadded_convolution_joins_it(geometry: str, rank: int) -> None:
    fields = {"kernel_size": 3} | GEOMETRIES[geometry]
    check(lambda: seq(NORMS[rank](4), CONVS[rank](4, 8, **fields)), inputs(4, rank), ONE)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("shape", ((4, 4, 1), (4, 4, 2), (4, 4, 4), (4, 6, 2), (4, 8, 4), (3, 5, 1)), ids=str)
@pytest.mark.parametrize("fields", ({}, {"stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 2}), ids=str)
def test_batch_norm_and_factor_join_a_transposed_convolution(shape: Any, fields: Any, rank: int) -> None:
    into, out, groups = shape
    layer = lambda: TRANSPOSED[rank](into, out, 3, groups=groups, **fields)  # noqa: E731
    check(lambda: seq(layer(), NORMS[rank](out), Affine(-2, 0, rank)), inputs(into, rank), ONE)
    if rank == 2:
        check(lambda: seq(C2(into, into, 1, bias=False), flip(), layer()), inputs(into, 2), ONE)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("geometry", [n for n, fields in GEOMETRIES.items() if "stride" not in fields and n != "even"])
def test_a_residual_joins_a_convolution_that_keeps_the_size(geometry: str, rank: int) -> None:
    fields = {"kernel_size": 3, "padding": "same"} | GEOMETRIES[geometry]
    if fields.get("padding_mode") == "replicate":
        fields["padding"] = 1
    block = lambda: Sum([CONVS[rank](4, 4, **fields), NORMS[rank](4), nn.Identity()], [-1, 2])  # noqa: E731
    check(block, inputs(4, rank), ONE)


LINEARS: dict[str, tuple[Build, dict[str, int]]] = {
    "linear -> bn": (lambda: seq(LINEAR(4, 6), nn.BatchNorm1d(6)), {"linear": 1}),
    "bn -> linear": (lambda: seq(nn.BatchNorm1d(4), LINEAR(4, 6, bias=False)), {"linear": 1}),
    "linear -> linear": (lambda: seq(LINEAR(4, 6), LINEAR(6, 3)), {"linear": 1}),
    "linear + x": (lambda: Sum([LINEAR(4, 4), nn.Identity()], [1]), {"linear": 1}),
    "linear + linear": (lambda: Sum([LINEAR(4, 5), LINEAR(4, 5, bias=False)], [-1]), {"linear": 1}),
    "cat of linears": (lambda: Concat([LINEAR(4, 2), LINEAR(4, 5)]), {"linear": 1}),
    "cat of linears of pieces": (lambda: Concat([LINEAR(1, 2), LINEAR(3, 5)], [1, 3]), {"linear": 1}),
    "flip, linear, slice": (lambda: seq(flip(), LINEAR(4, 6), Select(1, 4)), {"linear": 1}),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_obey_the_same_laws(name: str) -> None:
    build, executed = LINEARS[name]
    check(build, inputs(4, 0), executed, **layout(name))


def one_tap(channels: int, kernel: tuple[int, int], dilation: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, 6, kernel, dilation=dilation, output_padding=dilation - 1)


SUMS: dict[str, Build] = {
    "3x3 + 1x1": lambda: Sum([C2(4, 6, 3, padding=1), C2(4, 6, 1)], [1]),
    "5x5 - 3x3": lambda: Sum([C2(4, 6, 5, padding=2), C2(4, 6, 3, padding=1)], [-1]),
    "7x7 + 5x5 + 3x3 + 1x1": lambda: Sum([C2(4, 6, k, padding=k // 2) for k in (7, 5, 3, 1)], [1, 2, -1]),
    "3x3 + 1x3 + 3x1": lambda: Sum([C2(4, 6, k, padding="same") for k in ((3, 3), (1, 3), (3, 1))], [1, 1]),
    "1x3 + 3x1": lambda: Sum([C2(4, 6, (1, 3), padding=(0, 1)), C2(4, 6, (3, 1), padding=(1, 0))], [1]),
    "1x1 p1 + 3x3 p2": lambda: Sum([C2(4, 6, 1, padding=1), C2(4, 6, 3, padding=2)], [1]),
    "3x3 p0 + cropped reach 5x5 p1": lambda: Sum([C2(4, 6, 3), C2(4, 6, 5, padding=1)], [1]),
    "strided 3x3 p1 + 1x1": lambda: Sum([C2(4, 6, 3, 2, 1), C2(4, 6, 1, 2)], [1]),
    "strided 4x4 p1 + 2x2": lambda: Sum([C2(4, 6, 4, 2, 1), C2(4, 6, 2, 2)], [1]),
    "even kernels off centre": lambda: Sum([seq(pad(1, 2, 0, 3), C2(4, 6, 4)), seq(pad(0, 1, 1, 0), C2(4, 6, 2))], [1]),
    "even beside odd": lambda: Sum([C2(4, 6, 4, padding="same"), C2(4, 6, 3, padding="same")], [1]),
    "dilated + dense": lambda: Sum([C2(4, 6, 3, padding=2, dilation=2), C2(4, 6, 3, padding=1)], [1]),
    "dilated 2 + dilated 3": lambda: Sum([C2(4, 6, 3, padding=d, dilation=d) for d in (2, 3)], [1]),
    "dilated + pointwise": lambda: Sum([C2(4, 6, 3, padding=2, dilation=2), C2(4, 6, 1)], [1]),
    "grouped + dense": lambda: Sum([C2(4, 6, 3, padding=1, groups=2), C2(4, 6, 1)], [1]),
    "depthwise + depthwise": lambda: Sum([C2(4, 4, 5, padding=2, groups=4), C2(4, 4, 3, padding=1, groups=4)], [1]),
    "depthwise + grouped + x": lambda: Sum([C2(4, 4, 3, 1, 1, 1, 4), C2(4, 4, 1, groups=2), nn.Identity()], [1, 1]),
    "reflect + reflect": lambda: Sum([C2(4, 6, k, padding=k // 2, padding_mode="reflect") for k in (3, 5)], [1]),
    "circular + pointwise": lambda: Sum([C2(4, 6, 3, padding=1, padding_mode="circular"), C2(4, 6, 1)], [1]),
    "pad of 3 + pad of 3": lambda: Sum([seq(pad(1, 1, 1, 1, value=3.0), C2(4, 6, 3)) for _ in range(2)], [1]),
    "2x2 + pool": lambda: Sum([C2(4, 4, 2, 2), nn.AvgPool2d(2)], [1]),
    "4x4 + 4x4 pool, padded": lambda: Sum([seq(pad(1, 2, 1, 2), f) for f in (C2(4, 4, 4), nn.AvgPool2d(4, 1))], [1]),
    "pool that counts its padding": lambda: Sum([C2(4, 4, 4, 2, 1), nn.AvgPool2d(4, 2, 1)], [1]),
    "conv + slice": lambda: Sum([C2(4, 2, 3, padding=1), Select(1, 3)], [1]),
    "conv + scaled x": lambda: Sum([C2(4, 4, 3, padding=1), Affine(torch.tensor([2.0, -1.0, 4.0, 0.5]), 1, 2)], [2]),
    "x - conv": lambda: Sum([nn.Identity(), C2(4, 4, 3, padding=1)], [-1]),
    "x + x + conv": lambda: Sum([nn.Identity(), nn.Identity(), C2(4, 4, 3, padding=1)], [1, 1]),
    "conv of x + x": lambda: seq(Sum([nn.Identity(), nn.Identity()], [1]), C2(4, 6, 3, padding=1)),
    "one tap, transposed, twice": lambda: Sum([one_tap(4, (3, 1), 2) for _ in range(2)], [-1]),
    "transposed + transposed": lambda: Sum([nn.ConvTranspose2d(4, 6, 3, 2, 1) for _ in range(2)], [-1]),
    "sum before a conv": lambda: seq(Sum([C2(4, 3, 1, bias=False) for _ in range(2)], [2]), C2(3, 5, 3, padding=1)),
    "sum after a conv": lambda: seq(C2(4, 4, 1, bias=False), Sum([C2(4, 4, 3, padding=1), nn.Identity()], [1])),
    "sum of sums": lambda: Sum([Sum([C2(4, 4, 3, 1, 1), BN2(4)], [1]), Sum([C2(4, 4, 1), nn.Identity()], [-1])], [-1]),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_operators_on_one_tensor_are_one_convolution(name: str) -> None:
    check(SUMS[name], inputs(4, 2), ONE)


WIDE = ("7x7 + 5x5 + 3x3 + 1x1", "dilated 2 + dilated 3", "even kernels off centre", "x - conv")


@pytest.mark.parametrize("size", ((1, 1), (1, 6), (2, 1), (3, 2)), ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_maps_smaller_than_the_kernel(name: str, size: tuple[int, int]) -> None:
    check(SUMS[name], [integers((2, 4, *size)), integers((1, 4, 5, 4))], ONE)


CHAINS: dict[str, Build] = {
    "1x1 without bias -> padded 3x3": lambda: seq(C2(4, 8, 1, bias=False), C2(8, 6, 3, padding=1)),
    "1x1 -> 3x3": lambda: seq(C2(4, 8, 1), C2(8, 6, 3)),
    "padded 3x3 -> 1x1": lambda: seq(C2(4, 8, 3, padding=1), C2(8, 6, 1)),
    "padded 3x3 -> 3x3": lambda: seq(C2(4, 8, 3, padding=1), C2(8, 6, 3)),
    "1x3 -> 3x1": lambda: seq(C2(4, 8, (1, 3), padding=(0, 1)), C2(8, 6, (3, 1))),
    "pad one dim, then the other": lambda: seq(C2(4, 8, (1, 3), 1, (0, 1), bias=False), C2(8, 6, (3, 1), 1, (1, 0))),
    "even -> even": lambda: seq(C2(4, 8, 2, padding=1), C2(8, 6, 4)),
    "strided -> strided": lambda: seq(C2(4, 8, 3, 2, 1), C2(8, 6, 2, 2)),
    "dilated -> dilated": lambda: seq(C2(4, 8, 2, dilation=2), C2(8, 6, 2, dilation=3)),
    "dilated -> strided": lambda: seq(C2(4, 8, 2, dilation=2, padding=1), C2(8, 6, 3, 2)),
    "strided 1x1 -> padded 3x3": lambda: seq(C2(4, 8, 1, 2, bias=False), C2(8, 6, 3, padding=1)),
    "groups 2 -> groups 2": lambda: seq(C2(4, 8, 3, groups=2), C2(8, 4, 1, groups=2)),
    "groups 2 -> groups 3": lambda: seq(C2(4, 6, 3, groups=2), C2(6, 3, 1, groups=3)),
    "groups 4 -> groups 2": lambda: seq(C2(4, 8, 1, groups=4), C2(8, 6, 2, groups=2)),
    "depthwise -> pointwise": lambda: seq(C2(4, 4, 3, padding=1, groups=4), C2(4, 6, 1)),
    "pointwise -> depthwise": lambda: seq(C2(4, 6, 1, bias=False), C2(6, 6, 3, padding=1, groups=6)),
    "depth multiplier": lambda: seq(C2(4, 8, 3, groups=4), C2(8, 16, 1, groups=8)),
    "three in a row": lambda: seq(C2(4, 8, 1, bias=False), C2(8, 3, 3, padding=1), C2(3, 6, 1), BN2(6)),
    "pad -> conv": lambda: seq(pad(1, 2, 0, 3), C2(4, 6, 3)),
    "pad -> padded conv": lambda: seq(nn.ZeroPad2d((2, 0, 1, 0)), C2(4, 6, 3, padding=1)),
    "pad of 3 -> conv": lambda: seq(nn.ConstantPad2d(2, 3.0), C2(4, 6, 3, 2)),
    "reflection pad -> conv": lambda: seq(nn.ReflectionPad2d((1, 2, 0, 1)), C2(4, 6, 3)),
    "1x1 -> replicate": lambda: seq(C2(4, 8, 1), C2(8, 6, 3, padding=1, padding_mode="replicate")),
    "bn -> reflect": lambda: seq(BN2(4), C2(4, 6, 3, padding=1, padding_mode="reflect")),
    "factor -> padded conv": lambda: seq(Affine(torch.tensor([2.0, -1.0, 4.0, 0.5]), 0, 2), C2(4, 6, 3, padding=1)),
    "dropout between": lambda: seq(C2(4, 8, 3), nn.Dropout2d(), BN2(8), nn.Dropout(), C2(8, 2, 1)),
    "conv -> pool": lambda: seq(C2(4, 6, 3, padding=1), nn.AvgPool2d(2)),
    "pool -> conv": lambda: seq(nn.AvgPool2d(2, 1), C2(4, 6, 3)),
    "1x1 -> padded pool": lambda: seq(C2(4, 6, 1, bias=False), nn.AvgPool2d(4, 2, 1)),
    "conv -> pool -> bn -> conv": lambda: seq(C2(4, 6, 2), nn.AvgPool2d((1, 4)), BN2(6), C2(6, 3, 1)),
    "bn -> bn -> conv -> bn -> bn": lambda: seq(BN2(4), BN2(4), C2(4, 6, 3), BN2(6), BN2(6)),
    "slice -> conv": lambda: seq(Select(1, 3), C2(2, 6, 3, padding=1)),
    "every second channel -> conv": lambda: seq(Select(0, 4, 2), C2(2, 6, 3, padding=1)),
    "flip -> conv": lambda: seq(flip(), C2(4, 6, 3, padding=1)),
    "conv -> slice": lambda: seq(C2(4, 6, 3, padding=1), Select(2, 5)),
    "x.flip(1) -> conv": lambda: seq(Function(lambda x: x.flip(1)), C2(4, 6, 3, padding=1)),
    "conv -> flip": lambda: seq(C2(4, 6, 3, padding=1), flip()),
    "depthwise -> flip": lambda: seq(C2(4, 4, 1), C2(4, 4, 3, groups=4), flip()),
    "grouped -> slice of one group": lambda: seq(C2(4, 6, 3, padding=1, groups=2), Select(3, 6)),
    "shuffle -> conv": lambda: seq(nn.ChannelShuffle(2), C2(4, 6, 3, padding=1)),
    "conv -> shuffle": lambda: seq(C2(4, 6, 3, padding=1), nn.ChannelShuffle(3)),
    "grouped -> shuffle -> grouped": lambda: seq(C2(4, 4, 1, groups=2), nn.ChannelShuffle(2), C2(4, 4, 1, groups=2)),
    "bn -> flip -> conv": lambda: seq(BN2(4), flip(), C2(4, 6, 3)),
    # output_padding may be as large as the stride or the dilation, be it that of a single tap
    "1x1 -> one tap, transposed": lambda: seq(C2(4, 8, 1, bias=False), one_tap(8, (3, 1), 2)),
    "factor -> one tap, transposed": lambda: seq(Affine(torch.tensor([2.0, -1, 4, 0.5]), 0, 2), one_tap(4, (1, 3), 2)),
    "one tap, transposed -> bn -> 1x1": lambda: seq(one_tap(4, (1, 1), 3), BN2(6), C2(6, 5, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_operators_are_one_convolution(name: str) -> None:
    check(CHAINS[name], inputs(4, 2), ONE, **layout(name))


CONCATS: dict[str, Build] = {
    "two of one kernel": lambda: Concat([C2(4, 3, 3, padding=1), C2(4, 5, 3, padding=1)]),
    "mixed kernels": lambda: Concat([C2(4, 3, 3, padding=1), C2(4, 5, 1), C2(4, 2, 5, padding=2, bias=False)]),
    "conv beside x": lambda: Concat([C2(4, 3, 3, padding=1), nn.Identity()]),
    "conv beside a slice": lambda: Concat([Select(1, 3), C2(4, 3, 3, padding=1)]),
    "grouped": lambda: Concat([C2(4, 4, 3, groups=2), C2(4, 2, 3, groups=2)]),
    "strided, dilated": lambda: Concat([C2(4, 4, 3, 2, 2, 2), C2(4, 2, 1, 2)]),
    "pieces": lambda: Concat([C2(2, 3, 3, padding=1), C2(2, 3, 3, padding=1)], [2, 2]),
    "pieces of two sizes": lambda: Concat([C2(1, 3, 3, padding=1), C2(3, 2, 3, padding=1)], [1, 3]),
    "pieces with mixed kernels": lambda: Concat([C2(2, 3, 3, padding=1), C2(2, 3, 1)], [2, 2]),
    "one piece left alone": lambda: Concat([C2(2, 3, 3, padding=1), nn.Identity()], [2, 2]),
    "depthwise pieces": lambda: Concat([C2(2, 2, k, padding=k // 2, groups=2) for k in (3, 5)], [2, 2]),
    "conv -> cat -> conv": lambda: seq(C2(4, 4, 1, bias=False), Concat([C2(4, 3, 3, 1, 1), C2(4, 2, 1)]), C2(5, 2, 1)),
    "cat of sums": lambda: Concat([Sum([C2(4, 3, 1), C2(4, 3, 1)], [1]), Sum([C2(4, 4, 1), nn.Identity()], [-1])]),
}


@pytest.mark.parametrize("name", CONCATS)
def test_concatenations_on_the_channels_are_one_convolution(name: str) -> None:
    check(CONCATS[name], inputs(4, 2), ONE)


@pytest.mark.parametrize("pieces", (2, 4))
def test_pieces_transformed_alike_become_one_grouped_convolution(pieces: int) -> None:
    width = 4 // pieces
    build = lambda: Concat([C2(width, 3, 3, padding=1) for _ in range(pieces)], [width] * pieces)  # noqa: E731
    fused = fxfuse.optimize(randomize(build(), 1), inputs(4, 2)[0].float())
    groups = [m.groups for m in fused.modules() if isinstance(m, C2)]
    assert groups == [pieces]
    check(build, inputs(4, 2), ONE)


@pytest.mark.parametrize("shape", ((), (1,), (4, 1, 1), (1, 4, 1, 1)), ids=str)
@pytest.mark.parametrize(
    "formula",
    (
        lambda y, c: y * c,
        lambda y, c: c * y,
        lambda y, c: y / c,
        lambda y, c: y + c,
        lambda y, c: c - y,
        lambda y, c: torch.add(y, c, alpha=3),
        lambda y, c: torch.sub(y, c, alpha=-2),
        lambda y, c: torch.add(c, y, alpha=2),
        lambda y, c: y.mul_(c).add_(c),
        lambda y, c: -(y * c / c - 3),
    ),
    ids=("y*c", "c*y", "y/c", "y+c", "c-y", "y+3c", "y+2c", "c+2y", "in place", "-(y*c/c-3)"),
)
def test_constants_for_each_channel_join_the_convolution(formula: Any, shape: tuple[int, ...]) -> None:
    check(lambda: Numbers(shape, formula), inputs(4, 2), ONE)


class Expression(nn.Module):
    """A convolution whose weight is computed from parameters, then scaled for each channel."""

    def __init__(self, formula: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.formula, self.weight = formula, nn.Parameter(torch.empty(channels, 4, 3, 3))
        self.register_buffer("eye", nn.init.dirac_(torch.empty(4, 4, 3, 3)))
        self.register_buffer("c", torch.tensor([2.0, -0.5, 4.0, -1.0]).reshape(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.formula(self.weight + self.eye), padding=1) * self.c


def _standardized(weight: Tensor) -> Tensor:
    mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
    return (weight - mean) / torch.sqrt(var + 1e-5)


@pytest.mark.parametrize(
    "formula",
    (
        lambda w: w,
        _standardized,
        lambda w: w - w.mean([0, 1], keepdim=True),
        lambda w: F.normalize(w, dim=1),
        lambda w: w.flip(2),
        lambda w: w[:, [2, 0, 1, 3]],
        lambda w: w[:, :2].repeat(1, 2, 1, 1).reshape(w.shape),
        lambda w: w.clamp(-1.0, 1.0),
    ),
    ids=("w + eye", "standardized", "centred", "normalized", "flipped", "gathered", "repeated", "clamped"),
)
def test_weights_that_are_expressions_are_constants(formula: Any) -> None:
    check(lambda: Expression(formula), inputs(4, 2), ONE)
