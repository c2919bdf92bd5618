"""A random model optimized and compared with eager, in everything a caller can see."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from helpers import assert_untouched, fingerprint, relative_error
from random_body import FINEST
from random_models import Program
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxfuse
from fxfuse.capture.copying import copied

TOLERANCE = 1e-9
DOCUMENTED = re.compile("cannot be traced|which a graph|has a forward set on the instance")
GUARD = "fxfuse took the input here for a batch of"


class NoModel(Exception):
    """Eager itself does not run the program as a whole."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model that agrees with eager."""

    fired: int
    refused: bool = False
    guarded: bool = False


def check(program: Program) -> Outcome:
    """Optimize the program's model and compare.

    Raises:
        NoModel: eager does not run it.
        AssertionError: the result differs, or the model was changed.
    """
    truth = program.build()
    with torch.set_grad_enabled(program.grad):
        wanted = []
        for run in (0, 1):
            inputs = program.draw(run)
            try:
                torch.manual_seed(run)
                wanted.append((truth(*inputs), inputs))
            except Exception as error:
                raise NoModel from error
    model = program.build()
    before, state = fingerprint(model), torch.get_rng_state()
    examples = program.draw(0) if program.examples else None
    verify = TOLERANCE if program.then == "verify" and program.examples else None
    try:
        fused = fxfuse.optimize(model, examples, patterns=program.patterns, verify=verify)
    except fxfuse.CaptureError as error:
        assert DOCUMENTED.search(str(error)), error
        assert_untouched(model, before)
        return Outcome(0, refused=True)
    assert torch.equal(state, torch.get_rng_state()), "random numbers were drawn"
    assert_untouched(model, before)
    report = fxfuse.report(fused)
    if program.then == "optimize again":
        fused = fxfuse.optimize(fused, examples, patterns=program.patterns)
    elif program.then == "copy":
        fused = copied(fused)
    with torch.set_grad_enabled(program.grad):
        for run, (want, theirs) in enumerate(wanted):
            ours = program.draw(run)
            torch.manual_seed(run)
            try:
                got = fused(*ours)
            except AssertionError as error:
                assert GUARD in str(error), error
                return Outcome(len(report.fired), guarded=True)
            # a mean over 15 positions is exact for some inputs only, and thirds add up to a round number by chance
            exact = program.exact and "pool" not in program.source and _round((want, theirs))
            _same(got, ours, want, theirs, exact, program.last)
    assert_untouched(model, before)
    _same_state(truth, program.build(), fused, program.exact)
    return Outcome(len(report.fired))


def _same(got: Any, ours: tuple[Any, ...], want: Any, theirs: tuple[Any, ...], exact: bool, last: bool) -> None:
    """The outputs, and what was written to the inputs."""
    assert type(got) is type(want), f"{type(got).__name__} instead of {type(want).__name__}"
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if not isinstance(b, Tensor):
            assert a == b, f"{a} instead of {b}"
            continue
        # a forward that switches gradients on inside of no_grad is the one thing a trace does not see
        for what in ("shape", "dtype", "requires_grad")[: 3 if torch.is_grad_enabled() else 2]:
            assert getattr(a, what) == getattr(b, what), f"{what} {getattr(a, what)} instead of {getattr(b, what)}"
        # what eager returns as a part or a permutation of another tensor may be a tensor of its own
        assert last or a.is_contiguous() or not b.is_contiguous(), f"strides {a.stride()} instead of {b.stride()}"
        _close(a, b, exact, "output")
        assert [_shares(a, x) for x in ours] == [_shares(b, x) for x in theirs], "output and input share memory"
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, Tensor):
            _close(a, b, exact, "input afterwards")


def _round(values: Any) -> bool:
    """Whether all numbers are so round that none can come from a division that was not exact."""
    fine = [v.detach() * FINEST for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
    return all(torch.equal(v, v.round()) for v in fine)


def _close(a: Tensor, b: Tensor, exact: bool, what: str) -> None:
    error = relative_error(a, b)
    assert torch.equal(a, b) if exact else error <= TOLERANCE, f"{what} differs by {error:.1e}"


def _same_state(truth: nn.Module, fresh: nn.Module, fused: nn.Module, exact: bool) -> None:
    """Buffers and parameters that the calls changed, changed alike in the result."""
    start, kept = fresh.state_dict(), fused.state_dict()
    for name, tensor in truth.state_dict().items():
        if not torch.equal(tensor, start[name]) and name in kept:
            _close(kept[name], tensor, exact, f"{name} afterwards")


def _shares(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
