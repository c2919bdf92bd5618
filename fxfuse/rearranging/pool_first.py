"""1x1 conv -> avg_pool  =>  avg_pool -> 1x1 conv      the pool first, as it leaves fewer positions to convolve

Exact, as the pattern `pool_swap` says, with a batch norm between the two as well.

The captured graph is changed, before the plan that counts: the planner only decides what becomes one layer. The other
direction, which needs no other plan, is `layer_first`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor
from fxfuse.pattern import Selection
from fxfuse.reading.view import View


class Swapped(NamedTuple):
    """A layer and the pool that runs before it now, and the positions of the layer before and after, where known."""

    layer: Operator
    pool: Operator
    positions: tuple[int, ...]


def swap(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Average pools to be moved before the pointwise convolutions they follow."""
    for pool, affine in view.affine.items():
        op = affine.op
        if op.kind == "pool" and not op.pads and math.prod(op.stride) > 1 and (nodes := _up_to_conv(view, pool, op)):
            layer, shapes = view.affine[nodes[-1]].op, view.shapes
            swapped = isinstance(patterns.combine("swap", layer, op), Operator)
            if layer.pointwise and swapped and price(layer, op.pixels) < price(layer, Fraction(1)):
                positions = tuple(shapes[n].numel() // layer.out_channels for n in (nodes[-1], pool) if n in shapes)
                touched = frozenset((pool, *nodes, view.source(nodes[-1]), *pool.users))
                yield Edit(touched, partial(_rewire, view, pool, nodes), Swapped(layer, op, positions))


def _up_to_conv(view: View, pool: Node, op: Operator) -> list[Node]:
    """The nodes before `pool` up to a convolution, last first, if nobody else reads any; else none."""
    nodes = list[Node]()
    for node, step in view.before(view.source(pool), pool):
        if step.op.spatial not in (None, op.spatial) or node in view.sized or node in view.effects.writes:
            break
        nodes.append(node)
        if step.op.weighted:
            return nodes
        if step.op.kind not in ("scale", "identity"):
            break
    return []


def _rewire(view: View, pool: Node, nodes: list[Node], editor: Editor) -> None:
    last, conv, op = nodes[0], nodes[-1], view.affine[pool].op
    source = view.source(conv)
    for reader in list(pool.users):
        editor.rewire(reader, pool, last)
    editor.move(pool, before=conv)
    editor.rewire(pool, last, source)
    editor.rewire(conv, source, pool)
    for node in nodes:  # all behind the pool have the size it gave, and it has other channels
        editor.same_shape(node, like=pool)
    editor.resize(pool, -(op.spatial or 0) - 1, view.affine[conv].op.in_channels)
