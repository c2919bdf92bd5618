"""Orders of a chain in which a factor stands beside the layer that can absorb it.

    layer -> reshape -> factor => layer -> factor' -> reshape;  factor -> mean -> layer => mean -> factor' -> layer

A reshape, permutation or average treats every channel alike, so it commutes with a factor, which acts on the axis
that its own is moved to. Those that undo each other, once nothing is left between them, are the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, takewhile

from torch.fx import Node

from fxfuse.algebra.operator import IDENTITY
from fxfuse.planning.regions import Join, Part, Step, nodes_of, steps_of
from fxfuse.reading.movable.commuting import ROWS, Order, norm_keeps, order_after, order_of_layer, undone
from fxfuse.reading.movable.factor_ways import axes_past, passes
from fxfuse.reading.view import View


def orders(parts: list[Part], view: View) -> Iterator[list[Part]]:
    """Other orders of `parts` that compute the same: factors moved up where a layer is, else down; or reversed."""
    if not any(isinstance(p, Step) and p.op.kind in ("commuting", "pool") for p in parts):
        return
    found = [parts]
    for up in (True, False):
        order = _order(parts, up, view)
        if order not in found:
            found.append(order)
            yield order


def _order(parts: list[Part], up: bool, view: View) -> list[Part]:
    result, run = list[Part](), list[Step]()
    before: Part | None = None
    for part in (*parts, None):
        if isinstance(part, Step) and passes(part.op):
            run.append(part)
            continue
        after = isinstance(part, Join) or (part is not None and part.op.weighted)
        if before is not None and (up or not after):
            run = factors_first(run, _order_behind(before))
        elif after:
            run = factors_first(run[::-1], None)[::-1]
        settled = after or (before is not None and _rows_only(run, before))
        result += _without_detours(run, settled, view)
        result += [] if part is None else [part]
        run, before = [], part if after else None
    return result


def factors_first(run: Sequence[Step], order: Order | None) -> list[Step]:
    """Factors at the beginning, in their order, as far as they can move; `order` is that in memory before the run.

    Who reads a batch norm that has moved up finds the values in the same order. Without an order the run is given
    backwards, and the factors move down: the layer there takes its input in any order.
    """
    first, rest, up = list[Step](), list[Step](), order is not None
    blocked = False
    for step in run:
        other = None if blocked or step.op.kind != "scale" else moved(step, rest[::-1], up)
        if order is not None:
            order = order_after(order, step.op)
            if other is not None and other.moved and step.op.law == "batch_norm":
                keeps = norm_keeps(order, (step.op.spatial or 0) + 2)
                other = None if keeps is None else replace(other, contiguous=not keeps)
                order = order if keeps else ROWS
        if other is not None:
            first.append(other)
        else:
            blocked |= step.op.kind == "scale"  # no other factor can pass this one
            rest.append(step)
    return [*first, *rest]


def moved(step: Step, past: Sequence[Step], up: bool) -> Step | None:
    """`step` moved past others, the nearest first; None where one does not keep its axis."""
    op = step.op
    if not past or op.spatial is None:
        return replace(step, moved=True) if past else step
    axes = frozenset((-op.spatial - 1,))
    for other in (p.op for p in past if p.op.kind in ("commuting", "pool")):
        if other.kind == "commuting" and other.const("how") == "unflatten" and not up:
            return None  # it is a view, which not every order in memory allows
        axes = axes_past(other, axes, up=not up)
    return replace(step, op=op.on_layout(-min(axes) - 1), moved=True) if axes else None


def _order_behind(part: Part) -> Order:
    """The order in memory in which a part gives its output, by the first layer in it."""
    return order_of_layer(next((s.op.spatial for s in steps_of(part) if s.op.weighted), None))


def _rows_only(run: Sequence[Step], layer: Part) -> bool:
    """Whether everything in a run lies in row-major order, so that nothing changes if reshapes in it vanish."""
    found = [*accumulate(run, lambda order, step: order_after(order, step.op), initial=_order_behind(layer))]
    return all(order == ROWS for order in found[1:] or found)


def _without_detours(run: list[Step], settled: bool, view: View) -> list[Step]:
    """Rearrangements that undo each other as one step that is the identity, if nobody else reads between them."""
    inside = set(nodes_of(*run))
    for first, step in enumerate(run):
        told = (s.op.const("rearrangement") if s.op.kind == "commuting" else None for s in run[first:])
        moves = list(takewhile(lambda move: move is not None, told))
        for count in (c for c in range(2, len(moves) + 1) if undone(moves[:c])):
            *others, end = (s.node for s in run[first : first + count] if s.node is not None)
            between = _between(others[0], end, inside)
            if all(set(n.users) <= inside and _free(n, True, view) for n in between) and _free(end, settled, view):
                detour = Step(end, replace(IDENTITY, path=step.op.path), others=tuple(others))
                return [*run[:first], detour, *_without_detours(run[first + count :], settled, view)]
    return run


def _free(node: Node, settled: bool, view: View) -> bool:
    """Whether a node may vanish: no rank was taken for granted, and its order in memory is `settled` or no concern."""
    layers = all(u in view.affine and view.affine[u].op.weighted for u in view.readers(node))
    return view.affine[node].assumes is None and (settled or layers)


def _between(first: Node, end: Node, inside: set[Node]) -> list[Node]:
    """The nodes of a run from `first` on, before `end`: what vanishes with the detour."""
    nodes = [end]
    while nodes[-1] is not first:
        nodes.append(next(n for n in nodes[-1].all_input_nodes if n in inside))
    return nodes[:0:-1]
