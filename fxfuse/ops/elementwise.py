"""Functions of each element alone, in one table: what keeps shape, layout and dtype, and gives a tensor of its own.

Each is known as function, method, ATen operator and module, and by its name with an underscore where it writes.
Those that are activations may act on a wide tensor as well as on slices of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.names import is_aten, plain
from fxfuse.ops.modules import runs


@dataclass(frozen=True, slots=True)
class Elementwise:
    """One such function: the numbers that follow the tensor with their defaults, and the class of torch.nn.

    `inplace` tells that the function of that name takes `inplace=True`; `plain` that nothing but those numbers
    counts (`prelu` has a weight, `rrelu` draws numbers) and that the order in memory is kept (`logsigmoid` does not).
    """

    module: type[nn.Module] | None = None
    inplace: bool = False
    plain: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)


# Most go by the name of their class.
_INPLACE = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Hardswish, nn.Hardsigmoid)
ELEMENTWISE: dict[str, Elementwise] = {
    **{module.__name__.lower(): Elementwise(module, True) for module in _INPLACE},
    **{module.__name__.lower(): Elementwise(module) for module in (nn.Sigmoid, nn.Tanh, nn.Softsign, nn.Tanhshrink)},
    **{module.__name__.lower(): Elementwise(module, plain=False) for module in (nn.LogSigmoid, nn.PReLU)},
    "rrelu": Elementwise(nn.RReLU, True, plain=False),
    "elu": Elementwise(nn.ELU, True, parameters={"alpha": 1.0}),
    "celu": Elementwise(nn.CELU, True, parameters={"alpha": 1.0}),
    "leaky_relu": Elementwise(nn.LeakyReLU, True, parameters={"negative_slope": 0.01}),
    "hardtanh": Elementwise(nn.Hardtanh, True, parameters={"min_val": -1.0, "max_val": 1.0}),
    "threshold": Elementwise(nn.Threshold, True, parameters={"threshold": None, "value": None}),
    "gelu": Elementwise(nn.GELU, parameters={"approximate": "none"}),
    "softplus": Elementwise(nn.Softplus, parameters={"beta": 1, "threshold": 20}),
    "softshrink": Elementwise(nn.Softshrink, parameters={"lambd": 0.5}),
    "hardshrink": Elementwise(nn.Hardshrink, parameters={"lambd": 0.5}),
    **dict.fromkeys(("clamp", "clip"), Elementwise(parameters={"min": None, "max": None})),
}
_BARE = "exp expm1 log log1p sqrt rsqrt square reciprocal abs sign erf cos sin round floor ceil trunc"
ELEMENTWISE |= dict.fromkeys(_BARE.split(), Elementwise())
NAMES = {*ELEMENTWISE, *(n + "_" for n in ELEMENTWISE)}
MODULES: dict[Any, str] = {e.module: name for name, e in ELEMENTWISE.items() if e.module is not None}
# Methods that keep the shape as these do, but may return the tensor itself or change its dtype or layout.
CASTS = {"float": torch.float32, "half": torch.float16, "double": torch.float64, "bfloat16": torch.bfloat16}
_KEEP = {*CASTS, "type_as", "contiguous", "clone", "detach"}
# By the function itself, for `F.threshold.__name__` is "_threshold".
_FUNCTIONS = {getattr(space, n): n.removesuffix("_") for space in (F, torch) for n in NAMES if hasattr(space, n)}


def named(node: Node) -> str:
    """The name, in the table, of the function, method or ATen operator that a node calls; "" for any other."""
    if node.op == "call_method" or is_aten(node):
        name = plain(node.target)
        return "logsigmoid" if name == "log_sigmoid" else name.removesuffix("_") if name in NAMES else ""
    return _FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""


def elementwise(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node acts on each element of its first argument alone, so that the shape stays."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return runs(modules[str(node.target)]) in MODULES
    method = plain(node.target) if node.op == "call_method" or is_aten(node) else ""
    return method == "type_as" or ((bool(named(node)) or method in _KEEP) and node.all_input_nodes == [node.args[0]])


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


def read_activation(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
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
