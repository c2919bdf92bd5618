"""What a trace sees of calls that no traced value takes part in.

torch.fx sees a call when one of its values is an argument. `torch.zeros(2)` has none: torch.fx would make the tensor
once, at tracing, and every call of the graph would share it. Here such calls become nodes, so that what is fresh in
the model is fresh in the graph. Questions that have no argument at all, such as `torch.is_grad_enabled()`, have
another answer at every call, and raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from fxfuse.capture.guards import Effect
from fxfuse.capture.questions import user_frame
from fxfuse.refusal import CaptureError

# torch reads the sizes of these before anybody could see that they are traced
_FACTORIES = [
    n
    for n in "zeros ones empty full arange range linspace logspace eye rand randn randint randperm tensor as_tensor "
    "scalar_tensor zeros_like ones_like empty_like full_like rand_like randn_like randint_like tril_indices "
    "triu_indices hann_window hamming_window empty_strided complex polar from_numpy".split()
    if hasattr(torch, n)
]
_QUESTIONS = "is_grad_enabled is_inference_mode_enabled is_autocast_enabled is_autocast_cpu_enabled get_default_dtype"


class Unseen(TorchFunctionMode):
    """Sees the calls of a trace that no traced value takes part in: `unseen` says what becomes of them."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(type(v), Proxy) for v in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # which the proxy records
        return self.unseen(func, args, kwargs)

    def unseen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a call on real tensors and numbers alone."""
        raise NotImplementedError


class Recorded(Unseen):
    """Makes nodes of calls on nothing but real tensors and numbers that give a tensor."""

    def unseen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch._C._set_grad_enabled:
            raise CaptureError("the forward switches gradients off or on, which a graph cannot hold")
        try:
            result = func(*args, **kwargs)
            if not any(isinstance(v, Tensor) for v in tree_leaves(result)):
                return self._plain(func, args, result)
        except Effect:  # not now, but whenever the graph runs
            pass
        return self._record(func, args, kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__set__":
            raise CaptureError("the forward assigns to an attribute of a tensor, which a graph cannot hold")
        if name == "__get__":
            return self.tracer.create_proxy("call_function", getattr, (args[0], func.__self__.__name__), {})
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)

    def _plain(self, func: Any, args: Any, result: Any) -> Any:
        """A question to a real tensor; its data are noted as what the graph depends on."""
        if getattr(func, "__name__", "") in ("item", "tolist", "__bool__", "__int__", "__float__", "equal", "allclose"):
            for tensor in (a for a in args if isinstance(a, Tensor)):
                self.tracer.decided_by(tensor)
        return result


@contextmanager
def patched(tracer: Any) -> Iterator[None]:
    """Functions of torch in whose place, meanwhile, the trace is asked."""
    saved = {name: getattr(torch, name) for name in (*_FACTORIES, *_QUESTIONS.split(), "is_tensor")}
    for name in _FACTORIES:
        setattr(torch, name, _recording(tracer, saved[name]))
    for name in _QUESTIONS.split():
        setattr(torch, name, _question(tracer, name, saved[name]))
    torch.is_tensor = _is_tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


def _is_tensor(value: Any) -> bool:
    return value.asked_type() is Tensor if issubclass(type(value), Proxy) else isinstance(value, Tensor)


def _recording(tracer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if user_frame() is None or not tracer.in_its_thread():
            return original(*args, **kwargs)
        return tracer.create_proxy("call_function", original, args, kwargs)

    return make


def _question(tracer: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def ask(*args: Any, **kwargs: Any) -> Any:
        if user_frame() is not None and tracer.in_its_thread():
            raise CaptureError(f"the forward asks torch.{name}(), which is only known when it runs")
        return original(*args, **kwargs)

    return ask
