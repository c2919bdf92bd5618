"""What a forward asks while it is exported, beside sizes, and torch.export does not note.

Strides, contiguity, gradients, devices, modes: torch.export answers as its own tensors are, and what follows from the
answer is in the graph for good. Each question of the user's own code (not of torch's) becomes a condition on the
inputs, or stops the capture where no condition can be written. Whether something is being compiled is answered as
eager does: it is not.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfuse.capture.example_inputs import Part, parts
from fxfuse.refusal import CaptureError

_OURS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep)
_LAYOUT = {"stride", "is_contiguous", "storage_offset", "is_non_overlapping_and_dense"}
_GRADIENT = {"requires_grad", "is_leaf", "is_inference"}
_DEVICE = {"device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "get_device"}
_NEVER = {"data_ptr", "untyped_storage", "storage", "_version", "grad", "grad_fn", "_base", "_is_view", "is_pinned"}
_NEVER |= {"is_shared", "_grad", "retains_grad", "output_nr", "is_set_to", "_backward_hooks"}
# Functions that ask for no tensor: what they are answered, and the condition for it.
_MODES: dict[str, Any] = {
    "is_grad_enabled": False,
    "is_inference_mode_enabled": False,
    "is_autocast_enabled": False,
    "is_autocast_cpu_enabled": False,
    "get_autocast_dtype": None,  # as it is
}


def of_user(frame: FrameType | None) -> bool:
    """Whether a frame runs code that is neither torch's nor of this package."""
    return frame is not None and not frame.f_code.co_filename.startswith((*_OURS, "<"))


@dataclass
class Asked:
    """What the answers need to be true, as Python expressions, each with the line that asked.

    `modes` are those that no graph can check, as they are none on its inputs or on more than their metadata.
    """

    conditions: dict[str, str] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)


class Questions(TorchFunctionMode):
    """Notes in `asked` what the forward of a model asks of tensors and modes on `inputs`."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], asked: Asked) -> None:
        super().__init__()
        self.conditions, self.modes = asked.conditions, asked.modes
        self.strides = {p.name: strides(p.name, p.value) for p in parts(model, inputs) if isinstance(p.value, Tensor)}
        self.over: Callable[[], None] = lambda: None
        self.inputs: list[Part] = []
        self.computed: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_dynamo_compiling():  # for one of torch's control flow operators
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.__self__.__name__ if getattr(func, "__name__", "") == "__get__" else getattr(func, "__name__", "")
        frame = sys._getframe(1)
        if args and isinstance(args[0], Tensor) and name in _LAYOUT | _GRADIENT | _DEVICE | _NEVER and of_user(frame):
            self._ask(name, args[0], (args[1:], kwargs or {}), result, place(frame))
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not any(tensor is p.value for p in self.inputs):
                self.computed[id(tensor)] = weakref.ref(tensor), place(frame)
        return result

    def kept(self) -> list[str]:
        """Where those tensors were made that Python still holds although the forward is over: state.

        What only autograd holds, for a gradient of the outputs, is none.
        """
        if any(made() is not None for made, _ in self.computed.values()):
            gc.collect()
        alive = [(tensor, where) for made, where in self.computed.values() if (tensor := made()) is not None]
        return [pair[1] for pair in alive if any(holder is not pair for holder in gc.get_referrers(pair[0]))]

    def _ask(self, name: str, tensor: Tensor, given: Any, answer: Any, where: str) -> None:
        part = next((p for p in self.inputs if p.value is tensor), None)
        made = self.computed.get(id(tensor))
        computed = part is None and made is not None and made[0]() is tensor
        if part is None and not computed:
            if name == "data_ptr":
                raise CaptureError(
                    f"the forward asks for the data_ptr of a tensor ({where}), which a graph cannot hold"
                )
            return  # of the model itself, whose tensors are as they are
        if name in _DEVICE:
            for p in [part] if part is not None else self.inputs:
                self.conditions.setdefault(f"{p.name}.device.type == {p.value.device.type!r}", where)
        elif name in _NEVER or (computed and name in _GRADIENT):
            whose = "a computed tensor" if part is None else part.name
            raise CaptureError(f"the forward asks for {name} of {whose} ({where}), which is not the same at every call")
        elif name in _GRADIENT:
            call = "()" if name == "is_inference" else ""
            self.conditions.setdefault(f"{part.name}.{name}{call} == {bool(answer)}", where)  # type: ignore[union-attr]
        elif part is not None and name == "is_contiguous" and not given[0]:
            self.conditions.setdefault(f"{part.name}.is_contiguous({_format(given[1])}) == {bool(answer)}", where)
        elif part is not None and name == "storage_offset":
            self.conditions.setdefault(f"{part.name}.storage_offset() == {int(answer)}", where)
        else:
            for p in [part] if part is not None else self.inputs:
                if p.value.dim() and not self.strides[p.name]:
                    raise CaptureError(f"the forward asks for {name} ({where}), and {p.name} is not dense")
                self.conditions.update(dict.fromkeys(self.strides[p.name], where) | self.conditions)

    @contextmanager
    def asked_by(self, model: nn.Module) -> Iterator[None]:
        """Listen to the forward of `model`, as soon as it is called; `self.over` runs at its end."""
        forward, before = model.forward, vars(model).get("forward")

        def listening(*args: Any, **kwargs: Any) -> Any:
            if self.inputs:  # the forward calls itself
                return forward(*args, **kwargs)
            self.inputs = [p for p in parts(model, (*args, *kwargs.values())) if isinstance(p.value, Tensor)]
            with self:
                result = forward(*args, **kwargs)
            self.over()
            return result

        listening.__wrapped__ = forward  # type: ignore[attr-defined]  # whose signature torch.export asks for
        vars(model)["forward"] = listening
        try:
            with self._functions():
                yield
        finally:
            del vars(model)["forward"]
            if before is not None:
                vars(model)["forward"] = before

    @contextmanager
    def _functions(self) -> Iterator[None]:
        """The functions that ask for modes answer the user's code as eager would, whatever name it has for them."""
        answers = dict[int, Any]()
        for name in _MODES:
            function = getattr(torch, name)
            answers[id(function)] = (function, _constant(self._mode(name, function)))
        classes: Any = type(nn.Parameter)
        with ExitStack() as stack:
            for module in list(sys.modules.values()):
                for name, value in list(getattr(module, "__dict__", {}).items()):
                    if id(value) in answers and module.__name__ != __name__:
                        stack.enter_context(patch.object(module, name, answers[id(value)][1]))
            for function, code in _COMPILING.items():  # whoever holds them, by whatever name
                stack.callback(setattr, function, "__code__", function.__code__)
                function.__code__ = code
            stack.enter_context(patch.object(classes, "__instancecheck__", self._kind(classes.__instancecheck__)))
            yield

    def _mode(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        exporting = threading.get_ident()  # other threads get their own answers

        def asked(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            if not of_user(frame) or threading.get_ident() != exporting:
                return function(*args, **kwargs)
            answer = function(*args, **kwargs) if _MODES[name] is None else _MODES[name]
            self.modes.setdefault(f"torch.{name}({', '.join(map(repr, args))}) == {answer!r}", place(frame))
            return answer

        return asked

    def _kind(self, original: Callable[..., bool]) -> Callable[..., bool]:
        def asked(cls: Any, instance: Any) -> bool:
            answer = original(cls, instance)
            frame = sys._getframe(1)
            if cls is nn.Parameter and of_user(frame):
                for part in self.inputs:
                    if part.value is instance:
                        self.modes.setdefault(f"isinstance({part.name}, torch.nn.Parameter) == {answer}", place(frame))
            return answer

        return asked


def _is_compiling() -> bool:
    """What torch.compiler.is_compiling runs while a model is exported, in its own module."""
    import sys

    import torch

    from fxfuse.capture.export.questions import of_user

    return not of_user(sys._getframe(1)) and bool(torch.compiler._is_compiling_flag)


def _is_exporting() -> bool:
    import sys

    import torch

    from fxfuse.capture.export.questions import of_user

    return not of_user(sys._getframe(1)) and bool(torch.compiler._is_exporting_flag)


_COMPILING: dict[Any, CodeType] = {
    torch.compiler.is_compiling: _is_compiling.__code__,
    torch._utils.is_compiling: _is_compiling.__code__,
    torch.compiler.is_exporting: _is_exporting.__code__,
}


def _constant(function: Any) -> Any:
    """Dynamo, which torch's control flow operators run, takes the answer as it is instead of reading the code."""
    function._dynamo_marked_constant = True
    return function


def place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _format(kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in kwargs.items())


def strides(name: str, tensor: Tensor) -> Sequence[str]:
    """That a tensor's strides follow from its sizes the way they do now, as conditions; empty where they don't."""
    rank = tensor.dim()
    channels_last = [(0, *range(2, rank), 1)] if rank in (4, 5) else []
    for order in (tuple(range(rank)), *channels_last):
        inner = 1
        sizes: list[str] = []
        texts = []
        for dim in reversed(order):
            if tensor.stride(dim) != inner:
                break
            texts.append(f"{name}.stride({dim}) == {' * '.join(sizes) or '1'}")
            sizes.append(f"{name}.size({dim})")
            inner = inner * tensor.size(dim)
        if len(texts) == rank:
            return [*texts, f"{name}.storage_offset() == 0"]
    return []
