"""What kind of value a traced node gives, as far as its operation alone decides it."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch.fx import Node

from .names import plain

_ASKS_SIZE = {"size", "dim", "ndimension", "numel", "stride", "item", "nelement", "__len__"}
_IS_SIZE = {"shape", "ndim", "nbytes", "itemsize"}
_SPLITS = {"chunk", "split", "unbind", "tensor_split"}
_TENSOR_NAMES = set(
    "conv1d conv2d conv3d conv_transpose2d linear batch_norm layer_norm group_norm relu gelu silu sigmoid tanh softmax "
    "hardswish hardsigmoid leaky_relu matmul bmm cat stack interpolate pad avg_pool2d adaptive_avg_pool2d dropout "
    "flatten view reshape permute transpose contiguous squeeze unsqueeze mean sum clone detach float half double "
    "relu_ add_ mul_ sub_ div_ expand repeat scaled_dot_product_attention".split()
)
_LAYERS = "conv batchnorm linear normalization instancenorm padding dropout upsampling pixelshuffle flatten".split()
_TENSOR_MODULES = tuple(f"torch.nn.modules.{name}" for name in _LAYERS)
_ARITHMETIC = {getattr(operator, n) for n in "add sub mul truediv floordiv mod pow neg matmul and_ or_ xor".split()}
_ARITHMETIC |= {getattr(operator, n) for n in "iadd isub imul itruediv".split()}


def is_number(node: Any) -> bool:
    """Whether a node gives a Python number or tuple, so that `+=` makes a new one and writes nothing."""
    if not isinstance(node, Node):
        return isinstance(node, (int, float, str, slice, tuple, list))
    name = plain(node.target)
    if node.op == "call_method":
        return name in _ASKS_SIZE | _SPLITS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _IS_SIZE
    if name in _SPLITS or name == "sym_size":
        return True
    if node.target is operator.getitem:
        source = node.args[0]
        pieces = isinstance(source, Node) and plain(source.target) in _SPLITS
        return is_number(source) and not pieces
    module = getattr(node.target, "__module__", "")
    return module in ("_operator", "math", "builtins") and all(is_number(a) for a in node.args)


def is_tensor(node: Node, root: nn.Module) -> bool:
    """Whether a node certainly gives one tensor."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        place = type(module).__module__
        if place == "torch.nn.modules.activation":
            return not isinstance(module, nn.MultiheadAttention)
        if place == "torch.nn.modules.pooling":
            return not getattr(module, "return_indices", False)
        return place in _TENSOR_MODULES
    if node.target in _ARITHMETIC:
        return any(is_tensor(n, root) for n in node.all_input_nodes)
    name = plain(node.target)
    return node.op in ("call_function", "call_method") and name in _TENSOR_NAMES
