"""Tensors of constants that a forward makes for itself and writes in place before anybody reads them.

`w = torch.zeros(8, 8, 3, 3)`, then `w[i, i] = k[i, 0]` in a loop, is a weight as constant as `k`. What is done to it
until its last write is one `Program`, run on a copy; what reads it after that reads its result.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.algebra.constants import Apply, Attr, Place, freeze
from fxfuse.algebra.program import Program, Step
from fxfuse.names import below, operator_name
from fxfuse.ops.devices import DEVICE
from fxfuse.ops.layer_call import layer_call
from fxfuse.ops.purity import only_writes, pure
from fxfuse.reading.effects import Effects


@dataclass(frozen=True)
class OwnMemory:
    """A tensor, and all that is made of it until its last write, in order; `value` is what it is made as."""

    origin: Node
    value: Apply
    nodes: tuple[Node, ...]

    @property
    def last(self) -> Node:
        return self.nodes[-1]


def begun(origin: Node, value: Apply, effects: Effects, varies: Callable[[Node], bool]) -> OwnMemory | None:
    """What `origin`, made as `value`, becomes by the writes to it.

    None where the memory has other owners, or something in between `varies` from call to call.
    """
    root, writers = effects.classes[origin], set(effects.writers(origin))
    if not writers or any(effects.classes[n] == root for n in origin.all_input_nodes):
        return None
    position, stop = effects.position, max(effects.position[w] for w in writers)
    nodes, seen, todo = list[Node](), {origin}, [(position[u], u) for u in origin.users]
    heapq.heapify(todo)
    while todo and todo[0][0] <= stop:
        _, node = heapq.heappop(todo)
        if node in seen:
            continue
        if varies(node) or not seen.issuperset(effects.writes.get(node, ())):
            return None
        seen.add(node)
        nodes.append(node)
        for user in node.users:
            heapq.heappush(todo, (position[user], user))
    return OwnMemory(origin, value, tuple(nodes)) if writers <= seen else None


def finished(
    memory: OwnMemory,
    found: Mapping[Node, Any],
    writes: Iterable[Node],
    root: nn.Module,
    attr: Callable[[str], Attr | None],
    sample: Callable[[Any], Any],
) -> dict[Node, Any] | None:
    """The constants that the writes leave, by the nodes that are read after them.

    None where a write is more than one, where what is written is no constant in `found`, or where something that is no
    longer so was read in between. `sample` gives a stand-in for a constant, on which the program is tried.
    """
    inside = {memory.origin: Place(0)}
    constants: dict[Any, Place] = {}

    def place(const: Any) -> Any:
        if not isinstance(const, (Attr, Apply)):
            return const
        return constants.setdefault(const, Place(len(constants) + 1))

    calls = [_call(n, n in writes, root, attr) for n in memory.nodes]
    outside = {i for n in memory.nodes for i in n.all_input_nodes} - {memory.origin, *memory.nodes}
    if None in calls or any(i not in found or found[i] is DEVICE for i in outside):
        return None
    known = {i: place(found[i]) for i in outside}
    states = [[place(a) for a in state] for _, state in filter(None, calls)]
    first = len(constants) + 1
    inside |= {n: Place(first + i) for i, n in enumerate(memory.nodes)}
    steps = []
    for node, (function, _), state in zip(memory.nodes, filter(None, calls), states, strict=True):
        args, kwargs = map_arg((node.args, node.kwargs), (inside | known).__getitem__)
        steps.append(Step(function, (*state, *freeze(args).items), tuple((k, freeze(v)) for k, v in kwargs.items())))
    program = Program(tuple(steps))
    samples = [sample(c) for c in (memory.value, *constants)]
    if any(isinstance(s, Tensor) and s.is_meta for s in samples):
        samples = [s.to("meta") for s in samples]
    tried = program.run(*samples)
    whole, results = tried[0], tried[first:]
    if whole.shape != memory.value.shape or whole.dtype != memory.value.dtype:
        return None
    final = Apply(program, (memory.value, *constants), (), memory.value.shape, memory.value.dtype)
    left: dict[Node, Any] = {memory.origin: final}
    for node, result in zip(memory.nodes, results, strict=True):
        if result is whole or isinstance(result, (int, float, torch.Size, torch.dtype)):
            left[node] = final if result is whole else result
        elif not set(node.users) <= inside.keys():
            return None  # perhaps of before a later write
    return left


def _call(
    node: Node, writes: bool, root: nn.Module, attr: Callable[[str], Attr | None]
) -> tuple[Any, list[Attr]] | None:
    """What a node calls, and the tensors of a module; None if that is no function, or writes more than its argument."""
    if node.op == "call_module":
        layer, path = layer_call(root.get_submodule(str(node.target))), str(node.target)
        state = [attr(below(path, name)) for name in layer.state] if layer is not None else [None]
        known = [a for a in state if a is not None]
        return None if layer is None or len(known) < len(state) else (layer, known)
    if node.op not in ("call_function", "call_method") or not (only_writes(node) if writes else pure(node)):
        return None
    target: Any = node.target
    return operator_name(target) if isinstance(target, OpOverload) else target, []
