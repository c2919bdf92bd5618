"""Weights that are expressions of parameters and buffers are evaluated once, and to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize
from safety import agrees, model_of
from torch import Tensor, nn

import fxfuse

Forward = Callable[[Any, Tensor], Tensor]


def standardized(self: Any, x: Tensor) -> Tensor:
    w = self.a.weight
    w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(w)
    return F.conv2d(x, w, self.a.bias, padding=1)


def scaled(self: Any, x: Tensor) -> Tensor:
    w = self.a.weight
    gain = (self.gain * self.a.in_channels**-0.5).view(-1)
    w = F.batch_norm(w.reshape(1, len(w), -1), None, None, weight=gain, training=True, eps=1e-6).reshape_as(w)
    return F.conv2d(x, w, self.a.bias, padding=1)


def masked(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.a.weight * (self.gain.view(-1, 1, 1, 1) > 0), padding=1)


def normalized(self: Any, x: Tensor) -> Tensor:
    return F.linear(x.mean((2, 3)), F.normalize(self.head.weight), self.head.bias * 2)


FORWARDS: dict[str, Forward] = {
    "standardized": standardized,
    "scaled": scaled,
    "masked": masked,
    "normalized linear": normalized,
}


def build(forward: Forward, width: int = 5) -> nn.Module:
    layers = {"a": nn.Conv2d(4, width, 3, padding=1), "b": nn.BatchNorm2d(width), "head": nn.Linear(4, width)}
    return randomize(model_of(forward, **layers, gain=nn.Parameter(torch.randn(width))))


@pytest.mark.parametrize("width", [5, 200], ids=["small", "large"])
@pytest.mark.parametrize("case", FORWARDS)
def test_the_weight_is_the_very_tensor_of_eager(case: str, width: int) -> None:
    model = build(FORWARDS[case], width)
    fused = exactly(model, torch.randn(2, 4, 8, 7), torch.randn(3, 4, 5, 6))
    assert fxfuse.report(fused).by_pattern == {"constant_weight": 1}
    assert not [n for n in fused.graph.nodes if n.op == "get_attr"]


@pytest.mark.parametrize("case", ["standardized", "scaled", "masked"])
def test_a_batch_norm_after_it_folds_too(case: str) -> None:
    inner = FORWARDS[case]
    model = build(lambda s, x: s.b(inner(s, x))).double()
    fused = agrees(model, fires=True)
    assert count(fused, torch.randn(1, 4, 5, 5, dtype=torch.float64))["bn"] == 0


def test_it_can_be_left_out() -> None:
    fused = fxfuse.optimize(build(standardized), patterns=["-constant_weight"])
    assert not fxfuse.report(fused).fired


def test_new_weights_are_evaluated_again() -> None:
    model = build(scaled)
    fused = fxfuse.optimize(model)
    other = randomize(build(scaled), seed=5)
    fxfuse.refresh(fused, other)
    x = torch.randn(2, 4, 6, 5)
    assert torch.equal(fused(x), other(x)) and not torch.equal(fused(x), model(x))


def draws(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, F.dropout(self.a.weight, 0.5, training=True), padding=1)


def writes(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return F.conv2d(x, self.a.weight * self.count, padding=1)


def depends(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.a.weight * x.mean(), padding=1)


@pytest.mark.parametrize("forward", [draws, writes, depends])
def test_what_changes_from_call_to_call_is_computed_at_every_call(forward: Forward) -> None:
    model = build(forward)
    model.register_buffer("count", torch.zeros(()))
    agrees(model.double(), fires=False, refused="computed from data")
