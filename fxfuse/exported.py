"""Capture with torch.export."""

from __future__ import annotations

from typing import Any

from torch import nn

from .capture import Captured
from .refusal import CaptureError


def export(model: nn.Module, inputs: tuple[Any, ...]) -> Captured:
    """Raises CaptureError: exported graphs cannot be read yet."""
    raise CaptureError(f"{type(model).__name__}: exported graphs cannot be read yet; use another capture=")
