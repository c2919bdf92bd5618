"""Why a permutation of channels stayed: what stands on either side of it."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Node

from fxfuse.cost import CostFunction
from fxfuse.names import place
from fxfuse.pattern import Selection
from fxfuse.reading.movable.index_tensors import indexed
from fxfuse.reading.movable.permutation import permutation_of
from fxfuse.reading.view import View
from fxfuse.rearranging.permutation_routes import Route, Routes
from fxfuse.refusal import Refusal


def permutations_left(view: View, patterns: Selection, price: CostFunction, fused: Set[Node]) -> list[Refusal]:
    """A refusal for each permutation in the view that is not `fused`."""
    routes, notes = Routes(view, patterns, price), list[Refusal]()
    single = [permutation_of(n, a) for n, a in view.affine.items() if n not in fused]
    by_tensor = [i.permutation for i in indexed(view) if i.permutation.whole]
    for permutation in (*filter(None, single), *by_tensor, *(s.permutation for s in view.movable.shuffles)):
        found, where = routes.find(permutation), place(permutation.last)
        if isinstance(found, Route):
            reason = "a permutation of channels stays: what it reads is written in place before a layer could take it"
            notes.append(Refusal(reason, where, "use the out-of-place form"))
            continue
        before, after = found
        reason = "a permutation of channels stays: no layer before it or after it can take it into its weight"
        remedy = "a layer with groups=1 takes it, past activations and depthwise layers that nothing else reads"
        notes.append(Refusal(reason, where, remedy, f"before it {before.reason}; after it {after.reason}"))
    return notes
