"""The pipeline: capture, view, regions, plan, rewrite, verify, report."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from .capture import capture
from .constants import model_values
from .cost import CostFunction, cost_name, resolve
from .materialize import tensors
from .pattern import Selection, select
from .plan import Fuse, Plan, Planner, Rejoin, Segment
from .record import Operator
from .refusal import Refusal
from .regions import Join, Step
from .report import Fired, Report, Totals
from .rewrite import Recipe, Rewriter, drop_identities
from .shapes import as_tuple, propagate
from .verify import verify as compare
from .view import View, look

logger = logging.getLogger("fxfuse")
STORE = "_fxfuse"


def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str] | str | None = None,
    cost: str | CostFunction = "macs",
    verify: bool | float | None = None,
) -> GraphModule:
    """A GraphModule that computes what `model` computes in eval mode, with fewer and cheaper layers.

    The model is not changed and shares no tensor with the result. Fused layers are ordinary nn.Conv*,
    nn.ConvTranspose* and nn.Linear modules under the path of what they replace; their weights are
    computed in float64 and rounded once.

    Args:
        model: any module that torch.fx can trace, in eval mode.
        example_inputs: a tensor, or a tuple of positional arguments. They settle ranks that the layers
            alone leave open, give exact costs, and are needed for `verify`. They are not run, unless
            `verify` asks for it, and the result is not specialised to their sizes.
        patterns: names to use (default all); "-name" leaves one out, "name!" fuses whatever it costs.
        cost: "macs" (default), "nodes", "params", or a callable (operator, output positions) -> number.
            A merge is made when the cost does not rise; executed nodes break ties.
        verify: True compares outputs on the example inputs; a number is the relative tolerance.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: the model is in training mode; an unknown pattern or cost; `verify` without example
            inputs; example inputs that the model does not run on.
        CaptureError: the model cannot be traced.
        VerificationError: `verify` found a difference beyond the tolerance.
    """
    started = time.perf_counter()
    inputs = as_tuple(example_inputs)
    if verify and inputs is None:
        raise ValueError("verify needs example_inputs to run the model on")
    view, before, found = _analyse(model, inputs, patterns, cost)
    rewriter = Rewriter(view)
    done, recipes = rewriter.apply(found)
    fused = rewriter.build()
    fired = _fired(done, view, rewriter.names)
    if before.macs is not None:
        saved = sum((f.macs_before or 0) - (f.macs_after or 0) for f in fired)
        macs = round(before.macs - saved)
    else:
        macs = None
    after = replace(_totals(fused.graph, fused), macs=macs)
    error = None
    if verify and inputs is not None:
        error = compare(model, fused, inputs, None if verify is True else float(verify))
    report = Report(
        model=type(model).__name__,
        fired=fired,
        refused=done.refusals,
        before=before,
        after=after,
        cost=cost_name(cost),
        seconds=time.perf_counter() - started,
        capture=view.captured.how,
        max_error=error,
    )
    _store(fused, report, recipes, view.captured.constants)
    logger.info("%s", report._headline())
    return fused


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str] | str | None = None,
    cost: str | CostFunction = "macs",
) -> Report:
    """What `optimize` would do, without computing a weight or building a model. Raises as `optimize`."""
    started = time.perf_counter()
    view, before, found = _analyse(model, as_tuple(example_inputs), patterns, cost)
    fired = _fired(found, view, {})
    removed = Counter(b.split(" ")[0] for f in fired for b in f.before)
    saved_macs = sum((f.macs_before or 0) - (f.macs_after or 0) for f in fired)
    saved_nodes = sum(len(f.before) - 1 for f in fired)
    ops = Counter(before.ops)
    after = Totals(
        before.nodes - saved_nodes,
        before.params,
        None if before.macs is None else round(before.macs - saved_macs),
        dict(ops),
    )
    del removed
    return Report(
        type(model).__name__, fired, found.refusals, before, after, cost_name(cost),
        time.perf_counter() - started, view.captured.how, dry_run=True,
    )  # fmt: skip


def report(fused: nn.Module) -> Report:
    """The report of a module that `optimize` returned, also after deepcopy or pickling.

    Raises:
        TypeError: the module does not come from `optimize`.
    """
    stored = _stored(fused)
    if stored is None:
        raise TypeError(f"{type(fused).__name__} does not come from fxfuse.optimize: there is no report on it")
    result: Report = stored["report"]
    return result


def refresh(fused: GraphModule, model: nn.Module) -> GraphModule:
    """Give `fused` the weights that `model` has now, in place, without planning again; returns `fused`.

    `model` is the module `fused` was made of, or one with the same structure, in eval mode.

    Raises:
        TypeError: `fused` does not come from `optimize`.
        ValueError: `model` lacks a weight, holds it in another shape, or a merged weight is not finite.
    """
    stored = _stored(fused)
    if stored is None:
        raise TypeError(f"{type(fused).__name__} does not come from fxfuse.optimize: it cannot be refreshed")
    values = model_values(model, stored["constants"])
    fresh: dict[str, torch.Tensor] = {}
    for recipe in stored["recipes"]:
        try:
            numbers = tensors(recipe.op, values)
        except AttributeError as error:
            raise ValueError(f"{type(model).__name__} does not match: {error}") from error
        if isinstance(numbers, Refusal):
            raise ValueError(str(numbers.at(recipe.target)))
        fresh[f"{recipe.target}.weight"] = numbers[0]
        if numbers[1] is not None:
            fresh[f"{recipe.target}.bias"] = numbers[1]
    source = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    targets = dict(fused.named_parameters(remove_duplicate=False)) | dict(fused.named_buffers(remove_duplicate=False))
    pairs = {}
    for name, target in targets.items():
        value = fresh.get(name, source.get(name))
        if value is None and name in stored["constants"]:
            continue
        if value is None or value.shape != target.shape:
            raise ValueError(f"{type(model).__name__} does not match at {name}: is it the model that was optimized?")
        pairs[name] = value
    with torch.no_grad():
        for name, value in pairs.items():
            targets[name].copy_(value)
    return fused


def _analyse(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    patterns: Iterable[str] | str | None,
    cost: str | CostFunction,
) -> tuple[View, Totals, Plan]:
    """Everything up to the plan; raises on bad arguments before anything else happens."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes an nn.Module, not {type(model).__name__}")
    selection, price = select(patterns), resolve(cost)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    captured = capture(model)
    shapes = propagate(captured, inputs)
    nodes = len(captured.graph.nodes)
    drop_identities(captured)
    view = look(captured, shapes)
    totals = replace(_totals(captured.graph, model), nodes=nodes, macs=_macs(view))
    return view, totals, _plan(view, selection, price)


def _plan(view: View, selection: Selection, price: CostFunction) -> Plan:
    return Planner(view, selection, price).run()


def _store(fused: GraphModule, report: Report, recipes: tuple[Recipe, ...], constants: dict[str, Any]) -> None:
    """Keep the report where deepcopy (meta) and pickle (attributes) both find it."""
    content = {"report": report, "recipes": recipes, "constants": constants}
    fused.meta[STORE] = content
    setattr(fused, STORE, content)


def _stored(fused: nn.Module) -> dict[str, Any] | None:
    content = getattr(fused, STORE, None) or getattr(fused, "meta", {}).get(STORE)
    return content if isinstance(content, dict) else None


def _totals(graph: Graph, model: nn.Module) -> Totals:
    """Nodes, parameters and executed operations by kind."""
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = ("call_function", "call_method", "call_module")
    ops = Counter(_kind(n, modules) for n in graph.nodes if n.op in calls)
    params = sum(p.numel() for p in model.parameters())
    return Totals(len(graph.nodes), params, None, dict(sorted(ops.items())))


def _kind(node: Node, modules: dict[str, nn.Module]) -> str:
    """One name for all spellings: conv for nn.Conv2d, F.conv2d and torch.conv1d alike."""
    if node.op == "call_module":
        name = type(modules[str(node.target)]).__name__
    else:
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    flat = name.strip("_").lower()
    for kind in ("batchnorm", "batch_norm"):
        if flat.startswith(kind):
            return "batch_norm"
    if flat.startswith("conv"):
        return "conv"
    return {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div"}.get(flat, flat)


def _macs(view: View) -> int | None:
    """Multiply-accumulates of all convolutions and linear layers, where shapes are known."""
    if not view.shapes:
        return None
    return sum(
        view.shapes[node].numel() // affine.op.out_channels * affine.op.macs
        for node, affine in view.affine.items()
        if affine.op.weighted and node in view.shapes
    )


def _fired(found: Plan, view: View, names: dict[Operator, str]) -> tuple[Fired, ...]:
    return tuple(_describe(fuse, view, names) for site in found.sites for fuse in _fuses(site.segments))


def _fuses(segments: Iterable[Segment]) -> list[Fuse]:
    found: list[Fuse] = []
    for segment in segments:
        if isinstance(segment, Fuse):
            found.append(segment)
        elif isinstance(segment, Rejoin):
            found += [f for piece in segment.pieces for f in _fuses(piece)]
    return found


def _describe(fuse: Fuse, view: View, names: dict[Operator, str]) -> Fired:
    before: list[str] = []
    macs = 0

    def walk(part: Step | Join) -> None:
        nonlocal macs
        if isinstance(part, Join):
            for branch in part.branches:
                if not branch.parts:
                    before.append("identity")
                for inner in branch.parts:
                    walk(inner)
        elif part.node is not None:
            name = part.op.law if part.op.law == "batch_norm" else ""
            text = part.op.describe()
            before.append(text.replace("scale", name, 1) if name else text)
            if part.node in view.shapes and part.op.weighted:
                macs += view.shapes[part.node].numel() // part.op.out_channels * part.op.macs

    for part in fuse.parts:
        walk(part)
    exits = [p.node for p in fuse.parts if p.node is not None]
    after = None
    if exits and exits[-1] in view.shapes:
        after = view.shapes[exits[-1]].numel() // fuse.op.out_channels * fuse.op.macs
    path = names.get(fuse.op, fuse.op.path)
    known = after is not None
    return Fired(
        path, tuple(dict.fromkeys(fuse.op.applied)), tuple(before), fuse.op.describe(), macs if known else None, after
    )
