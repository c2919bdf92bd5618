"""Permutations of channels pushed through what lies between them and a layer that takes them, exactly, or kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse
from examples.blocks import ShuffleUnit

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMA = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
Forward = Callable[[Any, Tensor], Tensor]
ORDER = [4, 0, 11, 7, 2, 9, 1, 10, 6, 3, 8, 5]
BLOCKS = [6, 7, 8, 0, 1, 2, 9, 10, 11, 3, 4, 5]  # groups of three in another order
INSIDE = [1, 0, 2, 5, 4, 3, 8, 6, 7, 9, 11, 10]  # each group of three in an order of its own


class Menu(nn.Module):
    """Layers of twelve channels: grouped and dense, depthwise, norms, activations; and a forward over them."""

    def __init__(self, forward: Forward, dims: int = 2) -> None:
        super().__init__()
        conv, norm = CONVS[dims], NORMS[dims]
        self.act = forward
        self.n0, self.n1, self.n2 = norm(12), norm(12), norm(12)
        self.g, self.h = conv(12, 12, 1, groups=4), conv(12, 12, 3, padding=1, groups=4)
        self.wide = conv(12, 24, 1, groups=4)
        self.n3, self.last24 = norm(24), conv(24, 2, 1)
        self.d, self.e = conv(12, 12, 3, padding=1, groups=12), conv(12, 12, 3, padding=1, groups=12, bias=False)
        self.doubled, self.strided = conv(12, 24, 3, groups=12), conv(12, 12, 3, stride=2, padding=1, groups=12)
        self.mirrored = conv(12, 12, 3, padding=1, groups=12, padding_mode="replicate")
        self.dense, self.last = conv(12, 12, 1), conv(12, 5, 3, padding=1)
        self.relu, self.relu_, self.hard = nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(-2, 5)
        self.prelu, self.drop, self.softmax = nn.PReLU(12), nn.Dropout(0.5), nn.Softmax(1)
        self.group_norm = nn.GroupNorm(3, 12)
        self.pool, self.max = POOLS[dims](2), MAXIMA[dims](2)
        self.gamma = nn.Parameter(torch.ones(12, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def run(forward: Forward, dims: int = 2, shapes: tuple[tuple[int, ...], ...] = (), **options: Any) -> tuple[Any, Any]:
    model = randomize(Menu(forward, dims).double(), seed=7, integer=True)
    sizes = shapes or ((2, 12, 5, 7, 4), (3, 12, 4, 6, 5))
    tensors = [integers(shape[: 2 + dims], i) for i, shape in enumerate(sizes)]
    fused = exactly(model, *tensors, **options)
    for x in tensors:
        counts, were = count(fused, x), count(model, x)
        assert counts.total() <= were.total()
    return fused, counts


def stays(counts: Any) -> bool:
    return bool(counts["channel_shuffle"] or counts["index"] or counts["flip"] or counts["transpose"])


# All begin with grouped layers, which take no permutation out of their groups.
FORWARD: dict[str, Forward] = {
    "an activation": lambda s, x: s.last(s.relu(F.channel_shuffle(s.n0(s.g(x)), 4))),
    "two activations": lambda s, x: s.last(F.relu6(s.hard(s.n0(s.g(x)).flip(1))).relu()),
    "a depthwise layer": lambda s, x: s.last(s.relu(s.d(F.channel_shuffle(s.n0(s.g(x)).relu(), 4)))),
    "a depthwise layer without bias": lambda s, x: s.last(s.relu(s.e(s.n0(s.g(x)).relu()[:, ORDER]))),
    "and its batch norm": lambda s, x: s.last(s.relu(s.n1(s.d(s.n0(s.g(x)).relu()[:, ORDER])))),
    "and a factor a channel": lambda s, x: s.last(s.relu(s.d(s.n0(s.g(x)).relu()[:, ORDER]) * s.gamma)),
    "a batch norm before it": lambda s, x: s.last(s.relu(s.n1(s.g(s.n0(x))[:, ORDER]))),
    "two depthwise layers": lambda s, x: s.last(s.n2(s.e(s.relu(s.n1(s.d(s.n0(s.g(x)).relu()[:, ORDER]))))).relu()),
    "with a stride": lambda s, x: s.last(s.relu(s.n1(s.strided(s.n0(s.g(x)).relu()[:, ORDER])))),
    "of two outputs a channel": lambda s, x: s.last24(s.relu(s.n3(s.doubled(s.n0(s.g(x)).relu()[:, ORDER])))),
    "average pool": lambda s, x: s.last(s.relu(s.pool(s.n0(s.g(x)).relu()[:, ORDER]))),
    "maximum": lambda s, x: s.last(s.max(s.n0(s.g(x)).relu()[:, ORDER])),
    "dropout": lambda s, x: s.last(s.drop(s.relu(s.n0(s.g(x))[:, ORDER]))),
    "padding": lambda s, x: s.last(F.pad(s.relu(s.n0(s.g(x))[:, ORDER]), (1, 2), value=3.0).relu()),
    "numbers": lambda s, x: s.last((s.relu(s.n0(s.g(x))[:, ORDER]) * 2 + 1).relu()),
    "groups in another order": lambda s, x: s.last(s.relu(s.n1(s.h(s.n0(s.g(x)).relu()[:, BLOCKS])))),
    "groups in another order, wider": lambda s, x: s.last24(s.relu(s.n3(s.wide(s.n0(s.g(x)).relu()[:, BLOCKS])))),
    "to a layer of its groups": lambda s, x: s.h(s.relu(s.n0(s.g(x)))[:, INSIDE].tanh().round()),
    "in place behind a layer": lambda s, x: s.last(s.relu_(s.d(s.n0(s.g(x)).relu()[:, ORDER]))),
    "in place": lambda s, x: s.last(s.relu_(s.n0(s.g(x))[:, ORDER])),
    "two permutations": lambda s, x: s.last(s.relu(s.relu(s.n0(s.g(x))[:, ORDER]).flip(1))),
}
BACKWARD: dict[str, Forward] = {
    "an activation": lambda s, x: s.g(F.channel_shuffle(s.relu(s.n0(s.dense(x))), 4)),
    "in place": lambda s, x: s.g(F.channel_shuffle(s.relu_(s.n0(s.dense(x))), 4)),
    "a depthwise layer": lambda s, x: s.g(s.n1(s.d(s.relu(s.n0(s.dense(x))))).relu()[:, ORDER]),
    "a pool": lambda s, x: s.g(s.pool(s.relu(s.n0(s.dense(x))))[:, ORDER]),
    "a strided layer": lambda s, x: s.g(s.strided(s.relu(s.n0(s.dense(x)))).relu().flip(1)),
    "groups": lambda s, x: s.wide(s.h(s.relu(s.n0(s.dense(x)))).relu()[:, BLOCKS]).relu(),
    "a factor before a layer": lambda s, x: s.g((s.relu(s.n0(s.dense(x))) * s.gamma)[:, ORDER]),
    "to a layer of its groups": lambda s, x: s.n0(s.g(x)).relu()[:, INSIDE].abs(),
}
STAYS: dict[str, tuple[Forward, str]] = {
    "groups on both sides": (lambda s, x: s.h(F.channel_shuffle(s.relu(s.n0(s.g(x))), 4)), "takes channels out"),
    "groups behind a depthwise layer": (
        lambda s, x: s.h(s.n1(s.d(F.channel_shuffle(s.relu(s.n0(s.g(x))), 4))).relu()),
        "takes channels out",
    ),
    "a parameter a channel": (lambda s, x: s.last(s.prelu(s.n0(s.g(x))[:, ORDER])), "prelu may treat"),
    "softmax": (lambda s, x: s.last(s.softmax(s.n0(s.g(x)).relu()[:, ORDER]).round()), "softmax may treat"),
    "group norm": (lambda s, x: s.last(s.group_norm(s.n0(s.g(x)).relu()[:, ORDER]).round()), "group_norm may treat"),
    "two readers": (
        lambda s, x: (lambda y: s.last(y.relu()) + s.last(y.tanh().round()))(s.n0(s.g(x))[:, ORDER]),
        "read by",
    ),
    "a reader on the way": (
        lambda s, x: (lambda y: s.last(y.tanh().round()) + y.mean())(s.n0(s.g(x))[:, ORDER].relu()),
        "read by",
    ),
    "returned": (lambda s, x: s.relu(s.n0(s.g(x))[:, ORDER]), "the model returns it"),
    "given": (lambda s, x: s.g(x.relu()[:, ORDER] + s.n0(x)).relu(), "read by"),
    "a padding that repeats": (lambda s, x: s.last(s.mirrored(s.n0(s.g(x)).relu()[:, ORDER]).relu()), "pads in a way"),
    "a batch norm by itself": (
        lambda s, x: s.last(s.n1(s.hard(s.n0(s.g(x)).relu()[:, ORDER])).relu()),
        "at every call",
    ),
    "a sum": (lambda s, x: s.last(s.relu(s.hard(s.n0(s.g(x)).relu()[:, ORDER]) + x)), "joins several tensors"),
}  # fmt: skip


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str, dims: int) -> None:
    example = torch.ones((2, 12, 5, 7, 4)[: 2 + dims]).double()
    _, counts = run(FORWARD[name], dims, examples=example if dims == 1 else None)
    assert not stays(counts) and not counts["bn"]


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    _, counts = run(BACKWARD[name])
    assert not stays(counts)


@pytest.mark.parametrize("name", [n for n in (*FORWARD, *BACKWARD) if n not in ("numbers",)])
def test_exported_graphs(name: str) -> None:
    forward = FORWARD.get(name) or BACKWARD[name]
    _, counts = run(forward, examples=torch.ones(2, 12, 5, 7).double(), capture="export")
    assert not stays(counts)


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_says_why(name: str) -> None:
    forward, reason = STAYS[name]
    fused, counts = run(forward)
    assert stays(counts)
    notes = [r for r in fxfuse.report(fused).refused if "a permutation of channels stays" in r.reason]
    assert len(notes) == 1 and re.search(reason, notes[0].detail), notes
    assert notes[0].where and notes[0].remedy and "  " not in str(notes[0])


def filled(s: Any, x: Tensor) -> Tensor:
    """`x` padded with a value for each channel."""
    y, value = F.pad(x, [1] * 4), s.gamma[None]
    y[:, :, 0:1, :] = value
    y[:, :, -1:, :] = value
    y[:, :, :, 0:1] = value
    y[:, :, :, -1:] = value
    return y


FILLED: dict[str, Forward] = {
    "before a depthwise layer": lambda s, x: s.last(s.doubled(filled(s, s.n0(s.g(x)).relu()[:, ORDER]))[:, :12].relu()),
    "behind an activation": lambda s, x: s.last(filled(s, s.hard(s.n0(s.g(x))[:, ORDER])).relu()),
    "after a layer": lambda s, x: s.g(filled(s, s.hard(s.n0(s.dense(x))))[:, ORDER]).relu(),
}


@pytest.mark.parametrize("name", FILLED)
def test_no_permutation_passes_a_padding_with_a_value_a_channel(name: str) -> None:
    fused, counts = run(FILLED[name])
    assert stays(counts) and any("pads in a way" in r.detail for r in fxfuse.report(fused).refused)


def test_a_layer_takes_a_permutation_before_such_a_padding() -> None:
    _, counts = run(lambda s, x: s.last(filled(s, s.n0(s.dense(x))[:, ORDER])))
    assert not stays(counts)


def shared(s: Any, x: Tensor) -> Tensor:
    y = s.n0(s.g(x))
    return s.last(s.relu_(y[:, ORDER])) + s.last(y.tanh().round())


def overwritten(s: Any, x: Tensor) -> Tensor:
    y = s.n0(s.g(x))
    z = y[:, ORDER]
    return y.mul_(2), s.last(s.relu(z))


def overwritten_late(s: Any, x: Tensor) -> Tensor:
    y = s.n0(s.g(x))
    z = s.drop(y[:, ORDER])
    return y.mul_(2), s.last(s.hard(z.contiguous()))


def viewed(s: Any, x: Tensor) -> Tensor:
    y = s.n0(s.g(x))
    flat = y.flatten(2)
    return s.last(s.relu_(y[:, ORDER])), flat + 1


WRITTEN: dict[str, Forward] = {
    "what the model is given": lambda s, x: (s.last(s.relu_(F.channel_shuffle(x, 4))), s.n0(x)),
    "what it is given, by another name": lambda s, x: (s.last(s.relu_(s.drop(x)[:, ORDER])), s.n0(x)),
    "what is read again": shared,
    "what was permuted": overwritten,
    "what was permuted, later": overwritten_late,
    "a view of it": viewed,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_in_place(name: str) -> None:
    model = randomize(Menu(WRITTEN[name]).double(), seed=7, integer=True)
    tensors = integers((2, 12, 5, 7)), integers((3, 12, 4, 6), 1)
    fused = exactly(model, *tensors, examples=torch.ones(2, 12, 5, 7).double())
    assert all(stays(count(fused, x.clone())) for x in tensors)


def unit(**dense: bool) -> nn.Module:
    model = ShuffleUnit(12, 3)
    if dense.get("reduce"):
        model.reduce = nn.Conv2d(12, 6, 1, bias=False)
    if dense.get("expand"):
        model.expand = nn.Conv2d(6, 12, 1, bias=False)
    return randomize(model.double(), seed=2, integer=True)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("dense", ["", "reduce", "expand"])
def test_the_unit_of_shufflenet(dense: str, capture: str) -> None:
    model = unit(**{dense: True})
    tensors = integers((2, 12, 5, 7)), integers((3, 12, 4, 6), 1)
    executed = {"conv": 3, "bn": 0, "channel_shuffle": 0}
    fused = exactly(model, *tensors, examples=torch.ones(2, 12, 5, 7).double(), capture=capture, counts=executed)
    assert all(stays(count(fused, x)) == (not dense) for x in tensors)


@pytest.mark.parametrize("dense", ["reduce", "expand"])
def test_new_weights(dense: str) -> None:
    model = unit(**{dense: True})
    fused = fxfuse.optimize(model)
    other = randomize(unit(**{dense: True}), seed=9, integer=True)
    x = torch.randint(-3, 4, (2, 12, 5, 7)).double()
    with torch.no_grad():
        assert torch.equal(fxfuse.refresh(fused, other)(x), other(x))
        assert not torch.equal(other(x), model(x))


@pytest.mark.parametrize("freeze", ["auto", False])
def test_compiled_graphs_follow_their_weights(freeze: Any) -> None:
    torch._dynamo.reset()
    model = unit(expand=True)
    options = {"inner": "eager", "freeze": freeze, "strict": True}
    compiled = torch.compile(model, backend="fxfuse", options=options, dynamic=False)
    x = torch.randint(-3, 4, (2, 12, 5, 7)).double()
    with torch.no_grad():
        for seed in (2, 3, 4):
            randomize(model, seed=seed, integer=True)
            model.depthwise.weight.add_(seed)
            assert torch.equal(compiled(x), model(x))
    (report,) = fxfuse.report(compiled)
    counts = report.after.ops
    assert not any("shuffle" in n or "transpose" in n or "getitem" in n for n in counts), counts


def test_an_input_without_a_batch_dim_is_an_error_where_the_rank_was_taken_for_granted() -> None:
    model = randomize(
        Menu(lambda s, x: s.last(s.d(F.channel_shuffle(s.relu(s.g(x)), 4)).relu())).double(), integer=True
    )
    fused = fxfuse.optimize(model)
    x = torch.randint(-3, 4, (2, 12, 4, 6)).double()
    with torch.no_grad():
        assert torch.equal(fused(x), model(x)) and not stays(count(fused, x))
        with pytest.raises(AssertionError, match="fxfuse took the input here for a batch of 4 dims"):
            fused(x[0])


def test_without_the_patterns_it_needs_it_stays() -> None:
    forward: Forward = lambda s, x: s.last(s.relu(s.d(s.n0(s.g(x)).relu()[:, ORDER])))  # noqa: E731
    model = randomize(Menu(forward).double(), seed=7, integer=True)
    x, y = integers((2, 12, 5, 7)), integers((3, 12, 4, 6), 1)
    for patterns in ("-constant_weight", "conv_bn"):
        assert stays(count(exactly(model, x, y, patterns=patterns), x))
