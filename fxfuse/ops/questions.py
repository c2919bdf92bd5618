"""What a node asks of a tensor when it reads no data: its rank, its dtype, its sizes."""

from __future__ import annotations

import operator

from torch.fx import Node

from fxfuse.names import is_aten, plain, torch_name
from fxfuse.ops.value_kinds import settled

SIZE = ("size", "sym_size")
_ASKED = dict.fromkeys(("dim", "ndim", "ndimension"), "rank")
_ASKED |= dict.fromkeys(("dtype", "device", "is_cuda", "is_floating_point", "is_complex"), "dtype")
_ASKED |= dict.fromkeys(("shape", "size", "numel"), "shape")
_ASKED |= dict.fromkeys(("sym_size", "sym_numel", "sym_stride", "sym_storage_offset"), "shape")


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
    """Whether a node asks for a shape, or computes with one; `known` keeps the answers for one graph."""
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
