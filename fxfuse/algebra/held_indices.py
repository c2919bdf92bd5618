"""What constant tensors of indices hold: where that decided a plan, whoever brings new weights compares first."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fxfuse.algebra.constants import Apply, Attr, Values, evaluate, leaves

Held = tuple[int, ...]


def held(const: Attr | Apply, values: Values) -> Held:
    """What a tensor of indices holds."""
    with torch.no_grad():
        return tuple(int(i) for i in evaluate(const, values).tolist())


def changed(known: Mapping[Attr | Apply, Held], values: Values) -> str | None:
    """A tensor that no longer holds what is known of it, by its path; None if there is none."""
    other = (c for c, entries in known.items() if held(c, values) != entries)
    const = next(other, None)
    return None if const is None else ", ".join(a.path for a in leaves(const))
