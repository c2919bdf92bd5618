"""Activations: functions of each element alone, so that they may act on a wide tensor as well as on slices of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.names import is_aten, plain
from fxfuse.ops.modules import runs
from fxfuse.ops.spellings import elementwise

# name: (function, parameters and their defaults, class of torch.nn)
_TABLE: dict[str, tuple[Callable[..., Any], dict[str, Any], type[nn.Module]]] = {
    "relu": (F.relu, {}, nn.ReLU),
    "relu6": (F.relu6, {}, nn.ReLU6),
    "silu": (F.silu, {}, nn.SiLU),
    "mish": (F.mish, {}, nn.Mish),
    "selu": (F.selu, {}, nn.SELU),
    "hardswish": (F.hardswish, {}, nn.Hardswish),
    "hardsigmoid": (F.hardsigmoid, {}, nn.Hardsigmoid),
    "elu": (F.elu, {"alpha": 1.0}, nn.ELU),
    "celu": (F.celu, {"alpha": 1.0}, nn.CELU),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.01}, nn.LeakyReLU),
    "hardtanh": (F.hardtanh, {"min_val": -1.0, "max_val": 1.0}, nn.Hardtanh),
    "gelu": (F.gelu, {"approximate": "none"}, nn.GELU),
    "sigmoid": (torch.sigmoid, {}, nn.Sigmoid),
    "tanh": (torch.tanh, {}, nn.Tanh),
}
_ONLY_NEW = {"gelu", "sigmoid", "tanh"}  # without an `inplace` argument
_CLASSES: dict[Any, str] = {cls: name for name, (_, _, cls) in _TABLE.items()}


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation by name, and its parameters in order."""

    name: str
    parameters: tuple[Any, ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        return _TABLE[self.name][0]

    def arguments(self, inplace: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What follows the tensor in a call of `function`; `inplace` is a wish."""
        if self.name == "gelu":
            return (), {"approximate": self.parameters[0]}
        return self.parameters, {"inplace": True} if inplace and self.name not in _ONLY_NEW else {}


def read(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation of its only tensor that `node` calls, in place or not; None for anything else."""
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        name = _CLASSES.get(runs(module), "")
        if not name or len(node.args) + len(node.kwargs) > 1:
            return None
        return Activation(name, tuple(getattr(module, p) for p in _TABLE[name][1]))
    name = plain(node.target).rstrip("_")
    if name not in _TABLE or not elementwise(node):
        return None
    names = [*_TABLE[name][1], *([] if is_aten(node) else ["inplace"])]
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    if len(node.args) - 1 > len(names) or set(given) - set(names):
        return None
    values = tuple(given.get(p, default) for p, default in _TABLE[name][1].items())
    return Activation(name, values) if all(isinstance(v, (int, float, str)) for v in values) else None
