"""A write to one piece of a split tensor is none to another piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize
from safety import agrees, model_of
from torch import Tensor, nn

Forward = Callable[[Any, Tensor], Any]


class Opaque(nn.Module):
    """Stays one call in every graph, and may write for all that is known."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1) if bool(x.sum() > 0) else x * 2


def usual(forward: Forward) -> nn.Module:
    layers = {"o": Opaque(), "a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.BatchNorm2d(4), "c": nn.Conv2d(8, 8, 1)}
    return randomize(model_of(forward, **layers, act=nn.ReLU(inplace=True))).double()


def opaque_beside(self: Any, x: Tensor) -> Any:
    u, v = x.split([4, 4], 1)
    u = self.o(u)
    return torch.cat([u, self.act(self.b(self.a(v)))], 1)


def in_place_beside(self: Any, x: Tensor) -> Any:
    u, v = self.c(x).chunk(2, 1)
    u += 3
    return u * self.b(self.a(v))


def a_view_of_a_piece(self: Any, x: Tensor) -> Any:
    u, v = torch.split(x, 4, 1)
    v[:, 1:3].mul_(2)  # the last one, of which that size is not certain
    return self.b(self.a(u)), v


def halves_of_rows(self: Any, x: Tensor) -> Any:
    low, high = self.c(x).split([2, 2], 0)
    low.relu_()
    return self.b(self.a(high[:, :4])) + low[:, 4:]


def twice(self: Any, x: Tensor) -> Any:
    u, v, w = x.split([2, 2, 4], 1)
    u.add_(v)
    v.mul_(u)
    return self.b(self.a(w)), u, v


APART: dict[str, Forward] = {
    "an opaque module": opaque_beside, "a computed tensor": in_place_beside, "rows": halves_of_rows, "twice": twice,
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_a_layer_of_one_piece_fuses_where_another_is_written(case: str) -> None:
    fused = agrees(usual(APART[case]), shapes=((4, 8, 7, 5), (4, 8, 4, 6)), fires=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def the_same_piece(self: Any, x: Tensor) -> Any:
    u, v = x.split([4, 4], 1)
    y = self.a(v)
    v.add_(1)
    return self.b(y), u + v


def the_whole(self: Any, x: Tensor) -> Any:
    u, v = x.split([4, 4], 1)
    x.mul_(2)
    return self.b(self.a(v)) + u


def pieces_and_whole(self: Any, x: Tensor) -> Any:
    u, _ = x.split([4, 4], 1)
    u.add_(1)
    return self.b(self.a(x[:, 2:6]))


TOGETHER: dict[str, Forward] = {"the same": the_same_piece, "the whole": the_whole, "across": pieces_and_whole}


@pytest.mark.parametrize("case", [*TOGETHER, "a view of the last"])
def test_whatever_is_fused_a_write_that_is_read_is_seen(case: str) -> None:
    agrees(usual(TOGETHER.get(case, a_view_of_a_piece)), shapes=((2, 8, 7, 5), (1, 8, 4, 6)))


@pytest.mark.parametrize("case", ["split", "chunk"])
def test_channels_of_an_input_that_are_one_in_memory_are_written_together(case: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        u, v = x.split([1, 4], 1) if case == "split" else x.chunk(5, 1)[:2]
        u.add_(1)
        return self.b(self.a(v.expand(-1, 4, -1, -1)))

    def spread(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape[0], 1, *shape[2:], generator=generator, dtype=torch.float64).expand(shape)

    agrees(usual(forward), shapes=((2, 5, 7, 5), (1, 5, 4, 6)), draw=spread)
