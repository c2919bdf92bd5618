"""How the weights of fused layers are computed: what is kept of a plan, for new weights without a new plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.algebra.held_indices import Held
from fxfuse.algebra.operator import Operator


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one fused layer is computed: the submodule it lives in and its operator."""

    target: str
    op: Operator


@dataclass(frozen=True)
class Replay:
    """How the fused layers of one part of a model are computed, and the tensors that only its trace knew.

    `held` are tensors of indices that decided the plan, with what they held.
    """

    path: str
    recipes: tuple[Recipe, ...]
    constants: dict[str, Any]
    held: dict[Attr | Apply, Held] = field(default_factory=dict)
