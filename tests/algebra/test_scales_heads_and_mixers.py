"""The laws that whole models need, as modules and as functions, in both orders of their operands, on one to three axes.

Averaged heads, batch norm before a linear layer, layer scales of every shape, scalar factors, RepMixer's nested sums,
transposed convolutions and average pools beside the identity. Numbers are integers: outputs are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from affine_trees import CONVS, NORMS, POOLS, TRANSPOSED
from exactly import exactly
from helpers import randomize
from law_cases import EVERY, LAYERS, inputs, integers
from safety import model_of
from timm.layers import LayerScale, LayerScale2d
from torch import Tensor, nn

import fxfuse

Forward = Callable[[Any, Tensor], Any]
RANKS = (1, 2, 3)
ONE, LINEAR = {"conv": 1}, {"linear": 1}


def check(
    forward: Forward, parts: dict[str, Any], tensors: list[Tensor], executed: dict[str, int], patterns: Any = None
) -> fxfuse.Report:
    model = randomize(model_of(forward, **parts).double(), integer=True)
    fused = exactly(model, *tensors, examples=tensors[0], patterns=patterns, counts=executed, of=LAYERS)
    return fxfuse.report(fused)


def rows(channels: int = 4) -> list[Tensor]:
    return [integers((3, channels)), integers((5, channels), 1)]


def tokens(channels: int = 4) -> list[Tensor]:
    return [integers((2, 5, channels)), integers((3, 4, channels), 1)]


def norm_of(x: Tensor, norm: Any) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, 0.0)


def heads() -> dict[str, Any]:
    return {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6, bias=False), "n": nn.BatchNorm1d(4), "m": nn.BatchNorm1d(4)}


HEADS: dict[str, Forward] = {
    "(a + b) / 2": lambda s, x: (s.a(x) + s.b(x)) / 2,
    "0.5 * (b + a)": lambda s, x: 0.5 * (s.b(x) + s.a(x)),
    "a / 2 + 0.5 * b": lambda s, x: s.a(x) / 2 + 0.5 * s.b(x),
    "b - 2 * a": lambda s, x: torch.sub(s.b(x), s.a(x), alpha=2),
    "functions": lambda s, x: (F.linear(x, s.a.weight, s.a.bias) + F.linear(x, s.b.weight)).div(2),
    "a norm each": lambda s, x: (s.a(s.n(x)) + s.b(s.m(x))) / 2,
    "dropout and a norm each": lambda s, x: (s.a(F.dropout(s.n(x), 0.2, False)) + s.b(norm_of(x, s.m))) / 2,
    "one norm for both": lambda s, x: (lambda y: (s.a(y) + s.b(y)) / 2)(s.n(x)),
}


@pytest.mark.parametrize("name", HEADS)
def test_averaged_heads_of_one_tensor_are_one(name: str) -> None:
    check(HEADS[name], heads(), rows(), LINEAR)


def test_heads_of_two_tensors_stay_two() -> None:
    report = check(lambda s, x: (s.a(x[:, 0]) + s.b(x[:, 1])) / 2, heads(), tokens(), {"linear": 2, "add": 1})
    assert any("is not all made of one tensor" in r.reason and r.where == "a" for r in report.refused)


BEFORE: dict[str, Forward] = {
    "module": lambda s, x: s.a(s.n(x)),
    "function": lambda s, x: F.linear(norm_of(x, s.n), s.b.weight),
    "dropout between": lambda s, x: s.b(F.dropout(s.n(x), 0.1, False)),
    "factor, norm, shift": lambda s, x: s.a(2 - s.n(x * 4)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_batch_norm_before_a_linear_layer_joins_it(name: str) -> None:
    check(BEFORE[name], heads(), rows(), LINEAR)


@pytest.mark.parametrize("rank", RANKS)
def test_batch_norm_before_an_unpadded_convolution_joins_it_as_a_function(rank: int) -> None:
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    parts = {"c": CONVS[rank](4, 6, 3, groups=2), "n": NORMS[rank](4)}
    forward: Forward = lambda s, x: convolve(norm_of(x, s.n), s.c.weight, s.c.bias, groups=2)  # noqa: E731
    check(forward, parts, inputs(4, rank), ONE)


def gamma(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 4.0, -1.0, 2.0]).reshape(shape))


SCALES: dict[str, tuple[Forward, Callable[[int], tuple[int, ...]]]] = {
    "(C, 1, 1)": (lambda s, x: s.c(x) * s.layer_scale, lambda rank: (6, *[1] * rank)),
    "(C, 1, 1) first": (lambda s, x: s.layer_scale * s.c(x), lambda rank: (6, *[1] * rank)),
    "(1, C, 1, 1)": (lambda s, x: torch.mul(s.layer_scale, s.c(x)), lambda rank: (1, 6, *[1] * rank)),
    "in place": (lambda s, x: s.c(x).mul_(s.layer_scale), lambda rank: (6, *[1] * rank)),
    "a view of (C,)": (lambda s, x: s.c(x) * s.layer_scale.view(-1, *s.ones), lambda rank: (6,)),
    "divided": (lambda s, x: s.c(x) / s.layer_scale, lambda rank: (6, *[1] * rank)),
    "shifted": (lambda s, x: s.layer_scale - s.c(x), lambda rank: (6, *[1] * rank)),
    "one value": (lambda s, x: s.c(x) * s.layer_scale.flatten()[1], lambda rank: (6,)),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", SCALES)
def test_a_layer_scale_joins_the_convolution_before_it(name: str, rank: int) -> None:
    forward, shape = SCALES[name]
    check(
        forward,
        {"c": CONVS[rank](4, 6, 3, padding=1), "layer_scale": gamma(*shape(rank)), "ones": (1,) * rank},
        inputs(4, rank),
        ONE,
    )


TOKENS: dict[str, Forward] = {
    "(C,)": lambda s, x: s.a(x) * s.layer_scale,
    "(C,) first": lambda s, x: s.layer_scale * s.a(x),
    "in place": lambda s, x: s.a(x).mul_(s.layer_scale),
    "(1, 1, C)": lambda s, x: s.a(x) * s.layer_scale[None, None],
    "function": lambda s, x: torch.multiply(F.linear(x, s.a.weight, s.a.bias), s.layer_scale),
    "a scalar": lambda s, x: s.a(x) * 0.5 / 4,
    "a scalar parameter": lambda s, x: s.layer_scale[0] * s.a(x),
    "a scale and a shift": lambda s, x: s.a(x) * s.layer_scale + s.layer_scale,
}


@pytest.mark.parametrize("name", TOKENS)
def test_a_layer_scale_joins_the_linear_layer_before_it(name: str) -> None:
    check(TOKENS[name], heads() | {"layer_scale": gamma(6)}, tokens(), LINEAR)


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_scales_of_timm_join_what_is_before_them(inplace: bool) -> None:
    parts: dict[str, Any] = {"a": nn.Linear(4, 6), "s": LayerScale(6, inplace=inplace)}
    check(lambda s, x: s.s(s.a(x)), parts, tokens(), LINEAR)
    parts = {"c": nn.Conv2d(4, 6, 3), "s": LayerScale2d(6, inplace=inplace)}
    check(lambda s, x: s.s(s.c(x)), parts, inputs(4, 2), ONE)


@pytest.mark.parametrize("rank", RANKS)
def test_a_scalar_joins_the_convolution_before_it(rank: int) -> None:
    conv = CONVS[rank](4, 6, 3)
    check(lambda s, x: 2 * s.c(x) / 8 - 1, {"c": conv}, inputs(4, rank), ONE)
    check(lambda s, x: -s.c(x).mul(0.25), {"c": conv}, inputs(4, rank), ONE)


def depthwise(rank: int) -> nn.Module:
    layer: nn.Module = CONVS[rank](4, 4, 3, padding=1, groups=4)
    return layer


MIXERS: dict[str, Forward] = {
    "dw + x": lambda s, x: s.c(x) + x,
    "x + dw": lambda s, x: x + s.c(x),
    "x - bn(dw)": lambda s, x: x - s.m(s.c(x)),
    "x += dw": lambda s, x: s.c(x).add_(x),
    "RepMixer": lambda s, x: x + s.layer_scale * (s.c(x) - s.n(x)),
    "RepMixer turned round": lambda s, x: (s.c(x) - s.n(x)) * s.layer_scale + x,
    "RepMixer of sums": lambda s, x: x + s.layer_scale * (s.n(x) + s.m(s.c(x)) - x),
    "RepMixer as a function": lambda s, x: torch.add(x, torch.sub(s.m(s.c(x)), norm_of(x, s.n)).mul(s.layer_scale)),
    "three deep": lambda s, x: x - 2 * (s.c(x) + s.layer_scale * (x - s.n(x))),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", MIXERS)
def test_nested_sums_around_a_depthwise_convolution_are_one(name: str, rank: int) -> None:
    scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 4.0]).reshape(-1, *[1] * rank))
    parts = {"c": depthwise(rank), "n": NORMS[rank](4), "m": NORMS[rank](4), "layer_scale": scale}
    check(MIXERS[name], parts, inputs(4, rank), ONE)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_factors_after_a_transposed_convolution_go_by_its_output_channels(groups: int, rank: int) -> None:
    """C == N: the output channels are the second axis of the weight, within their group."""
    convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 4.0]).reshape(-1, *[1] * rank))
    parts = {"t": TRANSPOSED[rank](4, 4, 3, 2, 1, groups=groups), "n": NORMS[rank](4), "layer_scale": scale}
    check(lambda s, x: s.layer_scale * s.n(s.t(x)), parts, inputs(4, rank), ONE)
    as_function: Forward = lambda s, x: norm_of(convolve(x, s.t.weight, None, 2, 1, 0, groups), s.n)  # noqa: E731
    check(as_function, parts, inputs(4, rank), ONE)


class Pooled(nn.Module):
    """An average pool over four positions a dim that keeps the size."""

    def __init__(self, pool: nn.Module, rank: int) -> None:
        super().__init__()
        self.pool, self.amounts = pool, (1, 2) * rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(F.pad(x, self.amounts))
        return out


POOLED: dict[str, tuple[Forward, dict[str, int]]] = {
    "pool - x": (lambda s, x: s.pooled(x) - x, {"conv": 1, "sub": 1, "pool": 1}),
    "x - pool": (lambda s, x: x - s.pooled(x), {"conv": 1, "sub": 1, "pool": 1}),
    "x + pool": (lambda s, x: x.add(s.pooled(x)), {"conv": 1, "add": 1, "pool": 1}),
}


def beside(rank: int, **parts: nn.Module) -> dict[str, Any]:
    """What settles the channels of the input, and a pool."""
    return {"first": CONVS[rank](4, 4, 1), "pooled": Pooled(POOLS[rank](4, 1), rank), **parts}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", POOLED)
def test_a_pool_beside_the_identity_stays_and_says_why(name: str, rank: int) -> None:
    """PoolFormer's mixer is one depthwise convolution, which costs where a pool costs nothing."""
    forward, executed = POOLED[name]
    report = check(lambda s, x: forward(s, s.first(x).relu()), beside(rank), inputs(4, rank), executed)
    assert ["a new one would cost more" in r.reason for r in report.refused] == [True]


@pytest.mark.parametrize("rank", RANKS)
def test_a_pool_beside_the_identity_joins_a_layer_that_is_there(rank: int) -> None:
    joined: Forward = lambda s, x: s.c(x) + (s.pooled(x) - x)  # noqa: E731
    parts = beside(rank, c=CONVS[rank](4, 4, 4, padding="same", groups=4))
    check(lambda s, x: joined(s, s.first(x).relu()), parts, inputs(4, rank), {"conv": 2})
    after: Forward = lambda s, x: s.c(s.pooled(x) - x)  # noqa: E731
    parts = beside(rank, c=CONVS[rank](4, 5, 1))
    check(lambda s, x: after(s, s.first(x).relu()), parts, inputs(4, rank), {"conv": 2}, EVERY)


@pytest.mark.parametrize("rank", RANKS)
def test_a_pool_that_leaves_its_padding_out_is_no_convolution(rank: int) -> None:
    pool = nn.AvgPool1d(2, 2, 1, count_include_pad=False)
    pool = pool if rank == 1 else (nn.AvgPool2d, nn.AvgPool3d)[rank - 2](2, 2, 1, count_include_pad=False)
    report = check(lambda s, x: s.p(x), {"p": pool}, inputs(4, rank), {"pool": 1}, EVERY)
    assert [r.reason for r in report.refused] == [
        "this average pool is no convolution: count_include_pad=False divides by less at the border"
    ]
