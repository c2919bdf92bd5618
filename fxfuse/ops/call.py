"""One operation by its canonical name, whatever the graph spelled it as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxfuse.refusal import Refusal

# Calls with several results: whoever reads the tensor reads it where one of them is taken out.
SEVERAL = {"chunk", "split", "batch_norm_outputs"}
PIECES = {"chunk", "split", "split_with_sizes"}  # plain names of what cuts a tensor into several


@dataclass(frozen=True, slots=True)
class Call:
    """One operation: canonical name, arguments by name, spatial dims where the name fixes them."""

    op: str
    args: dict[str, Any]
    spatial: int | None = None
    path: str = ""
    inplace: bool = False
    refusal: Refusal | None = None
