"""Every way PyTorch spells an operation, read into one canonical `Call`.

`nn.Conv2d(...)(x)`, `F.conv2d(x, w)`, `torch.conv2d(x, w)` and `aten.conv2d(x, w)` are the same call
"conv" with the same argument names; `x + y`, `x.add(y)`, `torch.add(x, y)` and `x += y` are "add".
What a module call does beyond its forward (hooks, another forward) makes it no call at all but a refusal.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.algebra.constants import Attr
from fxfuse.framed import FRAMED
from fxfuse.names import below, is_aten
from fxfuse.ops import aten, deformable
from fxfuse.ops.call import Call, Signature
from fxfuse.ops.call import signature as _sig
from fxfuse.ops.modules import CONVS, DROPOUTS, NORMS, PADS, POOLS, TYPES, changed, layer_type
from fxfuse.refusal import Refusal

_CONV = "input weight bias stride padding dilation groups"
_CONV_T = "input weight bias stride padding output_padding groups dilation"
_conv: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_POOL = "input kernel_size stride padding ceil_mode count_include_pad"
_pool: dict[str, Any] = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}

FUNCTIONS: dict[Any, Signature] = {
    F.batch_norm: _sig(
        "batch_norm",
        "input running_mean running_var weight bias training momentum eps",
        weight=None, bias=None, training=False, momentum=0.1, eps=1e-5,
    ),
    F.linear: _sig("linear", "input weight bias", 0, bias=None),
    F.avg_pool1d: _sig("avg_pool", _POOL, 1, **_pool),
    F.avg_pool2d: _sig("avg_pool", _POOL + " divisor_override", 2, **_pool, divisor_override=None),
    F.avg_pool3d: _sig("avg_pool", _POOL + " divisor_override", 3, **_pool, divisor_override=None),
    F.pad: _sig("pad", "input pad mode value", mode="constant", value=None),
    F.dropout: _sig("dropout", "input p training inplace", p=0.5, training=True, inplace=False),
    torch.mm: _sig("mm", "input other"),
    operator.neg: _sig("neg", "input"),
    operator.getitem: _sig("getitem", "input index"),
    operator.setitem: _sig("setitem", "input index value", inplace=True),
    torch.chunk: _sig("chunk", "input chunks dim", dim=0),
    torch.split: _sig("split", "input split_size dim", dim=0),
    torch.narrow: _sig("narrow", "input dim start length"),
    torch.flip: _sig("flip", "input dims"),
    torch.index_select: _sig("index_select", "input dim index"),
    torch.cat: _sig("cat", "tensors dim", dim=0),
    torch.channel_shuffle: _sig("channel_shuffle", "input groups"),
    torch.flatten: _sig("flatten", "input start_dim end_dim", start_dim=0, end_dim=-1),
}  # fmt: skip
for _d in (1, 2, 3):
    FUNCTIONS[getattr(F, f"conv{_d}d")] = _sig("conv", _CONV, _d, **_conv)
    FUNCTIONS[getattr(F, f"conv_transpose{_d}d")] = _sig("conv_transpose", _CONV_T, _d, **_conv, output_padding=0)
    FUNCTIONS[getattr(F, f"dropout{_d}d")] = FUNCTIONS[F.dropout]
FUNCTIONS[torch.concat] = FUNCTIONS[torch.concatenate] = FUNCTIONS[torch.cat]
FUNCTIONS[torch.matmul] = FUNCTIONS[operator.matmul] = FUNCTIONS[torch.mm]
FUNCTIONS[torch._C._nn.pad] = FUNCTIONS[F.pad]  # what torch.compile makes of it
FUNCTIONS[F.channel_shuffle] = FUNCTIONS[F.native_channel_shuffle] = FUNCTIONS[torch.channel_shuffle]
FUNCTIONS[torch.neg] = FUNCTIONS[torch.negative] = FUNCTIONS[operator.neg]
FUNCTIONS[torch.batch_norm] = _sig(
    "batch_norm", "input weight bias running_mean running_var training momentum eps cudnn_enabled"
)

METHODS: dict[str, Signature] = {
    n: FUNCTIONS[getattr(torch, n)]
    for n in ("chunk", "split", "narrow", "flip", "index_select", "neg", "negative", "flatten", "mm", "matmul")
}
for _op, _alias in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("div", "truediv")):
    _alpha: dict[str, Any] = {"alpha": 1} if _op in ("add", "sub") else {"rounding_mode": None} if _op == "div" else {}
    _names = " ".join(("input", "other", *_alpha))
    _plain, _writes = _sig(_op, _names, **_alpha), _sig(_op, _names, inplace=True, **_alpha)
    FUNCTIONS[getattr(operator, _alias)] = FUNCTIONS[getattr(torch, _op)] = METHODS[_op] = _plain
    FUNCTIONS[getattr(operator, "i" + _alias)] = METHODS[_op + "_"] = _writes
for _long, _short in (("multiply", "mul"), ("subtract", "sub"), ("divide", "div"), ("true_divide", "div")):
    FUNCTIONS[getattr(torch, _long)] = METHODS[_long] = METHODS[_short]
    METHODS[_long + "_"] = METHODS[_short + "_"]


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
        fields = [*_POOL.split()[1:], *(["divisor_override"] if cls is not nn.AvgPool1d else [])]
        return Call("avg_pool", args | {n: getattr(m, n) for n in fields}, POOLS[cls], path)
    if cls in DROPOUTS:
        return Call("dropout", args | {"training": m.training}, path=path)
    if cls in PADS:
        return Call("pad", args | {"pad": m.padding, "mode": PADS[cls], "value": getattr(m, "value", 0)}, path=path)
    if cls is nn.ChannelShuffle:
        return Call("channel_shuffle", args | {"groups": m.groups}, path=path)
    return Call("identity", args, path=path)


def _state(m: nn.Module, name: str, path: str, attr: Any) -> Attr | None:
    return None if getattr(m, name) is None else attr(below(path, name))
