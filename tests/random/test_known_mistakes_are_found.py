"""The random models find every known mistake, each within a few hundred examples."""

from __future__ import annotations

import pytest
from fuzz_check import NoModel, check
from mutants import MUTANTS
from random_models import seeded

FIRST, EXAMPLES = 600, 300


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    for seed in range(FIRST, FIRST + EXAMPLES):
        try:
            check(seeded(seed))
        except NoModel:
            continue
        except Exception:
            return
    pytest.fail(f"{EXAMPLES} random models did not notice")
