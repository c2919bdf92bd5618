"""Operations that move, average or normalize values without a weight that could absorb anything.

They are read into the same `Call` as the layers are, one name for the function, the method and the
module (`torch.flatten(x, 1)`, `x.flatten(1)`, `nn.Flatten()`), for `ranks` and `dims` to reason about.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import OpOverload
from torch.fx import Node

from fxfuse.names import is_aten, plain
from fxfuse.ops.call import Call
from fxfuse.ops.modules import runs
from fxfuse.ops.schema import bound
from fxfuse.ops.spellings import ELEMENTWISE_MODULES
from fxfuse.ops.spellings import elementwise as elementwise_call

RESHAPES = {"reshape", "like", "flatten", "unflatten", "squeeze", "unsqueeze"}  # the same values in another shape
# name: (canonical operation, names of its arguments, defaults)
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flatten": ("flatten", "input start_dim end_dim", {"start_dim": 0, "end_dim": -1}),
    "ravel": ("flatten", "input", {"start_dim": 0, "end_dim": -1}),
    "unflatten": ("unflatten", "input dim sizes", {}),
    "reshape_as": ("like", "input other", {}),
    "view_as": ("like", "input other", {}),
    "expand_as": ("expand_like", "input other", {}),
    "transpose": ("transpose", "input dim0 dim1", {}),
    "swapaxes": ("transpose", "input dim0 dim1", {}),
    "swapdims": ("transpose", "input dim0 dim1", {}),
    "unsqueeze": ("unsqueeze", "input dim", {}),
    "squeeze": ("squeeze", "input dim", {"dim": None}),
    "softmax": ("same", "input dim dtype", {"dtype": None}),
    "log_softmax": ("same", "input dim dtype", {"dtype": None}),
    "cumsum": ("same", "input dim dtype", {"dtype": None}),
    "roll": ("same", "input shifts dims", {"dims": None}),
    "normalize": ("same", "input p dim eps", {"p": 2.0, "dim": 1, "eps": 1e-12}),
    "layer_norm": (
        "layer_norm", "input normalized_shape weight bias eps", {"weight": None, "bias": None, "eps": 1e-5}
    ),
    "group_norm": ("same", "input num_groups weight bias eps", {"weight": None, "bias": None, "eps": 1e-5}),
    "interpolate": (
        "interpolate", "input size scale_factor mode align_corners recompute_scale_factor antialias",
        {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None,
         "recompute_scale_factor": None, "antialias": False},
    ),
    "matmul": ("matmul", "input other", {}),
    "bmm": ("bmm", "input other", {}),
    "where": ("where", "condition input other", {}),
    "stack": ("stack", "tensors dim", {"dim": 0}),
    "unbind": ("unbind", "input dim", {"dim": 0}),
    "select": ("select", "input dim index", {}),
    "scaled_dot_product_attention": (
        "attention", "input key value attn_mask dropout_p is_causal scale enable_gqa",
        {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False},
    ),
    "embedding": ("embedding", "index weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
                  {"padding_idx": None, "max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False,
                   "sparse": False}),
}  # fmt: skip
for _name in ("mean", "sum", "nanmean", "nansum"):
    _reduced = "average" if _name == "mean" else "reduce"
    _TABLE[_name] = (_reduced, "input dim keepdim dtype", {"dim": None, "keepdim": False, "dtype": None})
for _name in ("amax", "amin", "logsumexp", "argmax", "argmin", "all", "any"):
    _TABLE[_name] = ("reduce", "input dim keepdim", {"dim": None, "keepdim": False})
_TABLE |= {f"adaptive_avg_pool{d}d": ("adaptive_avg_pool", "input output_size", {}) for d in (1, 2, 3)}
_VARIADIC = {"view": "reshape", "reshape": "reshape", "permute": "permute", "expand": "expand", "repeat": "repeat"}
_SPACES = (torch, F, operator)
_FUNCTIONS = {getattr(space, n): n for n in (*_TABLE, "reshape", "permute") for space in _SPACES if hasattr(space, n)}
# ATen operators that a table of names cannot tell, and what each canonical operation needs to be given
_ATEN = {"view": "reshape", "reshape": "reshape", "unsafe_view": "reshape", "permute": "permute"}
_ATEN |= {f"upsample_{kind}": "interpolate" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")}
_ATEN_ARGUMENTS = {"self": "input", "size": "sizes", "shape": "sizes"}
_MOVES: dict[str, tuple[str, ...]] = {
    "reshape": ("sizes",), "permute": ("sizes",), "flatten": ("start_dim", "end_dim"), "unflatten": ("dim", "sizes"),
    "transpose": ("dim0", "dim1"), "unsqueeze": ("dim",), "squeeze": ("dim",), "average": ("dim", "keepdim", "dtype"),
    "adaptive_avg_pool": ("output_size",), "like": ("other",),
}  # fmt: skip
_CASTS = {"to", "long", "int", "bool", "bfloat16", "cpu", "cuda"}
_NOT_METHODS = {"interpolate", "layer_norm", "group_norm", "normalize", "stack", "where", "embedding"}
_NOT_METHODS |= {"scaled_dot_product_attention", *(f"adaptive_avg_pool{d}d" for d in (1, 2, 3))}
_POOL_NAMES = {f"{kind}{d}d": d for d in (1, 2, 3) for kind in ("max_pool", "adaptive_max_pool", "lp_pool")}
_POOL_MODULES: dict[Any, int] = {
    getattr(nn, f"{kind}{d}d"): d for d in (1, 2, 3) for kind in ("MaxPool", "AdaptiveMaxPool")
}
_SAME = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def read_shaping(node: Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """The call behind a node that is no layer; None for what is not in the table."""
    if node.op == "call_module":
        return _module(node, modules[str(node.target)])
    if is_aten(node):
        return _aten(node)
    if node.op == "call_function":
        name = _FUNCTIONS.get(node.target, "")
    elif node.op == "call_method" and node.target not in _NOT_METHODS:
        name = str(node.target)
    else:
        return None
    if name in _CASTS and node.args:
        return Call("cast", {"input": node.args[0]})
    if name in _VARIADIC:
        return _variadic(node, _VARIADIC[name])
    if name not in _TABLE:
        return None
    op, text, defaults = _TABLE[name]
    names = text.split()
    kwargs = {k: v for k, v in node.kwargs.items() if k in names or (v is not None and k != "_stacklevel")}
    if len(node.args) > len(names) or any(k not in names for k in kwargs):
        return None
    given = defaults | dict(zip(names, node.args, strict=False)) | kwargs
    return Call(op, given, _spatial(name)) if all(n in given for n in names) else None


def _aten(node: Node) -> Call | None:
    """An ATen operator that moves or averages values; ranks and sizes of others are in what the export tells."""
    name, values = plain(node.target).removeprefix("_"), bound(node)
    if values is None:
        return None
    args = {_ATEN_ARGUMENTS.get(k, k): v for k, v in values.items()}
    args |= {"sizes": args["dims"]} if name == "permute" else {}
    op = _ATEN.get(name, _TABLE[name][0] if name in _TABLE else "")
    if op == "interpolate":
        return Call(op, {"input": args["input"]})
    if op not in _MOVES or not {*_MOVES[op], "input"} <= args.keys():
        return None
    return Call(op, {n: args[n] for n in ("input", *_MOVES[op])}, _spatial(name))


def _spatial(name: str) -> int | None:
    return int(name[-2]) if name.startswith("adaptive") else None


def _variadic(node: Node, op: str) -> Call | None:
    """`x.view(2, -1)` and `x.view((2, -1))`, `torch.permute(x, dims)` and `x.permute(*dims)`."""
    given: Any = node.args[1:]
    if not given and len(node.kwargs) == 1:
        given = tuple(node.kwargs.values())
    elif node.kwargs or not node.args:
        return None
    if len(given) == 1 and not isinstance(given[0], int):
        given = given[0]  # a tuple, or a node that may be a size or a whole shape
    return None if isinstance(given, torch.dtype) else Call(op, {"input": node.args[0], "sizes": given})


def _module(node: Node, m: nn.Module) -> Call | None:
    if runs(m) is None or len(node.args) != 1 or node.kwargs:
        return None
    args: dict[str, Any] = {"input": node.args[0]}
    if isinstance(m, nn.Flatten):
        return Call("flatten", args | {"start_dim": m.start_dim, "end_dim": m.end_dim})
    if isinstance(m, nn.Unflatten):
        return Call("unflatten", args | {"dim": m.dim, "sizes": m.unflattened_size})
    if isinstance(m, nn.LayerNorm):
        return Call("layer_norm", args | {"normalized_shape": m.normalized_shape})
    if isinstance(m, nn.Upsample):
        return Call("interpolate", args | {"mode": m.mode})
    for d, cls in ((1, nn.AdaptiveAvgPool1d), (2, nn.AdaptiveAvgPool2d), (3, nn.AdaptiveAvgPool3d)):
        if isinstance(m, cls):
            return Call("adaptive_avg_pool", args | {"output_size": m.output_size}, d)
    if isinstance(m, nn.Embedding):
        return Call("embedding", {"index": node.args[0], "width": m.embedding_dim})
    return Call("same", args) if isinstance(m, _SAME) else None


def elementwise(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node acts on each element of its first argument alone, so that the shape stays."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.op == "call_module":
        return runs(modules[str(node.target)]) in ELEMENTWISE_MODULES
    if node.op == "call_method" and node.target == "type_as":
        return True
    return elementwise_call(node) and node.all_input_nodes == [node.args[0]]


def pooled(node: Node, modules: Mapping[str, nn.Module]) -> int | None:
    """Over how many dims a node takes maxima or norms of windows, if it is such a pool and gives no indices."""
    if not node.args:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if getattr(module, "return_indices", False) else _POOL_MODULES.get(runs(module))
    several = isinstance(node.target, OpOverload) and len(node.target._schema.returns) > 1
    return _POOL_NAMES.get(plain(node.target)) if node.op == "call_function" and not several else None


def ints_of(value: Any) -> tuple[int, ...] | None:
    """One int or several as a tuple; None where any is not known."""
    items = (value,) if isinstance(value, int) else value
    if not isinstance(items, (tuple, list)) or not all(isinstance(i, int) for i in items):
        return None
    return tuple(items)
