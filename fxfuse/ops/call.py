"""One operation by its canonical name, whatever the graph spelled it as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


# Other names under which PyTorch takes the same arguments.
_ALSO = {"axis": "dim", "keepdims": "keepdim", "mat2": "other"}
_ALSO |= {"tensor": "input", "split_size_or_sections": "split_size"}


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a function or method in order, which become those of one canonical operation."""

    op: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    spatial: int | None = None
    inplace: bool = False

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call; None where arguments are missing, or there are some that the operation does not know."""
        given = {n if n in self.names else _ALSO.get(n, n): v for n, v in kwargs.items()}
        extra = [v for n, v in given.items() if n not in self.names and n != "_stacklevel"]
        if len(args) > len(self.names) or any(v is not None for v in extra):
            return None
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **given}
        if any(n not in bound for n in self.names):
            return None
        return Call(self.op, {n: bound[n] for n in self.names}, self.spatial, inplace=self.inplace)


def signature(op: str, text: str, spatial: int | None = None, inplace: bool = False, **defaults: Any) -> Signature:
    return Signature(op, tuple(text.split()), defaults, spatial, inplace)
