"""Models whose graph records what the forward makes of numbers (`torch.zeros(8)`), fused and compared with eager."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxfuse import refresh
from fxfuse.capture.captured import Captured
from fxfuse.capture.tracer import Reader
from fxfuse.cost import resolve
from fxfuse.pattern import select
from fxfuse.pipeline import fuse
from fxfuse.refresh import store
from fxfuse.rewriting.assemble import assemble
from fxfuse.rewriting.layers import Replay


def recorded(model: nn.Module) -> Any:
    """`model` fused, by a graph in which every call of its forward is a node."""
    captured = Captured(Reader().trace(model), model)
    done = fuse(captured, select(None), resolve("macs"), weights=True)
    fused: Any = assemble(captured, done.rewritten.layers, {})
    report: Any = done
    store(fused, report, (Replay("", done.rewritten.operators, captured.constants, captured.held),))
    return fused


def same_as_eager(model: nn.Module, *inputs: Tensor) -> Any:
    """The fused model, after three calls on each input and with other weights: all equal to the bit, as are the states.

    What a call returns is overwritten before the next, so that nothing may be shared between calls.
    """
    twin, fused = copy.deepcopy(model), recorded(model)
    for other in (None, copy.deepcopy(model)):
        if other is not None:
            with torch.no_grad():
                for number, parameter in enumerate(other.parameters()):
                    parameter.copy_(parameter.flip(0) + number)
            refresh(fused, other)
        for x in inputs:
            for _ in range(3):
                with torch.no_grad():
                    torch.manual_seed(3)
                    actual = fused(x.clone())
                    torch.manual_seed(3)
                    expected = (other or twin)(x.clone())
                for one, two in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
                    assert torch.equal(one, two) and one.dtype == two.dtype
                    one.fill_(7)
    for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    fused.graph.lint()
    return fused


def called(fused: Any) -> list[str]:
    """What the graph of a fused model calls, by the names of its nodes."""
    return [n.name for n in fused.graph.nodes if n.op.startswith("call")]
