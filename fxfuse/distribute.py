"""batch_norm(cat(f(x), g(y)))  =>  cat(batch_norm_1(f(x)), batch_norm_2(g(y)))      and the same for sums

A batch norm is one factor and one shift a channel: on a concatenation along the channels each part takes the
statistics of its own channels; on a sum every summand takes the factor, and the first alone the shift (the join
itself stays, a difference or `alpha` with it). Where every part comes from a layer that absorbs its batch norm,
none is left. f and g need no input in common, as in the BottleneckCSP of YOLOv5.

The captured graph is changed, before the plan that counts and only for batch norms that a first plan left.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .arguments import Affine
from .constants import Attr
from .pattern import Selection
from .record import Operator
from .refusal import Refusal
from .view import View

STATE = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True, slots=True)
class _Part:
    """What a join reads: its node, its channels within the batch norm, and whether it takes the shift."""

    node: Node
    join: Node
    start: int
    channels: int
    shifted: bool


@dataclass(frozen=True)
class _Split:
    """Finds the parts of the batch norm `norm` and what each of them comes from."""

    view: View
    patterns: Selection
    fused: Set[Node]
    norm: Operator

    def parts(self, join: Node, reader: Node, start: int, shifted: bool) -> list[_Part] | None:
        """What meets in `join`, joins inside it taken apart; None where the batch norm has to stay as it is."""
        affine = self._private(join, reader)
        if affine is None or affine.kind == "unary" or affine.spatial not in (None, self.norm.spatial):
            return None
        apart, found, ends = affine.kind == "concat", list[_Part](), set[int]()
        for source, _ in affine.inputs:
            inner = self.view.affine.get(source)
            if inner is not None and inner.kind != "unary" and source not in self.fused:
                here = self.parts(source, join, start, shifted)
            else:
                size = self._absorbing(source, join)
                here = None if size is None else [_Part(source, join, start, size, shifted)]
            if here is None:
                return None
            found += here
            ends.add(max(p.start + p.channels for p in here))
            if apart:
                start = max(ends)
            shifted &= apart
        if len({p.node for p in found}) < len(found) or (len(ends) > 1 and not apart):
            return None  # one that is read twice, or has one channel for all of the others'
        return found

    def _private(self, node: Node, reader: Node) -> Affine | None:
        return self.view.affine.get(node) if self.view.readers(node) == [reader] else None

    def _absorbing(self, node: Node, reader: Node) -> int | None:
        """Channels of a layer that takes a batch norm after `node`; None where there is no such layer."""
        affine = self._private(node, reader)
        while affine is not None and affine.kind == "unary" and affine.op.kind in ("scale", "identity"):
            reader, node = node, affine.inputs[0][0]
            affine = self._private(node, reader)
        if affine is None:
            return None
        if affine.kind != "unary":  # branches that have become one layer
            return self._channels(node) if node in self.fused else None
        op = affine.op
        count = op.out_channels
        alike = replace(self.norm, in_channels=count, out_channels=count, groups=count)
        if not op.weighted or isinstance(self.patterns.combine("chain", op, alike), Refusal):
            return None
        return op.out_channels

    def _channels(self, node: Node) -> int | None:
        """Channels of what joined branches give, if it has the layout of the batch norm."""
        affine = self.view.affine.get(node)
        if affine is None or affine.kind == "unary":
            return affine.op.out_channels if affine is not None and affine.op.spatial == self.norm.spatial else None
        sizes = [self._channels(source) for source, _ in affine.inputs]
        if affine.kind == "sum":
            return max((s for s in sizes if s is not None), default=None)
        return None if None in sizes or affine.spatial != self.norm.spatial else sum(s for s in sizes if s is not None)


def distribute(view: View, patterns: Selection, fused: Set[Node]) -> bool:
    """Split the batch norms that are not in `fused` over joins of layers; whether there were any to split."""
    found = False
    for node, affine in view.affine.items():
        if affine.op.law != "batch_norm" or node in fused or not _movable(view.calls[node].args):
            continue
        source = affine.inputs[0][0]
        if source in fused:
            continue
        parts = _Split(view, patterns, fused, affine.op).parts(source, node, 0, True)
        if parts and max(p.start + p.channels for p in parts) == affine.op.out_channels:
            _rewrite(view, node, source, parts)
            found = True
    return found


def _movable(args: dict[str, Any]) -> bool:
    return all(isinstance(args[n], Attr) or (args[n] is None and n in STATE[2:]) for n in STATE)


def _rewrite(view: View, node: Node, join: Node, parts: list[_Part]) -> None:
    graph, args = view.captured.graph, view.calls[node].args
    for part in parts:
        with graph.inserting_before(part.join):
            kwargs: dict[str, Any] = {"eps": args["eps"]}
            for name in STATE:
                if args[name] is not None and (part.shifted or name != "bias"):
                    whole = graph.create_node("get_attr", args[name].path)
                    kwargs[name] = graph.call_function(torch.narrow, (whole, 0, part.start, part.channels))
            if not part.shifted:
                kwargs["running_mean"] = graph.call_function(torch.zeros_like, (kwargs["running_mean"],))
            new = graph.call_function(F.batch_norm, (part.node,), kwargs)
        new.meta = dict(node.meta)
        part.join.replace_input_with(part.node, new)
    node.replace_all_uses_with(join)
    graph.erase_node(node)
