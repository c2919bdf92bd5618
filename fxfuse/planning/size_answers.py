"""Who asks for the size of a value that a fusion removes, and what can be asked instead.

`b, c, h, w = bn(x).shape` can be read off x, and the size of a convolution whose batch norm joins it off the
fused layer. Where neither the input nor the output of the new layer has the same size, the value has to stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from fxfuse.planning.regions import Join, Step, exit_of, part_nodes

Sized = Mapping[Node, Sequence[Node]]


def answers(parts: Sequence[Step | Join], sized: Sized) -> dict[Node, bool] | None:
    """For each removed node whose size is asked: whether the input (True) or the output of `parts` has it.

    None where one of them has a size of its own.
    """
    gone = {n for p in parts for n in part_nodes(p)}
    end = exit_of(parts)
    asked = {n for n in gone if n in sized and n is not end and not gone.issuperset(sized[n])}
    keeps = [isinstance(p, Step) and p.op.keeps_size for p in parts]
    found: dict[Node, bool] = {}
    for number, part in enumerate(parts):
        here = asked.intersection(part_nodes(part))
        if isinstance(part, Step) and part.moved:
            asked -= here  # who reads it will read what it stood on, of the same size
        elif here and isinstance(part, Step) and here == {part.node}:
            if all(keeps[: number + 1]):
                found[here.pop()] = True
            elif all(keeps[number + 1 :]):
                found[here.pop()] = False
    return found if asked == found.keys() else None
