"""`torch.compile(model, backend="fxfuse")`: the same passes under any inner compiler, never stale."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxfuse.attributes import attribute
from fxfuse.compiling.compiled_graph import Entry, How, Planned, Variants, untouched
from fxfuse.compiling.dynamo_graphs import exposed_state, frozen_state, number_positions, traced
from fxfuse.compiling.inner_compiler import mode_options
from fxfuse.compiling.weight_sets import CHECKS, watch_optimizers
from fxfuse.cost import cost_name, resolve
from fxfuse.pattern import select
from fxfuse.pipeline import fuse
from fxfuse.reporting.report import Report
from fxfuse.rewriting.functional import functional
from fxfuse.rewriting.layers import PARAMETERS

logger = logging.getLogger("fxfuse")
DEFAULTS: dict[str, Any] = {
    "inner": "inductor",
    "inner_options": None,
    "mode": None,
    "patterns": None,
    "cost": "macs",
    "freeze": "auto",
    "check": "full",
    "on_report": None,
    "strict": False,
}
_entries: weakref.WeakSet[Entry] = weakref.WeakSet()
_told = set[str]()


def fxfuse(gm: GraphModule, example_inputs: Sequence[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """A Dynamo backend: fuses the graph and hands it to an inner compiler.

    Args:
        gm: the graph as Dynamo traced it; it is not changed.
        example_inputs: its arguments, the model's parameters and buffers among them.
        options: a dict with any of
            inner: a registered Dynamo backend or a callable; default "inductor".
            inner_options: passed on to it.
            mode: one of torch.compile's modes, for inductor.
            patterns, cost: as for `optimize`.
            freeze: True bakes weights into the graph, so that the compiler can pack them, and compiles anew when they
                change; False keeps them inputs; "auto" bakes those on a CPU, without gradients, until they change.
            check: how changes of weights are seen: "full" by identity, version and address, "identity", "never".
            on_report: called with the Report of each graph.
            strict: raise when fxfuse fails, where the untouched graph would go to the inner compiler.
        mode: the same as in `options`.

    Raises:
        ValueError: an unknown option, or an unknown value of one; the message lists the known ones.
    """
    settings = _settings(options, mode)
    numbers = number_positions(gm, example_inputs)
    if not numbers:
        return _compiled(gm, example_inputs, settings, live=True)
    variants = Variants(numbers, lambda args, live: _compiled(gm, args, settings, live))
    variants.at(example_inputs, live=True)
    return variants


def _reset() -> None:
    """Forget all graphs, with Dynamo."""
    _entries.clear()


fxfuse.reset = _reset  # type: ignore[attr-defined]


def _compiled(gm: GraphModule, inputs: Sequence[Any], settings: dict[str, Any], live: bool) -> Any:
    """What Dynamo is given for its graph; `live` says that it is just compiling it."""
    how = How(settings["inner"], settings["inner_options"], settings["freeze"], settings["check"])
    try:
        planned = _planned(gm, inputs, settings)
    except Exception as error:  # whatever goes wrong here, the model runs
        if settings["strict"]:
            raise
        logger.error("a graph is left as it is: %s: %s", type(error).__name__, error, exc_info=True)
        planned = None
    if planned is None:
        return untouched(gm, inputs, how, live)
    if settings["on_report"] is not None:
        settings["on_report"](planned.report)
    entry = Entry(planned, gm, inputs, how, live)
    _entries.add(entry)
    return entry


def _settings(options: Any, mode: str | None) -> dict[str, Any]:
    given = dict(options or {})
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} of backend fxfuse; known: {', '.join(sorted(DEFAULTS))}")
    settings = DEFAULTS | given | ({"mode": mode} if mode is not None else {})
    if settings["check"] not in CHECKS:
        raise ValueError(f"unknown check {settings['check']!r}; known: {', '.join(CHECKS)}")
    if settings["freeze"] not in ("auto", True, False):
        raise ValueError(f"unknown freeze {settings['freeze']!r}; known: auto, True, False")
    if isinstance(settings["inner"], str) and settings["inner"] not in torch._dynamo.list_backends(()):
        known = ", ".join(torch._dynamo.list_backends(()))
        raise ValueError(f"unknown inner backend {settings['inner']!r}; known: {known}")
    select(settings["patterns"])
    resolve(settings["cost"])
    settings["inner_options"] = mode_options(settings["mode"]) | dict(settings["inner_options"] or {})
    return settings


def _planned(gm: GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> Planned | None:
    """The rewritten graph; None where it has to stay what it is."""
    started = time.perf_counter()
    take = traced(gm, inputs)
    if torch.is_grad_enabled() and any(inputs[i].requires_grad for i in take.state):
        _tell("graphs whose weights require gradients are not fused: call the model under torch.no_grad()")
        return None
    if frozen_state(gm):
        _tell(
            "torch._inductor.config.freezing is on: weights that change later are not followed; leave it off, "
            "as backend fxfuse bakes weights by itself and follows them"
        )
    exposed = exposed_state(take)
    if exposed:
        take = traced(gm, inputs, exposed)
    held = {str(n.target) for n in take.captured.graph.nodes if n.op in ("get_attr", "call_module")}
    held -= set(take.state.values())
    done = fuse(take.captured, select(settings["patterns"]), resolve(settings["cost"]), weights=False)
    report = Report(
        model=f"graph {gm.meta.get('dynamo_compile_id', '')}".strip(),
        fired=done.fired,
        refused=done.refused,
        before=done.before,
        after=done.after,
        cost=cost_name(settings["cost"]),
        seconds=time.perf_counter() - started,
        capture="dynamo",
    )
    logger.info("%s", report.headline)
    watch_optimizers()
    rewriter, names = done.rewriter, {recipe.target: recipe.op for recipe in done.recipes}
    made = functional(rewriter.graph, rewriter.layers)
    folded = {path: (names[name], PARAMETERS.index(place)) for path, (name, place) in made.items()}
    constants = {path: attribute(take.captured.root, path) for path in held}
    return Planned(rewriter.graph, take.state, folded, constants, report, take.captured.held)


def _tell(text: str) -> None:
    """Warn once a process."""
    if text not in _told:
        _told.add(text)
        logger.warning(text)


def reports(compiled_model: Any) -> tuple[Report, ...]:
    """The reports of the graphs that run with weights of a model, compiled or with compiled parts."""
    ids = {id(t) for t in (*compiled_model.parameters(), *compiled_model.buffers())}
    found = [
        e for e in _entries if any(not ids.isdisjoint(i) for i in (e.ids, *(s.ids for s in list(e.sets.values()))))
    ]
    return tuple(e.planned.report for e in sorted(found, key=lambda e: e.number))
