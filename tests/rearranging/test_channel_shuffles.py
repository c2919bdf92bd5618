"""Channel shuffles written as view, transpose, view: a neighbouring layer takes them, or they stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactly import exactly
from helpers import count, randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse

MOVES = ("transpose", "permute", "channel_shuffle")
Forward = Callable[..., Tensor]


class Shuffled(nn.Module):
    def __init__(self, forward: Forward, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.act = forward
        self.a, self.n, self.c = conv(6, 12, 1), norm(12), conv(12, 5, 3, padding=1)
        self.g, self.d = conv(12, 6, 1, groups=2), conv(12, 12, 3, padding=1, groups=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def shuffle(x: Tensor, groups: int = 3) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def unflattened(x: Tensor) -> Tensor:
    return x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)


def permuted(x: Tensor) -> Tensor:
    b, _, h, w = x.size()
    return x.reshape(b, 3, 4, h, w).permute(0, 2, 1, 3, 4).reshape(b, -1, h, w)


def other(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 3, 4, h, w).permute(0, 1, 2, 4, 3).reshape(b, c, h, w)


def flat(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 3, 4, h, w).transpose(1, 2).reshape(b, 4, 3 * h, w).reshape(b, c, h, w)


def grouped_batch(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(1, b, c, h, w).transpose(1, 2).reshape(b, c, h, w)


def read_between(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = x.view(b, 3, 4, h, w)
    return y.transpose(1, 2).reshape(b, c, h, w) * y.sum()


def written_between(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    y = x.view(b, 3, 4, h, w).transpose(1, 2)
    x.mul_(2)
    return y.reshape(b, c, h, w)


# A batch norm settles the rank, which a convolution alone does not.
TAKEN: dict[str, tuple[Forward, int]] = {
    "by the layer before": (lambda s, x: shuffle(s.n(s.a(x))).relu(), 1),
    "by the layer after": (lambda s, x: s.c(shuffle(s.n(s.a(x)).relu())), 2),
    "by a layer in one": (lambda s, x: s.c(shuffle(s.n(s.a(x)))), 2),
    "permuted": (lambda s, x: permuted(s.n(s.a(x))).relu(), 1),
    "behind an activation in place": (lambda s, x: s.c(shuffle(s.n(s.a(x)).relu_())), 2),
    "unflattened": (lambda s, x: unflattened(s.n(s.a(x))).relu(), 1),
    "two in a row": (lambda s, x: shuffle(shuffle(s.n(s.a(x))), 2).relu(), 1),
}
STAY: dict[str, Forward] = {
    "before a grouped layer": lambda s, x: s.g(shuffle(s.a(x).relu())),
    "before a depthwise layer": lambda s, x: s.d(shuffle(s.a(x).relu())),
    "another permutation": lambda s, x: other(s.a(x)).relu(),
    "rows among channels": lambda s, x: flat(s.a(x)).relu(),
    "samples among channels": lambda s, x: grouped_batch(s.a(x)).relu(),
    "read between": lambda s, x: s.c(read_between(s.a(x))),
    "written between": lambda s, x: s.c(written_between(s.a(x))),
    "no layer": lambda s, x: shuffle(x.relu()).abs(),
}


def run(forward: Forward, dims: int = 2, **options: Any) -> tuple[Any, Any]:
    model = randomize(Shuffled(forward, dims).double(), seed=3, integer=True)
    tensors = [integers(shape[: 2 + dims], i) for i, shape in enumerate(((2, 6, 5, 7, 4), (3, 6, 4, 3, 5)))]
    fused = exactly(model, *tensors, **options)
    return fused, count(fused, tensors[1])


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_a_neighbour_takes_it(name: str, examples: bool) -> None:
    forward, convs = TAKEN[name]
    x = torch.ones(2, 6, 5, 5).double() if examples else None
    _, counts = run(forward, examples=x)
    assert counts["conv"] == convs and not any(counts[n] for n in MOVES)


def test_in_three_dims() -> None:
    x = torch.ones(2, 6, 5, 4, 3).double()
    _, counts = run(lambda s, x: s.c(unflattened(s.n(s.a(x)).relu())), 3, examples=x)
    assert counts["conv"] == 2 and not any(counts[n] for n in MOVES)


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    _, counts = run(STAY[name])
    assert sum(counts[n] for n in MOVES) >= 1
    assert counts["channel_shuffle"] == 0  # as it was written


def test_exported_graphs_and_refreshed_weights() -> None:
    forward: Forward = lambda s, x: s.c(shuffle(s.n(s.a(x))))  # noqa: E731
    x = torch.ones(2, 6, 5, 5).double()
    fused, counts = run(forward, examples=x, capture="export")
    assert not any(counts[n] for n in MOVES)
    model = randomize(Shuffled(forward).double(), seed=4)
    fused = fxfuse.optimize(model)
    with torch.no_grad():
        model.a.weight.mul_(-2)
    fxfuse.refresh(fused, model)
    torch.testing.assert_close(fused(x), model(x))
    assert fxfuse.report(fxfuse.optimize(model, patterns="conv_bn")).by_pattern == {"conv_bn": 1}
