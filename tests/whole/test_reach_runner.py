"""The benchmark of well-known models: what it counts as left, every fate of a model, and its page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from benchmarks.reach import MODELS
from benchmarks.reach.__main__ import attempt
from benchmarks.reach.check import Subject, called, looked_at, optimized
from benchmarks.reach.entry import Entry, images
from benchmarks.reach.idioms import Chain
from benchmarks.reach.left import Watched
from benchmarks.reach.page import between_markers, tables

CHAIN = Entry(Chain, images(), convs=2, norms=0)
PAGE = Path(__file__).parent.parent.parent / "docs" / "reach.md"


class Factors(nn.Module):
    """A frozen batch norm by hand, then a gate that only looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.register_buffer("scale", torch.tensor([1.0, -2.0, 0.5, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.scale.reshape(1, -1, 1, 1)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Standardized(nn.Conv2d):
    """Its weight is computed anew in every call, from nothing but parameters."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (Chain, {"behind": 2, "frozen": 0, "computed": 0}),
        (Factors, {"behind": 0, "frozen": 1, "computed": 0}),
        (Standardized, {"behind": 0, "frozen": 0, "computed": 1}),
    ],
)
def test_what_is_left_is_seen_and_gone_afterwards(build: Any, left: dict[str, int]) -> None:
    entry = Entry(build, images())
    subject, before = looked_at(entry)
    assert subject is not None and {k: before[k] for k in left} == left
    for with_inputs in (True, False):
        record = optimized(subject, with_inputs)
        assert (record["status"], record["whole"], record["why"]) == ("ok", True, [])
        assert [record[k] for k in left] == [0, 0, 0]


def test_what_stays_is_named_with_the_layer_before_it() -> None:
    subject = Subject(MODELS["detectron2's Conv2d"])
    fused = subject.fresh()
    mode = Watched(fused)
    called(fused, subject.call(0), mode)
    assert mode.places() == [("0.norm", "0"), ("1.norm", "1")]


def test_wrong_results_and_changed_models_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fxfuse.optimize

    def careless(model: nn.Module, inputs: Any = None) -> nn.Module:
        fused = honest(model, inputs)
        next(fused.parameters()).data.mul_(1.001)
        return fused

    def greedy(model: nn.Module, inputs: Any = None) -> nn.Module:
        fused = honest(model, inputs)
        model.first.bias.data.add_(1)  # type: ignore[union-attr, operator]
        return fused

    subject = Subject(CHAIN)
    for optimizer, message in ((careless, "relative error"), (greedy, "the model was changed: first.bias")):
        monkeypatch.setattr(fxfuse, "optimize", optimizer)
        record = optimized(subject, True)
        assert record["status"] == "wrong" and message in record["message"]


def test_more_layers_than_needed_are_not_whole() -> None:
    record = optimized(Subject(Entry(Chain, images(), convs=1, norms=0)), True)
    assert record["status"] == "ok" and not record["whole"]


@pytest.mark.parametrize(
    ("name", "timeout", "status"), [("self[0](x)", 0.2, "timeout"), ("no such model", 60, "crash")]
)
def test_a_process_may_hang_or_die(tmp_path: Path, name: str, timeout: float, status: str) -> None:
    args = argparse.Namespace(timeout=timeout, memory=8, threads=1, envs=tmp_path)
    record = attempt(name, sys.executable, args, tmp_path / "r.jsonl", set())
    assert [record[way]["status"] for way in ("eager", "with", "without")] == [status] * 3
    assert status in tables({name: record})


def test_the_page_says_what_is_left_and_why() -> None:
    subject, eager = looked_at(CHAIN)
    assert subject is not None
    good = optimized(subject, True)
    bad = good | {
        "whole": False,
        "norms": 1,
        "behind": 1,
        "fired": 0,
        "why": ["here: it cannot be traced (1)", "b", "c"],
    }
    text = tables({"one": {"eager": eager, "with": good, "without": good},
                   "two": {"eager": eager, "with": good, "without": bad}})  # fmt: skip
    assert "2 of 2 whole with example inputs (all;" in text
    assert "1 of 2 whole without (1 untouched;" in text
    assert [line.count("`one`") for line in text.splitlines()].count(1) == 1  # both ways alike: one row
    assert "- `two`, inputs none: here: it cannot be traced (1)\n- `two`, inputs none: b" in text
    assert between_markers("a\n<!-- reach -->\nold\n<!-- /reach -->\nz", "new") == (
        "a\n<!-- reach -->\n\nnew\n\n<!-- /reach -->\nz"
    )
    with pytest.raises(ValueError, match="the page has no"):
        between_markers("nothing", "new")


def test_every_model_of_the_list_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert [name for name in MODELS if f"| `{name}`" not in page] == []
