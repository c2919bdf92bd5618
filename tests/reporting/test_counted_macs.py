"""The MACs of a report are those that are executed, as torch's own counter sees them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse


def executed(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


class Cat(nn.Module):
    def __init__(self, *kernels: int, stride: int = 1) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 2 + i, k, stride, k // 2, bias=False) for i, k in enumerate(kernels))
        self.branches = nn.ModuleList(nn.Sequential(c, nn.BatchNorm2d(c.out_channels)) for c in layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "concat of other kernels": lambda: Cat(5, 3, 3, 3),
    "concat of a run between": lambda: Cat(1, 3, 3, 5, stride=2),
    "concat that is one layer": lambda: Cat(3, 3),
    "transposed, then pointwise": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2), nn.Conv2d(8, 16, 1)),
    "transposed with all there is": lambda: nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, (2, 3), 1, (1, 2), groups=3, dilation=2), nn.BatchNorm2d(6)
    ),
    "transposed between layers": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 2, 3, 3), nn.BatchNorm2d(2)
    ),
    "layers with hooks": lambda: nn.Sequential(
        hooked(nn.Conv2d(3, 4, 3, 2, groups=1)),
        hooked(nn.ConvTranspose2d(4, 6, 3, 2, groups=2)),
        nn.Conv2d(6, 3, 1),
        nn.BatchNorm2d(3),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_as_executed(name: str) -> None:
    model = randomize(MODELS[name]()).double().eval()
    for x in (torch.randn(2, 3, 8, 8).double(), torch.randn(1, 3, 7, 11).double()):
        fused = fxfuse.optimize(model, x)
        report = fxfuse.report(fused)
        assert (report.before.macs, report.after.macs) == (executed(model, x), executed(fused, x))
        assert report.fired and fxfuse.plan(model, x).after.macs == report.after.macs
