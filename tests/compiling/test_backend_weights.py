"""torch.compile with backend "fxfuse": no answer is another model's or an older weight's."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from typing import Any

import pytest
import torch
from compiled_models import (
    CHANGES,
    Counting,
    build,
    compiled,
    draw,
    fresh,  # noqa: F401 - a fixture of every test
    in_place,
    load,
    perturbed,
    same,
)
from helpers import relative_error
from torch import Tensor, nn

from fxfuse.compiling.backend import fxfuse as backend


@pytest.mark.parametrize("freeze", ["auto", True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_weights_is_followed(name: str, freeze: Any) -> None:
    model, x = build(), draw()
    for p in model.parameters():
        p.requires_grad_(False)
    f, g = compiled(model, freeze=freeze), torch.Generator().manual_seed(1)
    with torch.no_grad():
        old = f(x)
        for _ in range(3):
            CHANGES[name](model, g)
            same(f, model, x)
            assert not torch.equal(f(x), old)


def test_optimizers_are_followed() -> None:
    """A fused step counts in no version; the others do."""
    for options in ({"fused": True}, {"foreach": True}, {}):
        model, x = build(), draw()
        f = compiled(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
        for _ in range(2):
            with torch.no_grad():
                same(f, model, x)
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_change_costs_no_compilation() -> None:
    model, inner, g = build(), Counting(), torch.Generator()
    f = compiled(model, inner, freeze=False)
    with torch.no_grad():
        for _ in range(4):
            same(f, model, draw())
            in_place(model, g)
            load(model, g)
    assert len(inner.graphs) == 1
    inner.graphs.clear()
    f = compiled(model, inner, freeze="auto")
    with torch.no_grad():
        for _ in range(4):
            same(f, model, draw())
            in_place(model, g)
    assert len(inner.graphs) == 2  # baked once, and then one for all


def test_checks_can_be_left_out() -> None:
    model, x = build(), draw()
    for check, seen in (("full", True), ("identity", False), ("never", False)):
        torch._dynamo.reset()
        f = compiled(model, check=check)
        with torch.no_grad():
            f(x)
            in_place(model, torch.Generator())
            assert torch.equal(f(x), model(x)) or (relative_error(f(x), model(x)) < 1e-12) == seen


def test_two_instances_and_their_weights() -> None:
    models = [build(seed=s) for s in range(3)]
    x = draw()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    f = compiled(run)
    with torch.no_grad():
        for model in (*models, *models[::-1]):
            assert relative_error(f(model, x), model(x)) < 1e-12


def test_many_instances_share_a_graph() -> None:
    inner = Counting()
    models = [build(1, seed=s)[0] for s in range(20)]
    f = compiled(lambda model, x: model(x), inner)
    with torch.no_grad():
        for model in models * 2:
            assert relative_error(f(model, draw()), model(draw())) < 1e-12
    assert len(inner.graphs) <= 12


def test_regional_compilation() -> None:
    model = build(4)
    plain = copy.deepcopy(model)
    for block in model:
        block.compile(backend=backend, options={"inner": "eager"})
    with torch.no_grad():
        for seed in range(3):
            same(model, plain, draw(seed=seed))


def test_what_is_dropped_is_freed() -> None:
    f = compiled(lambda model, x: model(x))
    kept = build(seed=1)
    with torch.no_grad():
        f(kept, draw())
        for freed in range(2):
            model = build(seed=2 + freed)
            f(model, draw())
            refs = [weakref.ref(p) for p in model.parameters()]
            del model
            gc.collect()
            assert [r for r in refs if r() is not None] == []
        assert relative_error(f(kept, draw()), kept(draw())) < 1e-12


def test_threads_call_while_another_loads() -> None:
    model, x, wrong = build(), draw(), list[float]()
    f = compiled(model)
    states = [perturbed(model, torch.Generator().manual_seed(s)) for s in range(4)]
    with torch.no_grad():
        f(x)
        done = threading.Event()

        def call() -> None:
            with torch.no_grad():
                while not done.is_set():
                    f(x)

        threads = [threading.Thread(target=call) for _ in range(3)]
        for t in threads:
            t.start()
        for state in states * 5:
            model.load_state_dict(state)
            wrong.append(relative_error(f(x), model(x)))
        done.set()
        for t in threads:
            t.join()
        same(f, model, x)
    assert max(wrong) < 1e-12


@pytest.mark.parametrize("freeze", ["auto", False])
def test_two_hundred_interleavings(freeze: Any) -> None:
    """Weight changes of any kind, instances, gradient modes, train and eval, and sizes, in any order."""
    chosen = random.Random(0)
    models = [build(seed=s) for s in range(3)]
    twins = copy.deepcopy(models)
    f = compiled(lambda model, x: model(x), freeze=freeze)
    at, grad = 0, False
    for step in range(200):
        kind = chosen.choice([*CHANGES, *CHANGES, "instance", "instance", "grad", "train", "frozen"])
        if kind == "instance":
            at = chosen.randrange(3)
        elif kind == "grad":
            grad = not grad
        elif kind == "train":
            models[at].train(not models[at].training), twins[at].train(models[at].training)
        elif kind == "frozen":
            flag = chosen.random() < 0.5
            models[at].requires_grad_(flag), twins[at].requires_grad_(flag)
        else:
            for model in (models[at], twins[at]):
                CHANGES[kind](model, torch.Generator().manual_seed(step))
        x = draw(chosen.randrange(2, 4), 4, chosen.randrange(4, 7), 5, seed=step)
        with torch.set_grad_enabled(grad):
            got, want = f(models[at], x), twins[at](x)
        assert got.requires_grad == want.requires_grad, (step, kind)
        assert relative_error(got, want) < 1e-10, (step, kind)
        for (name, b), (_, c) in zip(models[at].named_buffers(), twins[at].named_buffers(), strict=True):
            assert torch.equal(b, c), (step, kind, name)
