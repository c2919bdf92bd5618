"""Example inputs: the arguments of a forward they are, part by part, and a run of a model on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.capture.copying import copied
from fxfuse.capture.failures import said
from fxfuse.capture.shadow import Shadow
from fxfuse.refusal import CaptureError


def as_tuple(model: Any, example_inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as arguments in the order of the forward's parameters, those by keyword alone last.

    A lone tensor is one, a list or tuple is all of them; so is a dict with no other keys than names of parameters.

    Raises:
        ValueError: such a dict leaves out a parameter that has no default.
    """
    if example_inputs is None:
        return None
    if isinstance(example_inputs, dict) and example_inputs and isinstance(model, nn.Module):
        parameters = _parameters(model)
        if parameters.keys() >= example_inputs.keys():
            return _ordered(model, parameters, example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def _ordered(model: nn.Module, parameters: Mapping[str, inspect.Parameter], given: dict[str, Any]) -> tuple[Any, ...]:
    """The values of all parameters up to the last one given; between them, defaults."""
    last = max(i for i, name in enumerate(parameters) if name in given)
    values = {name: given.get(name, p.default) for name, p in list(parameters.items())[: last + 1]}
    required = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if required:
        text = f"example_inputs have no {', '.join(required)}"
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {text}")
    return tuple(values.values())


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the forward by name, without `*args` and `**kwargs`."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {n: p for n, p in inspect.signature(model.forward).parameters.items() if p.kind not in several}


def arguments(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How `inputs`, in the order of the forward's parameters, are given to it: by position, and by keyword."""
    if isinstance(model, torch.jit.ScriptModule):  # which has no signature in Python
        return inputs, {}
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if not names or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return inputs, {}
    first = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    named = dict(zip(names, inputs[first:], strict=False))
    return inputs[: len(inputs) - len(named)], named


def refuse_required(forward: Any) -> None:
    """Raises CaptureError for a parameter that code of a graph, which has no `*`, cannot have."""
    defaults = False
    scripted = isinstance(forward, torch.ScriptMethod)  # which has no signature in Python
    for p in () if scripted else inspect.signature(forward).parameters.values():
        if defaults and p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            text = "without a default behind one with a default, which a graph cannot have"
            raise CaptureError(f"the forward's parameter {p.name} is given by keyword alone, {text}")
        defaults = defaults or p.default is not p.empty


def bound(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The inputs by the parameter of the forward that each of them sets.

    Raises:
        ValueError: they do not fit the forward.
    """
    if isinstance(model, torch.jit.ScriptModule):
        forward: Any = model.forward
        return dict(zip((a.name for a in forward.schema.arguments[1:]), inputs, strict=False))
    args, kwargs = arguments(model, inputs)
    try:
        return inspect.signature(model.forward).bind(*args, **kwargs).arguments
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


def own_tensors(values: Any, made: dict[int, Any] | None = None) -> Any:
    """The same containers anew around copies of the tensors, one for each; `made` takes them by the id of the tensor.

    Tensors are cloned, for deepcopy refuses some: computed ones, and those of a class of their own.
    """
    made = {} if made is None else made

    def own(tensor: Tensor) -> Any:
        return made.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))

    return pytree.tree_map_only(Tensor, own, values)


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of all that is in the inputs."""
    memo: dict[int, Any] = {}
    own_tensors(inputs, memo)
    return copy.deepcopy(inputs, memo)


def run_copy(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Outputs of a copy of `model`, so that nothing it writes reaches the model or the inputs.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that two models that draw at random can be compared
            args, kwargs = arguments(model, _copies(inputs))
            return Shadow(copied(model)).root(*args, **kwargs)  # what hooks hold is no part of a copy
    except Exception as error:  # whatever the user's model raises is reported with its first line
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {said(error)}") from error
