"""Values of a trace that no input decides: what weights, buffers and fresh tensors hold, worked out when asked.

A size, a rank or a truth of such a value is the same at every call as long as the weights are. What is read of their
*data* decides a graph that holds for these weights alone: it is noted as an expression, so that whoever brings new
weights can compare.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.algebra.constants import Apply, Attr, freeze, leaves
from fxfuse.ops.memory import INPLACE
from fxfuse.refusal import CaptureError

_WRITES = {operator.setitem, *INPLACE.values()}
_RANDOM = ("rand", "normal", "dropout", "bernoulli", "multinomial", "uniform", "exponential", "poisson", "empty")
_SMALL = 4096


class KnownValues:
    """What the nodes of one trace are worth that depend on nothing but state; `state` finds a tensor by its path."""

    def __init__(self, state: Callable[[str], Any]) -> None:
        self._state = state
        self._known: dict[Node, bool] = {}
        self._values: dict[Node, Any] = {}
        self._written = False  # a known value was written: what it holds depends on when it is asked
        self._lost = False  # with something that an input decides
        self.decided: dict[Attr | Apply, tuple[Any, ...]] = {}

    def recorded(self, node: Node) -> None:
        """Note a new node, in the order of the trace."""
        self._known[node] = self._depends_on_state(node)
        if _writes(node) and node.args and isinstance(node.args[0], Node) and self._known.get(node.args[0]):
            self._written, self._lost = True, self._lost or not self._known[node]
            self._values.clear()
            written = {str(n.target) for n in self._needed(node.args[0], {}) if n.op == "get_attr"}
            if written.intersection(a.path for const in self.decided for a in leaves(const)):
                raise CaptureError("the forward writes a tensor that it has decided by")

    def knows(self, node: Any) -> bool:
        return isinstance(node, Node) and self._known.get(node, False) and not self._lost

    def value(self, node: Node) -> Any:
        """What a known node gives.

        Raises:
            CaptureError: it cannot be worked out.
        """
        if node in self._values:
            return self._values[node]
        with torch._C.DisableTorchFunction(), torch.no_grad():
            env: dict[Node, Any] = {}
            for each in self._needed(node, self._values):
                env[each] = self._run(each, env)
        value = env[node]
        if not isinstance(value, Tensor) or value.numel() <= _SMALL:
            self._values[node] = value
        return value

    def ask(self, node: Node, question: Callable[[Any], Any]) -> Any:
        """What a known value answers; of its data, only for `decide`."""
        value = self.value(node)
        with torch._C.DisableTorchFunction():
            return question(value)

    def decide(self, node: Node) -> Any:
        """What a known tensor holds, as Python numbers, noted for the graph to depend on."""
        value = self.value(node)
        if isinstance(value, Tensor):
            if value.is_meta:
                raise CaptureError("the forward reads data of a weight that is on the meta device")
            expression = self._expression(node, {})
            self.decided[expression] = tuple(self.ask(node, lambda tensor: tensor.flatten().tolist()))
        return value

    def _depends_on_state(self, node: Node) -> bool:
        if node.op == "get_attr":
            return True
        if node.op not in ("call_function", "call_method"):
            return False
        name = str(getattr(node.target, "__name__", node.target))
        return not any(r in name for r in _RANDOM) and all(self._known.get(n, False) for n in node.all_input_nodes)

    def _needed(self, node: Node, there: Mapping[Node, Any]) -> list[Node]:
        """What has to be worked out for a node, in that order, where `there` is what need not be."""
        if self._written:  # in the order of the trace, writes included
            return [n for n in node.graph.nodes if self._known.get(n)]
        order: dict[Node, None] = {}
        todo = [node]
        while todo:
            if missing := [n for n in todo[-1].all_input_nodes if n not in order and n not in there]:
                todo += missing
            else:
                order[todo.pop()] = None
        return list(order)

    def _run(self, node: Node, env: dict[Node, Any]) -> Any:
        if node in self._values:
            return self._values[node]
        if node.op == "get_attr":
            value = self._state(str(node.target))
            return value.detach().clone() if self._written and isinstance(value, Tensor) else value
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n] if n in env else self._values[n])
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise CaptureError(f"what {node.name} of the weights gives cannot be worked out ({error})") from error

    def _expression(self, node: Node, made: dict[Node, Any]) -> Any:
        if self._written:
            raise CaptureError("the forward decides by a tensor that it has written itself")
        for each in self._needed(node, {}):
            value = self.value(each)
            if each.op == "get_attr":
                made[each] = Attr(str(each.target), tuple(value.shape), value.dtype)
                continue
            args, kwargs = map_arg((each.args, each.kwargs), made.__getitem__)
            shape, dtype = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ((), torch.float64)
            target: Any = str(each.target) if each.op == "call_method" else each.target
            named = tuple((k, freeze(v)) for k, v in kwargs.items())
            made[each] = Apply(target, freeze(args).items, named, shape, dtype)
        return made[node]


def _writes(node: Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    name = str(getattr(node.target, "__name__", ""))
    return node.op == "call_function" and (
        node.target in _WRITES
        or (name.endswith("_") and not name.startswith("_"))
        or node.kwargs.get("out") is not None
    )
