"""torch.compile with backend "fxfuse": what it fuses, and that no answer is another model's or an older weight's."""

from __future__ import annotations

import copy
import gc
import logging
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from torch import Tensor, nn

import fxfuse
from fxfuse.backend import fxfuse as backend

Change = Callable[[nn.Module, torch.Generator], None]


class Block(nn.Module):
    """Three branches as RepVGG has them."""

    def __init__(self, width: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.a, self.p = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.b, self.n, self.m = (nn.BatchNorm2d(width, eps=eps) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.n(self.p(x)) + self.m(x))


def build(blocks: int = 2, seed: int = 0, **fields: Any) -> nn.Module:
    return randomize(nn.Sequential(*(Block(**fields) for _ in range(blocks))), seed).double()


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(model, backend=backend, dynamic=dynamic, options={"inner": inner, "strict": True, **options})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(f: Any, model: Any, x: Tensor, tolerance: float = 1e-12) -> None:
    assert relative_error(f(x), model(x)) <= tolerance


class Counting:
    """An inner backend that keeps the graphs it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def calls(self) -> list[str]:
        return [getattr(n.target, "__name__", str(n.target)) for g in self.graphs[-1:] for n in g.graph.nodes]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        recompile_limit=256, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True
    ):
        yield  # beyond its limit Dynamo would run eager, and everything would agree
    torch._dynamo.reset()


@pytest.mark.parametrize("freeze", ["auto", True, False])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_it_fuses_and_agrees(freeze: Any, dynamic: bool | None) -> None:
    model, inner, reports = build(), Counting(), []
    f = compiled(model, inner, freeze=freeze, dynamic=dynamic, on_report=reports.append)
    with torch.no_grad():
        for shape in ((2, 4, 6, 5), (3, 4, 7, 9), (1, 4, 5, 5), (4, 4, 9, 3)):
            same(f, model, draw(*shape))
    assert [c for c in inner.calls if "conv" in c or "norm" in c or "add" in c] == ["conv2d"] * 2
    assert all(len(r.fired) == 2 and r.capture == "dynamo" for r in reports) and len(reports) <= 4
    told = fxfuse.report(f)
    assert len(told) == len(reports) and "conv_bn" in str(told) and fxfuse.report(model) == told


def test_a_bare_name_in_a_fresh_process() -> None:
    code = (
        "import torch; from torch import nn; torch.set_num_threads(1)\n"
        "assert 'fxfuse' in torch._dynamo.list_backends(())\n"
        "m = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(); x = torch.randn(1, 3, 5, 5)\n"
        "f = torch.compile(m, backend='fxfuse', options={'inner': 'eager'})\n"
        "with torch.no_grad(): torch.testing.assert_close(f(x), m(x))\n"
        "import fxfuse; print(fxfuse.report(f)[0].by_pattern)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "{'conv_bn': 1}"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"inner_backend": "eager"},
            "unknown option 'inner_backend' of backend fxfuse; known: check, cost, freeze, inner",
        ),
        ({"inner": "inductr"}, "unknown inner backend 'inductr'; known: .*inductor"),
        ({"freeze": "sometimes"}, "unknown freeze 'sometimes'; known: auto, True, False"),
        ({"check": "hard"}, "unknown check 'hard'; known: full, identity, never"),
        ({"patterns": ["conv_nb"]}, "unknown pattern 'conv_nb'"),
        ({"cost": "flops"}, "unknown cost 'flops'"),
        ({"mode": "fast"}, "unknown mode 'fast'; known: .*reduce-overhead"),
    ],
)
def test_unknown_options(options: dict[str, Any], text: str) -> None:
    f = torch.compile(build(), backend=backend, options={"inner": "eager", **options})
    with pytest.raises(Exception, match=text), torch.no_grad():
        f(draw())


def load(model: nn.Module, g: torch.Generator) -> None:
    model.load_state_dict(perturbed(model, g))


def assign(model: nn.Module, g: torch.Generator) -> None:
    model.load_state_dict(perturbed(model, g), assign=True)


def perturbed(model: nn.Module, g: torch.Generator) -> dict[str, Tensor]:
    state = model.state_dict()
    return {
        k: v + torch.rand(v.shape, generator=g, dtype=v.dtype) if v.is_floating_point() else v for k, v in state.items()
    }


def in_place(model: nn.Module, g: torch.Generator) -> None:
    with torch.no_grad():
        model.get_parameter("0.a.weight").mul_(1 + torch.rand((), generator=g, dtype=torch.float64))


def data(model: nn.Module, g: torch.Generator) -> None:
    weight = model.get_parameter("1.b.weight")
    weight.data = torch.rand(weight.shape, generator=g, dtype=weight.dtype)


def statistics(model: nn.Module, g: torch.Generator) -> None:
    model.get_buffer("0.n.running_var").add_(torch.rand((), generator=g, dtype=torch.float64))


def new_parameter(model: nn.Module, g: torch.Generator) -> None:
    conv = model.get_submodule("1.p")
    assert isinstance(conv, nn.Conv2d)
    conv.weight = nn.Parameter(torch.rand(conv.weight.shape, generator=g, dtype=conv.weight.dtype), False)


def epsilon(model: nn.Module, g: torch.Generator) -> None:
    norm = model.get_submodule("0.b")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.eps = float(torch.rand((), generator=g))


def moved(model: nn.Module, g: torch.Generator) -> None:
    in_place(model, g)
    model.to(torch.float32).to(torch.float64)


def behind_the_back(model: nn.Module, g: torch.Generator) -> None:
    model.get_parameter("0.a.weight").data.mul_(1.5)
    model.get_buffer("1.b.running_mean").numpy()[:] += 1
    fxfuse.refresh()


def trained(model: nn.Module, g: torch.Generator) -> None:
    """A training step in eager writes running statistics, and counts it in no version of theirs."""
    was = model.training
    model.train()
    with torch.no_grad():
        model(torch.rand(2, 4, 5, 5, generator=g, dtype=torch.float64))
    model.train(was)


CHANGES: dict[str, Change] = {
    f.__name__: f
    for f in (load, assign, in_place, data, statistics, new_parameter, epsilon, moved, trained, behind_the_back)
}


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


def test_training_is_left_exact(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    twin = copy.deepcopy(model)
    f = compiled(model)
    with caplog.at_level(logging.WARNING, "fxfuse"):
        for step in range(2):
            for m, call in ((model, f), (twin, twin)):
                m.train(step == 0)
                call(draw(seed=step)).square().mean().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and relative_error(p.grad, q.grad) < 1e-12, name
    for (name, b), (_, c) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(b, c), name
    model.eval(), twin.eval()
    with torch.no_grad():
        same(f, twin, draw())
    model.train(), twin.train()
    with torch.no_grad():
        assert torch.equal(f(draw()), twin(draw()))


def test_frozen_weights_fold_and_the_input_gradient_matches() -> None:
    model, inner = build().requires_grad_(False), Counting()
    f = compiled(model, inner)
    grads = []
    for call in (f, model):
        x = draw().requires_grad_()
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None and grads[1] is not None and relative_error(grads[0], grads[1]) < 1e-12
    assert "batch_norm" not in inner.calls
    model.requires_grad_(True)
    f(draw()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Modes(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.block, self.last = kind, Block(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "enable_grad":
            with torch.enable_grad():
                y = self.block(x)
            return self.last(y)
        if self.kind == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.block(x)
            return self.last(y.to(x.dtype))
        if self.kind == "break":
            y = self.block(x)
            torch._dynamo.graph_break()
            return self.last(self.block(y))
        if self.kind == "shared":
            return self.block(self.last(self.block(x)))
        if self.kind == "writes":
            self.last.running_mean.add_(1)
            return self.last(self.block(x))
        return self.block(x) * self.last.weight.view(-1, 1, 1), self.last.weight.view(2, 2)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["enable_grad", "autocast", "break", "shared", "writes", "shows"])
def test_modes_breaks_sharing_and_writes(kind: str) -> None:
    model = randomize(Modes(kind))
    twin = copy.deepcopy(model)
    f = compiled(model)
    with torch.no_grad():
        for seed in range(3):
            x = draw(seed=seed).float()
            got, want = f(x), twin(x)
            got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
            for a, b in zip(got, want, strict=True):
                assert relative_error(a, b) < (2e-2 if kind == "autocast" else 1e-5)
    for (name, b), (_, c) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(b, c), name


def test_hooks_dtypes_and_inference_mode() -> None:
    model = build()
    model[0].a.register_forward_hook(lambda m, args, out: out * 2)
    f = compiled(model)
    with torch.inference_mode():
        same(f, model, draw())
    model.to(torch.float32)
    with torch.no_grad():
        same(f, model, draw().float(), 1e-5)
    model.to(torch.bfloat16)
    with torch.no_grad():
        same(f, model, draw().bfloat16(), 5e-2)
    with torch.inference_mode():
        made = build(seed=4)
        g = compiled(made)
        same(g, made, draw())
        made[0].a.weight.mul_(2)
        fxfuse.refresh()
        same(g, made, draw())


def test_a_failure_leaves_the_model_running(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("nothing works today")

    model, x = build(), draw()
    monkeypatch.setattr("fxfuse.backend.look", fails)
    f = torch.compile(model, backend=backend, options={"inner": "eager"})
    with torch.no_grad(), caplog.at_level(logging.ERROR, "fxfuse"):
        same(f, model, x)
    assert "nothing works today" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="nothing works today"), torch.no_grad():
        compiled(model)(x)


def test_weights_that_cannot_be_folded_run_as_they_are() -> None:
    model = build()
    f = compiled(model, freeze=False)
    with torch.no_grad():
        same(f, model, draw())
        model[0].b.running_var.fill_(float("inf"))
        model[0].b.weight.fill_(float("nan"))
        assert torch.equal(torch.isnan(f(draw())), torch.isnan(model(draw())))
        model[0].b.running_var.fill_(2.0)
        model[0].b.weight.fill_(0.5)
        same(f, model, draw())


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
