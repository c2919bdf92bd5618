"""What a failing forward said, and the line of the user's own code that it failed at."""

from __future__ import annotations

import contextlib
import os
import traceback

import torch
from torch import nn

from fxfuse.refusal import CaptureError

_LIBRARIES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    contextlib.__file__,
    "<",
)
_REMEDY = (
    "optimize the submodules around that line one by one, or make the line independent of its input's data and size"
)


def said(error: Exception) -> str:
    """The first line of an error's text, or its class where it has none."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def located(error: Exception) -> str:
    """The innermost line of the user's own code, if it was there, and what it raised."""
    return f"{_line(error)}{said(error).rstrip('.')}"


def cannot(model: nn.Module, be: str, error: Exception) -> CaptureError:
    """What is raised for a model that cannot be traced or exported because of `error`."""
    at = " at " if _line(error) else ": "
    return CaptureError(f"{type(model).__name__} cannot be {be}{at}{located(error)}; {_REMEDY}", located(error))


def _line(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`: " if frames else ""
