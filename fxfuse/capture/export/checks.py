"""The conditions a graph was captured under, as nodes that check them before anything else runs.

torch.export follows the branches that its example inputs take, and notes what it decided
(`x.size()[2] % 4 == 0`). In the graph each note is a `torch._assert` that says what the graph was
made for and what to do about it, so that other inputs raise instead of getting another branch's answer.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Add: operator.add, ast.Sub: operator.sub,
    ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.And: operator.and_, ast.Or: operator.or_,
}  # fmt: skip
# Only what torch.fx can trace again, as it does whenever a GraphModule is unpickled.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": torch.sym_max,
    "min": torch.sym_min,
    "float": torch.sym_float,
    "int": torch.sym_int,
}
_LONG = 160
_REMEDY = "optimize with example_inputs like these"


class Unreadable(Exception):
    """A condition in a form that has no nodes here."""


class InputChecks:
    """Writes checks into a graph whose inputs are `sources`: by expression (`xs[0]`) the node that holds it."""

    def __init__(self, graph: Graph, sources: Mapping[str, Node]) -> None:
        self.graph = graph
        self.sources = sources
        self.made: dict[str, Any] = {}
        self.checked: set[str] = set()

    def value(self, name: str, example: Any) -> None:
        """An input is a tensor of the same rank and dtype as `example`, or the same number, string or None."""
        node = self.sources[name]
        if not isinstance(example, Tensor):
            self._assert(node, example, f"{name}={example!r}")
            return
        dims = self.graph.call_method("dim", (node,))
        self._assert(dims, example.dim(), f"{name} of {example.dim()} dims")
        dtype = self.graph.call_function(getattr, (node, "dtype"))
        self._assert(dtype, example.dtype, f"{name} of {example.dtype}")

    def length(self, name: str, entries: int) -> None:
        """A list, tuple or dict has as many entries as in the examples."""
        count = self.graph.call_function(len, (self.sources[name],))
        count.meta["is_wrapped"] = True  # so that torch.fx can trace it again, when the graph is unpickled
        self._assert(count, entries, f"{name} of {entries} entries")

    def condition(self, text: str, where: str = "") -> None:
        """What the model itself decided by, as an expression in the inputs.

        Raises:
            Unreadable: the expression is more than arithmetic on sizes.
        """
        tree = ast.parse(text, mode="eval").body
        readable = ast.unparse(tree)
        if readable in self.checked:
            return
        self.checked.add(readable)
        holds = self._node(tree)
        if holds is not True:
            text = readable if len(readable) <= _LONG else readable[:_LONG] + " ..."
            self._message(holds, f"inputs with {text}", where)

    def _assert(self, value: Node, expected: Any, text: str) -> None:
        self._message(self.graph.call_function(operator.eq, (value, expected)), text)

    def _message(self, holds: Any, text: str, where: str = "") -> None:
        place = f", as decided at {where}" if where else ""
        self.graph.call_function(torch._assert, (holds, f"the graph was made for {text}{place}; {_REMEDY}"))

    def _node(self, tree: ast.expr) -> Any:
        """The value of an expression: a node, or a number where no input is in it."""
        text = ast.unparse(tree)
        if text in self.sources:
            return self.sources[text]
        if text not in self.made:
            self.made[text] = self._made(tree, text)
        return self.made[text]

    def _made(self, tree: ast.expr, text: str) -> Any:
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1:
            return self._apply(_OPERATORS.get(type(tree.ops[0])), [tree.left, tree.comparators[0]], text)
        if isinstance(tree, ast.BinOp):
            return self._apply(_OPERATORS.get(type(tree.op)), [tree.left, tree.right], text)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
            return self._call(operator.eq, [self._node(tree.operand), False])
        if isinstance(tree, ast.UnaryOp):
            return self._apply(_OPERATORS.get(type(tree.op)), [tree.operand], text)
        if isinstance(tree, ast.BoolOp):
            first, *rest = tree.values
            total = self._node(first)
            for value in rest:
                total = self._call(_OPERATORS[type(tree.op)], [total, self._node(value)])
            return total
        if isinstance(tree, ast.Call) and not tree.keywords:
            asked = tree.func
            if isinstance(asked, ast.Attribute) and asked.attr in ("size", "stride", "storage_offset"):
                tensor = self._node(asked.value)
                return self.graph.call_method(asked.attr, (tensor, *(self._node(a) for a in tree.args)))
            return self._apply(_FUNCTIONS.get(ast.unparse(asked)), tree.args, text)
        raise Unreadable(text)

    def _apply(self, function: Callable[..., Any] | None, operands: list[ast.expr], text: str) -> Any:
        if function is None:
            raise Unreadable(text)
        return self._call(function, [self._node(o) for o in operands])

    def _call(self, function: Callable[..., Any], values: list[Any]) -> Any:
        if any(isinstance(v, Node) for v in values):
            return self.graph.call_function(function, tuple(values))
        return function(*values)
