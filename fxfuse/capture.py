"""Capture: any traceable module becomes one torch.fx graph, and the module stays as it was."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer

from .refusal import CaptureError

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class _Proxy(Proxy):
    """A proxy that also records `x[i] = v`, which torch's own cannot."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class FuseTracer(Tracer):
    """Records item assignment; keeps every module whose call is more than its forward whole."""

    def __init__(self, proxy_buffers: bool = True) -> None:
        super().__init__()
        self.proxy_buffer_attributes = proxy_buffers

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_hooks(m) or "forward" in m.__dict__ or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise CaptureError("the forward enters torch.autocast, which a graph cannot hold")
        return node


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)


@dataclass(frozen=True)
class Captured:
    """One graph, the module it reads its state from, and tensors that only the trace knows."""

    graph: Graph
    root: nn.Module
    constants: dict[str, Tensor] = field(default_factory=dict)
    how: str = "symbolic"


def capture(model: nn.Module) -> Captured:
    """Trace `model` with torch.fx.

    Raises:
        CaptureError: the model does not trace; the message names the line that stopped it.
    """
    if "forward" in model.__dict__:
        raise CaptureError(
            f"{type(model).__name__} has a forward set on the instance, which tracing would ignore; "
            "define it on the class"
        )
    if model.__dict__.get("_compiled_call_impl") is not None:
        raise CaptureError(f"{type(model).__name__} was compiled in place; optimize it before calling .compile()")
    error: Exception | None = None
    for proxy_buffers in (True, False):
        # a forward that branches on a buffer's value traces only when buffers stay tensors
        with _restored(model, copy_buffers=not proxy_buffers) as created:
            tracer = FuseTracer(proxy_buffers)
            try:
                graph = tracer.trace(model)
            except Exception as e:  # what a forward raises on proxies can be anything
                error = error or e
                continue
        for node in graph.nodes:
            if isinstance(node.type, str):  # an unresolved annotation, which could not be pickled
                node.type = None
        tensors = {n: t for n, t in created.items() if isinstance(t, Tensor)}
        return Captured(graph, model, tensors)
    assert error is not None
    raise CaptureError(_explain(model, error)) from error


@contextmanager
def _restored(model: nn.Module, copy_buffers: bool) -> Iterator[dict[str, Any]]:
    """Undo what tracing does to the modules: attributes set, counters raised, buffers written.

    Yields a dict that holds, afterwards, what tracing added to the root: its tensor constants.
    """
    modules = list(model.modules())
    tables = ("_parameters", "_buffers", "_modules")
    saved = [(m, dict(m.__dict__), [dict(m.__dict__[t]) for t in tables]) for m in modules]
    buffers = [(b, b.clone()) for b in model.buffers()] if copy_buffers else []
    grad = torch.is_grad_enabled()
    created: dict[str, Any] = {}
    try:
        yield created
    finally:
        torch.set_grad_enabled(grad)
        created.update({k: v for k, v in model.__dict__.items() if k not in saved[0][1]})
        for module, attributes, contents in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, content in zip(tables, contents, strict=True):
                module.__dict__[table].clear()
                module.__dict__[table].update(content)
        with torch.no_grad():
            for buffer, copy in buffers:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


def _explain(model: nn.Module, error: Exception) -> str:
    """One line: the innermost line of the user's own code, and what to do about it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith("<")]
    own = [f for f in own if f.filename != __file__]
    place = f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`" if own else "unknown line"
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    return (
        f"{type(model).__name__} cannot be traced at {place}: {reason.rstrip('.')}; optimize the submodules "
        "around that line one by one, or make the line independent of its input's data and size"
    )
