"""The parts of a model: what is one graph, what stays Python, and the graphs below that.

Where a forward cannot be traced the module stays as it is, and the largest submodules of it that can be
are taken instead, as long as their call is all that the Python code uses of them (`reach`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fxfuse.capture.captured import Captured
from fxfuse.capture.export.program import export
from fxfuse.capture.python_use import outside, reach
from fxfuse.capture.symbolic import capture, stays, unusable
from fxfuse.names import above, below
from fxfuse.refusal import CaptureError, Refusal

WAYS = ("symbolic", "export", "hierarchical")
STAYS = "what is inside stays as it is"


@dataclass(frozen=True)
class Part:
    """A module of the model: its graph, or None where it stays Python, and the parts below it.

    `refused` are the sentences for what stays as it is; `asked` are plain attributes that are read from it.
    """

    path: str
    module: nn.Module
    captured: Captured | None
    parts: tuple[Part, ...] = ()
    refused: tuple[Refusal, ...] = ()
    asked: frozenset[str] = frozenset()

    def walk(self) -> Iterator[Part]:
        """This part and all below it, inner ones first: they are made before what holds them."""
        for part in self.parts:
            yield from part.walk()
        yield self

    @property
    def how(self) -> str:
        return "python" if self.captured is None else self.captured.how


def survey(model: nn.Module, inputs: tuple[Any, ...] | None, how: str | None) -> Part:
    """Capture `model` the way `how` says, or the first that works of symbolic, export, hierarchical.

    Raises:
        ValueError: an unknown way; "export" without example inputs.
        CaptureError: the way asked for does not work, or no way does.
    """
    if how not in (None, *WAYS):
        raise ValueError(f"unknown capture {how!r}; known: {', '.join(WAYS)}")
    if how == "export" and inputs is None:
        raise ValueError('capture="export" needs example_inputs to run the model on')
    unusable(model)
    if how == "export" and inputs is not None:
        return Part("", model, export(model, inputs))
    survey = _Survey(model)
    if how == "hierarchical":
        return survey.python("", model, "asked for by capture=")
    try:
        captured = capture(model, inputs, nested=how is None)  # which holds however the model is called
    except CaptureError as error:
        if how == "symbolic":
            raise
        with suppress(CaptureError):  # the next way needs nothing of what stopped this one
            exported = None if inputs is None else export(model, inputs)
            if exported is not None and exported.general:  # for every batch and size: no call fails that worked before
                return Part("", model, exported)
        return survey.python("", model, error.place)
    return survey.graph("", model, captured, descend=how is None)


class _Survey:
    def __init__(self, model: nn.Module) -> None:
        counts = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.shared = {m for m, n in counts.items() if n > 1}

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
        if id(module) in self.shared or not any(module.children()):
            return []
        if holder := outside(module):
            reason = "an attribute of it holds a module elsewhere, which may change while it runs"
            return [Part(path, module, None, refused=(Refusal(STAYS, path, detail=f"{holder}: {reason}"),))]
        try:
            return [self.graph(path, module, capture(module, given=given, nested=True))]
        except CaptureError as error:
            return [self.python(path, module, error.place)]

    def python(self, path: str, module: nn.Module, reason: str) -> Part:
        """A module that stays Python, and what can be taken of it."""
        found, where = reach(module), path or type(module).__name__
        parts = [
            replace(p, asked=frozenset(found.asked.get(name, ())))
            for name, m, given in found.replaceable(module)
            for p in self.take(below(path, name), m, given)
        ]
        refused = [stays(where, reason)]
        if found.opaque and any(module.children()):
            refused.append(Refusal(STAYS, where, detail=found.opaque))
        refused += [
            Refusal(
                "the module stays as it is: the Python code around it uses more of it than its call",
                where=below(path, name),
                detail=f"{type(module).__name__}.{place}",
                remedy="only call it there",
            )
            for name, place in found.used.items()
            if next(module.get_submodule(name).parameters(), None) is not None
        ]
        return Part(path, module, None, tuple(parts), tuple(refused))
