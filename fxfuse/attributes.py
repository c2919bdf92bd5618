"""One attribute of a module by its dotted path, as graphs name parameters, buffers and submodules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def owner_of(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that `path` leads to but for its last name, and that name.

    Raises:
        AttributeError: `root` has no such submodule.
    """
    owner, _, name = path.rpartition(".")
    return root.get_submodule(owner), name


def attribute(root: nn.Module, path: str) -> Any:
    """What `root` holds at `path`.

    Raises:
        AttributeError: nothing is there.
    """
    return getattr(*owner_of(root, path))


def tensor_at(root: nn.Module, path: str) -> Tensor | None:
    """The plain tensor `root` holds at `path`; None for anything else, subclasses and sparse ones included."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name, None)
    ordinary = type(value) in (Tensor, nn.Parameter, nn.Buffer) or (
        isinstance(value, Tensor) and type(value).__torch_function__ is torch._C._disabled_torch_function_impl
    )
    return value if ordinary and value.layout is torch.strided else None
