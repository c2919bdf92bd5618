"""Which operations give the same for the same arguments, in a shape that follows from theirs, and do nothing else."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from fxfuse.names import plain, torch_name
from fxfuse.ops import schema
from fxfuse.ops.spellings import read

_IMPURE = re.compile(
    r"rand|dropout|bernoulli|normal(?!ize)|multinomial|poisson|exponential|uniform|cauchy|geometric|empty|^item$|numpy|"
    r"tolist|data_ptr|backward|hook|retain_grad|share_memory|requires_grad|_assert|print|setattr|set_grad|"
    r"nonzero|argwhere|unique|masked|bincount|histogram|repeat_interleave|is_|allclose|equal$"
)
_ASKED = {"shape", "ndim", "dtype", "T", "mT", "H", "mH", "data", "real", "imag"}
_MAKES = set(
    "zeros ones full eye arange range linspace logspace tensor as_tensor scalar_tensor tril_indices triu_indices "
    "hann_window hamming_window blackman_window bartlett_window kaiser_window".split()
)
_SWITCHES = re.compile(r"autocast|inference_mode|grad_enabled|profiler|record_function|set_|all_reduce|manual_seed")
_HOMES = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._C._special", "_operator")


def pure(node: Node) -> bool:
    """Whether a call, of no module, is a function of its arguments alone, and the shape of its result one of theirs."""
    name = plain(node.target)
    if _IMPURE.search(name) or node.kwargs.get("requires_grad"):
        return False
    if name == "embedding" and (len(node.args) > 3 or node.kwargs.get("max_norm") is not None):
        return False  # it renormalizes its rows
    if node.target is getattr:
        return node.args[1] in _ASKED
    if isinstance(node.target, OpOverload):
        values = schema.bound(node)
        statistics = values is None or any(values.get(n) is not None for n in ("running_mean", "running_var"))
        return schema.pure(node) and not statistics
    if name == "batch_norm":  # weight standardisation calls it without running statistics
        call = read(node, {}, None)
        return call is not None and call.args["running_mean"] is None and call.args["running_var"] is None
    module = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or module.split(".")[0] in ("torch", "_operator", "builtins", "math")


def makes(node: Node) -> bool:
    """Whether a call makes a new tensor of numbers, sizes and lists of them."""
    name = torch_name(node)
    return node.op == "call_function" and (name in _MAKES or (not node.all_input_nodes and _aten(node)))


def takes(node: Node, keyword: str) -> bool:
    """Whether what `node` makes has a "dtype" or "device" of its own choice, where none is given."""
    if isinstance(node.target, OpOverload):
        return any(a.name == keyword for a in node.target._schema.arguments)
    return torch_name(node) in _MAKES


def _aten(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def only_writes(node: Node) -> bool:
    """Whether a call that writes its argument in place changes the numbers in it, by what it is given, and no more."""
    name = plain(node.target)
    if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    changes = re.match(r"(set|resize|resize_as|rename|swap|as_strided|squeeze|unsqueeze|transpose|t|detach)_$", name)
    return not changes and (not _IMPURE.search(name) or name in ("masked_fill_", "masked_scatter_"))


def superfluous(node: Node) -> bool:
    """Whether nothing is lost with a call whose result nobody reads; it is known to write nothing."""
    name = plain(node.target)
    if not pure(node) or _SWITCHES.search(name):
        return False
    if node.op == "call_method":  # of a tensor, not of a list: `seen.add(x)`
        return hasattr(Tensor, name) and not any(hasattr(kind, name) for kind in (list, dict, set))
    home = getattr(node.target, "__module__", None) or "torch"
    return bool(node.all_input_nodes) and (_aten(node) or home in _HOMES)
