"""Constant folding of the view: which nodes depend on parameters and buffers alone."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxfuse.algebra.constants import Apply, Attr, freeze
from fxfuse.attributes import owner_of, tensor_at
from fxfuse.names import operator_name, plain
from fxfuse.ops import schema
from fxfuse.ops.modules import has_hooks
from fxfuse.ops.spellings import read
from fxfuse.reading.effects import Effects

_IMPURE = re.compile(
    r"rand|dropout|bernoulli|normal(?!ize)|multinomial|poisson|exponential|uniform|cauchy|geometric|empty|^item$|numpy|"
    r"tolist|data_ptr|backward|hook|retain_grad|share_memory|requires_grad|_assert|print|setattr|set_grad|"
    r"nonzero|argwhere|unique|masked|bincount|histogram|repeat_interleave|is_|allclose|equal$"
)
_ASKED = {"shape", "ndim", "dtype", "T", "mT", "H", "mH", "data", "real", "imag"}


def find_constants(graph: Graph, root: nn.Module, extra: Mapping[str, Tensor], effects: Effects) -> dict[Node, Any]:
    """Nodes whose value is fixed by the weights: an `Attr`, an `Apply` or a Python value.

    No weight is read: shapes and dtypes are found on stand-ins. What is random, written in place
    or needs data to have a shape is no constant.
    """
    written, paths = effects.written(), effects.written_attributes()
    found: dict[Node, Any] = {}
    samples: dict[Node, Any] = {}
    for node in graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            path = str(node.target)
            tensor = extra[path] if path in extra else tensor_at(root, path)
            if tensor is not None and path not in paths and not _replaced_by_hook(root, path):
                found[node] = Attr(path, tuple(tensor.shape), tensor.dtype)
        elif node.op in ("call_function", "call_method"):
            inputs = node.all_input_nodes
            factory = not inputs and isinstance(node.target, OpOverload)  # torch.zeros and the like
            fixed = (inputs or factory) and all(n in found for n in inputs) and _pure(node)
            if fixed and (value := _apply(node, found, samples)) is not None:
                found[node] = value
    return found


def _replaced_by_hook(root: nn.Module, path: str) -> bool:
    """Whether a hook may put another tensor there, as pruning and the older weight_norm do."""
    module, name = owner_of(root, path)
    return name in module.__dict__ and has_hooks(module)


def _pure(node: Node) -> bool:
    name = plain(node.target)
    if _IMPURE.search(name):
        return False
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


def _apply(node: Node, found: Mapping[Node, Any], samples: dict[Node, Any]) -> Any:
    """The constant of a node whose inputs are constants; None where it has no fixed shape."""
    function = str(node.target) if node.op == "call_method" else node.target
    inputs = node.all_input_nodes
    indices = [found[n] for n in inputs[1:]] if function is operator.getitem else []
    if any(isinstance(c, (Attr, Apply)) and c.dtype in (torch.bool, torch.uint8) for c in indices):
        return None  # a mask: its shape depends on data
    samples.update({n: _sample(found[n]) for n in inputs if n not in samples})
    large = any(isinstance(samples[n], Tensor) and samples[n].is_meta for n in inputs)

    def sample(source: Node) -> Any:
        """All operands have to be on one device."""
        value = samples[source]
        return value.to("meta") if large and isinstance(value, Tensor) else value

    args, kwargs = map_arg((node.args, node.kwargs), sample)
    if "device" in kwargs and not inputs:
        kwargs = {**kwargs, "device": "meta"}  # only its shape is asked for here
    try:
        if isinstance(function, str):
            result = getattr(args[0], function)(*args[1:], **kwargs)
        else:
            result = function(*args, **kwargs)
        fixed, fixed_by_name = map_arg((node.args, node.kwargs), found.__getitem__)
        frozen, named = freeze(fixed).items, tuple((k, freeze(v)) for k, v in fixed_by_name.items())
        hash((frozen, named))
    except Exception:  # whatever cannot run without data is simply no constant
        return None
    if isinstance(result, Tensor):
        function = operator_name(function) if isinstance(function, OpOverload) else function  # which can be pickled
        found_here = Apply(function, frozen, named, tuple(result.shape), result.dtype)
        samples[node] = result if inputs else _sample(found_here)
        return found_here
    samples[node] = result
    return result if isinstance(result, (int, float, torch.Size, torch.dtype)) else None


def _sample(const: Any) -> Any:
    """A stand-in of the same shape and dtype: real ones while small, else on the meta device."""
    if not isinstance(const, (Attr, Apply)):
        return const
    small = math.prod(const.shape) <= 4096  # real arithmetic on so few is faster than meta's
    return torch.ones(const.shape, dtype=const.dtype, device=None if small else "meta")
