"""One compiled graph: planned once, and run with the weights that each call brings.

While weights rest they are baked into the graph, so that the inner compiler can pack them. Once they have
changed, or where gradients may be asked for, they are runtime inputs of one graph for all, and what is
folded of them is kept until they change again.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfuse.compiling.dynamo_graphs import frozen_state, statistics, switches_gradients_on
from fxfuse.compiling.fused_graph import FusedGraph
from fxfuse.compiling.options import CompileOptions
from fxfuse.compiling.runners import Runners
from fxfuse.compiling.weight_sets import WeightSet

BAKED = 8  # sets of weights that get a graph of their own; further ones share one
KEPT = 64  # sets of weights whose folded tensors are kept
_numbers = itertools.count()


class CompiledGraph:
    """Callable in place of Dynamo's graph, with the same arguments; `live` says that Dynamo is just compiling it."""

    def __init__(
        self, fused: FusedGraph, gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, live: bool
    ) -> None:
        self.report, self.options, self.number = fused.report, options, next(_numbers)
        self.frozen = {id(t) for t in frozen_state(gm)}  # weights that are no arguments
        self.positions = list(fused.state)
        self.looked = [self.positions.index(i) for i in statistics(gm, training=False) if i in fused.state]
        self.grad = torch.is_grad_enabled()
        self.inputs_only = self.grad or switches_gradients_on(gm)  # a constant requires no gradient
        self.lock = threading.RLock()
        self.sets: OrderedDict[tuple[int, ...], WeightSet] = OrderedDict()
        self.runners = Runners(fused, gm, inputs, options, live)
        state = [inputs[i] for i in self.positions]
        self.on_cpu = all(t.device.type == "cpu" for t in state)
        self.last: WeightSet | None = self._new(state)
        self.runners.settled()

    def __call__(self, *args: Any) -> Any:
        state = [args[i] for i in self.positions]
        last = self.last
        if (
            last is None
            or last.dead
            or (self.options.check != "never" and not (last.ids == list(map(id, state)) and last.fresh(state)))
            or (self.grad and any(t.requires_grad for t in state))
        ):
            last = self._switch(state)
        assert last.runner is not None
        return last.runner(*args)

    def serves(self, ids: set[int]) -> bool:
        """Whether it runs with any of these weights, given by their ids."""
        return not ids.isdisjoint(self.frozen) or any(not ids.isdisjoint(s.ids) for s in list(self.sets.values()))

    def _switch(self, state: list[Tensor]) -> WeightSet:
        """The set of these weights, brought up to date."""
        with self.lock:
            if self.grad and any(t.requires_grad for t in state):
                passing = WeightSet(state, "full", (), lambda _: None)
                passing.runner = self.runners.unfolded
                return passing
            key = tuple(map(id, state))
            found = self.sets.get(key)
            if found is None or found.dead:
                found = self._new(state)
            elif not found.fresh(state):
                # Looked at before they are read, so that what is written meanwhile counts as a change again; and
                # kept, where other threads see it, once there is a runner for it.
                seen = found.now(state)
                self.runners.give(found, state, self._bakes(first=False))
                found.seen = seen
            self.sets.move_to_end(key)
            self.last = found
            return found

    def _new(self, state: list[Tensor]) -> WeightSet:
        new = WeightSet(state, self.options.check, self.looked, self._forget)
        self.runners.give(new, state, self._bakes(first=True))
        self.sets[tuple(new.ids)] = new
        while len(self.sets) > KEPT:
            self.sets.popitem(last=False)
        return new

    def _bakes(self, first: bool) -> bool:
        if self.inputs_only:
            return False
        if self.options.freeze != "auto":
            return bool(self.options.freeze)
        return first and self.on_cpu and sum(s.baked for s in self.sets.values()) < BAKED

    def _forget(self, lost: WeightSet) -> None:
        self.sets.pop(tuple(lost.ids), None)
        if self.last is lost:
            self.last = None


class GraphByNumbers:
    """Dynamo's graph by the numbers that it is called with: compiled for each when they first come."""

    def __init__(self, numbers: list[int], make: Callable[[Sequence[Any], bool], Callable[..., Any]]) -> None:
        self.numbers, self.make = numbers, make
        self.made: dict[tuple[float, ...], Callable[..., Any]] = {}
        self.lock = threading.RLock()

    def at(self, args: Sequence[Any], live: bool) -> Callable[..., Any]:
        key = tuple(args[i].item() for i in self.numbers)
        if key not in self.made:
            with self.lock:
                if key not in self.made:
                    self.made[key] = self.make(args, live)
        return self.made[key]

    def __call__(self, *args: Any) -> Any:
        return self.at(args, live=False)(*args)
