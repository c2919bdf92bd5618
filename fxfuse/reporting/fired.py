"""What a report counts: one fused layer, and the size of a model before or after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Fired:
    """One fused layer: where it is, which patterns made it, and its shape before and after."""

    path: str
    patterns: tuple[str, ...]
    before: tuple[str, ...]
    after: str
    macs_before: int | None = None
    macs_after: int | None = None

    @property
    def saved(self) -> int:
        """Multiply-accumulates fewer; 0 where shapes are not known."""
        return (self.macs_before or 0) - (self.macs_after or 0)

    @property
    def summary(self) -> str:
        """`2 conv2d, 3 batch_norm, identity`: what went into it."""
        counts = Counter(b.split(" ")[0] for b in self.before)
        return ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())


@dataclass(frozen=True, slots=True)
class Totals:
    """Size of the model at one end of the optimization; MACs need example inputs."""

    nodes: int = 0
    params: int = 0
    macs: int | None = 0
    ops: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Totals) -> Totals:
        """Both together; MACs where both know their own."""
        macs = None if self.macs is None or other.macs is None else self.macs + other.macs
        ops = dict(sorted((Counter(self.ops) + Counter(other.ops)).items()))
        return Totals(self.nodes + other.nodes, self.params + other.params, macs, ops)
