"""A module's name is never code: whatever it holds, the graph says it, the report shows it, refresh finds it."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import randomize
from torch import nn

import fxfuse
from fxfuse.rewriting.spelling import spelled, unspelled

NAMES = (
    'a"b',
    "it's",
    "line\nfeed",
    "back\\slash",
    "ends\\",
    "carriage\r",
    "nul\0",
    "{0}{x}",
    "%s",
    '") or print("ran',
    "ﬁ",
    "größe",
    "a b-c",
    "class",
    "None",
    "\x1b[31m",
    "\u202e",
    "#",
    '"""',
)


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))


class Named(nn.Module):
    """Modules under given names, one after the other; some stay as they are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.order = names
        for name in names:
            self.add_module(name, pair())
            self.add_module(name + "'s", nn.GroupNorm(1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = self._modules[name + "'s"](torch.relu(self._modules[name](x)))
        return x


class Deciding(nn.Module):
    """The same, but below a forward that stays Python."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.body = Named(*names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) if x.sum() > -1e9 else x


def model_of(cls: Callable[..., nn.Module], *names: str) -> nn.Module:
    model = randomize(cls(*names)).double()
    inner = nn.Sequential()
    inner.add_module(names[0], model)
    return randomize(nn.Sequential(inner)).double().eval()


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(Named, name)
    before = copy.deepcopy(model.state_dict())
    fused = fxfuse.optimize(model, torch.randn(2, 3, 5, 7).double())
    changed = randomize(copy.deepcopy(model), seed=5).double().eval()
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        for size in ((1, 3, 5, 7), (2, 3, 4, 3)):
            x = torch.randn(size).double()
            torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
        fxfuse.refresh(twin, changed)
        torch.testing.assert_close(twin(x), changed(x), rtol=1e-9, atol=1e-9)
    assert [f.path for f in fxfuse.report(fused).fired] == [f"0.{name}.{name}.0"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("cls", [Named, Deciding])
def test_names_that_come_to_be_alike_stay_apart(cls: Callable[..., nn.Module]) -> None:
    model = model_of(cls, 'a"', "a_x22_", "a'", "a_x22__", "in", "in_", "in__", "a\n", "a\r")
    fused = fxfuse.optimize(model)
    x = torch.randn(2, 3, 5, 7).double()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    changed = randomize(copy.deepcopy(model), seed=3).double().eval()
    fxfuse.refresh(fused, changed)
    torch.testing.assert_close(fused(x), changed(x), rtol=1e-9, atol=1e-9)
    assert len(fxfuse.report(fused).fired) == 9


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "_graph", "shape_env"])
def test_names_that_a_graph_module_has_itself(name: str) -> None:
    model = randomize(Named(name)).double().eval()
    x = torch.randn(2, 3, 5, 7).double()
    fused = fxfuse.optimize(model)
    for twin in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
        fxfuse.refresh(twin, model)
    assert [f.path for f in fxfuse.report(fused).fired] == [f"{name}.0"]


def test_what_can_be_said_keeps_its_name() -> None:
    model = Named("stem", "conv-1x1", "größe", "0", "graphs", "it's", "a{b}")
    for name, _ in model.named_parameters():
        assert spelled(model, name) == name == unspelled(model, name)
    assert spelled(Named("lambda"), "lambda.0") == "lambda_.0"
    assert unspelled(Named("lambda"), "lambda_.0") == "lambda.0"
    taken = Named("lambda", "lambda_")
    assert spelled(taken, "lambda.0") == "lambda__.0" and unspelled(taken, "lambda_.0") == "lambda_.0"


def test_the_report_shows_names_and_sends_nothing() -> None:
    names = ("\x1b[2J|<img src=x>", "two\nlines", "a\\|b", "`<b>`")
    model = Named(*names)
    model.add_module("opaque", nn.BatchNorm2d(3, track_running_stats=False))
    report = fxfuse.report(fxfuse.optimize(randomize(nn.Sequential(model, model.opaque)).eval()))
    text, markdown = str(report), report.to_markdown()
    assert "\\x1b[2J|<img" in text and "two\\nlines" in text
    assert all(line.isprintable() for line in (*text.splitlines(), *markdown.splitlines()))
    assert "<" not in markdown and "\\\\x1b[2J\\|&lt;img src=x>" in markdown
    table = markdown[markdown.index("| fused") :].split("\n\n")[0].splitlines()
    plain = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in table]
    assert len(plain) == 2 + len(names) and set(plain) == {5}
    fired = json.loads(json.dumps(report.to_dict()))["fired"]
    assert [f["path"] for f in fired] == [f"0.{name}.0" for name in names]
