"""What a model is called with, part by part: each parameter of its forward and all that is inside of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Part:
    """One value, by the expression for it (`xs[0]`): a parameter of the forward, or an entry of a container.

    `note` is how the conditions of torch.export call it; `key` is where it is in the part `inside`.
    """

    name: str
    note: str
    value: Any
    inside: str = ""
    key: Any = None
    leaf: bool = True


def parts(model: nn.Module, inputs: tuple[Any, ...]) -> list[Part]:
    """All parts of `inputs`, containers before what they hold; the leaves in the order of torch.export.

    Raises:
        TypeError: they do not fit the forward.
    """
    given = inspect.signature(model.forward).bind(*inputs).arguments
    return [p for name, value in given.items() for p in _below(Part(name, f"L['{name}']", value))]


def _below(part: Part) -> Iterator[Part]:
    inner, _ = pytree.tree_flatten_with_path(part.value, is_leaf=lambda v: v is not part.value)
    if len(inner) == 1 and inner[0][1] is part.value:
        yield part
        return
    yield Part(part.name, part.note, part.value, part.inside, part.key, leaf=False)
    for (key,), value in inner:
        yield from _below(Part(f"{part.name}{key}", f"{part.note}{key}", value, part.name, key))
