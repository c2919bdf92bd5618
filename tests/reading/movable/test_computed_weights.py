"""Weights that are computed at run time: factors after them go to the bank they are mixed from, or stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import exactly
from helpers import count, randomize, relative_error
from torch import Tensor, nn
from torchvision_ops import declare_missing_ops

import fxfuse

declare_missing_ops()
import timm  # noqa: E402
import torchvision.ops  # noqa: E402
from timm.layers import CondConv2d  # noqa: E402

WIDTH = 4


class Mixed(nn.Module):
    """A kernel mixed for each sample by attention that rounds to integers, so that the laws are exact."""

    def __init__(self, forward: Callable[..., Tensor], bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.groups, self.act = groups, forward
        self.bank = nn.Parameter(torch.randint(-3, 4, (3, WIDTH, WIDTH // groups, 3, 3)).double())
        self.shifts = nn.Parameter(torch.randint(-3, 4, (3, WIDTH)).double()) if bias else None
        self.norm = nn.BatchNorm2d(WIDTH)
        self.spare = nn.Buffer(torch.randint(1, 4, (WIDTH, 1, 1)).double())

    def attention(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))[:, :3]

    def mixed(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        attention = self.attention(x)
        weight = torch.mm(attention, self.bank.view(3, -1)).view(b * WIDTH, WIDTH // self.groups, 3, 3)
        bias = None if self.shifts is None else torch.matmul(attention, self.shifts).view(-1)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, bias, padding=1, groups=self.groups * b)
        return y.view(b, WIDTH, y.shape[2], y.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def whole(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-2, 3, shape).double()


def mixed_exactly(model: nn.Module, norms: int, **options: Any) -> Any:
    model = randomize(model.double(), seed=2, integer=True)
    tensors = map(whole, ((1, WIDTH, 5, 6), (3, WIDTH, 7, 4), (2, WIDTH, 3, 3)))
    return exactly(model, *tensors, counts={"bn": norms}, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_goes_to_the_bank(bias: bool, groups: int) -> None:
    report = fxfuse.report(mixed_exactly(Mixed(lambda s, x: s.norm(s.mixed(x)).relu(), bias, groups), 0))
    assert {p for f in report.fired for p in f.patterns} == {"runtime_weight"}


FACTORS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "norm and number": (lambda s, x: s.norm(s.mixed(x)) * 2 + 1, 0),
    "a factor that may broadcast first": (lambda s, x: s.norm(s.mixed(x) * s.spare), 1),
    "two norms": (lambda s, x: s.norm(s.norm(s.mixed(x))), 0),
    "read elsewhere": (lambda s, x: (lambda y: s.norm(y) + y.relu())(s.mixed(x)), 1),
    "written between": (lambda s, x: s.norm(s.mixed(x).add_(x)), 1),
    "relu between": (lambda s, x: s.norm(s.mixed(x).relu()), 1),
    "other order of channels": (lambda s, x: s.norm(s.mixed(x).transpose(1, 2).reshape(x.shape)), 1),
}


@pytest.mark.parametrize("name", FACTORS)
def test_what_follows(name: str) -> None:
    forward, norms = FACTORS[name]
    mixed_exactly(Mixed(forward), norms)


def test_samples_and_channels_the_other_way_round_stay() -> None:
    """The convolution's channels read as [N, B]: the same numbers, and another channel for each."""

    def forward(self: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = (self.attention(x) @ self.bank.view(3, -1)).view(b * WIDTH, WIDTH // self.groups, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, None, padding=1, groups=b)
        return self.norm(y.view(WIDTH, b, h, w).transpose(0, 1))  # type: ignore[no-any-return]

    mixed_exactly(Mixed(forward, bias=False), 1)


def test_a_bank_with_another_reader_stays() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        mixed = self.attention(x) @ self.bank.view(3, -1)
        y = F.conv2d(
            x.reshape(1, b * c, h, w), mixed.view(b * WIDTH, WIDTH // self.groups, 3, 3), None, padding=1, groups=b
        )
        return self.norm(y.view(b, WIDTH, h, w)) + mixed.sum()  # type: ignore[no-any-return]

    mixed_exactly(Mixed(forward, bias=False), 1)


def test_switched_off_and_refreshed() -> None:
    model = Mixed(lambda s, x: s.norm(s.mixed(x)), bias=False)
    mixed_exactly(model, 1, patterns=["-runtime_weight"])
    fused = mixed_exactly(model, 0)
    with torch.no_grad():
        model.norm.running_var.mul_(3)
        model.bank.mul_(-2)
    fxfuse.refresh(fused, model)
    x = whole((2, WIDTH, 5, 5))
    assert relative_error(fused(x), model(x)) < 1e-12
    assert relative_error(copy.deepcopy(fused)(x), model(x)) < 1e-12


class Conditional(nn.Module):
    """timm's CondConv, with the routing of its users."""

    def __init__(self, bias: bool, groups: int = 1) -> None:
        super().__init__()
        self.routing = nn.Linear(8, 3)
        self.conv = CondConv2d(8, 6, 3, padding=1, bias=bias, num_experts=3, groups=groups)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        routing = torch.sigmoid(self.routing(x.mean((2, 3))))
        return F.relu(self.norm(self.conv(x, routing)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_conditional_convolutions_of_timm(bias: bool, groups: int) -> None:
    model = randomize(Conditional(bias, groups)).double()
    tensors = (torch.randn(shape).double() for shape in ((1, 8, 6, 5), (3, 8, 5, 9)))
    exactly(model, *tensors, counts={"bn": 0}, tolerance=1e-12)


def test_a_model_of_them() -> None:
    model = randomize(timm.create_model("tf_efficientnet_cc_b0_4e", pretrained=False)).double()
    x = torch.randn(2, 3, 64, 64).double()
    fused = fxfuse.optimize(model, x)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-9
    assert count(fused, x)["bn"] == 0, fxfuse.report(fused)


class Deformed(nn.Module):
    def __init__(self, forward: Callable[..., Tensor], bias: bool = False) -> None:
        super().__init__()
        self.act, self.offsets = forward, nn.Conv2d(4, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(4, 6, 3, padding=1, groups=2, bias=bias)
        self.norm, self.second, self.before = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


def written(self: Any, x: Tensor, offsets: Tensor) -> Tensor:
    y = self.conv(x, offsets)
    offsets.mul_(0)
    return self.norm(y) + offsets.sum()  # type: ignore[no-any-return]


DEFORMED: dict[str, tuple[Callable[..., Tensor], int]] = {
    "norm": (lambda s, x: s.norm(s.conv(x, s.offsets(x))), 0),
    "norm, number, layer": (lambda s, x: s.second(s.norm(s.conv(x, s.offsets(x))) * 2), 0),
    "norm before": (lambda s, x: s.conv(s.before(x), s.offsets(x)), 1),
    "beside another": (lambda s, x: s.norm(s.conv(x, s.offsets(x)) + s.conv(x, s.offsets(x))), 0),
    "offsets written after": (lambda s, x: written(s, x, s.offsets(x)), 0),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", DEFORMED)
def test_deformable_convolutions(name: str, bias: bool) -> None:
    forward, norms = DEFORMED[name]
    model = randomize(Deformed(forward, bias)).double()
    tensors = (torch.randn(shape).double() for shape in ((1, 4, 6, 5), (2, 4, 7, 8)))
    exactly(model, *tensors, counts={"bn": norms}, tolerance=1e-12)
