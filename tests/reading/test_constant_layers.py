"""Layers applied to constants, and constants that a forward moves to a device, are constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import count, randomize
from safety import agrees, model_of
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.symbolic import capture
from fxfuse.reading.view import look

Make = Callable[[Any], Tensor]
F64 = torch.float64


class Doubled(nn.Linear):
    """More than its class, but traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def layers() -> dict[str, Any]:
    return {
        "a": nn.Conv2d(4, 4, 3, padding=1),
        "b": nn.BatchNorm2d(4),
        "one": nn.Linear(2, 6),
        "two": nn.Linear(6, 4),
        "soft": nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.Dropout(0.3)),
        "inplace": nn.ReLU(inplace=True),
        "norm": nn.BatchNorm1d(6),
        "spread": nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular"),
        "rows": nn.Embedding(3, 4),
        "own": Doubled(6, 4),
        "hooked": nn.Linear(6, 4),
        "table": nn.Parameter(torch.randn(1, 2)),
        "index": torch.tensor([1]),
    }


def build(make: Make) -> nn.Module:
    model = randomize(model_of(lambda s, x: s.b(s.a(x)) * make(s)[:, :, None, None], **layers())).double()
    model.hooked.register_forward_hook(lambda module, args, output: output + 1)
    return model


GATES: dict[str, Make] = {
    "two linear layers": lambda s: torch.sigmoid(s.two(F.silu(s.one(s.table)))),
    "norm, activation, dropout": lambda s: s.two(s.soft(s.one(s.table))),
    "an activation in place": lambda s: s.two(s.inplace(s.one(s.table))),
    "batch norm in eval mode": lambda s: s.two(s.norm(s.one(s.table))),
    "a convolution": lambda s: s.spread(s.table[None]).flatten(1),
    "an embedding": lambda s: s.rows(s.index),
    "a forward of its own": lambda s: s.own(s.one(s.table)),
    "moved to its own device": lambda s: s.two(s.one(s.table).to(s.table.device)),
}


@pytest.mark.parametrize("case", GATES)
def test_a_gate_of_parameters_becomes_part_of_the_layer_before_it(case: str) -> None:
    fused = agrees(build(GATES[case]), fires=True, examples=torch.randn(2, 4, 5, 6, dtype=F64))
    assert [n.op for n in fused.graph.nodes if n.op == "call_module"] == ["call_module"], fused.code
    assert not any(isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d)) for m in fused.modules())


KEPT: dict[str, Make] = {
    "a hook": lambda s: s.hooked(s.one(s.table)),
    "random": lambda s: s.two(F.dropout(s.one(s.table), 0.5, training=True)),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_layer_that_is_more_than_its_class_is_called(case: str) -> None:
    fused = agrees(build(KEPT[case]), examples=torch.randn(2, 4, 5, 6, dtype=F64))
    assert sum(n.op == "call_module" for n in fused.graph.nodes) > 1, fused.code


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), nn.BatchNorm1d(4)], ids=lambda m: type(m).__name__)
def test_a_layer_left_in_training_mode_is_called(layer: nn.Module) -> None:
    parts = {"a": nn.Conv2d(4, 4, 1), "t": nn.Parameter(torch.randn(3, 4)), "layer": layer}
    model = randomize(model_of(lambda s, x: s.a(x) * s.layer(s.t).sum(0)[:, None, None], **parts)).double().eval()
    model.layer.train()
    assert not [n for n in look(capture(model)).constants if n.op == "call_module"]
    model.layer.eval()
    assert [str(n.target) for n in look(capture(model)).constants if n.op == "call_module"] == ["layer"]


MOVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "to(x.device)": lambda s, x: s.eye.to(x.device),
    "to(device=)": lambda s, x: s.eye.to(device=x.device),
    "to(device, dtype)": lambda s, x: s.eye.float().to(s.a.weight.device, F64),
    "to(device, non_blocking)": lambda s, x: s.eye.to(s.a.weight.device, non_blocking=True),
    "to a string": lambda s, x: s.eye.to("cpu"),
    "cpu": lambda s, x: s.eye.cpu(),
    "to(other)": lambda s, x: s.eye.float().to(s.a.weight),
    "zeros on it": lambda s, x: s.eye + torch.zeros_like(s.eye, device=x.device),
    "both": lambda s, x: (s.eye.to(x.device) * 2).to(dtype=F64, device=s.a.bias.device),
    "channels last": lambda s, x: s.eye.to(x.device, memory_format=torch.channels_last),
}


@pytest.mark.parametrize("case", MOVES)
def test_where_a_constant_is_moved_does_not_matter(case: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a.weight + MOVES[case](self, x), padding=1) + self.k(x)

    eye = torch.eye(4, dtype=F64)[:, :, None, None]
    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "k": nn.Conv2d(4, 4, 1), "eye": eye}
    fused = agrees(randomize(model_of(forward, **parts)).double(), fires=True)
    x = torch.randn(1, 4, 6, 5, dtype=F64)
    assert count(fused, x)["conv"] == 1 and sum(n.op.startswith("call") for n in fused.graph.nodes) == 1, fused.code


def test_a_device_is_no_number() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        same = x.device == self.a.weight.device
        return self.b(self.a(x)) * (2 if same is None else 3)

    agrees(randomize(model_of(forward, **layers())).double(), fires=True)


DEAD: dict[str, Callable[[Any, Tensor], Any]] = {
    "a product of weights": lambda s, x: torch.einsum("oihw,i->oihw", s.a.weight, s.b.weight),
    "a chain of the input": lambda s, x: (x * 2).relu().mean((2, 3)).cumsum(1),
    "a layer": lambda s, x: s.two(s.one(x.mean((2, 3))[:, :2])),
    "of its size": lambda s, x: x.shape[2] * 2 - 1,
}


@pytest.mark.parametrize("case", DEAD)
def test_what_nobody_reads_is_gone(case: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        DEAD[case](self, x)
        return self.b(self.a(x))

    fused = agrees(randomize(model_of(forward, **layers())).double(), fires=True)
    assert sum(n.op.startswith("call") for n in fused.graph.nodes) == 1, fused.code


def counts(self: Any, x: Tensor) -> None:
    self.seen.add_(1)


def draws(self: Any, x: Tensor) -> None:
    F.dropout(x, 0.5, training=True)


def checks(self: Any, x: Tensor) -> None:
    torch._assert((x.sum() < 1e9), "too large")


@pytest.mark.parametrize("effect", [counts, draws, checks])
def test_what_does_more_than_give_a_result_stays(effect: Callable[[Any, Tensor], None]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        effect(self, x)
        return self.b(self.a(x))

    model = randomize(model_of(forward, **layers(), seen=torch.zeros(()))).double()
    fused = agrees(model, fires=True)
    assert sum(n.op.startswith("call") for n in fused.graph.nodes) > 1, fused.code


def test_a_list_given_by_the_caller_is_still_appended_to() -> None:
    def forward(self: Any, x: Tensor, seen: Any) -> Tensor:
        seen.add(3)
        return self.b(self.a(x))

    model = randomize(model_of(forward, **layers())).double()
    fused, seen, x = fxfuse.optimize(model), set[int](), torch.randn(1, 4, 5, 5, dtype=F64)
    torch.testing.assert_close(fused(x, seen), model(x, set()))
    assert seen == {3}
