"""A permutation of channels, and what it becomes on the other side of a node that it changes places with.

With x[P] for the channels P[0], P[1], ... of x: an element-wise function or a pool of each channel alone gives
f(x[P]) = f(x)[P]. A layer g of several groups gives g(x[P]) = g'(x)[Q] where P takes its groups to groups, each in
order: Q does so to the groups of its outputs, and g' is g with its rows in that order. A depthwise layer, a batch
norm and a factor a channel are the case of one channel a group, where any P will do and Q is P.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.fx import Node

from fxfuse.algebra.operator import Ints
from fxfuse.names import place
from fxfuse.ops.elementwise import read_activation
from fxfuse.ops.movement import pooled
from fxfuse.reading.movable.permutations import Permutation
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal

KINDS = ("conv", "scale", "pool", "pad", "identity")  # of what a permutation may pass


class Passed(NamedTuple):
    """A node that a permutation passes: what is left of it on the other side, and the rows of the node's weights.

    `rows` is None where the node has no number of its own for each channel.
    """

    node: Node
    reads: Ints
    rows: Ints | None = None


def passed(node: Node, view: View, permutation: Permutation, reads: Ints, forward: bool) -> Passed | Refusal:
    """What `reads` becomes behind `node`, or before it; refused without a reason by a dense layer."""
    affine, modules = view.affine.get(node), view.captured.modules
    if node.op in ("placeholder", "output"):
        return Refusal("the model is given it" if node.op == "placeholder" else "the model returns it")
    if not permutation.whole:
        return _refusal("is no layer that takes some channels", node)
    if affine is None:
        alike = read_activation(node, modules) is not None or pooled(node, modules) == permutation.spatial
        return Passed(node, reads) if alike else _refusal("may treat channels differently", node)
    op = affine.op
    if affine.kind != "unary":
        return _refusal("joins several tensors", node)
    if op.spatial is None:
        return Passed(node, reads)
    if op.spatial != permutation.spatial:
        return _refusal("has its channels on another axis", node)
    if op.groups == 1:
        return Refusal("")  # it takes the permutation, or says itself why not
    if not isinstance(op.pad_value, (int, float)) or (op.kind == "conv" and op.padding_mode != "zeros"):
        return _refusal("pads in a way that has no form for permuted channels", node)
    plain = not (op.transposed or op.framed or op.reads is not None or affine.extra or affine.width)
    if not plain or op.kind not in KINDS or affine.inputs[0][0] not in node.all_input_nodes:
        return _refusal("has no form for permuted channels", node)
    sizes = (op.in_channels // op.groups, op.out_channels // op.groups)
    inner, outer = sizes if forward else sizes[::-1]
    groups = _groups(reads, inner, strict=forward)
    if len(reads) != inner * op.groups or groups is None:
        return _refusal("has groups, and the permutation takes channels out of them", node)
    after = tuple(g * outer + i for g in groups for i in range(outer))
    if op.kind not in ("conv", "scale"):
        return Passed(node, after)
    inverse = tuple(sorted(range(len(after)), key=after.__getitem__))
    return Passed(node, after, inverse if forward else reads)


def _groups(reads: Ints, size: int, strict: bool) -> Ints | None:
    """The groups in the order in which `reads` takes them, if it takes each whole (and `strict`ly in order)."""
    runs = [reads[i : i + size] for i in range(0, len(reads), size)]
    groups = tuple(run[0] // size for run in runs)
    whole = [tuple(range(g * size, (g + 1) * size)) for g in groups]
    return groups if (runs if strict else [tuple(sorted(run)) for run in runs]) == whole else None


def _refusal(why: str, node: Node) -> Refusal:
    return Refusal(f"{place(node)} {why}")
