"""One model of the list: how it is built, what it is called with, and when it counts as whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """A model.

    Attributes:
        build: gives the model with whatever weights its authors start with; imports its library itself.
        inputs: the arguments of call 0 and of call 1, of another batch, and of another size where the model takes one.
        needs: its environment (environments.py).
        convs: how many convolutions it executes when all is merged; None where that is not known.
        norms: how many batch norms it executes then; None asks only that none is behind a layer.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    needs: str = ""
    convs: int | None = None
    norms: int | None = None


def images(*shapes: tuple[int, ...]) -> Inputs:
    """One image batch a call; without shapes an even and an odd size."""
    taken = shapes or ((2, 3, 24, 32), (1, 3, 33, 21))

    def make(number: int) -> tuple[Any, ...]:
        return (torch.randn(taken[number], generator=torch.Generator().manual_seed(number)),)

    return make
