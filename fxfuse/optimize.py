"""The pipeline: capture, view, regions, plan, rewrite, verify, report."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.fx import GraphModule

from . import describe
from .capture import capture as captured_by
from .cost import CostFunction, cost_name, resolve
from .pattern import select
from .plan import Plan, Planner
from .refresh import store, stored
from .report import Fired, Report, Totals
from .rewrite import Rewriter, drop_identities
from .shapes import as_tuple, propagate
from .verify import verify as compare
from .view import View, look

logger = logging.getLogger("fxfuse")
Function = TypeVar("Function", bound=Callable[..., Any])


def _undisturbed(function: Function) -> Function:
    """Without garbage collection and inference mode.

    Graphs are all cycles, and walking them again and again while they grow takes longer than making
    them. Parameters made in inference mode could never be trained.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.inference_mode(False):  # or the new parameters could never be trained
                return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return cast(Function, wrapped)


@_undisturbed
def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str] | str | None = None,
    cost: str | CostFunction = "macs",
    verify: bool | float | None = None,
    capture: str | None = None,
) -> GraphModule:
    """A GraphModule that computes what `model` computes in eval mode, with fewer and cheaper layers.

    The model is not changed and shares no tensor with the result. Fused layers are ordinary nn.Conv*,
    nn.ConvTranspose* and nn.Linear modules under the path of what they replace; their weights are
    computed in float64 and rounded once.

    Args:
        model: any module that torch.fx can trace, in eval mode.
        example_inputs: a tensor, or a tuple of positional arguments. They settle ranks that the layers
            alone leave open, give exact costs, and are needed for `verify`. The model is not run on
            them unless `verify` asks for it, and the result is not specialised to their sizes.
        patterns: names to use (default all); "-name" leaves one out, "name!" fuses whatever it costs.
        cost: "macs" (default), "nodes", "params", or a callable (operator, output positions) -> number.
            A merge is made where the cost does not rise; executed nodes break ties.
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
    view, before, planned = _analyse(model, inputs, patterns, cost, capture)
    rewriter = Rewriter(view)
    done, recipes = rewriter.apply(planned)
    fused = rewriter.build()
    params = sum(p.numel() for p in fused.parameters())
    error = None
    if verify and inputs is not None:
        error = compare(model, fused, inputs, None if verify is True else float(verify), capture)
    report = _report(model, view, done, rewriter, before, params, cost_name(cost), started, max_error=error)
    store(fused, report, recipes, view.captured.constants)
    logger.info("%s", report.headline)
    return fused


@_undisturbed
def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str] | str | None = None,
    cost: str | CostFunction = "macs",
    capture: str | None = None,
) -> Report:
    """What `optimize` would do, without reading a weight or building a model. Raises as `optimize`."""
    started = time.perf_counter()
    view, before, planned = _analyse(model, as_tuple(example_inputs), patterns, cost, capture)
    rewriter = Rewriter(view, dry_run=True)
    done, _ = rewriter.apply(planned)
    return _report(model, view, done, rewriter, before, rewriter.params(), cost_name(cost), started, dry_run=True)


def report(fused: nn.Module) -> Report:
    """The report of a module that `optimize` returned, also after deepcopy or pickling.

    Raises:
        TypeError: the module does not come from `optimize`.
    """
    result: Report = stored(fused)["report"]
    return result


def _analyse(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    patterns: Iterable[str] | str | None,
    cost: str | CostFunction,
    how: str | None,
) -> tuple[View, Totals, Plan]:
    """Everything up to the plan; raises on bad arguments before anything else happens."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fxfuse takes an nn.Module, not {type(model).__name__}")
    selection, price = select(patterns), resolve(cost)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    captured = captured_by(model, inputs, how)
    before = describe.totals(captured.graph, captured.modules, sum(p.numel() for p in model.parameters()), None)
    drop_identities(captured)
    view = look(captured, propagate(captured, inputs))
    before = Totals(before.nodes, before.params, describe.macs(view), before.ops)
    return view, before, Planner(view, selection, price).run()


def _report(
    model: nn.Module,
    view: View,
    done: Plan,
    rewriter: Rewriter,
    before: Totals,
    params: int,
    cost: str,
    started: float,
    **fields: Any,
) -> Report:
    fired = describe.fired(done, view, rewriter.names)
    macs = None if before.macs is None else before.macs - sum(map(_saved, fired))
    return Report(
        model=type(model).__name__,
        fired=fired,
        refused=done.refusals,
        before=before,
        after=describe.totals(rewriter.graph, rewriter.modules(), params, macs),
        cost=cost,
        seconds=time.perf_counter() - started,
        capture=view.captured.how,
        **fields,
    )


def _saved(fired: Fired) -> int:
    return (fired.macs_before or 0) - (fired.macs_after or 0)
