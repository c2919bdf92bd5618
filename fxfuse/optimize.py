"""`optimize`, `plan` and `report`, as users call them: arguments checked, the result verified and its report kept."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fxfuse.capture.example_inputs import as_tuple
from fxfuse.capture.symbolic import unusable
from fxfuse.cost import CostFunction, cost_name, resolve
from fxfuse.pattern import Selection, select
from fxfuse.process import undisturbed
from fxfuse.refresh import store, stored
from fxfuse.reporting.report import Report, Reports
from fxfuse.reporting.verify import ROUNDING, Rounding
from fxfuse.reporting.verify import verify as compare
from fxfuse.whole_model import fuse_parts

logger = logging.getLogger("fxfuse")


P = ParamSpec("P")
R = TypeVar("R")


def _undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """One call at a time in a process, and none of the caller's modes in it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with undisturbed(args[0] if args else kwargs.get("model")):
            return function(*args, **kwargs)

    return call


@_undisturbed
def optimize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    patterns: Iterable[str] | str | None = None,
    cost: str | CostFunction = "macs",
    verify: bool | float | None = None,
    capture: str | None = None,
) -> nn.Module:
    """A GraphModule that computes what `model` computes in eval mode, with fewer and cheaper layers.

    Where the model's forward cannot be one graph the result is a copy of the model in which the largest
    submodules that can be are replaced. The model is not changed and shares no tensor with the result.
    Fused layers are ordinary nn.Conv*, nn.ConvTranspose* and nn.Linear modules, or `framed` convolutions,
    under the path of what they replace; their weights are computed in float64 and rounded once.

    Args:
        model: any module in eval mode.
        example_inputs: a tensor, a tuple of arguments in the order of the forward's parameters, or a dict of
            arguments by their names. They settle ranks that the layers alone leave open and give exact costs. A
            shadow of the model is run on them, call by call beside what was captured; the result is not
            specialised to their sizes.
        patterns: names to use (default all); "-name" leaves one out, "name!" fuses whatever it costs.
        cost: "macs" (default), "nodes", "params", or a callable (operator, output positions) -> number.
            A merge is made where the cost does not rise; executed nodes break ties.
        verify: compares outputs on the example inputs, which is the default where there are any; a number is the
            relative tolerance. False switches that off, and the second opinion on what was captured.
        capture: how to get at the graph. "symbolic" traces with torch.fx, "export" uses torch.export on the
            example inputs, "hierarchical" keeps the model's own forward and takes its submodules. Default
            is the first of these that works; export only where its graph holds for every batch and size.

    Raises:
        TypeError: `model` is no nn.Module, such as an ExportedProgram.
        ValueError: the model is in training mode; an unknown pattern, cost or capture; `verify` without
            example inputs; example inputs that the model does not run on.
        CaptureError: the way of capture asked for does not work on this model; or the model is compiled
            already, has parameters without a shape, or a global module hook is registered.
        VerificationError: `verify` found a difference beyond the tolerance.
    """
    started = time.perf_counter()
    inputs = as_tuple(model, example_inputs)
    if verify and inputs is None:
        raise ValueError("verify needs example_inputs to run the model on")
    parts = fuse_parts(model, inputs, *_checked(model, patterns, cost), capture, False, verify is not False)
    fused = parts.module()
    error = None
    if verify is not False and inputs is not None:
        tolerance = None if verify in (None, True) else float(verify)
        error = compare(model, fused, inputs, tolerance, parts.root.how)
    report = parts.report(cost_name(cost), started, fused, error)
    if isinstance(error, Rounding):
        report = replace(report, notes=(ROUNDING,))
    store(fused, report, parts.replays)
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
    parts = fuse_parts(model, as_tuple(model, example_inputs), *_checked(model, patterns, cost), capture, dry_run=True)
    return parts.report(cost_name(cost), started)


def report(fused: nn.Module) -> Any:
    """The `Report` of a module that `optimize` returned, also after deepcopy or pickling.

    For a module compiled by torch.compile with backend "fxfuse", or with such parts, the reports of its
    graphs, in the order in which they were compiled; they are there after the first call.

    Raises:
        TypeError: the module does not come from `optimize`, and no graph of it was compiled by fxfuse.
    """
    # Who has no compiled graph need not wait for torch._dynamo, which the backend imports and which takes seconds.
    compiled = sys.modules.get("fxfuse.compiling.backend")
    found = compiled.reports(fused) if compiled is not None and isinstance(fused, nn.Module) else ()
    if found:
        return Reports(found)
    return stored(fused)["report"]


def _checked(
    model: Any, patterns: Iterable[str] | str | None, cost: str | CostFunction
) -> tuple[Selection, CostFunction]:
    """The patterns and the cost meant; raises on bad arguments before anything else happens."""
    if not isinstance(model, nn.Module):
        remedy = "; pass program.module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise TypeError(f"fxfuse takes an nn.Module, not {type(model).__name__}{remedy}")
    selection, price = select(patterns), resolve(cost)
    unusable(model)
    exported = "eval" in vars(model)  # as torch.export's modules: their graph holds the mode, and eval() raises
    if model.training and not exported:
        wraps = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        remedy = "pass what it wraps, model.module, in eval mode" if wraps else "call model.eval() first"
        raise ValueError(f"{type(model).__name__} is in training mode: {remedy}")
    return selection, price
