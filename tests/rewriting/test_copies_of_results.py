"""Copies of a result, made in any way and any order, are the result: hooks, hidden buffers, report, new weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import nn

import fxfuse


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


WAYS: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m)), copy.copy)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.register_buffer("shift", torch.ones(3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x))) + self.shift


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Hidden(), Hidden()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.mean() > 0 else self.two(x)


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def halved(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] / 2, *args[1:]), kwargs


def model_of(kind: str) -> nn.Module:
    model = randomize(Branching() if kind == "parts" else Hidden()).double().eval()
    if kind == "hooks":
        model.register_forward_hook(doubled)
        model.register_forward_pre_hook(halved, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", ["graph", "hooks", "parts"])
@pytest.mark.parametrize("ways", [*product(WAYS, repeat=2), (saved, copy.deepcopy, saved, copy.deepcopy)])
def test_a_copy_of_a_copy(kind: str, ways: tuple[Callable[[Any], Any], ...]) -> None:
    model = model_of(kind)
    fused = made = fxfuse.optimize(model)
    for way in ways:
        made = way(made)
    other = randomize(copy.deepcopy(model), seed=7).double().eval()
    report = fxfuse.report(fused)
    assert fxfuse.report(made).to_dict() == report.to_dict() and len(report.fired) == (2 if kind == "parts" else 1)
    assert list(made.state_dict()) == list(fused.state_dict()) and not any("shift" in n for n in made.state_dict())
    assert type(made).__name__ == type(fused).__name__ and not made.training
    x = torch.randn(2, 3, 5, 7).double()
    for sign in (1, -1):
        torch.testing.assert_close(made(sign * x.abs()), model(sign * x.abs()), rtol=1e-9, atol=1e-9)
    fxfuse.refresh(made, other)
    for sign in (1, -1):
        torch.testing.assert_close(made(sign * x.abs()), other(sign * x.abs()), rtol=1e-9, atol=1e-9)


def test_a_copy_shares_nothing_and_is_changed_alone() -> None:
    model = model_of("hooks")
    fused = fxfuse.optimize(model)
    twin, x = copy.deepcopy(saved(fused)), torch.ones(1, 3, 4, 4).double()
    before = fused(x)
    twin._forward_hooks.clear()
    assert torch.equal(fused(x), before) and not torch.equal(twin(x), before)
    assert not {t.data_ptr() for t in fused.parameters()} & {t.data_ptr() for t in twin.parameters()}


def test_a_layer_of_a_result_is_no_result() -> None:
    fused = fxfuse.optimize(model_of("graph"))
    with pytest.raises(TypeError, match="does not come from"):
        fxfuse.report(fused.conv)
    with pytest.raises(TypeError, match="does not come from"):
        fxfuse.refresh(nn.Sequential(fused.conv), model_of("graph"))
