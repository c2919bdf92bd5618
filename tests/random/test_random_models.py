"""Random models against eager: whatever eager runs, the result runs, and gives the same.

`HYPOTHESIS_PROFILE=hunt` draws other examples than the fixed ones; `python -m benchmarks.fuzz` hunts for hours.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from fuzz_check import NoModel, check
from hypothesis import HealthCheck, given, settings
from random_models import Program, programs, seeded, smaller

HUNT = os.environ.get("HYPOTHESIS_PROFILE") == "hunt"
SHARES = 8
SEEDS = 200  # a share; fixed, so that a failure is a failure of the change before it
quick = settings(
    max_examples=3000 if HUNT else 500,
    derandomize=not HUNT,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@quick
@given(programs)
def test_small_models(program: Program) -> None:
    with suppress(NoModel):
        check(program)


@pytest.mark.parametrize("share", range(SHARES))
def test_larger_models(share: int) -> None:
    found = Counter[str]()
    for seed in range(share * SEEDS, (share + 1) * SEEDS):
        program = seeded(seed)
        try:
            outcome = check(program)
        except NoModel:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\n{smaller(program, _fails_like(error))!r}") from error
        found.update({"all": 1, "fired": outcome.fired > 0, "refused": outcome.refused, "guarded": outcome.guarded})
    assert found["all"] > 0.98 * SEEDS, "eager itself does not run what is written"
    assert found["fired"] > 0.4 * found["all"], "too few of the models have anything to fuse"
    assert found["refused"] + found["guarded"] < 0.06 * found["all"], "too many models are refused as a whole"


def _fails_like(error: Exception) -> Any:
    """Whether a program fails with an error of the same kind and beginning."""

    def fails(program: Program) -> bool:
        try:
            check(program)
        except NoModel:
            return False
        except Exception as other:
            return type(other) is type(error) and str(other)[:12] == str(error)[:12]
        return False

    return fails
