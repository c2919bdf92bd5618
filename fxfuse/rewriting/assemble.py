"""A rewritten graph assembled: a GraphModule of fused layers, and of copies of all that stayed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxfuse.algebra.operator import Operator
from fxfuse.attributes import attribute, owner_of
from fxfuse.capture.captured import Captured
from fxfuse.capture.copying import copied
from fxfuse.capture.tracer import Reader
from fxfuse.names import above
from fxfuse.ops.modules import HOOKS
from fxfuse.rewriting.autocast import prepare_for_autocast
from fxfuse.rewriting.result import Result, keep
from fxfuse.rewriting.spelling import spelled

STATELESS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Dropout, nn.Flatten, nn.MaxPool2d)

# What torch keeps beside the hooks of a module: which of them take keyword arguments, and so on.
FLAGS = (
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class Rewritten:
    """A graph with a plan carried out: its new layers (or biases alone) by path, and the path of each operator's."""

    captured: Captured
    layers: dict[str, nn.Module | nn.Parameter]
    names: dict[Operator, str]

    @property
    def operators(self) -> dict[str, Operator]:
        """How each layer is computed, by its path."""
        return {name: op for op, name in self.names.items()}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module a call in the graph can name: the root's, and the fused layers over them."""
        return self.captured.modules | {n: m for n, m in self.layers.items() if isinstance(m, nn.Module)}

    def params(self) -> int:
        """Parameters that the graph uses, each tensor once."""
        modules, used = self.modules, set[nn.Parameter]()
        for node in self.captured.graph.nodes:
            path = str(node.target)
            if node.op == "call_module":
                used.update(modules[path].parameters())
            elif node.op == "get_attr" and path not in self.captured.constants:
                value = self.layers[path] if path in self.layers else attribute(self.captured.root, path)
                used |= {value} if isinstance(value, nn.Parameter) else set()
        return sum(p.numel() for p in used)


def assemble(captured: Captured, layers: Mapping[str, nn.Module | nn.Parameter], memo: dict[int, Any]) -> Result:
    """The module of a rewritten graph: `layers` as they are, every other module and tensor copied.

    `memo` (by id) holds what was copied or replaced before, as for deepcopy.
    """
    root, graph = captured.root, captured.graph
    state: dict[str, Any] = {}
    hidden: list[str] = []
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        node.target = target = path if path in layers else spelled(root, path)
        if target in state:
            continue
        if path in layers:
            state[target] = layers[path]
        elif path in captured.constants:
            state[target] = _copied(captured.constants[path], memo)
        else:
            holder, name = owner_of(root, path)
            state[target] = _copied(getattr(holder, name), memo)
            if name in holder._non_persistent_buffers_set:
                hidden.append(target)
    graph.owning_module, graph._tracer_cls = None, Reader
    prepare_for_autocast(graph, state)
    loose = [(m, t.rpartition(".")[2]) for t in state if (m := _holder(t, state)) is not None]
    for module, name in loose:
        del module.__dict__[name]
    result = Result(state, graph, type(root).__name__)
    for module, name in loose:  # the module computes it anew at every call, so it is no buffer
        module.__dict__[name] = module._buffers.pop(name)
    result.training = False
    for module in result.modules():
        if type(module) is nn.Module:  # the containers that GraphModule made for the paths
            module.training = False
    kept = {n: copy.copy(getattr(root, n)) for n in (*HOOKS, *FLAGS) if getattr(root, n, None)}
    if hasattr(root, "validate_inputs"):  # a hook of torch.export's asks; it compares inputs with another kind of code
        kept["validate_inputs"] = False
    keep(result, kept, tuple(hidden))
    return result


def _holder(target: str, state: Mapping[str, Any]) -> nn.Module | None:
    """The module of `state` in which the tensor at `target` is a plain attribute, such as a pruned weight."""
    for path in reversed(above(target)):
        if isinstance(holder := state.get(path), nn.Module):
            module, name = owner_of(holder, target[len(path) + 1 :])
            return module if name in module.__dict__ else None
    return None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; modules without state of their own take a shorter way to the same."""
    if type(value) in STATELESS and id(value) not in memo:
        new = value.__class__.__new__(value.__class__)
        new.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in value.__dict__.items()})
        memo[id(value)] = new
        return new
    return copied(value, memo)
