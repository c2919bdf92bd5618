"""What can be compared with eager: fxfuse, Dynamo, and a capture that believes every trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxfuse
from fxfuse.capture.copying import copied


def careless(model: nn.Module, examples: Any) -> nn.Module:
    """torch.fx alone: whatever traces is believed. Raises CaptureError for what does not trace."""
    try:
        return torch.fx.symbolic_trace(copied(model))
    except Exception as error:
        raise fxfuse.CaptureError(f"it does not trace: {error}") from error


def dynamo(model: nn.Module, examples: Any) -> nn.Module:
    """torch.compile with nothing compiled: Dynamo's graphs, run as they are; the model itself, with its state."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    return compiled


WAYS: dict[str, Callable[..., nn.Module]] = {"fxfuse": fxfuse.optimize, "careless": careless, "dynamo": dynamo}
