"""What is inferred about ranks and sizes holds for every input on which the operations run.

Each operation gets tensors of all ranks up to five with sizes out of 1, 2 and 3. Whatever it accepts must lie
within the bounds; and bounds must be as tight as the operation allows, where a row says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safety import model_of
from torch import Tensor, nn

from fxfuse.capture.symbolic import capture
from fxfuse.facts.fact import Fact
from fxfuse.reading.view import View, look

Op = Callable[[Any, Tensor], Any]
N = 99  # no bound
# operation: (bounds on the rank of its input, on that of its output)
OPS: dict[str, tuple[Op, tuple[int, int], tuple[int, int]]] = {
    "flatten(1)": (lambda s, x: x.flatten(1), (2, N), (2, 2)),
    "flatten()": (lambda s, x: x.flatten(), (0, N), (1, 1)),
    "flatten(2)": (lambda s, x: x.flatten(2), (3, N), (3, 3)),
    "flatten(0, 1)": (lambda s, x: x.flatten(0, 1), (2, N), (1, 98)),
    "flatten(-2)": (lambda s, x: torch.flatten(x, -2), (2, N), (1, 98)),
    "flatten(1, -2)": (lambda s, x: x.flatten(1, -2), (3, N), (3, 3)),
    "nn.Flatten": (lambda s, x: nn.Flatten()(x), (2, N), (2, 2)),
    "flatten(1).unsqueeze(0)": (lambda s, x: x.flatten(1).unsqueeze(0), (2, N), (3, 3)),
    "unflatten": (lambda s, x: x.flatten(1).unflatten(1, (1, -1)), (2, N), (3, 3)),
    "view": (lambda s, x: x.reshape(1, -1, 1), (0, N), (3, 3)),
    "view of a tuple": (lambda s, x: x.contiguous().view((-1, 1)), (0, N), (2, 2)),
    "view of one size": (lambda s, x: x.reshape(-1), (0, N), (1, 1)),
    "view by sizes": (lambda s, x: x.reshape(x.shape[0], -1), (0, N), (2, 2)),
    "view by shape": (lambda s, x: x.mean((2, 3), True).expand(x.shape[0], -1, 2, 2).sum((2, 3)), (4, 4), (2, 2)),
    "reshape_as": (lambda s, x: x.flatten(2).reshape_as(x), (3, N), (3, N)),
    "permute": (lambda s, x: x.permute(0, 2, 1), (3, 3), (3, 3)),
    "torch.permute": (lambda s, x: torch.permute(x, (1, 0)), (2, 2), (2, 2)),
    "transpose": (lambda s, x: x.flatten(2).transpose(1, 2), (3, N), (3, 3)),
    "mean of two": (lambda s, x: x.mean((2, 3)).flatten(1), (4, N), (2, 2)),
    "mean of two, kept": (lambda s, x: x.mean((-2, -1), keepdim=True), (2, N), (2, N)),
    "mean of one": (lambda s, x: x.mean(1), (2, N), (1, 98)),
    "mean of the first": (lambda s, x: x.mean(0), (0, N), (0, N)),
    "mean": (lambda s, x: x.mean(), (0, N), (0, 0)),
    "sum": (lambda s, x: torch.sum(x, dim=(0, 1), keepdim=True), (2, N), (2, N)),
    "amax": (lambda s, x: x.flatten(1).amax(1), (2, N), (1, 1)),
    "logsumexp": (lambda s, x: x.flatten(2).logsumexp(-1), (3, N), (2, 2)),
    "squeeze": (lambda s, x: x.mean((2, 3), True).squeeze(-1).squeeze(-1).flatten(1), (4, N), (2, 2)),
    "squeeze of what is not 1": (lambda s, x: x.flatten(1).squeeze(1), (2, N), (1, 2)),
    "squeeze everything": (lambda s, x: x.flatten(1).squeeze(), (2, N), (0, 2)),
    "unsqueeze twice": (lambda s, x: x.flatten(1).unsqueeze(-1).unsqueeze(-1), (2, N), (4, 4)),
    "AdaptiveAvgPool2d": (lambda s, x: F.adaptive_avg_pool2d(x, 1).flatten(1), (2, N), (2, 2)),
    "pool and squeeze": (lambda s, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1), (2, N), (0, 97)),
    "AdaptiveAvgPool1d": (lambda s, x: F.adaptive_avg_pool1d(x, 1), (2, 3), (2, 3)),
    "max_pool2d": (lambda s, x: F.max_pool2d(x, 1), (3, 4), (3, 4)),
    "interpolate": (lambda s, x: F.interpolate(x, scale_factor=2), (3, 5), (3, 5)),
    "softmax": (lambda s, x: x.flatten(1).softmax(-1), (2, N), (2, 2)),
    "F.softmax": (lambda s, x: F.softmax(x.flatten(1), dim=1), (2, N), (2, 2)),
    "normalize": (lambda s, x: F.normalize(x.flatten(1), dim=-1), (2, N), (2, 2)),
    "layer_norm": (lambda s, x: F.layer_norm(x, (2,)), (1, N), (1, N)),
    "layer_norm of two": (lambda s, x: F.layer_norm(x, (3, 2)), (2, N), (2, N)),
    "matmul": (lambda s, x: x.flatten(1) @ x.flatten(1).transpose(0, 1), (2, N), (2, 2)),
    "matmul of vectors": (lambda s, x: x.flatten() @ x.flatten(), (0, N), (0, N)),
    "bmm": (lambda s, x: torch.bmm(x, x.transpose(1, 2)), (3, 3), (3, 3)),
    "attention": (lambda s, x: F.scaled_dot_product_attention(x, x, x), (2, N), (2, N)),
    "chunk": (lambda s, x: x.flatten(1).chunk(2, 0)[0], (2, N), (2, 2)),
    "split": (lambda s, x: x.flatten(1).split(1, dim=1)[0], (2, N), (2, 2)),
    "unbind": (lambda s, x: x.flatten(1).unbind(0)[0], (2, N), (1, 1)),
    "stack": (lambda s, x: torch.stack([x.flatten(1), x.flatten(1)]), (2, N), (3, 3)),
    "expand": (lambda s, x: x.expand(2, -1, -1), (0, 3), (3, 3)),
    "expand_as": (lambda s, x: x.mean((2, 3), True).expand_as(x), (4, N), (4, N)),
    "repeat": (lambda s, x: x.flatten(1).repeat(2, 1, 1), (2, N), (3, 3)),
    "where": (lambda s, x: torch.where(x.flatten(1) > 0, x.flatten(1), 0.0), (2, N), (2, N)),
    "where of tensors": (lambda s, x: torch.where(x > 0, x.flatten(1), x.flatten(1)), (2, N), (2, N)),
    "index": (lambda s, x: x.flatten(2)[:, 0], (3, N), (2, 2)),
    "index with None": (lambda s, x: x.flatten(1)[:, :, None, None], (2, N), (4, 4)),
    "index with ...": (lambda s, x: x.flatten(1)[..., 0], (2, N), (1, 1)),
    "index by a tensor": (lambda s, x: x.flatten(1)[x.flatten(1) > 0], (2, N), (0, N)),
    "select": (lambda s, x: x.flatten(1).select(1, 0), (2, N), (1, 1)),
    "x.shape[0] is no tensor": (lambda s, x: x.flatten(1) * x.shape[0], (2, N), (2, 2)),
    "sum of two ranks": (lambda s, x: x.flatten(1) + x.flatten(), (2, N), (2, 2)),
    "embedding": (lambda s, x: F.embedding(x.flatten(1).long().clamp(0, 1), s.e), (2, N), (3, 3)),
}
TENSORS = [
    torch.arange(-1.0, torch.Size(shape).numel() - 1).reshape(shape)
    for rank in range(6)
    for shape in itertools.product((1, 2, 3) if rank < 4 else (1, 3), repeat=rank)
]


def values(view: View, model: nn.Module, x: Tensor) -> dict[Any, Any]:
    """What every node of the graph gives for `x`."""
    found: dict[Any, Any] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    Keeping(model, graph=view.captured.graph).run(x)
    return found


def holds(fact: Fact, value: Tensor) -> bool:
    sizes = all(-axis <= value.dim() and value.shape[axis] == size for axis, size in fact.axes.items())
    return fact.low <= value.dim() <= fact.high and sizes


@pytest.mark.parametrize("name", OPS)
def test_facts_hold_for_every_input_that_is_accepted(name: str) -> None:
    op, into, out = OPS[name]
    model = model_of(op, e=torch.ones(2, 3)).eval()
    view = look(capture(model))
    nodes = list(view.captured.graph.nodes)
    source, result = next(n for n in nodes if n.op == "placeholder"), nodes[-1].args[0]
    bounds = [(view.facts[n].low, view.facts[n].high) for n in (source, result)]
    assert bounds == [into, out]
    accepted = 0
    for x in TENSORS:
        try:
            op(model, x)
        except (RuntimeError, IndexError, ValueError, NotImplementedError):
            continue
        accepted += 1
        for node, value in values(view, model, x).items():
            if isinstance(value, Tensor):
                assert holds(view.facts[node], value), (node, view.facts[node], value.shape)
    assert accepted
