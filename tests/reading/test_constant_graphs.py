"""Weights that loops compute: what is planned, optimized and refreshed in time with the number of their steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import count, randomize
from safety import model_of
from torch import Tensor, nn

import fxfuse

Weight = Callable[[Any, int], Tensor]


def newton_schulz(self: Any, steps: int) -> Tensor:
    w = self.w / self.w.norm()
    for _ in range(steps):
        w = 1.5 * w - 0.5 * w @ w.t() @ w
    return w[:, :, None, None]


def fibonacci(self: Any, steps: int) -> Tensor:
    a = b = self.w
    for _ in range(steps):
        a, b = b, (a + b) * 0.6180339887
    return b[:, :, None, None]


def squared(self: Any, steps: int) -> Tensor:
    w = self.w.softmax(1)
    for _ in range(steps):
        w = torch.stack([w @ w, w]).mean(0).softmax(1)
    return w[:, :, None, None]


def normalized(self: Any, steps: int) -> Tensor:
    w = self.w.exp()
    for _ in range(steps):  # Sinkhorn and Knopp 1967
        w = w / w.sum(0, keepdim=True)
        w = w / w.sum(1, keepdim=True)
    return w[:, :, None, None]


WEIGHTS: dict[str, Weight] = {
    "Newton-Schulz": newton_schulz, "Fibonacci": fibonacci, "squared": squared, "Sinkhorn": normalized
}  # fmt: skip


def build(weight: Weight, steps: int) -> nn.Module:
    model = model_of(lambda self, x: self.b(F.conv2d(x, weight(self, steps))), b=nn.BatchNorm2d(5))
    model.register_parameter("w", nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(1))))
    return randomize(model).double().eval()


@pytest.mark.parametrize("steps", [2, 200])
@pytest.mark.parametrize("case", WEIGHTS)
def test_a_loop_over_a_weight_is_one_layer(case: str, steps: int) -> None:
    """As trees these have at least 2**200 parts."""
    model = build(WEIGHTS[case], steps)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 7, 6), (1, 5, 3, 9))]
    assert fxfuse.plan(model, inputs[0]).by_pattern == {"conv_bn": 1}
    fused = fxfuse.optimize(model, inputs[0])
    assert count(fused, inputs[0])["bn"] == 0 and len(list(fused.parameters())) == 2
    other = randomize(build(WEIGHTS[case], steps), seed=4).double()
    for result in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for source in (model, other, model):
            fxfuse.refresh(result, source)
            for x in inputs:
                torch.testing.assert_close(result(x), source(x), rtol=1e-10, atol=1e-12)


def test_a_padding_is_compared_with_a_bias_that_a_loop_computes() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        shift = self.shift
        for _ in range(100):
            shift = (shift + shift) * 0.5 + shift * 0.25 - shift * 0.25
        y = F.conv2d(x, self.a.weight, shift)
        return self.a2(F.pad(y, (1, 1, 1, 1)))

    layers = {"a": nn.Conv2d(4, 4, 1), "a2": nn.Conv2d(4, 4, 3)}
    model = randomize(model_of(forward, **layers, shift=nn.Parameter(torch.randn(4)))).double().eval()
    fused = fxfuse.optimize(model)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_thousand_steps() -> None:
    model = build(fibonacci, 1000)
    fused = fxfuse.optimize(model)
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-8, atol=1e-10)
    again = pickle.loads(pickle.dumps(fused))
    fxfuse.refresh(again, model)
    assert torch.equal(again(x), fused(x))
