"""The result: a GraphModule of fused layers, and of copies of all that stayed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from .capture import HOOKS, Captured
from .copying import copied
from .reader import Reader

STATELESS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Dropout, nn.Flatten, nn.MaxPool2d)


@dataclass(frozen=True)
class Keep:
    """Gives a GraphModule the hooks of the model and hides its non-persistent buffers; its deepcopy would lose both."""

    hooks: dict[str, Any]
    hidden: tuple[str, ...]

    def __call__(self, module: GraphModule) -> None:
        for name, hooks in self.hooks.items():
            setattr(module, name, copy.copy(hooks))
        for target in self.hidden:
            owner, _, name = target.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(name)


def assemble(captured: Captured, graph: Graph, layers: Mapping[str, nn.Module]) -> GraphModule:
    """The GraphModule of `graph`: `layers` as they are, every other module and tensor copied."""
    root, memo = captured.root, dict[int, Any]()
    state: dict[str, Any] = {}
    hidden: list[str] = []
    for node in graph.nodes:
        target = str(node.target)
        if target in state or node.op not in ("call_module", "get_attr"):
            continue
        if target in layers:
            state[target] = layers[target]
        elif target in captured.constants:
            state[target] = _copied(captured.constants[target], memo)
        else:
            owner, _, name = target.rpartition(".")
            holder = root.get_submodule(owner)
            state[target] = _copied(getattr(holder, name), memo)
            if name in holder._non_persistent_buffers_set:
                hidden.append(target)
    graph.owning_module, graph._tracer_cls = None, Reader
    result = GraphModule(state, graph, type(root).__name__)
    result.training = False
    for module in result.modules():
        if type(module) is nn.Module:  # the containers that GraphModule made for the paths
            module.training = False
    flags = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks = {name: getattr(root, name) for name in (*HOOKS, *flags) if getattr(root, name, None)}
    if hooks or hidden:
        keep = Keep(hooks, tuple(hidden))
        keep(result)
        result._register_deepcopy_hook(keep)
    return result


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; modules without state of their own take a shorter way to the same."""
    if type(value) in STATELESS and id(value) not in memo:
        new = value.__class__.__new__(value.__class__)
        new.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in value.__dict__.items()})
        memo[id(value)] = new
        return new
    return copied(value, memo)
