"""What running over whole model collections brought to light, each as small as it gets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_untouched, count, fingerprint, randomize
from torch import Tensor, nn

import fxfuse


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
    before = fingerprint(model)
    x, y = torch.randint(-4, 5, (2, 4, 7, 5)).double(), torch.randint(-4, 5, (3, 4, 6, 9)).double()
    fused = fxfuse.optimize(model, x)
    for value in (x, y):
        assert torch.equal(fused(value), model(value))
    assert_untouched(model, before)
    ops = count(fused, x)
    assert (ops["conv"], ops["bn"]) == (convs, norms)
    return fxfuse.report(fused)


@pytest.mark.parametrize("how", ["shape", "size", "residual"])
@pytest.mark.parametrize("first", [nn.ReLU(), nn.Identity(), nn.MaxPool2d(2, 1)], ids=lambda m: type(m).__name__)
def test_a_batch_norm_asked_for_its_size_still_joins_the_layer_after_it(how: str, first: nn.Module) -> None:
    check(Asks(how, first), convs=1, norms=0)


@pytest.mark.parametrize("how", ["shape", "size", "residual"])
def test_nor_is_it_kept_from_the_layer_before_it(how: str) -> None:
    check(Asks(how, nn.Conv2d(4, 4, 3)), convs=2, norms=0)


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
    [(Twice(), 1, "the output of the layer before batch_norm is read elsewhere too"), (Alone(), 0, "follows no conv")],
    ids=["read twice", "concatenation of one"],
)
def test_every_batch_norm_left_has_its_reason(model: nn.Module, convs: int, reason: str) -> None:
    report = check(model, convs, norms=1)
    assert [reason in r.reason for r in report.refused if r.where == "norm"] == [True]
