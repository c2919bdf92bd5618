"""What one operation does to memory: what it writes in place, and whether its result may be a view of what it reads."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Node

from fxfuse.names import plain, torch_name
from fxfuse.ops import schema
from fxfuse.ops.call import Call
from fxfuse.ops.elementwise import MODULES, named
from fxfuse.ops.modules import layer_type, runs
from fxfuse.ops.movement import POOL_MODULES, POOLS, read_shaping
from fxfuse.ops.value_kinds import is_number

_NAMES = "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
INPLACE = {n: getattr(operator, f"i{n}") for n in _NAMES}
_WRITE_FIRST = {*INPLACE.values(), operator.imatmul, operator.iconcat, operator.setitem, operator.delitem}
_WRITE_FIRST |= {"__setitem__", "__iadd__", "__imul__"}
# What gives a tensor of its own beside `ELEMENTWISE` functions and pools: canonical operations, and other names.
_FRESH_CALLS = set(
    "conv conv_transpose linear batch_norm avg_pool add sub mul div neg cat pad flip index_select mm deform matmul bmm "
    "attention where stack embedding same layer_norm interpolate average reduce adaptive_avg_pool".split()
)
_FRESH_NAMES = set("clone repeat pow float_power max min eq ne lt gt std var rsub softmin glu size dim _assert".split())
_FRESH_NAMES |= set(
    "zeros ones full empty eye arange linspace logspace tensor rand randn randint zeros_like ones_like full_like "
    "empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor tril triu outer roll".split()
)
_FACTS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


def storage(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def written(node: Node, call: Call | None, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The tensors that `node` may write."""
    if isinstance(node.target, OpOverload):
        return schema.written(node)
    if call is not None and call.op == "batch_norm" and call.args["training"] is not False:
        return [v for n in ("running_mean", "running_var") if isinstance(v := call.args[n], Node)]
    out = node.kwargs.get("out")
    if out is not None:
        return schema.nodes([out])
    if (call is not None and call.inplace) or _writes_first(node, modules):
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        return schema.nodes([first])  # torch._foreach_add_ writes a list
    if node.op == "call_module" and not _known(modules[str(node.target)]):
        return node.all_input_nodes
    normalizes = call is None and torch_name(node) in ("batch_norm", "instance_norm", "native_batch_norm")
    return node.all_input_nodes[1:] if normalizes else []  # perhaps running statistics


def _known(module: nn.Module) -> bool:
    """Whether a call runs one class of torch.nn, or torchvision's deformable one, and nothing more."""
    return runs(module) is not None and (layer_type(module) is not None or not any(module.children()))


def own_writes(module: nn.Module) -> list[Tensor]:
    """The tensors of its own that a call of the module may write."""
    if not _known(module):
        return [*module.parameters(), *module.buffers()]
    if getattr(module, "max_norm", None) is not None:  # an embedding that renormalizes its rows
        return list(module.parameters())
    return list(module.buffers()) if module.training else []  # running statistics


def _writes_first(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = plain(node.target)
    if node.target in _WRITE_FIRST or (name.endswith("_") and not name.endswith("__")):
        return True
    return node.op == "call_function" and bool(_inplace_argument(node))


def _inplace_argument(node: Node) -> Any:
    named = node.kwargs.get("inplace", False)
    if getattr(node.target, "__module__", "") != "torch.nn.functional":
        return named
    try:
        return inspect.signature(node.target).bind_partial(*node.args).arguments.get("inplace", named)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins without a signature have no inplace argument
        return named


def shared(node: Node, targets: list[Node], call: Call | None, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The arguments whose memory the result may share, beside those it writes."""
    if isinstance(node.target, OpOverload):
        return schema.shared(node)
    return [] if targets or fresh(node, call, modules) else node.all_input_nodes


def fresh(node: Node, call: Call | None, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result certainly shares no memory with any argument."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    call = read_shaping(node, modules) if call is None else call
    if (call is not None and call.op in _FRESH_CALLS) or named(node):
        return True
    if node.op == "call_module":
        return runs(modules[str(node.target)]) in {*MODULES, *POOL_MODULES}
    if node.target is getattr:
        return node.args[1] in _FACTS
    own = node.target not in (max, min) or is_number(node)  # Python's own give one of their arguments
    return own and torch_name(node) in {*POOLS, *_FRESH_NAMES}
