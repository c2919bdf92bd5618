"""torch.compile with backend "fxfuse": what it fuses, refuses and leaves exact."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from compiled_models import (
    Block,
    Counting,
    build,
    compiled,
    draw,
    fresh,  # noqa: F401 - a fixture of every test
    same,
)
from helpers import randomize, relative_error
from torch import Tensor, nn

import fxfuse
from fxfuse.compiling.backend import fxfuse as backend


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


def test_marked_sizes_share_a_graph_and_a_reset_forgets_it() -> None:
    model, inner = build(), Counting()
    f = compiled(model, inner)
    with torch.no_grad():
        for shape in ((2, 4, 6, 5), (3, 4, 7, 9), (5, 4, 8, 3)):
            x = draw(*shape)
            for dim in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, dim)
            same(f, model, x)
        assert len(inner.graphs) == 1 and len(fxfuse.report(f)) == 1
        torch._dynamo.reset()
        with pytest.raises(TypeError, match="does not come from"):
            fxfuse.report(f)
        same(f, model, draw())
    assert len(inner.graphs) == 2 and len(fxfuse.report(f)) == 1


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
    monkeypatch.setattr("fxfuse.pipeline.look", fails)
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


def test_global_freezing_is_folded_too_and_its_danger_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxfuse.compiling.fused_graph._told", set())
    model, other, inner = build(), build(seed=1), Counting()
    f, g = compiled(model, inner), compiled(other, inner)
    with torch._inductor.config.patch(freezing=True), torch.no_grad(), caplog.at_level(logging.WARNING, "fxfuse"):
        for x in (draw(), draw(3, 4, 7, 9)):
            same(f, model, x)
            same(g, other, x)
    assert inner.calls.count("conv2d") == 2 and "batch_norm" not in inner.calls
    assert len([r for r in caplog.records if "freezing is on: weights that change later" in r.message]) == 1
    assert len(fxfuse.report(f)[0].fired) == 2


def test_compiled_within_compiled() -> None:
    model = build(3)
    model[1] = compiled(model[1])
    f, inner = compiled(model), Counting()
    with torch.no_grad():
        same(f, model, draw())
        model[1].a.weight.mul_(2)
        same(f, model, draw(3, 4, 7, 9))
    twin = build(3)
    g = compiled(compiled(twin, inner), inner)
    with torch.no_grad():
        same(g, twin, draw())
    assert inner.calls.count("conv2d") == 3 and "batch_norm" not in inner.calls
