"""Numbers that the shapes of weights fix, written where they are read.

`pad_same(x, self.weight.shape[-2:])` keeps a weight alive for the sake of its size, long after the convolution
it belongs to has become another one; with the number itself in the graph nobody holds the weight any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def write_numbers(constants: dict[Node, Any]) -> set[Node]:
    """Replace every constant integer and float among the arguments of what is no constant; what nobody reads now."""
    unread = set[Node]()
    for node, value in reversed(constants.items()):
        if type(value) not in (int, float):
            continue
        for user in [u for u in node.users if u not in constants]:
            user.args, user.kwargs = _replaced(user.args, node, value), _replaced(user.kwargs, node, value)
        if unread.issuperset(node.users):
            unread.add(node)
    return unread


def _replaced(arguments: Any, node: Node, value: float) -> Any:
    return torch.fx.map_arg(arguments, lambda n: value if n is node else n)
