"""What the random sources are worth: a capture that believes every trace is found out, and eager itself is not."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_difference import difference
from python_check import NoModel, Wrong, check
from python_ways import careless
from random_python import IDIOMS, Gene, program, seeded
from torch import nn

from fxfuse.capture.copying import copied

SEEDS = range(1000, 1060)


def kinds(optimize: Any, folder: Path) -> Counter[str]:
    """How often each kind of mistake is found in the seeds."""
    found = Counter[str]()
    for seed in SEEDS:
        try:
            found["refused" if check(seeded(seed), folder, optimize).refused else "right"] += 1
        except NoModel:
            found["not run"] += 1
        except Wrong as wrong:
            found[wrong.kind] += 1
    return found


def test_a_careless_capture_is_found_out(tmp_path: Path) -> None:
    found = kinds(careless, tmp_path)
    wrong = {k: n for k, n in found.items() if k not in ("refused", "right", "not run")}
    assert sum(wrong.values()) > 0.15 * len(SEEDS), found
    assert len(wrong) >= 4, found


def test_eager_is_right(tmp_path: Path) -> None:
    found = kinds(_itself, tmp_path)
    assert set(found) <= {"right", "not run"}, found
    assert found["not run"] < 0.03 * len(SEEDS)


def _itself(model: nn.Module, examples: Any) -> nn.Module:
    return model


def _run_once(model: nn.Module, examples: Any) -> nn.Module:
    """Wrong: the model's own forward is run while it is optimized."""
    with torch.no_grad():
        model(torch.zeros(2, 4, 6, 7))
    return copied(model)


@pytest.mark.parametrize(
    "idiom",
    [name for name in IDIOMS if name.startswith("counter_") or name in ("default_list", "nested_containers")],
)
def test_a_model_that_was_run_is_noticed(idiom: str, tmp_path: Path) -> None:
    program_ = program((Gene(idiom, 3),), 7)
    with pytest.raises(Wrong):
        check(program_, tmp_path, _run_once)


@pytest.mark.parametrize("idiom", IDIOMS)
def test_eager_runs_every_idiom(idiom: str, tmp_path: Path) -> None:
    ran = 0
    for seed in (0, 5):
        with suppress(NoModel):
            check(program((Gene(idiom, seed),), seed), tmp_path, _itself)
            ran += 1
    assert ran


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": [1]}, {"a": [2]}),
        (Holder({"a": (1, [torch.ones(2)])}), Holder({"a": (1, [torch.zeros(2)])})),
        (Holder(1), Holder(None)),
        (iter([1, 2]), iter([1])),
        ([[], []], [[]] * 2),
        (lambda x=[1]: x, lambda x=[2]: x),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
    ],
)
def test_a_difference_is_found(one: Any, other: Any) -> None:
    assert difference(one, other, __name__, __name__)
    assert not difference(one, one, __name__, __name__)
