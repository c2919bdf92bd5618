"""Models and optimizers for the tests of benchmarks/zoo.py; its processes import them by name."""

from __future__ import annotations

import os
import time
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fxfuse


class Small(nn.Module):
    """A model on images; `fate` is what `fateful` does with it."""

    default_cfg: ClassVar = {"input_size": (3, 9, 7), "fixed_input_size": True}

    def __init__(self, fate: str = "") -> None:
        super().__init__()
        self.fate = fate
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.fate == "eager":
            raise ValueError("this model cannot run")
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def right() -> nn.Module:
    return Small()


def wrong() -> nn.Module:
    return Small("wrong")


def raises() -> nn.Module:
    return Small("raises")


def dies() -> nn.Module:
    return Small("dies")


def hangs() -> nn.Module:
    return Small("hangs")


def refused() -> nn.Module:
    return Small("refused")


def writes() -> nn.Module:
    return Small("writes")


def eager_fails() -> nn.Module:
    return Small("eager")


def fateful(model: Any, inputs: Any) -> nn.Module:
    """fxfuse.optimize, but not for every model."""
    if model.fate == "raises":
        raise IndexError("nothing there")
    if model.fate == "refused":
        raise fxfuse.CaptureError("no graph")
    if model.fate == "dies":
        os.abort()
    if model.fate == "hangs":
        time.sleep(600)
    if model.fate == "writes":
        model.conv.weight.data.mul_(1 + 1e-6)
    fused = fxfuse.optimize(model, inputs)
    if model.fate == "wrong":
        with torch.no_grad():
            next(fused.parameters()).mul_(1.01)
    return fused


def nothing(model: nn.Module, inputs: Any) -> nn.Module:
    """An optimizer that leaves everything and says nothing."""
    return deepcopy(model)


def speechless(model: nn.Module, inputs: Any) -> nn.Module:
    """Leaves the batch norm, and its report names no reason."""
    fused = fxfuse.optimize(nn.Sequential(nn.ReLU()).eval())
    fused.forward = model.forward  # type: ignore[method-assign]
    fused.left = model
    return fused


def told(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    """Raises what it was given."""
    shapes = None if inputs is None else [tuple(x.shape) for x in inputs]
    raise TypeError(f"inputs {shapes}, options {options}")
