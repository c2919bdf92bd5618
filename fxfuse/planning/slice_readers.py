"""Who may read a slice of a wide tensor where a whole tensor was: those that cannot tell from the strides.

A slice of the channels holds the same values as the tensor that it stands for, but they do not lie side by side. Most
operations never notice: they read through the strides and give a tensor of their own. A view of a slice is followed to
its readers; `view`, which not every order in memory allows, becomes `reshape`. Whatever else there may be could notice,
and so could the caller of the model.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxfuse.names import is_aten, plain, torch_name
from fxfuse.ops import schema
from fxfuse.ops.memory import fresh
from fxfuse.ops.modules import runs
from fxfuse.ops.value_kinds import shape_reader
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal

RESHAPES: dict[Any, Any] = {"view": "reshape", "view_as": "reshape_as"}
RESHAPES |= dict.fromkeys(
    (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default), torch.ops.aten.reshape.default
)
_NOT_FRESH = {"_unsafe_view", "_reshape_alias", "as_strided", "as_strided_copy"}  # whatever their schemas say
_VIEWS = set(
    "view _unsafe_view reshape flatten unflatten transpose permute swapaxes swapdims movedim unsqueeze squeeze chunk "
    "split split_with_sizes tensor_split unbind getitem narrow select slice expand expand_as view_as reshape_as alias "
    "mT mH dropout dropout1d dropout2d dropout3d contiguous detach t".split()
)
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_STRIDES = {"sym_stride", "sym_storage_offset"}


def reshaped(value: Node, view: View, own: Collection[Node]) -> tuple[Node, ...] | Refusal:
    """The views of `value` that have to be reshapes once it is a slice, or who might notice that it is one.

    What `own` nodes write does not count: a wide layer does it for all.
    """
    writer = next((w for w in view.effects.writers(value) if w not in own), None)
    if writer is not None:
        return _noticed("it is written in place", f"by {writer.name}", "use the out-of-place form")
    todo, seen, found = [value], {value}, list[Node]()
    while todo:
        node = todo.pop()
        for user in (u for u in node.users if u not in seen):
            seen.add(user)
            name = plain(user.target)
            if user.op == "output":
                return _noticed("the model returns it", node.name)
            if name in _STRIDES or user.kwargs.get("memory_format") is not None:
                return _noticed("its strides are asked for", f"by {user.name}")
            if shape_reader(user) or _fresh(user, view):
                continue
            if not _is_view(user, view):
                return _noticed("who reads it may look at its strides", f"read by {user.name}")
            if name in ("view", "view_as", "_unsafe_view"):
                if any(isinstance(a, torch.dtype) for a in (*user.args, *user.kwargs.values())):
                    return _noticed("its memory is read as another dtype", f"by {user.name}")
                found.append(user)
            todo.append(user)
    return tuple(found)


def _noticed(why: str, detail: str, remedy: str = "") -> Refusal:
    reason = f"beside other layers of one tensor its output would be a slice of a wider one, and {why}"
    return Refusal(reason, detail=detail, remedy=remedy)


def _fresh(user: Node, view: View) -> bool:
    """Whether a user gives nothing but a tensor of its own."""
    if "out" in user.kwargs:
        return False
    if is_aten(user):
        return schema.pure(user) and not schema.shared(user) and plain(user.target) not in _NOT_FRESH
    return fresh(user, view.calls.get(user), view.captured.modules)


def _is_view(user: Node, view: View) -> bool:
    if user.op == "call_module":
        return runs(view.captured.modules[str(user.target)]) in _VIEW_MODULES
    return torch_name(user) in _VIEWS
