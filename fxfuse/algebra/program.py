"""Writes in place to a tensor that a forward makes for itself, as one pure function of what is written.

`w = torch.zeros(8, 8); w[i, i] = k[i]` is the program with the one step `setitem`, on what `torch.zeros` gives and on
`k[i]`. Run on a copy it is a function like any other, and nothing is shared between two calls of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fxfuse.algebra.constants import call, thaw


@dataclass(frozen=True, slots=True)
class Step:
    """One call; a `Place` among its frozen arguments is an argument of the program, or behind those an earlier step."""

    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """The tensor that steps make of a copy of the first argument; the others are only read."""

    steps: tuple[Step, ...]

    def run(self, *args: Any) -> list[Any]:
        """The copy, the other arguments, and the result of each step."""
        values = [args[0].clone(), *args[1:]]
        for step in self.steps:

            def known(place: Any) -> Any:
                return values[place.number]

            kwargs = {name: thaw(value, known) for name, value in step.kwargs}
            values.append(call(step.function, [thaw(a, known) for a in step.args], kwargs))
        return values

    def __call__(self, *args: Any) -> Tensor:
        written: Tensor = self.run(*args)[0]
        return written
