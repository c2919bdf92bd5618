"""What others do with the values of nodes that are to run as one: they write them in place, or ask for a size.

`b, c, h, w = bn(x).shape` can be read off x, and the size of a convolution whose batch norm joins it off the
fused layer. Where neither the input nor the output of the new layer has the same size, the value has to stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from fxfuse.names import place
from fxfuse.planning.regions import Chain, Join, Part, Step, exit_of, nodes_of, steps_of
from fxfuse.reading.view import View
from fxfuse.refusal import Refusal


def answers(parts: Sequence[Part], sized: Mapping[Node, Sequence[Node]]) -> dict[Node, bool] | None:
    """For each removed node whose size is asked: whether the input (True) or the output of `parts` has it.

    None where one of them has a size of its own.
    """
    if not sized:
        return {}
    part_of = {n: i for i, p in enumerate(parts) for n in nodes_of(p)}
    end, found = exit_of(parts), dict[Node, bool]()
    keeps = [isinstance(p, Step) and p.op.keeps_size for p in parts]
    for node, number in part_of.items():
        part = parts[number]
        moved = isinstance(part, Step) and part.moved  # who reads it will read what it stood on, of the same size
        if moved or node not in sized or node is end or part_of.keys() >= {*sized[node]}:
            continue
        before, after = all(keeps[: number + 1]), all(keeps[number + 1 :])
        if node is not part.node or not (before or after) or isinstance(part, Join):
            return None
        found[node] = before
    return found


def overwritten(view: View, source: Node, nodes: Sequence[Node], foreign: Iterable[Node] = ()) -> Refusal | None:
    """Why `nodes`, of which the first read `source`, can't run at one place, if somebody else writes it between them.

    What they write themselves is no hindrance, except for what `foreign` ones write.
    """
    effects = view.effects
    own = {*nodes, *(w for n in nodes if n in view.affine for w in view.affine[n].extra)} - {*foreign}
    at = [effects.position[n] for n in nodes]
    writer = effects.written_between(source, min(at), max(at), own)
    reason = "what its first layer reads is overwritten in place before the last layer of the site has run"
    return None if writer is None else _written(reason, writer, nodes[-1])


def chain_overwritten(view: View, chain: Chain) -> Refusal | None:
    """What is written in place between the layers of a chain, or of a join in it."""
    if not view.effects.writes:
        return None
    nodes, last = list(nodes_of(*chain.parts)), chain.parts[-1]
    if isinstance(last, Step) and last.op.kind == "select" and (writer := view.effects.writes_itself(nodes[-1])):
        # whether PyTorch takes a write over memory that overlaps depends on the strides, and these would change
        reason = "its slice is written in place by an operation that also reads the same memory by another name"
        return _written(reason, writer, nodes[-1])
    refusal = overwritten(view, chain.source, nodes)
    for join in (p for p in chain.parts if isinstance(p, Join)):  # where one branch may stay, and another move
        steps = [s.node for s in steps_of(join) if s.node is not None]
        refusal = refusal or overwritten(view, join.branches[0].source, nodes, foreign=steps)
    return refusal


def _written(reason: str, writer: Node, where: Node) -> Refusal:
    return Refusal(reason, place(where), "use the out-of-place form", f"written by {writer.name}")
