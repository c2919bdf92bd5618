"""Activations: functions of each element alone, so that they may act on a wide tensor as well as on slices of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.names import is_aten
from fxfuse.ops.elementwise import ELEMENTWISE, MODULES, named
from fxfuse.ops.modules import runs


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation by name, and its parameters in order."""

    name: str
    parameters: tuple[Any, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        both = ELEMENTWISE[self.name].inplace or not hasattr(torch, self.name)
        function: Callable[..., Any] = getattr(F if both else torch, self.name)
        return function

    def arguments(self, inplace: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What follows the tensor in a call of `function`; `inplace` is a wish."""
        if self.name == "gelu":
            return (), {"approximate": self.parameters[0]}
        return self.parameters, {"inplace": True} if inplace and ELEMENTWISE[self.name].inplace else {}


def read(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation of its only tensor that `node` calls, in place or not; None for anything else."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    module = modules[str(node.target)] if node.op == "call_module" else None
    name = named(node) if module is None else MODULES.get(runs(module), "")
    entry = ELEMENTWISE.get(name)
    if entry is None or entry.module is None or not entry.plain:
        return None
    if module is not None:
        single = len(node.args) + len(node.kwargs) == 1
        return Activation(name, tuple(getattr(module, p) for p in entry.parameters)) if single else None
    names = [*entry.parameters, *([] if is_aten(node) else ["inplace"])]
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    if len(node.args) - 1 > len(names) or set(given) - set(names):
        return None
    values = tuple(given.get(p, default) for p, default in entry.parameters.items())
    return Activation(name, values) if all(isinstance(v, (int, float, str)) for v in values) else None
