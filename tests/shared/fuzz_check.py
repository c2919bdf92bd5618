"""A random model optimized and compared with eager, in everything a caller can see."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from exactly import SEED, Call, outcome, same_outcome, same_state
from helpers import assert_untouched, fingerprint
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
    wanted = [_run(truth, program, run) for run in (0, 1)]
    for want in wanted:
        if isinstance(want.value, Exception):
            raise NoModel from want.value
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
    for run, want in enumerate(wanted):
        got = _run(fused, program, run)
        if isinstance(got.value, AssertionError) and GUARD in str(got.value):
            return Outcome(len(report.fired), guarded=True)
        if isinstance(got.value, Exception):
            raise got.value
        # a mean over 15 positions is exact for some inputs only, and thirds add up to a round number by chance
        exact = program.exact and "pool" not in program.source and _round((want.value, want.given))
        # a forward that switches gradients on inside of no_grad is the one thing a trace does not see
        views = {"views": False, "strides": not program.last, "grads": program.grad}
        same_outcome(got, want, 0.0 if exact else TOLERANCE, **views)
    assert_untouched(model, before)
    same_state(fused, truth, program.build(), 0.0 if program.exact else TOLERANCE)
    return Outcome(len(report.fired))


def _run(model: nn.Module, program: Program, run: int) -> Any:
    return outcome(model, Call(program.draw(run), {}), program.grad, lambda _: SEED(run))


def _round(values: Any) -> bool:
    """Whether all numbers are so round that none can come from a division that was not exact."""
    fine = [v.detach() * FINEST for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point()]
    return all(torch.equal(v, v.round()) for v in fine)
