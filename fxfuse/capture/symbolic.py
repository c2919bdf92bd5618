"""Capture: any traceable module becomes one torch.fx graph, and the module stays as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.jit._trace import TopLevelTracedModule

from fxfuse.capture.captured import Captured as Captured
from fxfuse.capture.failures import cannot
from fxfuse.capture.guards import RealTensors, nothing_set
from fxfuse.capture.shadow import Shadow
from fxfuse.capture.tracer import CHECKED
from fxfuse.capture.tracer import FuseTracer as FuseTracer
from fxfuse.guarded import Form
from fxfuse.ops.modules import has_hooks
from fxfuse.refusal import CaptureError, Refusal


def capture(
    model: nn.Module,
    inputs: tuple[Any, ...] | None = None,
    *,
    given: int | None = None,
    nested: bool = False,
    none: frozenset[str] | None = None,
) -> Captured:
    """Trace `model` with torch.fx; a submodule that does not trace stays whole.

    Parameters of the forward with a default are taken to have it, unless `inputs` set them or the graph
    is the same for every value; the graph checks that when it runs. With `nested` the module may be called
    in any way: unless the calls are known to give `given` arguments and no more, its graph has to be the
    same for every value. With `none` these parameters are None, and others among the first `given`, or all, are given.

    Raises:
        CaptureError: the model itself does not trace; the message names the line that stopped it.
    """
    _refuse_more_than_forward(model)
    known = not nested or given is not None
    if given is None and none is None:  # those after the last tensor left out
        given = max((i for i, v in enumerate(inputs or (), 1) if isinstance(v, Tensor)), default=0)
    error: Exception | None = None
    for proxy_buffers in (True, False):
        try:
            traced = _trace(model, FuseTracer(proxy_buffers, given, none or frozenset()))
        except Exception as e:  # what a forward raises on proxies can be anything
            error = error or e
            continue
        if none is not None:
            return traced
        names = {str(n.target) for n in traced.graph.nodes if n.op == "placeholder" and CHECKED in n.meta}
        general = _general(model, traced, proxy_buffers, names) if names else traced
        if general is None and not known:
            text = f"its graph depends on {', '.join(sorted(names))}, which the call may set"
            raise CaptureError(f"{type(model).__name__} cannot be traced: {text}", text)
        if asked := _asked_for_none(model, general or traced, proxy_buffers, given):
            text = f"its forward asks whether {asked} is None, and a graph is for the one or the other"
            raise CaptureError(f"{type(model).__name__} cannot be traced: {text}", text)
        nodes = (general or traced).graph.find_nodes(op="placeholder")
        free = (str(n.target) for n in nodes if n.args and CHECKED not in n.meta)
        return replace(general or traced, free=frozenset(free))
    assert error is not None
    raise cannot(model, "traced", error) from error


def form(captured: Captured) -> Form:
    """The kind of call that a graph is for."""
    nodes = captured.graph.find_nodes(op="placeholder")
    fixed = tuple((str(n.target), n.meta[CHECKED]) for n in nodes if CHECKED in n.meta)
    return Form(tuple(str(n.target) for n in nodes), fixed, captured.free)


def _asked_for_none(model: nn.Module, traced: Captured, proxy_buffers: bool, given: int | None) -> str:
    """The first parameter that the forward treats as another when it is None: a trace cannot see `is`."""
    open_ones = [str(n.target) for n in traced.graph.find_nodes(op="placeholder") if CHECKED not in n.meta]
    fixed = {str(n.target) for n in traced.graph.find_nodes(op="placeholder") if CHECKED in n.meta}
    for name in open_ones if len(open_ones) > 1 else ():
        if name.startswith("*"):
            continue
        try:
            other = _trace(model, FuseTracer(proxy_buffers, given if fixed else None, frozenset({name})))
        except Exception:  # it does not take None
            continue
        if _signature(other.graph, {name, *fixed}, name) != _signature(traced.graph, {name, *fixed}, name):
            return name
    return ""


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
        how, made = ("traced", "trace") if isinstance(model, TopLevelTracedModule) else ("scripted", "script")
        raise CaptureError(f"{name} is {how} and has no forward in Python; optimize the model before torch.jit.{made}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise CaptureError(f"{name} hands its inputs on to the model that it wraps; optimize that, model.module")
    if "forward" in model.__dict__:
        raise CaptureError(
            f"{name} has a forward set on the instance, which tracing would ignore; define it on the class"
        )
    calls = type(model)._call_impl is not nn.Module._call_impl
    if calls or not (type(model).__call__ is nn.Module.__call__ or isinstance(model, GraphModule)):
        raise CaptureError(f"{name} has a __call__ of its own, which tracing would ignore; put it into forward")


def _trace(model: nn.Module, tracer: FuseTracer) -> Captured:
    """One trace, on a shadow of the model; submodules that leave it changed stay whole."""
    shadow = Shadow(model)
    while True:
        try:
            with nothing_set(shadow.root), RealTensors(model), torch.enable_grad():
                graph = tracer.trace(shadow.root)
        finally:
            own = vars(shadow.root)
            created = {n: own.pop(n) for n in list(own) if n not in vars(model) and n.startswith("_tensor_constant")}
            changes = shadow.changed()
        if not changes:
            break
        text = f"the forward changes {changes[0]}, which a graph does not repeat"
        owner = _owner(model, changes[0])
        if not owner or owner in tracer.whole:
            raise CaptureError(text)
        tracer.whole[owner] = text  # and once more, with that module as one call
    for node in graph.nodes:
        if isinstance(node.type, str):  # an unresolved annotation, which could not be pickled
            node.type = None
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    hooked = next((p for p in called if has_hooks(model.get_submodule(p))), None)
    if created and hooked:
        raise CaptureError(f"the forward reads a tensor of no module, which a hook of {hooked} may set")
    whole = {path: reason for path, reason in tracer.whole.items() if path in called}
    return Captured(graph, model, created, whole=whole, held=dict(tracer.known.decided))


def _owner(model: nn.Module, changed: str) -> str:
    """Path of the innermost submodule that holds what was changed, by the name that a shadow gives it."""
    paths = (p for p, _ in model.named_modules() if p and changed.startswith((f"self.{p}.", f"self.{p}[")))
    return max(paths, key=len, default="")


def _signature(graph: Graph, names: set[str], none: str = "") -> list[Any]:
    """What a graph computes when the parameters `names` have their defaults, and `none` is None, for comparison."""
    seen: dict[Node, Any] = {}
    found: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in names:
            seen[node] = None if node.target == none else node.meta.get(CHECKED, node.args[0] if node.args else None)
        elif CHECKED not in node.meta:
            args = torch.fx.map_arg((node.args, node.kwargs), lambda n: seen[n])
            found.append((node.op, str(node.target), repr(args)))
            seen[node] = f"%{len(found)}"
    return found
