"""Orders of a chain in which a factor stands beside the layer that can absorb it.

    layer -> carry -> factor => layer -> factor' -> carry;  factor -> carry -> layer => carry -> factor' -> layer

A carry treats every channel alike, so the two commute; the factor acts on the axis that the carry moves its own
to. Carries that undo each other, once nothing is left between them, are the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch.fx import Node

from .carries import undone
from .passage import axes_of, passes
from .record import IDENTITY
from .regions import Join, Step, part_nodes

Part = Step | Join


def orders(parts: list[Part], free: Callable[[Node], bool]) -> Iterator[list[Part]]:
    """Other orders of `parts` that compute the same: factors moved up where there is a layer, else down; and reversed.

    `free` tells whether a node may vanish: nothing was taken for granted about it.
    """
    if not any(isinstance(p, Step) and p.op.kind in ("carry", "pool") for p in parts):
        return
    found = [parts]
    for up in (True, False):
        order = _order(parts, up, free)
        if order not in found:
            found.append(order)
            yield order


def _order(parts: list[Part], up: bool, free: Callable[[Node], bool]) -> list[Part]:
    result, run = list[Part](), list[Step]()
    before = False
    for part in (*parts, None):
        if isinstance(part, Step) and passes(part.op):
            run.append(part)
            continue
        after = part is not None and _absorbs(part)
        if before or after:
            run = _arranged(run, up if before and after else before)
        result += _without_detours(run, free)
        result += [] if part is None else [part]
        run, before = [], after
    return result


def _absorbs(part: Part) -> bool:
    return isinstance(part, Join) or part.op.weighted


def _arranged(run: Sequence[Step], up: bool) -> list[Step]:
    """Factors first where they move up, in their order, or last where they move down."""
    moved, rest = list[Step](), list[Step]()
    blocked = False
    for step in run if up else run[::-1]:
        other = None if blocked or step.op.kind != "scale" else _moved(step, rest[::-1], up)
        if other is not None:
            moved.append(other)
        else:
            blocked |= step.op.kind == "scale"  # no other factor can pass this one
            rest.append(step)
    return [*moved, *rest] if up else [*rest[::-1], *moved[::-1]]


def _moved(step: Step, past: Sequence[Step], up: bool) -> Step | None:
    """`step` moved past others, the nearest first; None where one does not keep its axis."""
    op = step.op
    if not past or op.spatial is None:
        return replace(step, moved=True) if past else step
    axis = -op.spatial - 1
    for other in (p.op for p in past):
        axes = axes_of(other)
        if other.kind == "pool" and axis != -(other.spatial or 0) - 1:
            return None
        if axes is not None:
            found = axes.get(axis) if up else next((o for o, i in axes.items() if i == axis), None)
            if found is None:
                return None
            axis = found
    return replace(step, op=op.relaid(-axis - 1), moved=True)


def _without_detours(run: list[Step], free: Callable[[Node], bool]) -> list[Step]:
    """Carries that undo each other as one step that is the identity, if nobody else reads a value between them."""
    inside = {n for s in run for n in part_nodes(s)}
    for first, step in enumerate(run):
        turns = []
        for last in range(first, len(run)):
            if run[last].op.kind != "carry" or (turn := run[last].op.const("turn")) is None:
                break
            turns.append(turn)
            end = run[last].node
            if last > first and undone(turns) and step.node is not None and end is not None:
                between = _between(step.node, end, inside)
                if all(set(n.users) <= inside and free(n) for n in between) and free(end):
                    others = tuple(s.node for s in run[first:last] if s.node is not None)
                    detour = Step(end, replace(IDENTITY, path=step.op.path), others=others)
                    return [*run[:first], detour, *_without_detours(run[last + 1 :], free)]
    return run


def _between(first: Node, end: Node, inside: set[Node]) -> list[Node]:
    """The nodes of a run from `first` on, before `end`: what vanishes with the detour."""
    nodes = [end]
    while nodes[-1] is not first:
        nodes.append(next(n for n in nodes[-1].all_input_nodes if n in inside))
    return nodes[:0:-1]
