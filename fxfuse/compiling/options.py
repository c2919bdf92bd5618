"""The options of backend "fxfuse": what there is, what it means when nothing is said, and which values are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch._dynamo import list_backends
from torch._inductor import list_mode_options

from fxfuse.compiling.weight_sets import CHECKS
from fxfuse.cost import CostFunction, resolve
from fxfuse.pattern import select
from fxfuse.reporting.report import Report


@dataclass(frozen=True)
class CompileOptions:
    """One field an option; `fxfuse.compiling.backend.fxfuse` says what each does."""

    inner: str | Callable[..., Any] = "inductor"
    inner_options: dict[str, Any] | None = None
    mode: str | None = None
    patterns: Iterable[str] | str | None = None
    cost: str | CostFunction = "macs"
    freeze: bool | str = "auto"
    check: str = "full"
    on_report: Callable[[Report], Any] | None = None
    strict: bool = False


def compile_options(given: Any, mode: str | None) -> CompileOptions:
    """The options that are `given` as a dict, and defaults; what `mode` stands for is among the inner ones.

    Raises:
        ValueError: an unknown option, or an unknown value of one; the message lists the known ones.
    """
    given, known = dict(given or {}), sorted(f.name for f in fields(CompileOptions))
    for name in sorted(given):
        _check("option", name, known, " of backend fxfuse")
    options = CompileOptions(**given)
    _check("check", options.check, CHECKS)
    _check("freeze", options.freeze, ("auto", True, False))
    if isinstance(options.inner, str):
        _check("inner backend", options.inner, list_backends(()))
    select(options.patterns)
    resolve(options.cost)
    mode, patches = options.mode if mode is None else mode, dict[str, Any]()
    if mode is not None:
        _check("mode", mode, list_mode_options())
        patches = list_mode_options()[mode]
    return replace(options, inner_options=patches | dict(options.inner_options or {}))


def _check(what: str, value: Any, known: Iterable[Any], of: str = "") -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}{of}; known: {', '.join(map(str, known))}")
