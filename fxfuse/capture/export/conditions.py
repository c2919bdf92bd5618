"""The conditions an ExportedProgram holds under, as expressions in the inputs: `x.size(2) % 4 == 0`."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.capture.example_inputs import Part

_TORCH = os.path.dirname(torch.__file__) + os.sep
Conditions = dict[str, str]
VARIES = "fxfuse_varies"  # in the meta of a program's node: dims of its value that are not to be relied on


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
        value = self.visit(node.value)
        if isinstance(value, ast.Name) and value.id == "L" and isinstance(node.slice, ast.Constant):
            return ast.Name(str(node.slice.value))
        if isinstance(value, ast.Call) and not value.args:
            return ast.Call(value.func, [node.slice], [])
        return ast.Subscript(value, node.slice)
