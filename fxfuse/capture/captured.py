"""What every way of capture gives: one graph, the module it reads its state from, and what is known of its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.attributes import attribute

KNOWN = "fxfuse_known"  # in the meta of a node: its sizes, None where they vary, and its dtype, for every input


class Shapes(dict[Node, torch.Size]):
    """Shape of every tensor by the node that gives it, and its dtype, as example inputs have them."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[Node, torch.dtype] = {}


@dataclass(frozen=True)
class Captured:
    """One graph, the module it reads its state from, and tensors that only the trace knows.

    `general` tells that the graph holds for every batch and size the model takes.
    `held` are constants whose values the graph was changed by, with these: it holds for no others.
    `whole` are the submodules that stay one call each, by path, with what kept them from being traced.
    `free` are parameters of the forward that may have any value or be left out: the graph is the same for all.
    `shapes` are those of the example inputs; empty without them.
    """

    graph: Graph
    root: nn.Module
    constants: dict[str, Tensor] = field(default_factory=dict)
    how: str = "symbolic"
    general: bool = True
    whole: Mapping[str, str] = field(default_factory=dict)
    held: dict[Attr | Apply, tuple[int, ...]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    shapes: Shapes = field(default_factory=Shapes)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the root by each of its paths."""
        return dict(self.root.named_modules(remove_duplicate=False))

    def requires_grad(self, attr: Attr) -> bool:
        """Whether a tensor of the root is trained; one that only the trace knows is not."""
        return attr.path not in self.constants and bool(attribute(self.root, attr.path).requires_grad)
