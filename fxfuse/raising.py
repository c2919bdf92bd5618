"""x.shape read after a batch norm  =>  the shape of its input: the same numbers, and no reader of the norm.

`y = norm(x); b, c, h, w = y.shape; conv(y)` reads `y` twice, and a batch norm that somebody else reads cannot
join the convolution. It changes no size, so that the question can go to `x`, where that keeps nothing apart:
`x` is read elsewhere anyway, or comes from nothing that could absorb the batch norm.
"""

from __future__ import annotations

from torch.fx import Node

from .call import Call
from .capture import Captured
from .dialect import read
from .effects import shape_reader

_SAME_SIZE = ("batch_norm", "dropout")


def raise_size_readers(captured: Captured) -> None:
    """Let those who ask a batch norm's or dropout's output for its sizes ask its input."""
    for node in list(captured.graph.nodes):
        if shape_reader(node) != "shape":
            continue
        asked = last = found = node.all_input_nodes[0]
        while (source := _input(last, captured)) is not None:
            if not _apart(source, last, captured):
                found = source
            last = source
        node.replace_input_with(asked, found)


def _call(node: Node, captured: Captured) -> Call | None:
    return read(node, captured.modules, lambda path: None)


def _input(node: Node, captured: Captured) -> Node | None:
    """What goes into a layer that keeps sizes; None for any other node."""
    call = _call(node, captured)
    source = call.args.get("input") if call is not None and call.op in _SAME_SIZE and not call.inplace else None
    if not isinstance(source, Node):
        return None
    resized = any(u.op == "call_method" and str(u.target).endswith("_") for u in source.users)
    return None if resized else source


def _apart(source: Node, node: Node, captured: Captured) -> bool:
    """Whether `source` and `node` may fuse now, which a reader of `source` would prevent."""
    if any(u is not node and shape_reader(u) not in ("rank", "dtype") for u in source.users):
        return False
    return _call(source, captured) is not None
