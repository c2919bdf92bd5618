"""A random source as a model, optimized, and compared call by call with an untouched twin."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deep_difference import difference
from exactly import SEED, alike, shared
from helpers import assert_untouched, count, fingerprint, randomize
from random_python import Program
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import fxfuse

MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "default": contextlib.nullcontext,
}
LONGEST = 20  # seconds of this process that optimize may take
Optimize = Callable[..., nn.Module]


class NoModel(Exception):
    """Eager itself does not run the source."""


class Wrong(AssertionError):
    """The result differs from the twin; `kind` says in what, in a few words."""

    def __init__(self, kind: str, what: object) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@dataclass(frozen=True)
class Outcome:
    """A model that agrees with its twin: whether it was refused, and the batch norms run before and after."""

    refused: str = ""
    before: int = 0
    after: int = 0


def check(program: Program, folder: Path, optimize: Optimize = fxfuse.optimize, norms: bool = False) -> Outcome:
    """Optimize the program's model and compare, in a file of `folder`, where the source stays.

    `norms` counts batch norms, in one more call.

    Raises:
        NoModel: eager does not run it.
        Wrong: the result differs, the model or what was passed in was changed, or something was raised.
    """
    with _loaded(program, folder) as (twin_source, source):
        twin, model = (built(s, program) for s in (twin_source, source))
        if program.used:
            for one, text in ((twin, twin_source), (model, source)):
                try:
                    _call(one, text, 0)
                except Exception as error:
                    raise NoModel from error
        return _compared(program, twin, model, twin_source, source, optimize, norms)


def _compared(
    program: Program, twin: nn.Module, model: nn.Module, truth: Any, source: Any, optimize: Optimize, norms: bool
) -> Outcome:
    before = fingerprint(model)
    examples, as_drawn = (_positional(s, program.examples) for s in (source, truth))
    fused, refusal = None, ""
    try:
        with _in_time():
            fused = optimize(model, examples)
    except Wrong:
        raise
    except (fxfuse.CaptureError, ValueError) as error:
        refusal = str(error) or "a refusal without a word"
    except Exception as error:
        raise Wrong("optimize raises", f"{type(error).__name__}: {error}") from error
    changed = _changed(model, before, examples, twin, as_drawn, source, truth)
    if fused is None:
        _eager_runs(twin, truth)
    else:
        _calls(program, fused, twin, source, truth)
    if fused is None or getattr(fused, "_orig_mod", fused) is not model:  # Dynamo's is the model itself
        if changed is not None:
            raise changed
        with _kind("a call changed the model"):
            assert_untouched(model, before)
    if fused is None:
        return Outcome(refusal)
    return Outcome("", *(_norms(m, s) for m, s in ((twin, truth), (fused, source)))) if norms else Outcome()


def _changed(
    model: nn.Module, before: Any, examples: Any, twin: nn.Module, as_drawn: Any, source: Any, truth: Any
) -> Wrong | None:
    """What is not as it was before, of the model and all that it reaches, its source and the example inputs."""
    names = source.__name__, truth.__name__
    try:
        with _kind("the model was changed"):
            assert_untouched(model, before)
            found = difference(model, twin, *names)
            assert not found, f"model{found}"
        with _kind("a global was changed"):
            found = difference(vars(source), vars(truth), *names)
            assert not found, found
        with _kind("the example inputs were changed"):
            alike(examples, as_drawn, views=False, strides=False)
    except Wrong as wrong:
        return wrong
    return None


def _calls(program: Program, fused: nn.Module, twin: nn.Module, source: Any, truth: Any) -> None:
    """The calls of the source, made of both in turn, until eager raises."""
    earlier: list[tuple[Any, Any]] = []
    for i in range(len(truth.CALLS)):
        try:
            want, given = _call(twin, truth, i)
        except Exception as error:
            if i == 0:
                raise NoModel from error
            break
        try:
            got, gave = _call(fused, source, i)
        except Exception as error:
            raise Wrong("a call raises", f"call {i}: {type(error).__name__}: {error}") from error
        same(got, gave, want, given, program.tolerance)
        earlier.append((got, want))
    with _kind("a later call changed what an earlier one returned"):
        for got, want in earlier:
            alike(got, want, program.tolerance, views=False, strides=False)


def same(got: Any, gave: Any, want: Any, given: Any, tolerance: float) -> None:
    """One call gave the same, wrote the same to its arguments, and returned the same of them."""
    with _kind("another container or value"):
        alike(_bare(got), _bare(want))
    for what in ("shape", "dtype", "requires_grad"):
        ours, theirs = ([getattr(t, what) for t in _tensors(v)] for v in (got, want))
        if ours != theirs:
            raise Wrong(f"another {what}", f"{ours} instead of {theirs}")
    with _kind("other values"):
        alike(got, want, tolerance, views=False, strides=False)
    with _kind("the arguments are another after the call"):
        alike(gave, given, tolerance, views=False, strides=False)
    with _kind("other tensors are one or share memory"):
        assert shared(got, gave) == shared(want, given), "output and argument share memory"
        assert _identities(got, gave) == _identities(want, given), "which tensors are one"


def built(source: Any, program: Program) -> nn.Module:
    """The model of a source, the same at every call: random statistics, weights of both signs, in eval mode."""
    SEED(program.seed)
    try:
        model = randomize(source.Net(), program.seed)
        return model.double() if program.double else model
    except Exception as error:
        raise NoModel from error


def _call(model: nn.Module, source: Any, number: int) -> tuple[Any, Any]:
    """What the model gives in a call of the source, and the arguments afterwards."""
    mode, size, call = source.CALLS[number]
    args, kwargs = call(source.data(number, *size))
    with MODES[mode]():
        return model(*args, **kwargs), (args, kwargs)


def _positional(source: Any, number: int | None) -> Any:
    """The arguments of a call that can be given by position, as example inputs."""
    if number is None:
        return None
    _, size, call = source.CALLS[number]
    return call(source.data(number, *size))[0]


def _eager_runs(twin: nn.Module, source: Any) -> None:
    try:
        _call(twin, source, 0)
    except Exception as error:
        raise NoModel from error


def _norms(model: nn.Module, source: Any) -> int:
    """How many batch norms run in a call."""
    _, size, call = source.CALLS[0]
    args, kwargs = call(source.data(0, *size))
    try:
        return count(model, *args, **kwargs)["bn"]
    except Exception:  # a state that this call does not go with
        return 0


@contextlib.contextmanager
def _in_time() -> Any:
    """Raises Wrong where something takes longer than any of these small models can."""

    def end(*_: Any) -> None:
        raise Wrong("optimize does not end", f"it took more than {LONGEST} seconds")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _kind(kind: str) -> Any:
    try:
        yield
    except AssertionError as error:
        raise Wrong(kind, error) from error


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in tree_leaves(value) if isinstance(v, Tensor)]


def _bare(value: Any) -> Any:
    """The containers alone, a word for each tensor."""
    return tree_map(lambda v: type(v).__name__ if isinstance(v, Tensor) else v, value)


def _identities(*values: Any) -> list[tuple[int, int]]:
    """For each tensor which one before it is the same object, and which begins at the same place."""
    tensors = _tensors(values)
    places = [t.data_ptr() for t in tensors]
    return [(next(j for j, u in enumerate(tensors) if u is t), places.index(places[i])) for i, t in enumerate(tensors)]


@contextlib.contextmanager
def _loaded(program: Program, folder: Path) -> Any:
    """The source as two modules that share nothing, from one real file."""
    path = folder / f"python_{program.seed}.py"
    path.write_text(program.source)
    linecache.checkcache(str(path))
    try:
        code = compile(program.source, str(path), "exec")
    except SyntaxError as error:
        raise AssertionError(f"{path}: {error}") from error
    modules = [types.ModuleType(f"python_{program.seed}_{name}") for name in ("twin", "model")]
    try:
        for module in modules:
            module.__file__ = str(path)
            sys.modules[module.__name__] = module
            exec(code, vars(module))
        modules[1].Pair = modules[0].Pair  # containers of one class
        yield modules
    finally:
        for module in modules:
            sys.modules.pop(module.__name__, None)
