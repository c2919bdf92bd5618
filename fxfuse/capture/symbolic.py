"""Capture: any traceable module becomes one torch.fx graph, and the module stays as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxfuse.capture.captured import Captured as Captured
from fxfuse.capture.failures import cannot, located
from fxfuse.capture.guards import RealTensors, unchanged
from fxfuse.capture.tracer import CHECKED
from fxfuse.capture.tracer import FuseTracer as FuseTracer
from fxfuse.refusal import CaptureError, Refusal


def capture(
    model: nn.Module, inputs: tuple[Any, ...] | None = None, *, given: int | None = None, nested: bool = False
) -> Captured:
    """Trace `model` with torch.fx; a submodule that does not trace stays whole.

    Parameters of the forward with a default are taken to have it, unless `inputs` set them or the graph
    is the same for every value; the graph checks that when it runs. With `nested` the module may be called
    in any way: unless the calls are known to give `given` arguments and no more, its graph has to be the
    same for every value.

    Raises:
        CaptureError: the model itself does not trace; the message names the line that stopped it.
    """
    _refuse_more_than_forward(model)
    known = not nested or given is not None
    if given is None:  # those after the last tensor left out
        given = max((i for i, v in enumerate(inputs or (), 1) if isinstance(v, Tensor)), default=0)
    error: Exception | None = None
    for proxy_buffers in (True, False):
        try:
            fixed = _trace(model, FuseTracer(proxy_buffers, given))
        except Exception as e:  # what a forward raises on proxies can be anything
            error = error or e
            continue
        names = {str(n.target) for n in fixed.graph.nodes if n.op == "placeholder" and CHECKED in n.meta}
        general = _general(model, fixed, proxy_buffers, names) if names else fixed
        if general is None and not known:
            text = f"its graph depends on {', '.join(sorted(names))}, which the call may set"
            raise CaptureError(f"{type(model).__name__} cannot be traced: {text}", text)
        return general or fixed
    assert error is not None
    raise cannot(model, "traced", error) from error


def _general(model: nn.Module, fixed: Captured, proxy_buffers: bool, names: set[str]) -> Captured | None:
    """The graph with the parameters `names` open, where that changes nothing in it."""
    try:
        general = _trace(model, FuseTracer(proxy_buffers))
    except Exception:  # it traces with its defaults alone
        return None
    return general if _signature(general.graph, names) == _signature(fixed.graph, names) else None


def stays(path: str, place: str) -> Refusal:
    """What the report says of a module whose forward stays Python; `place` is the line that stopped the trace."""
    remedy = "make its forward independent of its input's data and size, and free of side effects"
    return Refusal("the module stays Python: its forward cannot be traced", path, remedy, place)


def unusable(model: nn.Module) -> None:
    """Raises CaptureError for a model that no way of capturing can do anything about yet."""
    name = type(model).__name__
    if model.__dict__.get("_compiled_call_impl") is not None:
        raise CaptureError(f"{name} was compiled in place; optimize it before calling .compile()")
    if any(nn.parameter.is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise CaptureError(f"{name} has lazy parameters that no input has shaped yet; run it once first")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise CaptureError('the model was compiled; optimize it before torch.compile, or use backend="fxfuse"')
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        raise CaptureError("a global module hook is registered, which fused layers would skip; remove it first")


def _refuse_more_than_forward(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{name} is a scripted module, which has no forward in Python; optimize it before scripting")
    if "forward" in model.__dict__:
        raise CaptureError(
            f"{name} has a forward set on the instance, which tracing would ignore; define it on the class"
        )
    calls = type(model)._call_impl is not nn.Module._call_impl
    if calls or not (type(model).__call__ is nn.Module.__call__ or isinstance(model, GraphModule)):
        raise CaptureError(f"{name} has a __call__ of its own, which tracing would ignore; put it into forward")


def _trace(model: nn.Module, tracer: FuseTracer) -> Captured:
    created: dict[str, Any] = {}
    with unchanged(model, created), RealTensors(model), torch.enable_grad():
        graph = tracer.trace(model)
    for node in graph.nodes:
        if isinstance(node.type, str):  # an unresolved annotation, which could not be pickled
            node.type = None
    tensors = {n: t for n, t in created.items() if isinstance(t, Tensor)}
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    whole = {p: located(e) for p, e in tracer.whole.items() if p in called}
    return Captured(graph, model, tensors, whole=whole)


def _signature(graph: Graph, names: set[str]) -> list[Any]:
    """What a graph computes when the parameters `names` have their defaults, for comparison."""
    seen: dict[Node, Any] = {}
    found: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in names:
            seen[node] = node.args[0]
        elif CHECKED not in node.meta:
            args = torch.fx.map_arg((node.args, node.kwargs), lambda n: seen[n])
            found.append((node.op, str(node.target), repr(args)))
            seen[node] = f"%{len(found)}"
    return found
