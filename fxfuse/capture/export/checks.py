"""The conditions a graph was captured under, as nodes that check them before anything else runs.

torch.export follows the branches that its example inputs take, and notes what it decided
(`x.size()[2] % 4 == 0`). In the graph each note is a `torch._assert` that says what the graph was
made for and what to do about it, so that other inputs raise instead of getting another branch's answer.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

# What a condition may call: only what torch.fx can trace again, as it does whenever a GraphModule is unpickled.
_FUNCTIONS: dict[str, Any] = {
    "__builtins__": {},
    "max": torch.sym_max,
    "min": torch.sym_min,
    "float": torch.sym_float,
    "int": torch.sym_int,
}
_LONG = 160
_REMEDY = "optimize with example_inputs like these"


class InputChecks:
    """Writes checks into a graph whose parameters are `arguments`, by evaluating what is asked on proxies of them."""

    def __init__(self, graph: Graph, arguments: Mapping[str, Node]) -> None:
        self.tracer = _Once(graph)
        self.values = {name: self.tracer.proxy(node) for name, node in arguments.items()}

    def value(self, name: str, example: Any) -> Node:
        """An input is a tensor of the same rank and dtype as `example`, or the same number, string or None."""
        given = eval(name, _FUNCTIONS, self.values)
        if isinstance(example, Tensor):
            self._assert(given.dim() == example.dim(), f"{name} of {example.dim()} dims")
            self._assert(given.dtype == example.dtype, f"{name} of {example.dtype}")
        else:
            self._assert(given == example, f"{name}={example!r}")
        node: Node = given.node
        return node

    def length(self, name: str, entries: int) -> None:
        """A list, tuple or dict has as many entries as in the examples."""
        count: Any = self.tracer.create_proxy("call_function", len, (eval(name, _FUNCTIONS, self.values),), {})
        count.node.meta["is_wrapped"] = True  # so that torch.fx can trace it again, when the graph is unpickled
        self._assert(count == entries, f"{name} of {entries} entries")

    def condition(self, text: str, where: str) -> None:
        """What the model itself decided by, as an expression in the inputs.

        Raises:
            ValueError: the expression is more than arithmetic on sizes.
        """
        tree = ast.parse(text, mode="eval")
        text = ast.unparse(tree)
        code = compile(ast.fix_missing_locations(_Recordable().visit(tree)), "condition", "eval")
        try:
            holds = eval(code, _FUNCTIONS, self.values)
        except Exception as error:  # what the names and operators in it do on proxies can be anything
            raise ValueError(f"a graph cannot check that {text}") from error
        if holds is not True:
            short = text if len(text) <= _LONG else text[:_LONG] + " ..."
            self._assert(holds, f"inputs with {short}" + (f", as decided at {where}" if where else ""))

    def _assert(self, holds: Proxy | bool, text: str) -> None:
        message = f"the graph was made for {text}; {_REMEDY}"
        self.tracer.create_proxy("call_function", torch._assert, (holds, message), {})


class _Once(GraphAppendingTracer):
    """Records into a graph; what is asked several times is computed once."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.made: dict[str, Node] = {}

    def create_node(self, *call: Any, **more: Any) -> Node:
        asked = repr(call)
        if asked not in self.made:
            self.made[asked] = super().create_node(*call, **more)
        return self.made[asked]


class _Recordable(ast.NodeTransformer):
    """`and`, `or` and `not`, which would ask for the truth of a value, as operators that proxies record."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        both = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        return reduce(lambda a, b: ast.BinOp(a, both, b), node.values)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return ast.Compare(node.operand, [ast.Eq()], [ast.Constant(False)]) if isinstance(node.op, ast.Not) else node
