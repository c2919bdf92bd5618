"""The parts of a model: what is one graph, what stays Python, and the graphs below that.

Where a forward cannot be traced the module stays as it is, and the largest submodules of it that can be
are taken instead, as long as their call is all that the Python code uses of them (`reach`).
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fxfuse.capture.captured import Captured
from fxfuse.capture.example_inputs import arguments, bound
from fxfuse.capture.export.program import export
from fxfuse.capture.observed import Call, Calls, calls_of, made_up
from fxfuse.capture.python_use import outside, reach
from fxfuse.capture.second_opinion import agrees
from fxfuse.capture.shadow import Shadow
from fxfuse.capture.symbolic import capture, form, stays, unusable
from fxfuse.guarded import guard_of
from fxfuse.names import above, below
from fxfuse.ops.modules import has_hooks
from fxfuse.refusal import CaptureError, Refusal

logger = logging.getLogger("fxfuse")
WAYS = ("symbolic", "export", "hierarchical")
STAYS = "what is inside stays as it is"


@dataclass(frozen=True)
class Part:
    """A module of the model: its graph, or None where it stays Python, and the parts below it.

    `refused` are the sentences for what stays as it is; `asked` are plain attributes that are read from it. A part that
    is `kept`, for the reason given, stays beside its graph, for whoever uses more of it than its call; `others` are
    graphs for other kinds of calls.
    """

    path: str
    module: nn.Module
    captured: Captured | None
    parts: tuple[Part, ...] = ()
    refused: tuple[Refusal, ...] = ()
    asked: frozenset[str] = frozenset()
    kept: str = ""
    others: tuple[Captured, ...] = ()

    def walk(self) -> Iterator[Part]:
        """This part and all below it, inner ones first: they are made before what holds them."""
        for part in self.parts:
            yield from part.walk()
        yield self

    @property
    def how(self) -> str:
        return "python" if self.captured is None else self.captured.how


def survey(model: nn.Module, inputs: tuple[Any, ...] | None, how: str | None, checked: bool = True) -> Part:
    """Capture `model` the way `how` says, or the first that works of symbolic, export, hierarchical.

    What was captured is `checked` by a run on the inputs, or on such as fit the first layer.

    Raises:
        ValueError: an unknown way; "export" without example inputs, or inputs that do not fit the forward.
        CaptureError: the way asked for does not work, or no way does.
    """
    if how not in (None, *WAYS):
        raise ValueError(f"unknown capture {how!r}; known: {', '.join(WAYS)}")
    if how == "export" and inputs is None:
        raise ValueError('capture="export" needs example_inputs to run the model on')
    unusable(model)
    if inputs is not None:
        bound(model, inputs)
    if how == "export" and inputs is not None:
        return Part("", model, _exported(model, inputs))
    ran = None if not checked else made_up(model) if inputs is None else inputs
    survey = _Survey(model, ran)
    if how == "hierarchical":
        return survey.python("", model, "asked for by capture=")
    try:
        captured = capture(model, inputs, nested=how is None)  # which holds however the model is called
        if ran is not None:
            (_agrees_where_it_runs if inputs is None else agrees)(captured, *arguments(model, ran))
    except CaptureError as error:
        if how == "symbolic":
            raise
        if inputs is not None and (given := survey.by_form("", model, error)) is not None:
            return given
        with suppress(CaptureError):  # the next way needs nothing of what stopped this one
            exported = None if inputs is None else _exported(model, inputs)
            if exported is not None and exported.general:  # for every batch and size: no call fails that worked before
                return Part("", model, exported)
        return survey.python("", model, error.place)
    return survey.graph("", model, captured, descend=how is None)


def _agrees_where_it_runs(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A second opinion on arguments that nobody gave: they may not fit."""
    try:
        agrees(captured, args, kwargs)
    except ValueError as error:
        logger.info("no second opinion: %s", error)


def _confirmed(captured: Captured, calls: list[Call]) -> Captured:
    """The same, if it agrees on those of the calls that it is for. Raises as `agrees`."""
    for call in calls:
        if form(captured).fits(*call):
            _agrees_where_it_runs(captured, *call)
    return captured


def _required(module: nn.Module) -> int:
    """How many parameters of a forward have no default."""
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _exported(model: nn.Module, inputs: tuple[Any, ...]) -> Captured:
    """The graph of torch.export, which runs the forward: on a shadow."""
    shadow = Shadow(model)
    try:
        captured = export(shadow.root, inputs)
    finally:
        changes = shadow.changed()
    if changes:
        raise CaptureError(f"the forward changes {changes[0]}, which a graph does not repeat")
    return replace(captured, root=model)


class _Survey:
    def __init__(self, model: nn.Module, inputs: tuple[Any, ...] | None) -> None:
        self.model, self.inputs = model, inputs
        counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.shared = {m for m, n in counts.items() if n > 1}
        self.kept = set[int]()

    @cached_property
    def calls(self) -> Calls:
        """What the submodules are called with, as far as a run shows."""
        return {} if self.inputs is None else calls_of(self.model, self.inputs)

    def graph(self, path: str, module: nn.Module, captured: Captured, descend: bool = True) -> Part:
        """A part with a graph, and the parts of the modules that the graph keeps whole."""
        targets = {str(n.target) for n in captured.graph.nodes if n.op in ("call_module", "get_attr")}
        opened = {name for target in targets for name in above(target)}
        parts = []
        for node in captured.graph.nodes if descend else ():
            name = str(node.target)
            if node.op != "call_module" or name in opened:
                continue  # the graph itself reads something in it
            kept, inner = captured.modules[name], below(path, name)
            if name in captured.whole:
                parts.append(self.python(inner, kept, captured.whole[name]))
            elif any(kept.children()) and not type(kept).__module__.startswith("torch.nn"):
                parts += self.take(inner, kept, None if node.kwargs else len(node.args))
        return Part(path, module, captured, tuple({p.path: p for p in parts}.values()))

    def take(self, path: str, module: nn.Module, given: int | None) -> list[Part]:
        """A submodule of which only the call is used, with `given` positional arguments."""
        if id(module) in self.shared or not any(module.children()) or guard_of(module) is not None:
            return []
        if has_hooks(module):
            return self.keep(path, module, f"{path}: it has hooks")
        if refused := self._outside(path, module):
            return refused
        try:
            captured = capture(module, given=given, nested=True)
            for call in self.calls.get(path, ()):
                _agrees_where_it_runs(captured, *call)
        except CaptureError as error:
            part = self.by_form(path, module, error)
            return [self.python(path, module, error.place) if part is None else part]
        return [self.graph(path, module, captured)]

    def by_form(self, path: str, module: nn.Module, why: CaptureError) -> Part | None:
        """A part that keeps its module, with a graph for each kind of call: arguments left out, and given."""
        if isinstance(module, torch.jit.ScriptModule):
            return None
        calls = self.calls.get(path, []) if path else [arguments(module, self.inputs or ())]
        kinds = dict.fromkeys([(None if kw else len(args), _nones(module, args, kw)) for args, kw in calls])
        captured: list[Captured] = []
        for given, none in kinds:
            with suppress(CaptureError):
                captured.append(_confirmed(capture(module, given=given, none=none), calls))
        if not any(form(one).fits(*call) for one in captured for call in calls):
            return None
        part = self.graph(path, module, captured[0], descend=False)
        return replace(part, kept=why.place, others=tuple(captured[1:]))

    def _outside(self, path: str, module: nn.Module) -> list[Part]:
        if holder := outside(module):
            reason = "an attribute of it holds a module elsewhere, which may change while it runs"
            return [Part(path, module, None, refused=(Refusal(STAYS, path, detail=f"{holder}: {reason}"),))]
        return []

    def keep(self, path: str, module: nn.Module, reason: str) -> list[Part]:
        """A submodule that Python code uses in other ways too: it stays, beside a graph for its calls."""
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted or not any(module.children()) or id(module) in self.kept or guard_of(module) is not None:
            return []
        self.kept.add(id(module))
        inner = [(below(path, name), child) for name, child in module._modules.items() if child is not None]
        if type(module) in (nn.ModuleList, nn.ModuleDict) or self._not_called(path, module):
            return [part for p, child in inner for part in self.keep(p, child, reason)]
        if refused := self._outside(path, module):
            return refused
        try:
            captured = _confirmed(capture(module, given=_required(module)), self.calls.get(path, []))
        except CaptureError as error:
            part = self.by_form(path, module, error)
            return [self.python(path, module, error.place) if part is None else part]
        return [replace(self.graph(path, module, captured, descend=False), kept=reason)]

    def _not_called(self, path: str, module: nn.Module) -> bool:
        """Whether it is its children that are called, as a run showed, or a sequence of blocks suggests."""
        if self.inputs is not None:
            return path not in self.calls
        return type(module) is nn.Sequential and any(any(child.children()) for child in module.children())

    def python(self, path: str, module: nn.Module, reason: str) -> Part:
        """A module that stays Python, and what can be taken of it."""
        found, where = reach(module), path or type(module).__name__
        taken = {name: (m, given) for name, m, given in found.replaceable(module)}
        parts = [
            replace(p, asked=frozenset(found.asked.get(name, ())))
            for name, (m, given) in taken.items()
            for p in self.take(below(path, name), m, given)
        ]
        for name, child in module._modules.items():
            inner = below(path, name)
            reached = (
                found.opaque or name in found.used or any(p == inner or p.startswith(f"{inner}.") for p in self.calls)
            )
            if child is None or name in taken or any(n.startswith(f"{name}.") for n in taken) or not reached:
                continue
            place = found.opaque or f"{type(module).__name__}.{found.used.get(name, 'forward')}"
            parts += self.keep(inner, child, f"{inner}: {place}")
        return Part(path, module, None, tuple(parts), (stays(where, reason),))


def _nones(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[str]:
    """The parameters of a forward that are None in a call."""
    signature = inspect.signature(module.forward)
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError:  # the call itself fails
        return frozenset()
    call.apply_defaults()
    return frozenset(name for name, value in call.arguments.items() if value is None)
