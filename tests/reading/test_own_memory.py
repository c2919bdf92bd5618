"""Tensors that a forward makes for itself: constants where constants are written to them before they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded import called, recorded, same_as_eager
from safety import model_of
from torch import Tensor, nn

F64 = torch.float64
Forward = Callable[[Any, Tensor], Any]
Make = Callable[[Any], Tensor]


class Opaque(nn.Module):
    """Stays one call in every graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x + 1


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def build(forward: Forward) -> nn.Module:
    layers = {"s": nn.Conv2d(4, 4, 1), "g": nn.Linear(3, 4), "opaque": Opaque()}
    tensors = {"k": nn.Parameter(integers(4, 1, 3, 3)), "w": nn.Parameter(integers(4, 4, 3, 3, seed=1))}
    model = model_of(forward, **layers, **tensors, table=integers(4, 3, seed=2)).double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(*parameter.shape, seed=number))
    return model


INPUTS = (integers(2, 4, 7, 5, seed=8), integers(1, 4, 4, 9, seed=9))


def diagonal(self: Any) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    for i in range(4):
        w[i, i] = self.k[i, 0]
    return w


def copied_rows(self: Any) -> Tensor:
    w = torch.ones(4, 4, 3, 3, dtype=F64)
    w[:, 0].copy_(self.k[:, 0])
    w[:, 3].mul_(self.k[:, 0]).sub_(1)
    return w


def accumulated(self: Any) -> Tensor:
    w = torch.zeros_like(self.w)
    for scale in range(3):
        w += self.w * scale
    return w


def masked(self: Any) -> Tensor:
    w = self.w.clone()
    w[:, :, 1:, 2] = 0
    return w


def through_its_size(self: Any) -> Tensor:
    w = torch.full((4, 4, 3, 3), 2.0, dtype=F64)
    for i in range(4):
        w[i, w.shape[1] - 1 - i, w.size(2) // 2] += self.k[i, 0, 0]
    return w.view(w.shape[0], -1, 3, 3)


def of_itself(self: Any) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    w[0] = self.k[:, 0]
    w[1] = w[0] * 2
    w[2] = w[:2].sum(0) - w[0].flip(0)
    return w


def clamped(self: Any) -> Tensor:
    return torch.relu_(self.w * 2).add_(self.k)


def by_a_layer(self: Any) -> Tensor:
    row = torch.relu_(self.g(self.table))  # [4, 4]
    return row[:, :, None, None] + self.w


def two_of_them(self: Any) -> Tensor:
    one, two = torch.zeros(4, 4, 3, 3, dtype=F64), torch.zeros(4, 4, 3, 3, dtype=F64)
    one[:, 1] = self.k[:, 0]
    two[2] = one[1] - 1
    two[:, 0].add_(self.k[:, 0])
    return one - two


def moved(self: Any) -> Tensor:
    eye = torch.eye(4, dtype=F64, device=self.w.device)
    eye.mul_(3)
    return eye[:, :, None, None] + self.w.to(self.k.device)


MADE: dict[str, Make] = {
    "a diagonal": diagonal, "rows": copied_rows, "a sum": accumulated, "masked": masked, "its size": through_its_size,
    "of itself": of_itself, "clamped": clamped, "by a layer": by_a_layer, "two": two_of_them, "moved": moved,
}  # fmt: skip


def beside(make: Make) -> Forward:
    return lambda self, x: F.conv2d(x, make(self), padding=1) + self.s(x)


@pytest.mark.parametrize("case", MADE)
def test_a_weight_of_its_own_is_one_layer_with_the_branch_beside_it(case: str) -> None:
    fused = same_as_eager(build(beside(MADE[case])), *INPUTS)
    assert len(called(fused)) == 1, fused.code


@pytest.mark.parametrize("case", ["a diagonal", "of itself", "clamped"])
def test_it_may_be_returned_too(case: str) -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        w = MADE[case](self)
        return F.conv2d(x, w, padding=1) + self.s(x), w

    fused = same_as_eager(build(forward), *INPUTS)
    assert [n for n in called(fused) if "conv" in n] == ["conv2d_1"] or "self.conv2d(" in fused.code


def written_from_the_input(self: Any, x: Tensor) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    w[0, 0] = self.k[0, 0] * x.sum()
    return F.conv2d(x, w, padding=1) + self.s(x)


def read_between(self: Any, x: Tensor) -> Tensor:
    w = torch.ones(4, 4, 3, 3, dtype=F64)
    first = F.conv2d(x, w, padding=1)
    w[0] = self.k[:, 0]
    return first - F.conv2d(x, w, padding=1)


def read_by_an_older_view(self: Any, x: Tensor) -> Tensor:
    w = torch.ones(4, 4, 3, 3, dtype=F64)
    older, copy = w[0], w[1] * 2
    w[:2].copy_(self.w[:2])
    return F.conv2d(x, w, padding=1) + F.conv2d(x, older[:, None] - copy[:, None], padding=1, groups=4)


def written_after(self: Any, x: Tensor) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    w[1] = self.k[:, 0]
    y = F.conv2d(x, w, padding=1) + self.s(x)
    w += y.mean()
    return y * w.sum()


def given_away(self: Any, x: Tensor) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    w[1] = self.k[:, 0]
    return F.conv2d(x, w, padding=1) + self.s(x) + self.opaque(w).sum()


def drawn(self: Any, x: Tensor) -> Tensor:
    w = torch.zeros(4, 4, 3, 3, dtype=F64)
    w.bernoulli_(0.5)
    return F.conv2d(x, w, padding=1) + self.s(x)


def an_accumulator(self: Any, x: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=F64)
    for i in range(3):
        total += self.s(x)[:, i].sum()
    return self.s(x) * total


def a_canvas(self: Any, x: Tensor) -> Tensor:
    canvas = torch.zeros(2, 4, 12, 12, dtype=F64)
    canvas[: x.shape[0], :, 2 : 2 + x.shape[2], 2 : 2 + x.shape[3]] = self.s(x)
    return canvas


VARYING: dict[str, Forward] = {
    "written from the input": written_from_the_input, "read between": read_between, "an older view":
    read_by_an_older_view, "written after": written_after, "given away": given_away, "drawn": drawn,
    "an accumulator": an_accumulator, "a canvas": a_canvas,
}  # fmt: skip


@pytest.mark.parametrize("case", VARYING)
def test_what_is_read_before_its_last_write_is_made_at_every_call(case: str) -> None:
    fused = same_as_eager(build(VARYING[case]), *INPUTS)
    assert any(word in fused.code for word in ("torch.zeros", "torch.ones")), fused.code


def test_the_parameter_itself_may_not_be_written() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.w.view(4, 4, 9)
        w[0] = 1
        return F.conv2d(x, self.w, padding=1) + self.s(x)

    model = build(forward)
    fused = recorded(model)
    with torch.no_grad():
        assert torch.equal(fused(INPUTS[0]), model(INPUTS[0]))
    assert len([n for n in called(fused) if "conv" in n or n == "s"]) == 2


def test_numbers_without_a_dtype_have_the_default_one_of_when_the_graph_was_read() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w + torch.eye(4)[:, :, None, None], padding=1) + self.s(x)

    model = build(forward)
    fused = same_as_eager(model, *INPUTS)
    assert len(called(fused)) == 1
    model.float()
    single = same_as_eager(model, *(x.float() for x in INPUTS))
    assert len(called(single)) == 1 and single(INPUTS[0].float()).dtype == torch.float32


def test_numbers_on_the_device_of_the_input_are_no_weight_of_their_own() -> None:
    def alone(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.eye(4, dtype=F64, device=x.device)[:, :, None, None]) + self.s(x)

    def joined(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.k[:, :, :1, :1] * torch.eye(4, dtype=F64, device=x.device)[:, :, None, None]) + self.s(
            x
        )

    assert len(called(same_as_eager(build(joined), *INPUTS))) == 1
    assert "torch.eye" in same_as_eager(build(alone), *INPUTS).code
