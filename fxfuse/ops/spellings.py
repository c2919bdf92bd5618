"""Every way PyTorch spells an operation, read into one canonical `Call`.

`nn.Conv2d(...)(x)`, `F.conv2d(x, w)`, `torch.conv2d(x, w)` and `aten.conv2d(x, w)` are the same call
"conv" with the same argument names; `x + y`, `x.add(y)`, `torch.add(x, y)` and `x += y` are "add".
What a module call does beyond its forward (hooks, another forward) makes it no call at all but a refusal.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.framed import FRAMED
from fxfuse.names import below, is_aten
from fxfuse.ops import aten, deformable
from fxfuse.ops.call import FUNCTIONS, METHODS, Call
from fxfuse.ops.modules import CONVS, DROPOUTS, NORMS, PADS, POOLS, TYPES, changed, layer_type
from fxfuse.refusal import Refusal


def read(node: Node, modules: Mapping[str, nn.Module], attr: Any) -> Call | None:
    """The canonical call behind `node`, or None for what fxfuse has no name for.

    `attr(path)` gives the constant for a module's parameter or buffer.
    """
    if is_aten(node):
        return aten.read(node, modules)
    if node.op == "call_function":
        if node.target is operator.getitem and (output := aten.read_output(node, modules)) is not None:
            return output
        signature = FUNCTIONS.get(node.target)
        return signature.bind(node.args, node.kwargs) if signature else deformable.read(node)
    if node.op == "call_method":
        method = METHODS.get(str(node.target))
        return method.bind(node.args, node.kwargs) if method else None
    if node.op == "call_module":
        return _module_call(node, modules[str(node.target)], str(node.target), attr)
    return None


def _module_call(node: Node, m: nn.Module, path: str, attr: Any) -> Call | None:
    cls = layer_type(m)
    if cls is None:
        if isinstance(m, TYPES):
            name = next(t.__name__ for t in TYPES if isinstance(m, t))
            reason = f"a subclass or parametrization of nn.{name} computes its own weight or forward"
            return Call("refused", {}, path=path, refusal=Refusal(reason, path, "bake it into a plain module first"))
        return None
    values = [*node.args, *node.kwargs.values()]
    if why := changed(m, cls):
        return Call("refused", {}, path=path, refusal=Refusal(why, path, "remove them before optimizing"))
    if cls not in TYPES:
        state = {n: _state(m, n, path, attr) for n in ("weight", "bias")}
        return deformable.read_module(node, m, path, state)
    if not values or len(values) > 1:
        return None
    args: dict[str, Any] = {"input": values[0]}
    if cls in CONVS:
        assert isinstance(m, nn.modules.conv._ConvNd)
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
        args |= {n: getattr(m, n) for n in names}
        args |= {n: _state(m, n, path, attr) for n in ("weight", "bias")}
        if isinstance(m, tuple(FRAMED.values())):
            args |= {"frame": _state(m, "frame", path, attr), "sides": m.sides}
        return Call("conv_transpose" if m.transposed else "conv", args, CONVS[cls], path)
    if cls is nn.Linear:
        return Call("linear", args | {n: _state(m, n, path, attr) for n in ("weight", "bias")}, 0, path)
    if cls in NORMS:
        assert isinstance(m, nn.modules.batchnorm._BatchNorm)
        args |= {n: _state(m, n, path, attr) for n in ("running_mean", "running_var", "weight", "bias")}
        return Call("batch_norm", args | {"training": m.training, "eps": m.eps}, NORMS[cls], path)
    if cls in POOLS:
        fields = "kernel_size stride padding ceil_mode count_include_pad divisor_override".split()
        return Call("avg_pool", args | {n: getattr(m, n) for n in fields if hasattr(m, n)}, POOLS[cls], path)
    if cls in DROPOUTS:
        return Call("dropout", args | {"training": m.training}, path=path)
    if cls in PADS:
        return Call("pad", args | {"pad": m.padding, "mode": PADS[cls], "value": getattr(m, "value", 0)}, path=path)
    if cls is nn.ChannelShuffle:
        return Call("channel_shuffle", args | {"groups": m.groups}, path=path)
    return Call("identity", args, path=path)


def _state(m: nn.Module, name: str, path: str, attr: Any) -> Attr | None:
    return None if getattr(m, name) is None else attr(below(path, name))
