"""Constant folding of the view: which nodes depend on parameters and buffers alone.

A tensor that the forward makes of numbers (`torch.eye(8)`) is such a constant too: each call makes it anew, and it is
the same every time. Without a `dtype` it has the default one of when the graph is read, which is written into the
expression, so that new weights later meet the same: whoever changes the default optimizes again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxfuse.algebra.constants import Apply, Attr, call, freeze, leaves, parts, thaw
from fxfuse.attributes import owner_of, tensor_at
from fxfuse.names import below, operator_name
from fxfuse.ops.devices import DEVICE, asks_device, cast, without_device
from fxfuse.ops.layer_call import layer_call
from fxfuse.ops.modules import has_hooks
from fxfuse.ops.purity import makes, pure, takes
from fxfuse.reading.effects import Effects
from fxfuse.reading.own_memory import OwnMemory, begun, finished

SMALL = 4096  # real arithmetic on so few numbers is faster than on the meta device


def find_constants(graph: Graph, root: nn.Module, extra: Mapping[str, Tensor], effects: Effects) -> dict[Node, Any]:
    """Nodes whose value is fixed by the weights: an `Attr`, an `Apply` or a Python value.

    No weight is read: shapes and dtypes are found on stand-ins. What is random or needs data to have a shape is no
    constant, nor is what is written in place; but for a tensor of the forward's own that is written by constants before
    it is read, whose writes `effects` forget. A call of a plain layer of torch.nn on constants gives one.
    """
    folder = _Folder(graph, root, extra, effects)
    while folder.fold():
        pass  # again, without the writes that have become part of a constant
    return {n: v for n, v in folder.found.items() if v is not DEVICE and n not in folder.loose}


class _Folder:
    """`found` are the constants so far, `samples` stand-ins of the same shape and dtype, on which each call is tried.

    `loose` are those made of numbers alone, on a device that only a run knows: they have no place outside of others.
    """

    def __init__(self, graph: Graph, root: nn.Module, extra: Mapping[str, Tensor], effects: Effects) -> None:
        self.graph, self.root, self.extra, self.effects = graph, root, extra, effects
        self.found: dict[Node, Any] = {}
        self.samples: dict[Attr | Apply, Tensor] = {}
        self.loose = set[Node]()
        self.done: dict[Node, dict[Node, Any]] = {}  # what the writes that end with a node have left
        self.inside = set[Node]()

    def fold(self) -> bool:
        """Find all constants; whether writes have become part of one, so that more may be found now."""
        self.written, self.paths = self.effects.written(), self.effects.written_attributes()
        self.found, ends, before = {}, dict[Node, OwnMemory](), len(self.done)
        inside = set(self.inside)
        for node in self.graph.nodes:
            if node in self.done:
                self.found |= self.done[node]
            elif node in ends:
                self._finish(ends[node])
            elif node in inside:
                continue
            elif (value := self._value(node)) is not None:
                if node not in self.written:
                    self.found[node] = value
                elif isinstance(value, Apply) and (own := begun(node, value, self.effects, self.varies)) is not None:
                    ends[own.last] = own
                    inside.update((node, *own.nodes))
        return len(self.done) > before

    def _finish(self, own: OwnMemory) -> None:
        writers = [n for n in own.nodes if n in self.effects.writes]
        try:
            with torch.no_grad():
                left = finished(own, self.found, writers, self.root, self._attr, self._stand_in)
        except Exception:  # whatever cannot run without data is simply no constant
            return
        if left is not None:
            self.done[own.last] = left
            self.found |= left
            self.inside.update((own.origin, *own.nodes))
            self.effects.replay((own.origin, *own.nodes), writers)
            if own.origin in self.loose and not leaves(left[own.origin]):
                self.loose.update(left)

    def varies(self, node: Node) -> bool:
        return node in self._varying

    @cached_property
    def _varying(self) -> set[Node]:
        """What depends on an input of the graph, but for its device."""
        found = set[Node]()
        for node in self.graph.nodes:
            depends = node.op in ("placeholder", "output") or not found.isdisjoint(node.all_input_nodes)
            if depends and not asks_device(node):
                found.add(node)
        return found

    def _attr(self, path: str) -> Attr | None:
        """The tensor at `path`, if the forward itself leaves it alone."""
        tensor = self.extra[path] if path in self.extra else tensor_at(self.root, path)
        kept = tensor is not None and path not in self.paths and not _replaced_by_hook(self.root, path)
        return Attr(path, tuple(tensor.shape), tensor.dtype) if kept and tensor is not None else None

    def _value(self, node: Node) -> Any:
        """The constant that a node gives, if all that it reads is constant."""
        if node.op == "get_attr":
            return self._attr(str(node.target))
        if asks_device(node):
            return DEVICE
        inputs = node.all_input_nodes
        if node.op not in ("call_function", "call_method", "call_module") or any(n not in self.found for n in inputs):
            return None
        if node.op == "call_module":
            return self._layer(node) if inputs else None
        if not (inputs or makes(node)) or not pure(node):
            return None
        value, moved = self._call(node)
        if (moved or not self.loose.isdisjoint(inputs)) and isinstance(value, Apply) and not leaves(value):
            self.loose.add(node)
        return value

    def _layer(self, node: Node) -> Any:
        layer = layer_call(self.root.get_submodule(str(node.target)))
        state = [self._attr(below(str(node.target), name)) for name in layer.state] if layer is not None else [None]
        return None if layer is None or None in state else self._tried(node, layer, (*state, *node.args), node.kwargs)

    def _call(self, node: Node) -> tuple[Any, bool]:
        """The constant of a function or method, and whether the call says on which device it is to be."""
        if (to := cast(node, self.found)) is not None:
            source = self.found.get(node.all_input_nodes[0])
            if not isinstance(source, (Attr, Apply)) or (to.dtype in (None, source.dtype) and not to.memory_format):
                return source if isinstance(source, (Attr, Apply)) else None, True
            more = {"memory_format": to.memory_format} if to.memory_format else {}
            return self._tried(node, "to", (node.args[0], to.dtype or source.dtype), more), True
        kwargs, moved = without_device(node)
        target: Any = node.target
        function = operator_name(target) if isinstance(target, OpOverload) else target  # which can be pickled
        return self._tried(node, function, node.args, kwargs), moved

    def _tried(self, node: Node, function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The constant that `function` gives for arguments with nodes in them; None where it has no fixed shape."""
        args, kwargs = map_arg((args, kwargs), self.found.__getitem__)
        frozen, named = tuple(map(freeze, args)), tuple((k, freeze(v)) for k, v in kwargs.items())
        whole = (*frozen, *(v for _, v in named))
        tensors, new = [o for v in whole for o in parts(v)], makes(node)
        if any(v is DEVICE for v in whole) or (new and tensors):  # torch.tensor(weight) warns
            return None
        if function is operator.getitem and any(c.dtype in (torch.bool, torch.uint8) for c in tensors[1:]):
            return None  # a mask: its shape depends on data
        large = any(self._stand_in(c).is_meta for c in tensors)

        def known(const: Any) -> Any:
            """All operands have to be on one device."""
            return self._stand_in(const).to("meta") if large else self._stand_in(const)

        tried = {name: thaw(value, known) for name, value in named}
        if new and takes(node, "device"):
            tried["device"] = "meta"  # only its shape is asked for here
        try:
            result = call(function, [thaw(a, known) for a in frozen], tried)
            if not isinstance(result, Tensor):
                return result if isinstance(result, (int, float, torch.Size, torch.dtype)) else None
            if new and takes(node, "dtype") and tried.get("dtype") is None:
                named = (*(n for n in named if n[0] != "dtype"), ("dtype", result.dtype))
            value = Apply(function, frozen, named, tuple(result.shape), result.dtype)
        except Exception:  # whatever cannot run without data is simply no constant
            return None
        if tensors:
            self.samples.setdefault(value, result)
        return value

    def _stand_in(self, const: Attr | Apply) -> Tensor:
        """A tensor of the same shape and dtype: a real one while small, else on the meta device."""
        if const not in self.samples:
            device = None if math.prod(const.shape) <= SMALL else "meta"
            self.samples[const] = torch.ones(const.shape, dtype=const.dtype, device=device)
        return self.samples[const]


def _replaced_by_hook(root: nn.Module, path: str) -> bool:
    """Whether a hook may put another tensor there, as pruning and the older weight_norm do."""
    module, name = owner_of(root, path)
    return name in module.__dict__ and has_hooks(module)
