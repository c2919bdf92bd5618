"""Whether a call is one that an exported graph was made for: its conditions as one Python function of the arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.capture.example_inputs import Part, parts

_NAMES = {"torch": torch, "math": math}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class LeftOut:
    """Stands for an argument that is not given and whose default is no plain value."""


class Holds:
    """`holds(*args, **kwargs)` tells whether a graph was made for these arguments of a forward; it never raises.

    It can be copied and pickled as long as the classes and values among the examples can be.

    Attributes:
        conditions: Python expressions in the parameters of the forward; all are true of a call that the graph is for.
        modes: expressions that are no arithmetic on the arguments, such as `torch.is_grad_enabled() == False`, each
            with the line of the model that asked.
    """

    def __init__(
        self, header: str, conditions: Sequence[str], modes: Mapping[str, str], values: Mapping[str, Any]
    ) -> None:
        self.header, self.values = header, dict(values)
        self.conditions, self.modes = tuple(conditions), dict(modes)
        self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> bool:
        try:
            return bool(self._function(*args, **kwargs))
        except Exception:  # arguments of other kinds fail in any way: the graph is not for them
            return False

    def failing(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """The conditions that are not true of a call."""
        for text in (*self.conditions, *self.modes):
            try:
                holds = eval(self._lambda(text), self._names())(*args, **kwargs)
            except Exception:  # as in a call
                holds = False
            if not holds:
                yield text

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    def _lambda(self, text: str) -> CodeType:
        return compile(f"lambda {self.header}: {text}", "the conditions of a graph", "eval")

    def _names(self) -> dict[str, Any]:
        return {**_NAMES, **self.values}

    def _compile(self) -> None:
        every = " and ".join(f"({text})" for text in (*self.conditions, *self.modes)) or "True"
        self._function = eval(self._lambda(every), self._names())


def holds_for(model: nn.Module, inputs: tuple[Any, ...], conditions: Iterable[str], modes: Mapping[str, str]) -> Holds:
    """`conditions` and `modes`, and that the arguments are of the structure, ranks, dtypes and values of `inputs`."""
    given, values, texts = parts(model, inputs), dict[str, Any](), list[str]()

    def constant(value: Any) -> str:
        name = next((n for n, v in values.items() if v is value), f"_fxfuse_{len(values)}")
        values[name] = value
        return name

    for part in given:
        texts += _kind(part, constant)
    header: list[str] = []
    named = {p.name for p in given}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        default = parameter.default
        if name not in named and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            left = default if isinstance(default, _PLAIN) else LeftOut
            texts += [f"{name} is {constant(left)}"] if left is LeftOut else _kind(Part(name, left, True), constant)
            default = left
        elif name not in named:
            texts.append(f"not {name}")
        header.append(_parameter(parameter, default, constant, header))
    tensors = [p.name for p in given if isinstance(p.value, Tensor)]
    texts += [f"{a} is not {b}" for i, a in enumerate(tensors) for b in tensors[:i]]
    return Holds(", ".join(header), [*texts, *conditions], modes, values)


def _kind(part: Part, constant: Callable[[Any], str]) -> list[str]:
    """That a value is of the kind of an example."""
    name, value = part.name, part.value
    if isinstance(value, Tensor):
        kinds = (Tensor, nn.Parameter) if isinstance(value, nn.Parameter) else (Tensor,)
        return [
            f"type({name}) in {constant(kinds)}",
            f"{name}.dim() == {value.dim()}",
            f"{name}.dtype is {constant(value.dtype)}",
            f"{name}.device.type == {value.device.type!r}",
            f"{name}.layout is {constant(value.layout)}",
        ]
    texts = [f"type({name}) is {constant(type(value))}"]
    if part.leaf:
        return [*texts, f"{name} == {constant(value)}"]
    return [*texts, f"list({name}) == {list(value)!r}" if isinstance(value, dict) else f"len({name}) == {len(value)}"]


def _parameter(
    parameter: inspect.Parameter, default: Any, constant: Callable[[Any], str], before: Sequence[str]
) -> str:
    """One parameter as a lambda writes it."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return "*" + parameter.name
    if parameter.kind is parameter.VAR_KEYWORD:
        return "**" + parameter.name
    star = parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in before)
    value = "" if default is parameter.empty else f"={constant(default)}"
    return ("*, " if star else "") + parameter.name + value
