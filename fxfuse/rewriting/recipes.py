"""How the weights of fused layers are computed: what is kept of a plan, for new weights without a new plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fxfuse.algebra.constants import Apply, Attr, Held
from fxfuse.algebra.operator import Operator


@dataclass(frozen=True)
class Replay:
    """How the fused layers of one part of a model are computed, and the tensors that only its trace knew.

    `operators` are those of the layers by the path of each; `held` are tensors of indices that decided the plan, with
    what they held.
    """

    path: str
    operators: dict[str, Operator]
    constants: dict[str, Any]
    held: dict[Attr | Apply, Held] = field(default_factory=dict)
