"""Modules that plain attributes hold, where no table of submodules shows them: in lists, partials, bound methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn


def outside(module: nn.Module) -> str:
    """Path of a submodule one of whose attributes holds a module elsewhere, whose changes a graph would not see."""
    inside = {id(m) for m in module.modules()}
    for path, inner in module.named_modules():
        if any(id(m) not in inside for m in held(vars(inner))):
            return path or type(module).__name__
    return ""


def held(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Modules that plain attributes hold: in lists, dicts, partials and bound methods."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, partial):
        yield from held([value.func, *value.args, *value.keywords.values()], depth)
    elif inspect.ismethod(value):
        yield from held(value.__self__, depth)
    elif depth < 4 and isinstance(value, dict):
        for key, inner in value.items():
            if depth or key not in ("_modules", "_parameters", "_buffers"):
                yield from held(inner, depth + 1)
    elif depth < 4 and isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from held(inner, depth + 1)
