"""Devices in a graph: what moves a tensor gives the same numbers, and where they are is no part of a constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.names import plain

_CASTS = {"to", "cpu", "cuda", "_to_copy"}


class _Device:
    """What `x.device` gives, whichever that is."""

    def __repr__(self) -> str:
        return "DEVICE"


DEVICE: Final = _Device()


def asks_device(node: Node) -> bool:
    return node.target is getattr and node.args[1] == "device"


class Cast(NamedTuple):
    """What `.to(...)` changes of a constant: its dtype, its order in memory; None for what it keeps."""

    dtype: torch.dtype | None
    memory_format: torch.memory_format | None


def cast(node: Node, known: Mapping[Node, Any]) -> Cast | None:
    """What a call of `to`, `cpu` or `cuda` changes, its arguments being `known`; None for any other call."""
    method = node.op == "call_method" or isinstance(node.target, torch._ops.OpOverload)
    if not method or plain(node.target) not in _CASTS:
        return None
    given = [known[v] if isinstance(v, Node) else v for v in (*node.args[1:], *node.kwargs.values())]
    if any(isinstance(v, torch.layout) and v is not torch.strided for v in given):
        return None
    dtypes = [v if isinstance(v, torch.dtype) else v.dtype for v in given if isinstance(v, (torch.dtype, Attr, Apply))]
    formats = [v for v in given if isinstance(v, torch.memory_format) and v is not torch.preserve_format]
    return Cast(dtypes[0] if dtypes else None, formats[0] if formats else None)


def without_device(node: Node) -> tuple[dict[str, Any], bool]:
    """The keywords of a call without where its result is to be, and whether that was among them."""
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("device", "pin_memory")}
    return kwargs, node.kwargs.get("device") is not None
