"""Optimize a RepVGG-A0 and check that the result computes the same: 44 convolutions and 61 batch norms become 22."""

from __future__ import annotations

import _checkout  # noqa: F401
import torch
from blocks import repvgg_a0
from torch import nn

import fxfuse


def megabytes(model: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6


def layers(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


torch.manual_seed(0)
model = repvgg_a0().eval()
for module in model.modules():  # statistics as after training, so that the batch norms do something
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.running_mean, std=0.1)
        nn.init.uniform_(module.running_var, 0.5, 2)

image = torch.randn(1, 3, 64, 96)
fused = fxfuse.optimize(model, image, verify=True)

with torch.no_grad():
    expected, actual = model(image), fused(image)
error = float((actual - expected).abs().max() / expected.abs().max())
assert error < 1e-4

for name, m in (("before", model), ("after", fused)):
    convs, norms = layers(m, nn.Conv2d), layers(m, nn.BatchNorm2d)
    print(f"{name:6} {convs:3} conv, {norms:3} batch norm, state_dict of {megabytes(m):.1f} MB")
print(f"outputs differ by {error:.1e} of the largest one")

assert (layers(fused, nn.Conv2d), layers(fused, nn.BatchNorm2d)) == (22, 0)
assert megabytes(fused) < megabytes(model)
