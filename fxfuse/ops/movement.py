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
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from fxfuse.names import is_aten, plain
from fxfuse.ops.call import Call, Signature, signature
from fxfuse.ops.modules import runs
from fxfuse.ops.schema import bound

RESHAPES = {"reshape", "like", "flatten", "unflatten", "squeeze", "unsqueeze"}  # the same values in another shape
_DIMS = "input dim=None keepdim=False"
_SIGNATURES: dict[str, Signature] = {
    **dict.fromkeys(("flatten", "ravel"), signature("flatten", "input start_dim=0 end_dim=-1")),
    "unflatten": signature("unflatten", "input dim sizes"),
    **dict.fromkeys(("reshape_as", "view_as"), signature("like", "input other")),
    "expand_as": signature("expand_like", "input other"),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), signature("transpose", "input dim0 dim1")),
    "unsqueeze": signature("unsqueeze", "input dim"),
    "squeeze": signature("squeeze", "input dim=None"),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), signature("same", "input dim dtype=None")),
    "roll": signature("same", "input shifts dims=None"),
    "normalize": signature("same", "input p=2.0 dim=1 eps=1e-12"),
    "layer_norm": signature("layer_norm", "input normalized_shape weight=None bias=None eps=1e-5"),
    "group_norm": signature("same", "input num_groups weight=None bias=None eps=1e-5"),
    "interpolate": signature(
        "interpolate",
        "input size=None scale_factor=None mode='nearest' align_corners=None recompute_scale_factor=None "
        "antialias=False",
    ),
    "matmul": signature("matmul", "input other"),
    "bmm": signature("bmm", "input other"),
    "where": signature("where", "condition input other"),
    "stack": signature("stack", "tensors dim=0"),
    "unbind": signature("unbind", "input dim=0"),
    "select": signature("select", "input dim index"),
    "scaled_dot_product_attention": signature(
        "attention", "input key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False"
    ),
    "embedding": signature(
        "embedding", "index weight padding_idx=None max_norm=None norm_type=2.0 scale_grad_by_freq=False sparse=False"
    ),
    "mean": signature("average", _DIMS + " dtype=None"),
    **dict.fromkeys(("sum", "nanmean", "nansum"), signature("reduce", _DIMS + " dtype=None")),
    **dict.fromkeys("amax amin logsumexp argmax argmin all any".split(), signature("reduce", _DIMS)),
}
POOLS: dict[str, Signature] = {}  # of windows, by the maximum or a norm
POOL_MODULES: dict[Any, int] = {}
for _d in (1, 2, 3):
    _SIGNATURES[f"adaptive_avg_pool{_d}d"] = signature("adaptive_avg_pool", "input output_size", _d)
    for _name, _text in (
        ("max_pool", "input kernel_size stride=None padding=0 dilation=1 ceil_mode=False return_indices=False"),
        ("adaptive_max_pool", "input output_size return_indices=False"),
        ("lp_pool", "input norm_type kernel_size stride=None ceil_mode=False"),
    ):
        POOLS[f"{_name}{_d}d"] = signature("max_pool", _text, _d)
    POOL_MODULES |= {getattr(nn, f"{kind}{_d}d"): _d for kind in ("MaxPool", "AdaptiveMaxPool")}
_VARIADIC = {"view": "reshape", "reshape": "reshape", "permute": "permute", "expand": "expand", "repeat": "repeat"}
_NAMED = (*_SIGNATURES, "reshape", "permute")
_FUNCTIONS = {getattr(space, n): n for n in _NAMED for space in (torch, F) if hasattr(space, n)}
_FUNCTIONS[operator.matmul] = "matmul"
_POOL_FUNCTIONS = {getattr(F, n): n for n in POOLS}
_POOL_FUNCTIONS |= {getattr(torch, n): n for n in ("max_pool1d", "max_pool2d", "max_pool3d")}  # which give no indices
# ATen operators that a table of names cannot tell, and which operations are read of any
_ATEN = {"view": "reshape", "reshape": "reshape", "unsafe_view": "reshape", "permute": "permute"}
_ATEN |= {f"upsample_{kind}": "interpolate" for kind in ("nearest1d", "nearest2d", "bilinear2d", "bicubic2d")}
_ATEN_ARGUMENTS = {"self": "input", "size": "sizes", "shape": "sizes"}
_MOVES = set("reshape permute flatten unflatten transpose unsqueeze squeeze average adaptive_avg_pool like".split())
_CASTS = {"to", "long", "int", "bool", "cpu", "cuda"}
# layers: the operation, the fields that hold its arguments, and spatial dims where the layer fixes them
_LAYERS: dict[Any, tuple[Any, ...]] = {
    nn.Flatten: ("flatten", {"start_dim": "start_dim", "end_dim": "end_dim"}),
    nn.Unflatten: ("unflatten", {"dim": "dim", "sizes": "unflattened_size"}),
    nn.LayerNorm: ("layer_norm", {"normalized_shape": "normalized_shape"}),
    nn.Embedding: ("embedding", {"width": "embedding_dim"}),
    nn.Upsample: ("interpolate", {"mode": "mode"}),
    **dict.fromkeys((nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.GroupNorm), ("same", {})),
    **{getattr(nn, f"InstanceNorm{d}d"): ("same", {}) for d in (1, 2, 3)},
    **{
        getattr(nn, f"AdaptiveAvgPool{d}d"): ("adaptive_avg_pool", {"output_size": "output_size"}, d) for d in (1, 2, 3)
    },
}


def read_shaping(node: Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """The call behind a node that is no layer; None for what is not in the table."""
    if node.op == "call_module":
        return _module(node, modules[str(node.target)])
    if is_aten(node):
        return _aten(node)
    method = str(node.target) if node.op == "call_method" and node.target != "where" else ""
    name = _FUNCTIONS.get(node.target, "") if node.op == "call_function" else method if hasattr(Tensor, method) else ""
    if name in _CASTS and node.args:
        return Call("cast", {"input": node.args[0]})
    if name in _VARIADIC:
        return _variadic(node, _VARIADIC[name])
    return _SIGNATURES[name].bind(node.args, node.kwargs) if name in _SIGNATURES else None


def _aten(node: Node) -> Call | None:
    """An ATen operator that moves or averages values; ranks and sizes of others are in what the export tells."""
    name, values = plain(node.target).removeprefix("_"), bound(node)
    if values is None:
        return None
    args = {_ATEN_ARGUMENTS.get(k, k): v for k, v in values.items()}
    args |= {"sizes": args["dims"]} if name == "permute" else {}
    known = _SIGNATURES.get(name)
    op = _ATEN.get(name, "" if known is None else known.op)
    if op == "interpolate":
        return Call(op, {"input": args["input"]})
    names = ("input", "sizes") if op in ("reshape", "permute") or known is None else known.names
    if op not in _MOVES or not args.keys() >= set(names):
        return None
    return Call(op, {n: args[n] for n in names}, None if known is None else known.spatial)


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
    known = next((_LAYERS[c] for c in type(m).__mro__ if c in _LAYERS), None)
    if known is None:
        return None
    op, fields, *spatial = known
    args = {"index" if op == "embedding" else "input": node.args[0]}
    return Call(op, args | {n: getattr(m, field) for n, field in fields.items()}, *spatial)


def pooled(node: Node, modules: Mapping[str, nn.Module]) -> int | None:
    """Over how many dims a node takes maxima or norms of windows, if it is such a pool and gives no indices."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if getattr(module, "return_indices", False) else POOL_MODULES.get(runs(module))
    if isinstance(node.target, OpOverload):
        pool = POOLS.get(plain(node.target))
        return None if pool is None or len(node.target._schema.returns) > 1 else pool.spatial
    name = _POOL_FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""
    call = POOLS[name].bind(node.args, node.kwargs) if name else None
    return None if call is None or call.args.get("return_indices", False) is not False else call.spatial


def ints_of(value: Any) -> tuple[int, ...] | None:
    """One int or several as a tuple; None where any is not known."""
    items = (value,) if isinstance(value, int) else value
    if not isinstance(items, (tuple, list)) or not all(isinstance(i, int) for i in items):
        return None
    return tuple(items)
