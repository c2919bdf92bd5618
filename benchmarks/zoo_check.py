"""One model of the zoo: optimized and compared on two inputs, in a process of its own (see zoo.py).

The record it gives is plain data. Its status is

    ok        the outputs agree
    wrong     they do not: by more than 1e-5 of the largest value in float32, which rounding alone may explain,
              *and* more than 1e-8 in float64, which it cannot; or the model passed in has changed
    refused   fxfuse said that it cannot capture the model
    crash     optimizing or the result raised, or the process died
    timeout   it took longer than it was given
    skipped   the model itself does not build or run
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import assert_untouched, fingerprint, relative_error
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fxfuse
from fxfuse.capture.parts import survey

from . import zoo_models
from .executed import Executed, called

MAX_ERROR, MAX_ERROR_64 = 1e-5, 1e-8
Record = dict[str, Any]


def in_process(name: str, options: dict[str, Any], connection: Any, log: str) -> None:
    """Check one model and send its record; whatever it prints goes into the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    score = Path("/proc/self/oom_score_adj")
    if score.exists():  # where memory ends, this process goes first
        score.write_text("1000")
    warnings.simplefilter("ignore")
    torch.set_num_threads(options["threads"])
    connection.send(check(name, options))


def check(name: str, options: dict[str, Any]) -> Record:
    """The record of one model."""
    record: Record = {"model": name}
    try:
        model = zoo_models.build(name)
        calls, wants, before = _run_eager(name, model)
    except Exception as error:  # a model may raise anything; then there is nothing to compare with
        return record | {"status": "skipped", "message": f"the model itself fails: {_line(error)}"}
    record["inputs"] = [_shapes(call) for call in calls]
    record["before"] = before.sizes() | {"params": sum(p.numel() for p in model.parameters())}
    if not all(t.isfinite().all() for t in _floats(wants)):
        record["note"] = "outputs are not all finite"
    elif all(t.numel() < 2 or t.std() == 0 for t in _floats(wants)):
        record["note"] = "every output is constant"
    try:
        return record | _compare(model, calls, wants, options)
    except fxfuse.CaptureError as error:
        return record | {"status": "refused", "message": _line(error)}
    except Exception as error:  # what is being looked for
        return record | {"status": "crash", "message": _line(error), "traceback": traceback.format_exc()[-4000:]}


def _run_eager(name: str, model: nn.Module) -> tuple[list[Any], list[Any], Executed]:
    """Two calls the model accepts, their outputs, and what the first one executed."""
    calls = [accepted(model, tries) for tries in zoo_models.inputs(name, model)]
    zoo_models.calibrate(model, calls[0])
    mode = Executed(model)
    wants = [called(model, calls[0], mode), called(model, calls[1])]
    return calls, wants, mode


def accepted(model: nn.Module, tries: list[Any]) -> Any:
    """The first inputs that the model runs on; the error of the last where there are none."""
    for args in tries[:-1]:
        try:
            called(model, args)
        except Exception:  # it does not take this size; models raise anything
            continue
        return args
    called(model, tries[-1])
    return tries[-1]


def _compare(model: nn.Module, calls: list[Any], wants: list[Any], options: dict[str, Any]) -> Record:
    optimize = partial(load(options["optimizer"]), **options["optimize_options"])
    known = calls[0] if options["example_inputs"] else None
    state = fingerprint(model)
    start = time.perf_counter()
    survey(model, known, options["optimize_options"].get("capture"))
    captured = time.perf_counter()
    fused = optimize(model, known)
    record: Record = {"capture_s": captured - start, "optimize_s": time.perf_counter() - captured}
    try:
        assert_untouched(model, state)
    except AssertionError as error:
        return record | {"status": "wrong", "message": _line(error)}
    del state
    mode = Executed(fused)
    error = _error(called(fused, calls[0], mode), wants[0])
    error = max(error, _error(called(fused, calls[1]), wants[1]))
    record |= {"error": error, "after": mode.sizes() | {"params": sum(p.numel() for p in fused.parameters())}}
    record |= _norms_left(fused, mode)
    error_64 = None
    if error > MAX_ERROR or options["float64"]:
        error_64 = record["error_64"] = _error_in_double(model, calls, optimize, known is not None)
    if error_64 is not None and error_64 > MAX_ERROR_64:
        return record | {"status": "wrong", "message": f"relative error {error:.1e}, in float64 {error_64:.1e}"}
    return record | {"status": "ok"}


def _error(got: Any, want: Any) -> float:
    """relative_error, infinite where the outputs differ in structure or shape (as lists of boxes may)."""
    try:
        return relative_error(got, want)
    except (AssertionError, ValueError):
        return float("inf")


def _error_in_double(model: nn.Module, calls: list[Any], optimize: Callable[..., nn.Module], known: bool) -> float:
    model.double()
    calls = tree_map_only(torch.Tensor, torch.Tensor.double, calls)
    fused = optimize(model, calls[0] if known else None)
    return max(_error(called(fused, args), called(model, args)) for args in calls)


def _norms_left(fused: nn.Module, mode: Executed) -> Record:
    """How the result was captured, what fired, and the batch norms left that no refusal names.

    One names it by its own path, that of the layer before it, or that of a module around either.
    """
    after_layers = {"norms_after_layers": sum(layer is not None for layer, _ in mode.left)}
    try:
        report = fxfuse.report(fused)
    except TypeError:  # another optimizer's result has no report
        return after_layers
    named = {r.where for r in report.refused}
    unexplained = [
        norm.path + (f" after {layer.kind} {layer.path}" if layer else "")
        for layer, norm in mode.left
        if named.isdisjoint({*_ancestors(norm.path), *_ancestors(layer.path if layer else "")})
    ]
    return after_layers | {
        "capture": report.capture,
        "fired": len(report.fired),
        "by_pattern": report.by_pattern,
        "refused_by": dict(Counter(r.pattern for r in report.refused)),
        "refusals": {reason: len(sites) for (reason, _), sites in report.by_reason.items()},
        "unexplained": list(dict.fromkeys(unexplained)),
    }


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def load(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _shapes(args: Any) -> list[list[int]]:
    return [list(t.shape) for t in tree_leaves(args) if isinstance(t, torch.Tensor)]


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
