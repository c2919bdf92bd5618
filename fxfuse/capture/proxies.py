"""The values of a trace: they record what they are written with (`x += y`, `x[i] = v`), and their properties at once.

Questions that only a run can answer, such as the type of a value, raise.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import sys
from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute

from fxfuse.attributes import owner_of
from fxfuse.ops.memory import INPLACE
from fxfuse.ops.value_kinds import is_number, is_tensor, number_type
from fxfuse.refusal import CaptureError

_ATTRIBUTES = {n: inspect.getattr_static(Tensor, n) for n in dir(Tensor) if not n.startswith("_")}
_PROPERTIES = {n for n, a in _ATTRIBUTES.items() if isinstance(a, (property, GetSetDescriptorType))}


class FuseProxy(Proxy):
    """A proxy that records what it is written with, and does not guess what it cannot know."""

    tracer: Any  # a FuseTracer

    def __getattr__(self, name: str) -> Attribute:
        attribute = FuseAttribute(self, name)
        if name in _PROPERTIES:
            _ = attribute.node  # read now: `x.shape` behind an `x.squeeze_()` would be another
        return attribute

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad", "real", "imag", "names"):
            raise CaptureError(f"the forward assigns to .{name} of a tensor, which a graph cannot hold")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        if self.node.op == "get_attr":
            owner, name = owner_of(self.tracer.root, str(self.node.target))
            tables = vars(owner)
            return len((tables["_parameters"] | tables["_buffers"])[name])  # a weight's size is known
        return super().__len__()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Read by `isinstance`, and by C code too: whose line it is tells the two apart."""
        asking = sys._getframe(1)
        library = asking.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fxfuse")
        if library or "isinstance(" not in linecache.getline(asking.f_code.co_filename, asking.f_lineno):
            return FuseProxy
        if is_tensor(self.node, self.tracer.root):
            return Tensor
        if (number := number_type(self.node)) is not None:
            return number
        raise CaptureError("the forward asks for the type of a value, which is only known when it runs")


class FuseAttribute(Attribute, FuseProxy):
    """An attribute of a proxy; if it is a method to be called, no node of its own is made."""

    @property
    def node(self) -> Node:  # type: ignore[override]
        if self._node is not None and self._node._erased:  # it was made in a trace that was given up
            self._node = None
        return super().node


def _writing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: FuseProxy, other: Any) -> Any:
        plain = getattr(operator, name, None) or getattr(operator, name + "_")
        called = plain if is_number(self.node, self.tracer.numbers) else function
        return self.tracer.create_proxy("call_function", called, (self, other), {})

    return write


for _name, _function in INPLACE.items():
    setattr(FuseProxy, f"__i{_name}__", _writing(_name, _function))
