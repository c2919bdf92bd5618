"""One graph for every batch size, where torch.export would make one for a batch of 1 and one for the rest.

Inside of torch a batch of 1 often takes another way to the same result (whether a reshape copies, which
memory format a convolution writes), and torch.export notes each as a condition on the input. So the model
is exported with both kinds of batch. Where the graph of many, at a batch of 1, is operation by operation
that of one, it holds for whatever either of the two holds for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv

from fxfuse.capture.example_inputs import bound, parts
from fxfuse.capture.export.conditions import VARIES, Conditions, conditions, input_values, number
from fxfuse.names import is_aten
from fxfuse.ops.aten import whole_slice

_NUMBERS = (torch.SymInt, torch.SymBool, torch.SymFloat, int, float)


def for_any_batch(
    model: nn.Module, inputs: tuple[Any, ...], export: Callable[[tuple[Any, ...]], Any]
) -> tuple[Any, Conditions]:
    """The program to use for inputs like `inputs`, and the conditions it holds under."""
    program, leaves = export(inputs), [p for p in parts(model, inputs) if p.leaf]
    holds = conditions(program, leaves)
    size = next((p.value.shape[0] for p in leaves if isinstance(p.value, Tensor) and p.value.dim()), 0)
    batched = [isinstance(p.value, Tensor) and p.value.dim() > 0 and p.value.shape[0] == size for p in leaves]
    other = pytree.tree_map_only(Tensor, lambda t: _resized(t, size), inputs)
    fixed = [number(v.shape[0]) is not None for v, b in zip(input_values(program), batched, strict=True) if b]
    if not size or (size > 1 and any(fixed)) or _hold(holds, model, other):
        return program, holds
    try:
        second = export(other)
    except Exception:  # a model that cannot do another batch size needs no graph for it
        return program, holds
    pairs = [(program, holds), (second, conditions(second, leaves))]
    (many, first), (one, last) = pairs if size > 1 else pairs[::-1]
    if not _same_at_one(many, one, batched):
        return program, holds
    return many, _either(first, last, [p.name for p, b in zip(leaves, batched, strict=True) if b])


def _resized(tensor: Tensor, size: int) -> Tensor:
    """A batch of one for a batch of `size`, and a batch of two for one."""
    if not tensor.dim() or tensor.shape[0] != size:
        return tensor
    return torch.cat([tensor, tensor]) if size == 1 else tensor[:1]


def _hold(texts: Conditions, model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    try:
        return all(eval(text, {}, bound(model, inputs)) for text in texts)
    except ArithmeticError:  # x % 0
        return False


def _either(many: Conditions, one: Conditions, names: Sequence[str]) -> Conditions:
    """What both programs need, and what the one or the other needs."""
    common = {text: place for text, place in many.items() if text in one}
    of_many = [f"({t})" for t in many if t not in common]
    of_one = [f"({t})" for t in one if t not in common]
    if not of_many:
        return common
    of_one = [f"({name}.size(0) == 1)" for name in names] + of_one
    return common | {f"({' and '.join(of_many)}) or ({' and '.join(dict.fromkeys(of_one))})": ""}


def _same_at_one(many: Any, one: Any, batched: Sequence[bool]) -> bool:
    """Whether `many` does, with a batch of 1, what `one` does: the same operations with the same numbers.

    Sizes that are certain of the values of `many` alone are noted as varying, for a batch of 1 is now possible too.
    """
    sizes = [v.shape[0] for v, b in zip(input_values(many), batched, strict=True) if b]
    if any(isinstance(s, int) or not s.node.expr.is_symbol for s in sizes):
        return False
    at_one = {str(s.node.expr): 1 for s in sizes}
    if [s.target for s in many.graph_signature.input_specs] != [s.target for s in one.graph_signature.input_specs]:
        return False
    if many.constants.keys() != one.constants.keys() or many.call_spec.out_spec != one.call_spec.out_spec:
        return False
    if any(a is not (b := one.constants[name]) and not _equal(a, b) for name, a in many.constants.items()):
        return False
    ours, theirs = list(_steps(many, at_one)), list(_steps(one, at_one))
    if [step for _, step, _ in ours] != [step for _, step, _ in theirs]:
        return False
    for (node, _, sizes), (_, _, others) in zip(ours, theirs, strict=True):
        if any(None not in (a, b) and a != b for a, b in zip(sizes, others, strict=True)):
            return False
        node.meta[VARIES] = {dim for dim, size in enumerate(others) if size is None}
    return True


def _equal(a: Any, b: Any) -> bool:
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _quotient(dividend: Any, divisor: Any) -> Any:
    """dividend // divisor; where it comes out even, without the division."""
    exact = (dividend / divisor).expand() if divisor.is_Integer else None
    even = exact is not None and all(c.is_Integer for c in exact.as_coefficients_dict().values())
    return exact if even else FloorDiv(dividend, divisor)


def _steps(program: Any, at: Mapping[str, int]) -> Iterator[tuple[Node, Any, list[int | None]]]:
    """Every operation on tensors in a form that compares equal across programs, its numbers worked out for batch `at`.

    With it the sizes of what it gives, where they are the same for all inputs.
    """
    position: dict[Node, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Node):
            return ("%", position[value]) if value in position else plain(value.meta.get("val"))
        if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            sizes = {s: at[s.name] for s in value.node.expr.free_symbols if s.name in at}
            expression = value.node.expr.subs(sizes).replace(FloorDiv, _quotient)
            return str(expression.expand() if hasattr(expression, "expand") else expression)
        return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, _NUMBERS):
            continue
        if is_aten(node) and whole_slice(node) and node.args[0] in position:
            position[node] = position[node.args[0]]  # `x[:, 1:]` has one for the batch, but not for a batch of 1
            continue
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        kinds = [(t.dim(), t.dtype, t.device) for t in tensors]
        step = (node.op, node.target, map_aggregate((node.args, node.kwargs), plain), kinds)
        yield node, step, [number(size) for t in tensors for size in t.shape]
        position[node] = len(set(position.values()))
