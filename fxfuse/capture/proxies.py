"""The values of a trace: they record what they are written with (`x += y`, `x[i] = v`), and their properties at once.

Questions that only a run can answer, such as the type of a value, raise.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable
from types import GetSetDescriptorType
from typing import Any

from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute

from fxfuse.capture.questions import asks_attribute, by_identity, calls_isinstance, for_a_message, unpacked, user_frame
from fxfuse.ops.memory import INPLACE
from fxfuse.ops.value_kinds import is_number, is_tensor, number_type
from fxfuse.refusal import CaptureError

_ATTRIBUTES = {n: inspect.getattr_static(Tensor, n) for n in dir(Tensor) if not n.startswith("_")}
_TENSOR = set(dir(Tensor))
_PROPERTIES = {n for n, a in _ATTRIBUTES.items() if isinstance(a, (property, GetSetDescriptorType))}


# What of a value no input decides is the same at every call; dtype and device follow the module when it is moved.
_FIXED = {"shape", "ndim", "nbytes", "itemsize", "layout", "is_sparse", "is_leaf", "is_nested", "is_quantized"}


class DeviceText(str):
    """The text of a device, which may be the key of a memo; to compare it is to ask what a run alone tells."""

    __slots__ = ()

    def _asks(self, *others: Any) -> Any:
        raise CaptureError("the forward compares the text of a device, which is only known when it runs")

    __eq__ = __ne__ = __contains__ = startswith = _asks
    __hash__ = str.__hash__


class FuseProxy(Proxy):
    """A proxy that records what it is written with, and does not guess what it cannot know."""

    tracer: Any  # a FuseTracer

    def __getattr__(self, name: str) -> Any:
        if name in _FIXED and self.tracer.known.knows(self.node):
            return self.tracer.known.ask(self.node, operator.attrgetter(name))
        frame = None if self.tracer.reading else user_frame()
        if frame is not None:
            self._asked(name, frame)
        attribute = FuseAttribute(self, name)
        if name in _PROPERTIES:
            _ = attribute.node  # read now: `x.shape` behind an `x.squeeze_()` would be another
        return attribute

    def _asked(self, name: str, frame: Any) -> None:
        """Raises where the answer to a question for an attribute is only known when it runs."""
        if name in ("dtype", "device", "layout") and by_identity(frame):
            raise CaptureError(f"the forward compares .{name} of a tensor by `is`; compare it by ==")
        if name in ("requires_grad", "is_leaf", "grad_fn", "grad", "is_inference", "_base", "_version"):
            raise CaptureError(f"the forward asks for .{name} of a tensor, which is only known when it runs")
        if asks_attribute(frame) and not isinstance(self.node.target, property):
            if not is_tensor(self.node, self.tracer.root):
                raise CaptureError(f"the forward asks whether a value has .{name}, which is only known when it runs")
            if name not in _TENSOR:
                raise AttributeError(f"'Tensor' object has no attribute '{name}'")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad", "real", "imag", "names"):
            raise CaptureError(f"the forward assigns to .{name} of a tensor, which a graph cannot hold")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        if self.tracer.known.knows(self.node):
            return int(self.tracer.known.ask(self.node, len))
        return super().__len__()

    def __iter__(self) -> Any:
        if self.tracer.known.knows(self.node):
            return iter([operator.getitem(self, i) for i in range(len(self))])
        count = unpacked(sys._getframe(1))
        return self.tracer.iter(self) if count is None else iter([operator.getitem(self, i) for i in range(count)])

    def __bool__(self) -> bool:
        if self.tracer.known.knows(self.node):
            return bool(self.tracer.known.decide(self.node))
        return bool(self.tracer.to_bool(self))

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __index__(self) -> int:
        return operator.index(self._number())

    def _number(self) -> Any:
        if self.tracer.known.knows(self.node):
            return self.tracer.known.decide(self.node)
        raise CaptureError("the forward makes a Python number of a value, which is only known when it runs")

    def __hash__(self) -> int:
        if user_frame() is not None and not self.tracer.reading:
            raise CaptureError("the forward looks a value up, which is only known when it runs")
        return id(self)

    def __repr__(self) -> str:
        return self._text(super().__repr__())

    def __str__(self) -> str:
        if self.node.target is getattr and self.node.args[1] == "device":
            return DeviceText(super().__repr__())
        return self._text(super().__repr__())

    def __format__(self, spec: str) -> str:
        return self._text(super().__repr__())

    def _text(self, name: str) -> str:
        frame = user_frame(3)
        if frame is None or self.tracer.reading or for_a_message(frame):
            return name
        raise CaptureError("the forward makes text of a value, which is only known when it runs")

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Read by `isinstance`, and by C code too: who asks tells the two apart."""
        frame = None if self.tracer.reading else user_frame()
        return self.asked_type() if frame is not None and calls_isinstance(frame) else FuseProxy

    def asked_type(self) -> type:
        """The type of the value, where every run has the same."""
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
