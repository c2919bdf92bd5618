"""Deformable convolution of torchvision: it is linear in its weight, whatever its taps read.

So a factor and shift a channel after it go to the weight's rows and to the bias. Nothing before it can join it.
torchvision is imported only where a model has brought it.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxfuse.names import plain
from fxfuse.ops.call import Call, signature

_HOME = "torchvision.ops.deform_conv"
_FUNCTION = signature("deform", "input offset weight bias=None stride=1 padding=0 dilation=1 mask=None", 2)
_LAYER = signature("deform", "input offset mask=None", 2)


def is_deformable(module: nn.Module) -> bool:
    """Whether a module is torchvision's layer, and no subclass of it, with the forward that torchvision gave it."""
    cls = type(module)
    named = (cls.__module__, cls.__qualname__) == (_HOME, "DeformConv2d")
    return named and (cls.forward.__module__, cls.forward.__qualname__) == (_HOME, "DeformConv2d.forward")


def read(node: Node) -> Call | None:
    """The call behind torchvision's function, or behind the operator that torch.compile and torch.export make of it."""
    if plain(node.target) != "deform_conv2d":
        return None
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):  # its last arguments: groups, offset groups, masked
        if len(node.args) != 14 or node.kwargs:
            return None
        x, weight, offset, mask, bias = node.args[:5]
        args = {"input": x, "offset": offset, "weight": weight, "bias": None if _zeros(bias) else bias}
        pairs = {n: node.args[at : at + 2] for n, at in (("stride", 5), ("padding", 7), ("dilation", 9))}
        return Call("deform", args | pairs | {"mask": mask if node.args[13] is True else None}, 2)
    return _FUNCTION.bind(node.args, node.kwargs) if getattr(node.target, "__module__", "") == _HOME else None


def _zeros(bias: Any) -> bool:
    """Whether it is what torchvision puts in place of a bias that there is not."""
    return isinstance(bias, Node) and plain(bias.target) in ("zeros", "new_zeros") and len(bias.users) == 1


def read_module(node: Node, module: Any, path: str, state: dict[str, Any]) -> Call | None:
    """The call of torchvision's layer; `state` are its weight and bias."""
    call = _LAYER.bind(node.args, node.kwargs)
    fields = {n: getattr(module, n) for n in ("stride", "padding", "dilation")}
    return None if call is None else replace(call, args=call.args | fields | state, path=path)


def torchvision_ops() -> Any:
    """The module of torchvision that has the layer and the function."""
    return importlib.import_module(_HOME)
