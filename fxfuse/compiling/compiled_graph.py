"""One compiled graph: planned once, and run with the weights that each call brings.

While weights rest they are baked into the graph, so that the inner compiler can pack them. Once they have
changed, or where gradients may be asked for, they are runtime inputs of one graph for all, and what is
folded of them is kept until they change again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.algebra.operator import Operator
from fxfuse.attributes import attribute
from fxfuse.compiling.dynamo_graphs import frozen_state, statistics
from fxfuse.compiling.inner_compiler import compiled
from fxfuse.compiling.weight_sets import WeightSet, touch
from fxfuse.rearranging.index_tensors import Held, changed
from fxfuse.refusal import Refusal
from fxfuse.reporting.report import Report
from fxfuse.rewriting.layers import tensors

logger = logging.getLogger("fxfuse")
BAKED = 8  # sets of weights that get a graph of their own; further ones share one
KEPT = 64  # sets of weights whose folded tensors are kept
_numbers = itertools.count()
STATIC = {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}


@dataclass(frozen=True)
class Planned:
    """A rewritten graph of functions, and where its attributes come from.

    `state` are paths of the model's tensors by argument position; `folded` the operator and the place
    (in `PARAMETERS`) of those computed from them; `constants` belong to the graph. It holds only while `held`,
    tensors of indices, have these values.
    """

    graph: Graph
    state: dict[int, str]
    folded: dict[str, tuple[Operator, int]]
    constants: dict[str, Any]
    report: Report
    held: Mapping[Attr | Apply, Held] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """What is done with a graph: inner compiler and its options, freezing, how hard to check for changes."""

    inner: Any
    inner_options: dict[str, Any]
    freeze: bool | str
    check: str


class Entry:
    """Callable in place of Dynamo's graph, with the same arguments."""

    def __init__(self, planned: Planned, gm: GraphModule, inputs: Sequence[Any], how: How, live: bool = True) -> None:
        self.planned, self.gm, self.how = planned, gm, how
        self.number = next(_numbers)
        self.ids = [id(t) for t in frozen_state(gm)]  # of weights that are no arguments
        self.reads: list[int] = []
        self.state = sorted(planned.state)
        self.looked = [self.state.index(i) for i in statistics(gm, training=False) if i in planned.state]
        self.written = statistics(gm, training=True)
        self.runtime = [i for i in range(len(inputs)) if i not in planned.state]
        self.fakes = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        self.fake_mode = next((t.fake_mode for t in self.fakes if isinstance(t, FakeTensor)), None)
        self.lock = threading.RLock()
        self.sets: OrderedDict[tuple[int, ...], WeightSet] = OrderedDict()
        self.last: WeightSet | None = None
        self.shared: Callable[..., Any] | None = None
        self.plain: Callable[..., Any] | None = None
        self.on_cpu = all(t.device.type == "cpu" for t in (inputs[i] for i in self.state))
        self.grad = torch.is_grad_enabled()
        with self.lock:  # `live` says that Dynamo's own context stands
            self.last = self._new([inputs[i] for i in self.state], inputs if live else None)

    def __call__(self, *args: Any) -> Any:
        state = [args[i] for i in self.state]
        last = self.last
        if (
            last is None
            or last.dead
            or (self.how.check != "never" and not (last.ids == list(map(id, state)) and last.fresh(state)))
            or (self.grad and any(t.requires_grad for t in state))
        ):
            last = self._switch(state, args)
        runner = last.runner
        assert runner is not None
        result = runner(args, state)
        if self.written:
            touch(args[i] for i in self.written)
        return result

    def known(self) -> list[list[int]]:
        """The ids of the weights of every model that it runs."""
        return [self.ids, *(s.ids for s in list(self.sets.values()))]

    def _switch(self, state: list[Tensor], args: Sequence[Any]) -> WeightSet:
        """The set of these weights, brought up to date."""
        with self.lock:
            if self.grad and any(t.requires_grad for t in state):
                return self._passing(state)
            key = tuple(map(id, state))
            found = self.sets.get(key)
            if found is None or found.dead:
                found = self._new(state, None)
            elif not found.fresh(state):
                # Noted before they are read, so that what is written meanwhile counts as a change again; and shown
                # to other threads once there is a runner for it.
                noted = found.noted(state)
                self._fold(found, state, None, first=False)
                found.show(noted)
            self.sets.move_to_end(key)
            self.last = found
            return found

    def _new(self, state: list[Tensor], inputs: Sequence[Any] | None) -> WeightSet:
        new = WeightSet(state, self.how.check, self.looked, self._forget)
        self._fold(new, state, inputs, first=True)
        self.sets[tuple(new.ids)] = new
        while len(self.sets) > KEPT:
            self.sets.popitem(last=False)
        return new

    def _fold(self, found: WeightSet, state: list[Tensor], inputs: Sequence[Any] | None, first: bool) -> None:
        """Compute what is folded of the weights, and a runner for it."""
        with torch.no_grad(), torch.inference_mode(False), _no_autocast():
            values = {self.planned.state[i]: t.detach() for i, t in zip(self.state, state, strict=True)}
            other = changed(self.planned.held, lambda attr: self._value(attr, values))
            if other is not None:
                logger.warning("a graph is run as it is: %s holds other indices than its plan was made for", other)
                found.runner = self._unfolded(inputs)
                return
            stored = tensors((op for op, _ in self.planned.folded.values()), lambda attr: self._value(attr, values))
        refused = [r for r in stored.values() if isinstance(r, Refusal)]
        if refused:
            logger.warning("these weights are not folded: %s", refused[0])
            found.runner = self._unfolded(inputs)
            return
        folded: dict[str, Tensor] = {}
        for path, (op, place) in self.planned.folded.items():
            pair = stored[op]
            assert not isinstance(pair, Refusal)
            value = pair[place]
            assert value is not None  # an operator with a bias has one for all weights
            folded[path] = value
        found.baked = self._bakes(first)
        found.runner = self._baked(values | folded, inputs) if found.baked else self._sharing(found, folded, inputs)

    def _bakes(self, first: bool) -> bool:
        if self.how.freeze != "auto":
            return bool(self.how.freeze) and not self.grad
        return first and self.on_cpu and not self.grad and sum(s.baked for s in self.sets.values()) < BAKED

    def _value(self, attr: Attr, values: dict[str, Tensor]) -> Tensor:
        return values[attr.path] if attr.path in values else self.planned.constants[attr.path]

    def _baked(self, values: dict[str, Tensor], inputs: Sequence[Any] | None) -> Callable[..., Any]:
        """A graph of its own, with these weights as constants."""
        gm = module_of(copied_graph(self.planned.graph), self.planned.constants | values, self.gm)
        run, runtime = self._compiled(gm, self.runtime, inputs, baked=True), self.runtime
        return lambda args, state: run(*[args[i] for i in runtime])

    def _sharing(self, found: WeightSet, folded: dict[str, Tensor], inputs: Sequence[Any] | None) -> Callable[..., Any]:
        """The graph for all, with these folded tensors."""
        if found.folded and found.folded[0].device.type == "cuda":
            for old, new in zip(found.folded, folded.values(), strict=True):
                old.copy_(new)  # where a captured CUDA graph reads them
        else:
            found.folded = list(folded.values())
        if self.shared is None:
            self.shared = self._lifted(list(folded), inputs, found.folded)
        run, extra, used = self.shared, found.folded, [*self.runtime, *self.reads]
        return lambda args, state: run(*[args[i] for i in used], *extra)

    def _lifted(self, paths: list[str], inputs: Sequence[Any] | None, folded: list[Tensor]) -> Callable[..., Any]:
        """The graph with its attributes as inputs behind those of each call: state it still reads, folded tensors."""
        graph, nodes = copied_graph(self.planned.graph), dict[str, list[Node]]()
        for node in graph.find_nodes(op="get_attr"):
            nodes.setdefault(str(node.target), []).append(node)
        read = nodes.keys() - set(paths)  # a folded tensor may have the name of one it replaces
        self.reads = [i for i in self.state if self.planned.state[i] in read]
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            for path in (*(self.planned.state[i] for i in self.reads), *paths):
                new = graph.placeholder("weight_" + path.replace(".", "_"))
                new.meta = {**nodes[path][0].meta, **STATIC}
                new._dynamo_source = None
                for old in nodes[path]:
                    old.replace_all_uses_with(new)
        for node in graph.find_nodes(op="get_attr"):
            if not node.users:
                graph.erase_node(node)
        gm = module_of(graph, self.planned.constants, self.gm)
        return self._compiled(gm, [*self.runtime, *self.reads], inputs, baked=False, extra=folded)

    def _unfolded(self, inputs: Sequence[Any] | None) -> Callable[..., Any]:
        """The graph as Dynamo gave it."""
        if self.plain is None:
            self.plain = untouched(self.gm, self.fakes if inputs is None else inputs, self.how, inputs is not None)
        plain = self.plain
        return lambda args, state: plain(*args)

    def _passing(self, state: list[Tensor]) -> WeightSet:
        passing = WeightSet(state, "full", (), lambda _: None)
        passing.runner = self._unfolded(None)
        return passing

    def _compiled(
        self,
        gm: GraphModule,
        which: Sequence[int],
        inputs: Sequence[Any] | None,
        baked: bool,
        extra: Sequence[Any] = (),
    ) -> Callable[..., Any]:
        """Compile with the inputs that Dynamo gave, or later on with its stand-ins for them."""
        mode = self.fake_mode
        known = [(self.fakes if inputs is None else inputs)[i] for i in which]
        known += [t if mode is None else mode.from_tensor(t, static_shapes=True) for t in extra]
        with _context(mode, inputs is not None):
            return compiled(gm, known, self.how.inner, self.how.inner_options, baked)

    def _forget(self, lost: WeightSet) -> None:
        self.sets.pop(tuple(lost.ids), None)
        if self.last is lost:
            self.last = None


class Variants:
    """Dynamo's graph by the numbers that it is called with: an entry for each, planned when they first come."""

    def __init__(self, numbers: list[int], plan: Callable[[Sequence[Any], bool], Callable[..., Any]]) -> None:
        self.numbers, self.plan = numbers, plan
        self.entries: dict[tuple[float, ...], Callable[..., Any]] = {}
        self.lock = threading.RLock()

    def at(self, args: Sequence[Any], live: bool) -> Callable[..., Any]:
        key = tuple(args[i].item() for i in self.numbers)
        if key not in self.entries:
            with self.lock:
                if key not in self.entries:
                    self.entries[key] = self.plan(args, live)
        return self.entries[key]

    def __call__(self, *args: Any) -> Any:
        return self.at(args, live=False)(*args)


def untouched(gm: GraphModule, inputs: Sequence[Any], how: How, live: bool) -> Callable[..., Any]:
    """A copy of Dynamo's graph, handed to the inner compiler as it is."""
    mode = next((t.fake_mode for t in inputs if isinstance(t, FakeTensor)), None)
    with _context(mode, live):
        run, written = compiled(clone(gm), inputs, how.inner, how.inner_options, baked=False), statistics(gm, True)
    if not written:
        return run

    def training(*args: Any) -> Any:
        result = run(*args)
        touch(args[i] for i in written)
        return result

    return training


def _context(mode: Any, live: bool) -> Any:
    """Dynamo's own context while it compiles; later on a new one about the same stand-ins."""
    return contextlib.nullcontext() if live or mode is None else tracing(TracingContext(mode))


def clone(gm: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph module that a compiler may do with as it likes."""
    held = {str(n.target): attribute(gm, str(n.target)) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    return module_of(copied_graph(gm.graph), held, gm)


def copied_graph(graph: Graph) -> Graph:
    """A copy of a graph with what Dynamo notes on its placeholders."""
    new, values = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        values[node] = new.node_copy(node, values.__getitem__)
        if node.op == "placeholder":
            values[node]._dynamo_source = getattr(node, "_dynamo_source", None)
    return new


def module_of(graph: Graph, held: dict[str, Any], dynamo: GraphModule) -> GraphModule:
    """The module of a graph that was made of `dynamo`'s, with the notes by which later stages know its inputs."""
    gm = GraphModule({str(n.target): held[str(n.target)] for n in graph.nodes if str(n.target) in held}, graph)
    gm.meta = dict(dynamo.meta)
    known: dict[str, Any] = dict(getattr(dynamo, "_param_name_to_source", None) or {})
    names = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    sources: Any = known | {name: LocalSource(f"fxfuse {name}") for name in names}
    gm._param_name_to_source = sources
    return gm


def _no_autocast() -> Any:
    """Folding is in double precision, whatever the call runs in."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack
