"""Train on, then refresh: the fused model takes over the new weights without being planned again."""

from __future__ import annotations

import time

import _checkout  # noqa: F401
import torch
from blocks import RepVGG
from torch import nn

import fxfuse

torch.manual_seed(0)
model = RepVGG((1, 2, 2, 1), (16, 24, 32, 64), stem=16, num_classes=10)
images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))

start = time.perf_counter()
fused = fxfuse.optimize(model.eval())
planned = time.perf_counter() - start


def difference() -> float:
    """Of the two models' outputs, relative to the largest."""
    with torch.no_grad():
        expected = model.eval()(images)
        return float((fused(images) - expected).abs().max() / expected.abs().max())


assert difference() < 1e-4

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
nn.functional.cross_entropy(model.train()(images), labels).backward()
optimizer.step()  # the weights and, in the forward, the batch norms' statistics have changed
stale = difference()
assert stale > 1e-3

start = time.perf_counter()
same = fxfuse.refresh(fused, model)
refreshed = time.perf_counter() - start
fresh = difference()
assert same is fused and fresh < 1e-4

print(f"optimize: {1e3 * planned:.0f} ms, refresh: {1e3 * refreshed:.0f} ms")
print(f"difference after a training step: {stale:.1e}, after refresh: {fresh:.1e}")
