"""The conditions an ExportedProgram holds under: as expressions in the inputs, and as nodes that check them.

torch.export follows the branches that its example inputs take, and notes what it decided
(`x.size()[2] % 4 == 0`). In the graph each note is a `torch._assert`, before anything else runs, that says
what the graph was made for and what to do about it, so that other inputs raise instead of getting another
branch's answer.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fxfuse.capture.example_inputs import Part

_TORCH = os.path.dirname(torch.__file__) + os.sep
Conditions = dict[str, str]
VARIES = "fxfuse_varies"  # in the meta of a program's node: dims of its value that are not to be relied on
# What a condition may call: only what torch.fx can trace again, as it does whenever a GraphModule is unpickled.
_FUNCTIONS: dict[str, Any] = {
    "__builtins__": {},
    "max": torch.sym_max,
    "min": torch.sym_min,
    "float": torch.sym_float,
    "int": torch.sym_int,
    "torch": torch,
}
_LONG = 160
_REMEDY = "optimize with example_inputs like these"


def conditions(program: Any, leaves: Sequence[Part]) -> Conditions:
    """Each condition with the line of the model that it comes from; "" for those of torch itself."""
    first: dict[str, str] = {}
    found: Conditions = {}
    for part, value in zip(leaves, input_values(program), strict=True):
        for dim, size in enumerate(value.shape if isinstance(part.value, Tensor) else ()):
            for text in _bounds(program, f"{part.name}.size({dim})", size, first):
                found.setdefault(text, "")
    for guard, place in zip(program._guards_code, _places(program), strict=True):
        found.setdefault(ast.unparse(_Readable().visit(ast.parse(guard, mode="eval"))), place)
    return found


def input_values(program: Any) -> list[Any]:
    """What torch.export ran the forward on, in place of the inputs."""
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    specs = program.graph_signature.input_specs
    return [n.meta.get("val") for n, s in zip(nodes, specs, strict=True) if s.kind.name == "USER_INPUT"]


def number(size: Any) -> int | None:
    """A size that is the same for all inputs; None for one that is not."""
    same = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if same is None else int(same)


def _bounds(program: Any, text: str, size: Any, first: dict[str, str]) -> Iterator[str]:
    """What the program takes for granted of one size beside its guards; `first` are sizes seen before."""
    fixed = number(size)
    if fixed is not None:
        yield f"{text} == {fixed}"
        return
    expression = size.node.expr
    if str(expression) in first:
        yield f"{text} == {first[str(expression)]}"
    first.setdefault(str(expression), text)
    bounds = program.range_constraints.get(expression)
    if bounds is not None and bounds.lower > 0:
        yield f"{text} >= {bounds.lower}"
    if bounds is not None and bounds.upper < 2**62:
        yield f"{text} <= {bounds.upper}"


def _places(program: Any) -> list[str]:
    shapes = [n.meta["val"].shape for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    sizes = [s for shape in shapes for s in shape if number(s) is None]
    guards = sizes[0].node.shape_env.guards if sizes else []
    if len(guards) != len(program._guards_code):
        return [""] * len(program._guards_code)
    frames = [g.sloc.framework_loc for g in guards]
    ours = [not isinstance(f, str) and f is not None and not f.filename.startswith(_TORCH) for f in frames]
    return [f"{f.filename}:{f.lineno}" if own else "" for f, own in zip(frames, ours, strict=True)]


class _Readable(ast.NodeTransformer):
    """A guard as torch.export writes it (`L['x'].size()[2] > 4`) in terms of the inputs: `x.size(2) > 4`."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "L" and isinstance(node.slice, ast.Constant):
            return ast.Name(str(node.slice.value))
        value = self.visit(node.value)
        if isinstance(value, ast.Call) and not value.args:
            return ast.Call(value.func, [node.slice], [])
        return ast.Subscript(value, node.slice)


class InputChecks:
    """Writes checks into a graph whose parameters are `arguments`, by evaluating what is asked on proxies of them."""

    def __init__(self, graph: Graph, arguments: Mapping[str, Node], wanted: bool = True) -> None:
        self.tracer, self.wanted = _Once(graph), wanted
        self.values = {name: self.tracer.proxy(node) for name, node in arguments.items()}

    def value(self, name: str, example: Any) -> Node:
        """An input is a tensor of the same rank and dtype as `example`, or the same number, string or None."""
        given = eval(name, _FUNCTIONS, self.values)
        if not self.wanted:
            pass
        elif isinstance(example, Tensor):
            self._assert(given.dim() == example.dim(), f"{name} of {example.dim()} dims")
            self._assert(given.dtype == example.dtype, f"{name} of {example.dtype}")
        else:
            self._assert(given == example, f"{name}={example!r}")
        node: Node = given.node
        return node

    def length(self, name: str, entries: int) -> None:
        """A list, tuple or dict has as many entries as in the examples."""
        if not self.wanted:
            return
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
