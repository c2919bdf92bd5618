"""Functions of each element alone, in one table: what keeps shape, layout and dtype, and gives a tensor of its own.

Each is known as function, method, ATen operator and module, and by its name with an underscore where it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    parameters: Mapping[str, Any] = field(default_factory=dict)
    module: type[nn.Module] | None = None
    inplace: bool = False
    plain: bool = True


def _activation(module: type[nn.Module], inplace: bool = False, plain: bool = True, **parameters: Any) -> Elementwise:
    return Elementwise(parameters, module, inplace, plain)


ELEMENTWISE: dict[str, Elementwise] = {
    "relu": _activation(nn.ReLU, True),
    "relu6": _activation(nn.ReLU6, True),
    "silu": _activation(nn.SiLU, True),
    "mish": _activation(nn.Mish, True),
    "selu": _activation(nn.SELU, True),
    "hardswish": _activation(nn.Hardswish, True),
    "hardsigmoid": _activation(nn.Hardsigmoid, True),
    "elu": _activation(nn.ELU, True, alpha=1.0),
    "celu": _activation(nn.CELU, True, alpha=1.0),
    "leaky_relu": _activation(nn.LeakyReLU, True, negative_slope=0.01),
    "hardtanh": _activation(nn.Hardtanh, True, min_val=-1.0, max_val=1.0),
    "threshold": _activation(nn.Threshold, True, threshold=None, value=None),
    "gelu": _activation(nn.GELU, approximate="none"),
    "sigmoid": _activation(nn.Sigmoid),
    "tanh": _activation(nn.Tanh),
    "softplus": _activation(nn.Softplus, beta=1, threshold=20),
    "softsign": _activation(nn.Softsign),
    "tanhshrink": _activation(nn.Tanhshrink),
    "softshrink": _activation(nn.Softshrink, lambd=0.5),
    "hardshrink": _activation(nn.Hardshrink, lambd=0.5),
    "logsigmoid": _activation(nn.LogSigmoid, plain=False),
    "prelu": _activation(nn.PReLU, plain=False),
    "rrelu": _activation(nn.RReLU, True, plain=False),
}
ELEMENTWISE |= {
    name: Elementwise()
    for name in "exp expm1 log log1p sqrt rsqrt square reciprocal abs sign erf cos sin round floor ceil trunc".split()
}
ELEMENTWISE |= {name: Elementwise({"min": None, "max": None}) for name in ("clamp", "clip")}
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
