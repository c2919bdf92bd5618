"""A batch norm that stays behind its convolution has one reason in the report, and it is the one that decided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import count, randomize
from law_cases import integers
from torch import Tensor, nn

import fxfuse
from fxfuse.algebra.operator import Operator

OVERWRITTEN = "what its first layer reads is overwritten in place before the last layer of the site has run"
DEAR = "exact, but merged it would cost more"
OFF = "pattern conv_bn is switched off"
SIZE = "somebody asks for the size of a value that would be gone, and no other value has that size"
AXIS = "what lies between the layer and batch_norm puts the layer's channels on another axis"
ORDER = "moved next to the layer, batch_norm would leave those who read it another order in memory"
Forward = Callable[["Model", Tensor], Any]


class Model(nn.Module):
    """A convolution, another beside it, a batch norm, and a forward that uses them."""

    def __init__(self, forward: Forward, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.other, self.norm, self.drop = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), norm, nn.Dropout()
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def written(between: Callable[[Model, Tensor], Tensor]) -> Forward:
    """What the convolution reads is written before the batch norm runs."""

    def forward(model: Model, x: Tensor) -> Any:
        x = x.relu()
        y = model.conv(x)
        x.mul_(2)
        return model.norm(between(model, y)), x

    return forward


def written_under_a_sum(model: Model, x: Tensor) -> Any:
    x = x.relu()
    a, b = model.conv(x), model.other(x)
    x += 1
    return model.norm(a + b), x


def written_by_a_view(model: Model, x: Tensor) -> Any:
    x = x.relu()
    y = model.conv(x)
    x[:, 0].zero_()
    return model.norm(y), x


def dear(op: Operator, positions: Fraction) -> Fraction:
    """A cost that no merge with a batch norm lowers."""
    return Fraction(1 + 5 * op.applied.count("conv_bn"))


def tie(op: Operator, positions: Fraction) -> Fraction:
    """A cost by which a merged layer costs more only together with something else."""
    return Fraction(3 if {"conv_bn", "parallel_conv"} <= {*op.applied} else 1)


N1, N2 = nn.BatchNorm1d(4), nn.BatchNorm2d(4)
CASES: dict[str, tuple[Forward, nn.Module, dict[str, Any], str]] = {
    "overwritten": (written(lambda m, y: y), N2, {}, OVERWRITTEN),
    "overwritten, a dropout between": (written(lambda m, y: m.drop(y)), N2, {}, OVERWRITTEN),
    "overwritten, a reshape between": (written(lambda m, y: y.flatten(2)), N1, {}, OVERWRITTEN),
    "overwritten, a factor between": (written(lambda m, y: y * 3), N2, {}, OVERWRITTEN),
    "overwritten, a sum between": (written_under_a_sum, N2, {}, OVERWRITTEN),
    "overwritten by a view": (written_by_a_view, N2, {}, OVERWRITTEN),
    "overwritten and switched off": (written(lambda m, y: y), N2, {"patterns": ["-conv_bn"]}, OVERWRITTEN),
    "overwritten and dear": (written(lambda m, y: y), N2, {"cost": dear}, OVERWRITTEN),
    "switched off": (lambda m, x: m.norm(m.conv(x)), N2, {"patterns": ["-conv_bn"]}, OFF),
    "switched off, a dropout between": (lambda m, x: m.norm(m.drop(m.conv(x))), N2, {"patterns": ["-conv_bn"]}, OFF),
    "switched off, a reshape between": (lambda m, x: m.norm(m.conv(x).flatten(2)), N1, {"patterns": ["-conv_bn"]}, OFF),
    "switched off, a sum between": (lambda m, x: m.norm(m.conv(x) + m.other(x)), N2, {"patterns": ["-conv_bn"]}, OFF),
    "dear": (lambda m, x: m.norm(m.conv(x)), N2, {"cost": dear}, DEAR),
    "dear, a dropout between": (lambda m, x: m.norm(m.drop(m.conv(x))), N2, {"cost": dear}, DEAR),
    "dear, a reshape between": (lambda m, x: m.norm(m.conv(x).flatten(2)), N1, {"cost": dear}, DEAR),
    "dear, a pool between": (
        lambda m, x: m.norm(nn.functional.adaptive_avg_pool2d(m.conv(x), 2)), N2, {"cost": dear}, DEAR
    ),
    "dear, a sum and a dropout between": (
        lambda m, x: m.norm(m.drop(m.conv(x) + m.other(x))), N2, {"cost": tie}, DEAR
    ),
    "another dtype": (lambda m, x: m.norm(m.conv(x).float()), N2, {}, "follows no convolution"),
    "read elsewhere": (lambda m, x: (lambda y: (m.norm(y), y.relu()))(m.conv(x)), N2, {}, "read elsewhere too"),
    "channels on another axis": (lambda m, x: m.norm(m.conv(x).transpose(1, 2)), nn.BatchNorm2d(6), {}, AXIS),
    "positions in another order": (lambda m, x: m.norm(m.conv(x).transpose(2, 3)), N2, {}, ORDER),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_batch_norm_that_stays_has_one_reason(name: str) -> None:
    forward, norm, options, reason = CASES[name]
    model = randomize(Model(forward, copy.deepcopy(norm)).double(), integer=True)
    if name == "another dtype":
        model.norm.float()
    x = integers((2, 3, 6, 6))
    fused = fxfuse.optimize(model, x.clone(), **options)
    found = [r for r in fxfuse.report(fused).refused if r.where == "norm"]
    assert len(found) == 1, found
    assert reason in found[0].reason
    assert count(fused, x)["bn"] == 1
    for one, two in zip(_leaves(fused(x.clone())), _leaves(model(x.clone())), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


def _leaves(value: Any) -> list[Any]:
    return [*value] if isinstance(value, tuple) else [value]


def test_a_size_that_is_asked_for_is_one_reason() -> None:
    def forward(model: Model, x: Tensor) -> Any:
        y = model.conv(x)
        return model.norm(model.other(y)), y.shape[2]

    model = Model(forward, nn.BatchNorm2d(4))
    model.conv, model.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    fused = fxfuse.optimize(model.eval(), torch.randn(2, 3, 6, 6), patterns=["conv_bn", "conv_chain!"])
    assert [(r.where, r.reason) for r in fxfuse.report(fused).refused] == [("other", SIZE)]


def test_numbers_that_are_not_finite_are_one_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e20)
        model[1].weight.fill_(1e30)
    refused = fxfuse.report(fxfuse.optimize(model, torch.randn(2, 3, 6, 6))).refused
    assert ["not finite" in r.reason for r in refused] == [True]


def test_a_write_that_depends_on_strides_is_one_reason_for_all() -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        y = x.relu()
        z = y.flatten(1)
        z += 1
        return model.norm(model.conv(x)) + y.mean()

    refused = fxfuse.report(fxfuse.optimize(Model(forward, nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 6, 6))).refused
    assert ["depends on strides" in r.reason for r in refused] == [True]


@pytest.mark.parametrize("switch", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_where_modes_are_switched_is_one_reason(switch: Callable[[], Any]) -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        with switch():
            y = model.norm(model.conv(x))
        return y.float() + 1

    reports = list[Any]()
    model = randomize(Model(forward, nn.BatchNorm2d(4))).requires_grad_(False)
    torch._dynamo.reset()
    options = {"inner": "eager", "on_report": reports.append}
    torch.compile(model, backend="fxfuse", options=options)(torch.randn(2, 3, 6, 6))
    refused = [r for report in reports for r in report.refused]
    assert ["switches gradients or autocast before" in r.reason for r in refused] == [True], refused
