"""Models that are no single graph: their parts are optimized, and nothing else can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_untouched, count, fingerprint, randomize
from python_models import Plain, both, count_norms, python
from safety import agrees, model_of, pickled
from torch import Tensor, nn

import fxfuse


def inner(self: Any, x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        x = x[..., 1:]
    return self.a(x) if len(x) > 2 else self.b(x)


def test_parts_below_a_module_in_a_graph() -> None:
    child = model_of(inner, a=Plain(), b=Plain())
    model = randomize(nn.Sequential(Plain(), child, Plain())).double()
    fused = agrees(model, fires=True)
    report = fxfuse.report(fused)
    assert report.capture == "symbolic" and count_norms(fused) == 0
    assert {p: how for p, how, _ in report.parts} == {
        "1.a": "symbolic",
        "1.b": "symbolic",
        "1": "python",
        "": "symbolic",
    }
    assert {f.path for f in report.fired} == {"0.conv", "1.a.conv", "1.b.conv", "2.conv"}
    assert "1: " in str(report) or "1  " in str(report)


def test_a_graph_that_reads_inside_a_kept_module_leaves_it_alone() -> None:
    child = model_of(inner, a=Plain(), b=Plain())
    model = randomize(model_of(lambda s, x: s.c(x) * s.c.a.conv.bias.sum(), c=child)).double()
    fused = agrees(model)
    assert count_norms(fused) == 2


def test_hooks_on_what_is_taken_and_on_what_stays() -> None:
    model: Any = python(both)
    model.a.register_forward_hook(lambda m, args, out: out * 2)
    fused = agrees(model, fires=True)
    assert count_norms(fused.b) == 0 and fxfuse.report(fused).kept_for == ("a: it has hooks",)
    assert count_norms(fxfuse.strip(fused).a) == 0
    model = python(both)
    model.register_forward_pre_hook(lambda m, args: (args[0] * m.a.conv.weight.mean(),))
    fused = agrees(model, fires=True)
    assert all("has hooks" in why for why in fxfuse.report(fused).kept_for)


def test_the_result_is_a_module_like_any_other() -> None:
    model = python(both)
    before = fingerprint(model)
    fused = fxfuse.optimize(model)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    want = model(x)
    for candidate in (pickled_class(fused), fxfuse.optimize(fused)):
        torch.testing.assert_close(candidate(x), want)
        assert fxfuse.report(candidate).capture == "hierarchical"
    assert not fxfuse.report(fxfuse.optimize(fused)).fired
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
    assert_untouched(model, before)
    other = randomize(python(both), seed=3)
    fxfuse.refresh(fused, other)
    torch.testing.assert_close(fused(x), other(x))
    with pytest.raises(ValueError, match=r"no such tensor as|is not the model that was optimized"):
        fxfuse.refresh(fused, nn.Conv2d(3, 3, 1))


def pickled_class(module: nn.Module) -> Any:
    """Through pickle where the class can be found again; the class here is local, so its parts alone."""
    copied = fxfuse.optimize(module)
    copied.a, copied.b = pickled(module.a), pickled(module.b)
    return copied


def test_a_dry_run_says_the_same() -> None:
    model = python(both)
    planned, done = fxfuse.plan(model), fxfuse.report(fxfuse.optimize(model))
    assert planned.parts == done.parts and planned.refused == done.refused
    assert [f.path for f in planned.fired] == [f.path for f in done.fired]
    assert planned.after.params == done.after.params and planned.before == done.before
    assert done.before.ops["batch_norm"] - done.after.ops["batch_norm"] == 2


def test_example_inputs_reach_the_parts() -> None:
    """The rank of what a part is given is known from running the whole, on stand-ins."""

    def body(self: Any, x: Tensor) -> Tensor:
        return self.c(x.mean((2, 3))) if x.dim() == 4 else x

    mixed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = randomize(model_of(body, c=mixed)).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, verify=True)
    assert count(fused, x)["batch_norm"] == 0
    torch.testing.assert_close(fused(x), model(x))


def test_the_way_can_be_forced() -> None:
    model = randomize(nn.Sequential(Plain(), nn.ReLU(), Plain())).double()
    for how, kind in (("symbolic", torch.fx.GraphModule), ("hierarchical", nn.Sequential)):
        fused = agrees(model, capture=how, fires=True)
        assert fxfuse.report(fused).capture == how and isinstance(fused, kind)
        assert count_norms(fused) == 0
    with pytest.raises(ValueError, match="unknown capture 'trace'; known: symbolic, export, hierarchical"):
        fxfuse.optimize(model, capture="trace")
    with pytest.raises(ValueError, match='capture="export" needs example_inputs'):
        fxfuse.optimize(model, capture="export")
    with pytest.raises(fxfuse.CaptureError, match="control flow"):
        fxfuse.optimize(python(both), capture="symbolic")


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Padding whose amount depends on the input's size, as TensorFlow does it."""
    amounts: list[Any] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


class ConvSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def test_padding_that_depends_on_the_size_is_one_graph() -> None:
    model = randomize(nn.Sequential(ConvSame(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())).double()
    shapes = ((2, 4, 8, 7), (1, 4, 5, 11), (1, 4, 1, 2))
    fused = agrees(model, fires=True, shapes=shapes)
    assert fxfuse.report(fused).capture == "symbolic" and count_norms(fused) == 0


def test_max_and_min_of_numbers_and_tensors_stay_what_they_are() -> None:
    model = model_of(lambda s, x: x * max(x.shape[-1], 3, 7) - min(2, x.dim()) + max([1, 2]) + min(3, 4))
    agrees(model, fires=False)
    assert max(3, 4) == 4 and max.__name__ == "max"
