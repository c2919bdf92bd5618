"""What runs a fused graph with given weights: baked in, as inputs of one graph for all, or the graph as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule

from fxfuse.algebra.constants import changed
from fxfuse.compiling.dynamo_graphs import statistics
from fxfuse.compiling.fused_graph import FusedGraph
from fxfuse.compiling.inner_compiler import Runner, compiled, copied_graph, copied_module, module_of
from fxfuse.compiling.options import CompileOptions
from fxfuse.compiling.weight_sets import WeightSet, touch
from fxfuse.refusal import Refusal
from fxfuse.rewriting.functional import attributes_as_inputs
from fxfuse.rewriting.layers import tensors

logger = logging.getLogger("fxfuse")
STATIC = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


class Runners:
    """Makes callables in place of Dynamo's graph `gm`, with the same arguments.

    `live` says that Dynamo is compiling: `inputs` and its own context serve until `settled`, then its fake tensors.
    """

    def __init__(
        self, fused: FusedGraph, gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, live: bool
    ) -> None:
        self.fused, self.gm, self.options = fused, gm, options
        self.written = statistics(gm, training=True)
        self.runtime = [i for i in range(len(inputs)) if i not in fused.state]
        self.fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        self.fake_mode = next((t.fake_mode for t in self.fakes if isinstance(t, FakeTensor)), None)
        self.inputs: Sequence[Any] = inputs if live else self.fakes
        self.mode = None if live else self.fake_mode
        self.shared: Runner | None = None
        self.reads: list[int] = []  # positions of weights that the shared graph takes as they are

    def settled(self) -> None:
        """Dynamo has compiled its graph: what is made from now on is compiled for its fake tensors."""
        self.inputs, self.mode = self.fakes, self.fake_mode

    def give(self, weights: WeightSet, state: Sequence[Tensor], bake: bool) -> None:
        """Compute what is folded of the weights `state`, and give them a runner for it."""
        paths = zip(self.fused.state.values(), state, strict=True)
        cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))  # folding is in float64
        with torch.no_grad(), torch.inference_mode(False), cpu, cuda:
            known = self.fused.constants | {path: t.detach() for path, t in paths}
            folded = self._folded(known)
        if folded is None:
            weights.runner = self.unfolded
            return
        weights.baked = bake
        runner = self._baked(known | folded) if bake else self._sharing(weights, folded)
        weights.runner = telling(runner, self.written)

    def _folded(self, known: dict[str, Any]) -> dict[str, Tensor] | None:
        """The tensors computed of the weights; None, which is told, where the plan does not hold for these."""
        other = changed(self.fused.held, lambda attr: known[attr.path])
        if other is not None:
            logger.warning("a graph is run as it is: %s holds other indices than its plan was made for", other)
            return None
        made = tensors((op for op, _ in self.fused.folded.values()), lambda attr: known[attr.path])
        folded: dict[str, Tensor] = {}
        for path, (op, place) in self.fused.folded.items():
            numbers = made[op]
            if isinstance(numbers, Refusal):
                logger.warning("these weights are not folded: %s", numbers)
                return None
            value = numbers[place]
            assert value is not None  # an operator with a bias has one for all weights
            folded[path] = value
        return folded

    def _baked(self, held: dict[str, Any]) -> Runner:
        """A graph of its own, with these weights as constants."""
        gm, used = module_of(copied_graph(self.fused.graph), held, self.gm), self.runtime
        run = compiled(gm, [self.inputs[i] for i in used], self.options, self.mode, baked=True)
        return lambda *args: run(*[args[i] for i in used])

    def _sharing(self, weights: WeightSet, folded: dict[str, Tensor]) -> Runner:
        """The graph for all, with these folded tensors."""
        if weights.folded and weights.folded[0].device.type == "cuda":
            for old, new in zip(weights.folded, folded.values(), strict=True):
                old.copy_(new)  # where a captured CUDA graph reads them
        else:
            weights.folded = list(folded.values())
        if self.shared is None:
            self.shared = self._shared(folded)
        run, extra, used = self.shared, weights.folded, [*self.runtime, *self.reads]
        return lambda *args: run(*[args[i] for i in used], *extra)

    def _shared(self, folded: dict[str, Tensor]) -> Runner:
        """The graph with its attributes as inputs behind those of each call: state it still reads, folded tensors."""
        graph = copied_graph(self.fused.graph)
        attributes = {str(n.target) for n in graph.find_nodes(op="get_attr")}
        read = attributes - folded.keys()  # a folded tensor may have the name of one it replaces
        self.reads = [i for i, path in self.fused.state.items() if path in read]
        for node in attributes_as_inputs(graph, [*(self.fused.state[i] for i in self.reads), *folded]):
            node.meta |= STATIC
            node._dynamo_source = None
        inputs = [self.inputs[i] for i in (*self.runtime, *self.reads)]
        mode = self.fake_mode
        inputs += [t if mode is None else mode.from_tensor(t, static_shapes=True) for t in folded.values()]
        return compiled(module_of(graph, self.fused.constants, self.gm), inputs, self.options, self.mode)

    @cached_property
    def unfolded(self) -> Runner:
        """The graph as Dynamo gave it."""
        return untouched(self.gm, self.inputs, self.options, self.mode)


def untouched(
    gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, mode: FakeTensorMode | None = None
) -> Runner:
    """A copy of Dynamo's graph, handed to the inner compiler as it is."""
    return telling(compiled(copied_module(gm), inputs, options, mode), statistics(gm, training=True))


def telling(run: Callable[..., Any], written: Sequence[int]) -> Runner:
    """`run`, which says afterwards that its arguments at the positions `written` have changed."""
    if not written:
        return run

    def training(*args: Any) -> Any:
        result = run(*args)
        touch(args[i] for i in written)
        return result

    return training
