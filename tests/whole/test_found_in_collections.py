"""What running over whole model collections brought to light, each as small as it gets."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize, relative_error
from torch import Tensor, nn

import fxfuse
from benchmarks.executed import Executed


class Asks(nn.Module):
    """A pre-norm block whose attention asks the normalized tensor for its sizes, as visformer's do."""

    def __init__(self, how: str, first: nn.Module) -> None:
        super().__init__()
        self.how, self.first = how, first
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.1)
        self.qkv = nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.drop(self.norm(x))
        b, h, w = (y.shape[0], y.shape[2], y.shape[3]) if self.how == "shape" else (y.size(0), y.size(2), y.size(3))
        out = self.qkv(y).reshape(b, 2, 3, h * w).sum(1)
        return out + x.flatten(2)[:, :3] if self.how == "residual" else out


def check(model: nn.Module, convs: int, norms: int) -> fxfuse.Report:
    randomize(model, integer=True).double()
    x, y = torch.randint(-4, 5, (2, 4, 7, 5)).double(), torch.randint(-4, 5, (3, 4, 6, 9)).double()
    return fxfuse.report(exactly(model, x, y, examples=x, counts={"conv": convs, "bn": norms}))


@pytest.mark.parametrize("how", ["shape", "size", "residual"])
@pytest.mark.parametrize("first", [nn.ReLU(), nn.Identity(), nn.MaxPool2d(2, 1)], ids=lambda m: type(m).__name__)
def test_a_batch_norm_asked_for_its_size_still_joins_the_layer_after_it(how: str, first: nn.Module) -> None:
    check(Asks(how, first), convs=1, norms=0)


@pytest.mark.parametrize("how", ["shape", "size", "residual"])
def test_nor_is_it_kept_from_the_layer_before_it(how: str) -> None:
    check(Asks(how, nn.Conv2d(4, 4, 3)), convs=2, norms=0)


ELSEWHERE = "the output of the layer before batch_norm is read elsewhere too"


class Twice(nn.Module):
    """A batch norm after parallel convolutions whose sum is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return F.relu(self.norm(y)) + y


class Alone(nn.Module):
    """A batch norm of what no layer made, read through steps that are linear but no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([x.relu()], 1))


@pytest.mark.parametrize(
    ("model", "convs", "reason"),
    [(Twice(), 1, ELSEWHERE), (Alone(), 0, "follows no convolution")],
    ids=["read twice", "concatenation of one"],
)
def test_every_batch_norm_left_has_its_reason(model: nn.Module, convs: int, reason: str) -> None:
    report = check(model, convs, norms=1)
    assert [reason in r.reason for r in report.refused if r.where == "norm"] == [True]


class Meeting(nn.Module):
    """Layers of different tensors that meet before their batch norm, as in BottleneckCSP."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(4, 12, 1)
        self.e = nn.Conv2d(4, 1, 1)
        self.d, self.drop, self.own = nn.Conv2d(4, 6, 1), nn.Dropout(), nn.BatchNorm2d(6)
        self.norm = nn.BatchNorm2d(12 if "cat" in how else 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x.relu()
        a, b = self.a(y), self.drop(self.own(self.b(x)))
        if self.how == "cat":
            z = torch.cat([a, b], 1)
        elif self.how == "cat, read twice":
            z = torch.cat([a, b], 1)
            return self.norm(z).relu() + z
        elif self.how == "cat, part read twice":
            return self.norm(torch.cat([a, b], 1)).relu() + torch.cat([b, b], 1)
        elif self.how == "cat with an activation":
            z = torch.cat([a, b.relu()], 1)
        elif self.how == "cat of sums":
            z = torch.cat((self.d(x) + b, a - self.d(x)), 1)
        elif self.how == "sum with cat":
            z = torch.cat([a, b], dim=1) + self.c(x)
        elif self.how == "difference":
            z = torch.sub(a, b, alpha=2)
        elif self.how == "one channel for all":
            z = a + self.e(x)
        elif self.how == "cat of the same":
            z = torch.cat([a, a], 1)
        elif self.how == "broadcast":
            z = a + b + self.d(x.sum((2, 3), keepdim=True))
        else:
            z = a
            z += b
        return self.norm(z).relu()


@pytest.mark.parametrize("how", ["cat", "cat of sums", "sum with cat", "difference", "in place", "broadcast"])
def test_a_batch_norm_goes_to_each_of_the_layers_that_meet_before_it(how: str) -> None:
    convs = {"cat of sums": 3, "sum with cat": 3, "broadcast": 3}.get(how, 2)
    report = check(Meeting(how), convs, norms=0)
    assert all(r.where in ("norm", "own", "a", "b", "c", "d") for r in report.refused)


STAYS = ("cat, read twice", "cat, part read twice", "cat with an activation", "cat of the same", "one channel for all")


@pytest.mark.parametrize("how", STAYS)
def test_a_batch_norm_stays_whole_where_not_every_layer_takes_it(how: str) -> None:
    model = Meeting(how)
    report = check(model, 1 if how == "cat of the same" else 2, norms=1)  # there nobody reads b, which is gone
    fused = fxfuse.optimize(model)
    assert isinstance(fused.get_submodule("norm"), nn.BatchNorm2d)
    assert [r.where for r in report.refused if "batch_norm follows no" in r.reason] == ["norm"]


@pytest.mark.parametrize("how", ["cat", "difference"])
def test_nor_where_the_pattern_is_left_out(how: str) -> None:
    model = randomize(Meeting(how))
    fused = fxfuse.optimize(model, patterns="-conv_bn")
    assert isinstance(fused.get_submodule("norm"), nn.BatchNorm2d)


@pytest.mark.parametrize("how", ["cat", "cat of sums", "difference", "broadcast"])
def test_layers_that_meet_in_an_exported_graph(how: str) -> None:
    model, x = randomize(Meeting(how), integer=True).double(), torch.randint(-4, 5, (2, 4, 7, 5)).double()
    fused = fxfuse.optimize(model, x, capture="export")
    assert torch.equal(fused(x), model(x))
    assert count(fused, x)["bn"] == 0


def test_parts_of_a_batch_norm_are_computed_anew_from_new_weights() -> None:
    model, x = randomize(Meeting("sum with cat")), torch.randn(2, 4, 7, 5)
    fused = fxfuse.optimize(model)
    randomize(model, seed=1)
    fxfuse.refresh(fused, model)
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), atol=1e-5)


class Transition(nn.Module):
    """A pointwise convolution before an average pool, as between the blocks of DenseNet."""

    def __init__(self, conv: nn.Module, pool: nn.Module, norm: nn.Module | None = None, twice: bool = False) -> None:
        super().__init__()
        self.first, self.conv, self.norm, self.pool = nn.ReLU(), conv, norm or nn.Identity(), pool
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        z = self.pool(self.norm(y) * 2)
        return (z, y) if self.twice else z


def pointwise(**options: Any) -> nn.Module:
    return nn.Conv2d(4, 6, 1, **options)


@pytest.mark.parametrize(
    "model",
    [
        Transition(pointwise(bias=False), nn.AvgPool2d(2)),
        Transition(pointwise(), nn.AvgPool2d(2, 2), nn.BatchNorm2d(6)),
        Transition(pointwise(groups=2), nn.AvgPool2d((4, 2), (2, 1))),
        Transition(nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 6, 1)), nn.AvgPool2d(2, count_include_pad=False)),
    ],
    ids=["densenet", "batch norm between", "overlapping windows, groups", "two convolutions"],
)
def test_an_average_pool_goes_before_a_pointwise_convolution(model: Transition) -> None:
    report = check(model, convs=2 if isinstance(model.conv, nn.Sequential) else 1, norms=0)
    x = torch.randn(2, 4, 7, 5).double()
    fused = fxfuse.optimize(model, x)
    order = [str(n.target).partition(".")[0] for n in fused.graph.nodes if n.op == "call_module"]
    assert order[:3] == ["first", "pool", "conv"]
    mode = Executed(fused)
    with torch.no_grad(), mode:
        fused(x)
    assert report.after.macs == mode.macs < (report.before.macs or 0)
    assert report.after.params <= report.before.params
    swapped = [f for f in report.fired if f.after.startswith("pool")]
    assert swapped and all(f.patterns == ("pool_swap",) and f.path.startswith("conv") for f in swapped)
    assert fxfuse.plan(model, x).after == report.after
    again = fxfuse.report(fxfuse.optimize(fused, x))
    assert again.fired == ()


@pytest.mark.parametrize(
    "model",
    [
        Transition(pointwise(), nn.AvgPool2d(3, 2, 1)),
        Transition(pointwise(), nn.AvgPool2d(3, 1)),
        Transition(pointwise(), nn.AvgPool2d(2, ceil_mode=True)),
        Transition(nn.Conv2d(4, 6, 3, padding=1), nn.AvgPool2d(2)),
        Transition(nn.Conv2d(4, 6, 1, stride=2), nn.AvgPool2d(2)),
        Transition(pointwise(), nn.AvgPool2d(2), twice=True),
        Transition(pointwise(), nn.MaxPool2d(2)),
    ],
    ids=["padding", "stride 1", "ceil_mode", "3x3", "strided", "read twice", "maximum"],
)
def test_other_pools_stay_where_they_are(model: Transition) -> None:
    randomize(model)
    x = torch.randn(2, 4, 7, 5)
    fused = fxfuse.optimize(model, x)
    assert tree_map_equal(fused(x), model(x))
    order = [str(n.target) for n in fused.graph.nodes if n.op == "call_module"]
    assert order.index("conv") < order.index("pool") if "pool" in order else order[-1] == "conv"


def tree_map_equal(a: Any, b: Any) -> bool:
    return relative_error(a, b) < 1e-6


def test_pools_stay_where_the_pattern_is_left_out_or_the_cost_counts_layers() -> None:
    model = Transition(pointwise(), nn.AvgPool2d(2)).eval()
    assert fxfuse.report(fxfuse.optimize(model, patterns=["-pool_swap", "-avg_pool"])).by_pattern == {"conv_bn": 1}
    (merged,) = fxfuse.report(fxfuse.optimize(model, cost="nodes")).fired
    assert merged.after == "conv2d 4->6 k2x2 s2"


class Same(nn.Module):
    """Padding from the size of a weight, as TensorFlow's "SAME" convolutions have it in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.other = nn.Parameter(torch.randn(24, 1))
        self.last = nn.Conv2d(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight.shape[-2:]
        height, width = (max((-(-x.shape[i + 2] // 2) - 1) * 2 + kernel[i] - x.shape[i + 2], 0) for i in (0, 1))
        x = F.pad(x, (0, width, 0, height))
        x = self.norm(F.conv2d(x, self.conv.weight, self.conv.bias, 2)).relu()
        # this one stays, and still needs to know the size of a weight that goes
        return F.conv2d(
            x, self.last.weight * 1.5, self.other.reshape(self.conv.weight.shape[1], -1).sum(1)[:1].repeat(5)
        )


def test_a_weight_asked_for_its_size_alone_is_not_kept() -> None:
    model = randomize(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    fused = fxfuse.optimize(model)
    before = sum(p.numel() for p in model.parameters())
    norms = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert sum(p.numel() for p in fused.parameters()) == fxfuse.report(fused).after.params <= before - norms
    assert {n for n, _ in fused.named_parameters()} <= {n for n, _ in model.named_parameters()} | {
        f"{f.path}.bias" for f in fxfuse.report(fused).fired
    }
    x = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-5


def test_a_size_that_another_weight_needs_is_still_known() -> None:
    model = randomize(Same())
    fused = fxfuse.optimize(model)
    for shape in ((2, 4, 7, 9), (1, 4, 8, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-5
    assert count(fused, x)["bn"] == 0
