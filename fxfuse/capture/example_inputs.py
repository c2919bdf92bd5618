"""Example inputs: the arguments of a forward they are, part by part, and a run of a model on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxfuse.capture.copying import copied
from fxfuse.capture.failures import said


def as_tuple(example_inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as positional arguments: a lone tensor is one, a list or tuple is all of them."""
    if example_inputs is None:
        return None
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def bound(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The inputs by the parameter of the forward that each of them sets.

    Raises:
        ValueError: they do not fit the forward.
    """
    try:
        return inspect.signature(model.forward).bind(*inputs).arguments
    except TypeError as error:
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {error}") from error


@dataclass(frozen=True, slots=True)
class Part:
    """One value, by the expression for it (`xs[0]`): a parameter of the forward, or an entry of a container."""

    name: str
    value: Any
    leaf: bool


def parts(model: nn.Module, inputs: tuple[Any, ...]) -> list[Part]:
    """All parts of `inputs`, containers before what they hold; the leaves in the order of torch.export.

    Raises:
        ValueError: they do not fit the forward.
    """
    return [part for name, value in bound(model, inputs).items() for part in _parts(name, value)]


def _parts(name: str, value: Any) -> Iterator[Part]:
    inner, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)
    leaf = len(inner) == 1 and inner[0][1] is value
    yield Part(name, value, leaf)
    for (key,), entry in () if leaf else inner:
        yield from _parts(f"{name}{key}", entry)


def run_copy(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Outputs of a copy of `model`, so that nothing it writes reaches the model or the inputs.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that two models that draw at random can be compared
            return copied(model)(*copy.deepcopy(inputs))
    except Exception as error:  # whatever the user's model raises is reported with its first line
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {said(error)}") from error
