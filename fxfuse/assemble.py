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
    """Gives a GraphModule hooks or plain attributes of the model; its deepcopy would lose them."""

    attributes: dict[str, Any]

    def __call__(self, module: GraphModule) -> None:
        for name, value in self.attributes.items():
            setattr(module, name, copy.copy(value))


def keep(module: GraphModule, attributes: dict[str, Any]) -> None:
    """Set `attributes` on a GraphModule so that copies of it have them too."""
    if attributes:
        kept = Keep(attributes)
        kept(module)
        module._register_deepcopy_hook(kept)


def assemble(captured: Captured, graph: Graph, layers: Mapping[str, nn.Module], memo: dict[int, Any]) -> GraphModule:
    """The GraphModule of `graph`: `layers` as they are, every other module and tensor copied.

    `memo` (by id) holds what was copied or replaced before, as for deepcopy.
    """
    root = captured.root
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
    loose = [(m, t.rpartition(".")[2]) for t in state if (m := _holder(t, state)) is not None]
    for module, name in loose:
        del module.__dict__[name]
    result = GraphModule(state, graph, type(root).__name__)
    for module, name in loose:  # the module computes it anew at every call, so it is no buffer
        module.__dict__[name] = module._buffers.pop(name)
    result.training = False
    for module in result.modules():
        if type(module) is nn.Module:  # the containers that GraphModule made for the paths
            module.training = False
    for target in hidden:
        owner, _, name = target.rpartition(".")
        result.get_submodule(owner)._non_persistent_buffers_set.add(name)
    flags = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    keep(result, {name: getattr(root, name) for name in (*HOOKS, *flags) if getattr(root, name, None)})
    return result


def _holder(target: str, state: Mapping[str, Any]) -> nn.Module | None:
    """The module of `state` in which the tensor at `target` is a plain attribute, such as a pruned weight."""
    owner, _, name = target.rpartition(".")
    parts = owner.split(".")
    for i in range(len(parts), 0, -1):
        above = state.get(".".join(parts[:i]))
        if isinstance(above, nn.Module):
            module = above.get_submodule(".".join(parts[i:]))
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
