"""What kind of value a traced node gives, and what it asks of a tensor when it reads no data but rank, dtype or sizes.

Both as far as its operation alone decides it.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy

from fxfuse.names import is_aten, plain, torch_name
from fxfuse.ops.elementwise import named
from fxfuse.ops.modules import runs

_ASKS_SIZE = {"size", "dim", "ndimension", "numel", "stride", "item", "nelement", "__len__"}
_ASKS_ONE = _ASKS_SIZE - {"stride", "item"}
_IS_SIZE = {"shape", "ndim", "nbytes", "itemsize"}
_SPLITS = {"chunk", "split", "unbind", "tensor_split"}
_TENSOR_NAMES = set(
    "conv1d conv2d conv3d conv_transpose2d linear batch_norm layer_norm group_norm softmax matmul bmm cat stack "
    "interpolate pad avg_pool2d adaptive_avg_pool2d dropout flatten view reshape permute transpose contiguous squeeze "
    "unsqueeze mean sum clone detach float half double add_ mul_ sub_ div_ expand repeat "
    "scaled_dot_product_attention".split()
)
_LAYERS = "conv batchnorm linear normalization instancenorm padding dropout upsampling pixelshuffle flatten".split()
_TENSOR_MODULES = tuple(f"torch.nn.modules.{name}" for name in _LAYERS)
_ARITHMETIC = {getattr(operator, n) for n in "add sub mul truediv floordiv mod pow neg matmul and_ or_ xor".split()}
_ARITHMETIC |= {getattr(operator, n) for n in "iadd isub imul itruediv".split()}
_KEEPS_INT = {getattr(operator, n) for n in "add sub mul floordiv mod neg".split()} | {builtins.max, builtins.min}


SIZE = ("size", "sym_size")
_ASKED = dict.fromkeys(("dim", "ndim", "ndimension"), "rank")
_ASKED |= dict.fromkeys(("dtype", "device", "is_cuda", "is_floating_point", "is_complex"), "dtype")
_ASKED |= dict.fromkeys(("shape", "size", "numel"), "shape")
_ASKED |= dict.fromkeys(("sym_size", "sym_numel", "sym_stride", "sym_storage_offset"), "shape")


def is_number(node: Any, known: dict[Node, bool] | None = None) -> bool:
    """Whether a node gives a Python number or tuple, so that `+=` makes a new one and writes nothing."""
    if not isinstance(node, Node):
        return isinstance(node, (int, float, str, slice, tuple, list))
    return settled(node, {} if known is None else known, _numbers_in, all)


def is_tensor(node: Node, root: nn.Module) -> bool:
    """Whether a node certainly gives one tensor."""
    return settled(node, {}, lambda n: _tensors_in(n, root), any)


def settled(
    node: Node,
    known: dict[Node, bool],
    read: Callable[[Node], bool | list[Node]],
    whole: Callable[[Iterable[bool]], bool],
) -> bool:
    """What `read` says of a node, or `whole` of the nodes it names instead; a chain of them may be long.

    `known` keeps the answers for nodes of one graph.
    """
    todo = [node]
    while todo:
        parts = known[todo[-1]] if todo[-1] in known else read(todo[-1])
        if isinstance(parts, list):
            if missing := [p for p in parts if p not in known]:
                todo += missing
                continue
            parts = whole(known[p] for p in parts)
        known[todo.pop()] = parts
    return known[node]


def _numbers_in(node: Node) -> bool | list[Node]:
    """Whether a node gives a number, or the nodes that decide it: it does if all of them do."""
    name = torch_name(node)
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
        pieces = isinstance(source, Node) and torch_name(source) in _SPLITS
        return [source] if isinstance(source, Node) and not pieces else not pieces and is_number(source)
    if getattr(node.target, "__module__", "") not in ("_operator", "math", "builtins"):
        return False
    fixed = all(is_number(a) for a in node.args if not isinstance(a, Node))
    return [a for a in node.args if isinstance(a, Node)] if fixed else False


def _tensors_in(node: Node, root: nn.Module) -> bool | list[Node]:
    """Whether a node certainly gives one tensor, or the nodes that decide it: it does if any of them does."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        place = getattr(runs(module), "__module__", "")
        if place == "torch.nn.modules.activation":
            return not isinstance(module, nn.MultiheadAttention)
        if place == "torch.nn.modules.pooling":
            return not getattr(module, "return_indices", False)
        return place in _TENSOR_MODULES
    if node.target in _ARITHMETIC:
        return node.all_input_nodes
    return bool(named(node)) or torch_name(node) in _TENSOR_NAMES


def number_type(node: Node) -> type | None:
    """The Python type of a size, or of arithmetic on sizes, where the operations fix it."""
    if node.op == "call_method" and node.target in _ASKS_ONE:
        return int if node.target != "size" or len(node.args) + len(node.kwargs) > 1 else torch.Size
    if node.op != "call_function":
        return None
    if node.target is getattr and node.args[1] in _IS_SIZE:
        return torch.Size if node.args[1] == "shape" else int
    if node.target in (math.ceil, math.floor):
        return int
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        cut = isinstance(node.args[1], slice)
        return (torch.Size if cut else int) if number_type(node.args[0]) is torch.Size else None
    kinds = {number_type(a) if isinstance(a, Node) else type(a) for a in node.args}
    if node.target is operator.truediv and kinds <= {int, float}:
        return float
    return int if node.target in _KEEPS_INT and kinds == {int} else None


def shape_reader(node: Node) -> str | None:
    """What a node asks of its input when it reads no data: "rank", "dtype", "shape" or None."""
    return _ASKED.get(str(node.args[1]) if node.target is getattr else torch_name(node))


def asks_size(user: Node, node: Node) -> bool:
    """Whether `user` reads nothing but the size of `node`."""
    if shape_reader(user) == "shape":
        return True
    method = user.op == "call_method" or is_aten(user)
    like = method and plain(user.target) in ("reshape_as", "view_as", "expand_as")
    return like and len(user.args) == 2 and user.args[1] is node and user.args[0] is not node


def rank_check(node: Node) -> tuple[Node, int] | None:
    """(tensor, rank) of `assert x.ndim == rank`, also spelled `x.dim() == rank`; None for any other node."""
    if node.op != "call_function" or plain(node.target) != "_assert":
        return None
    condition = node.args[0] if node.args else None
    if not isinstance(condition, Node) or condition.target is not operator.eq:
        return None
    asked, rank = condition.args[:2]
    tensor = asked.args[0] if isinstance(asked, Node) and shape_reader(asked) == "rank" else None
    return (tensor, rank) if isinstance(tensor, Node) and isinstance(rank, int) else None


def asks(node: Node, known: dict[Node, bool] | None = None) -> bool:
    """Whether a node asks for a shape, or computes with one."""
    return settled(node, {} if known is None else known, _asks, any)


def _asks(node: Node) -> bool | list[Node]:
    if node.op == "call_method":
        return node.target == "size"
    if is_aten(node):
        return plain(node.target) in SIZE
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    computes = node.target in (operator.getitem, operator.mul, operator.floordiv, operator.add)
    return [a for a in node.args if isinstance(a, Node)] if computes else False


@contextmanager
def extremes_recorded(forward: Any) -> Iterator[None]:
    """Meanwhile `max` and `min` of traced numbers become nodes, where comparing them would stop the trace.

    "Same" padding is `max(..., 0)` of an expression in the input's size. The code of a graph has imported the two into
    its own names.
    """
    originals = {name: getattr(builtins, name) for name in ("max", "min")}
    own = getattr(inspect.unwrap(forward), "__globals__", {})
    places = [(names, n) for names in (vars(builtins), own) for n, f in originals.items() if names.get(n) is f]

    def recording(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            proxy = next((a for a in args if issubclass(type(a), Proxy)), None)
            if len(args) < 2 or proxy is None or kwargs:
                return original(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", original, args, {})

        return call

    for names, name in places:
        names[name] = recording(originals[name])
    try:
        yield
    finally:
        for names, name in places:
            names[name] = originals[name]
