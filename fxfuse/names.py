"""Names: of modules above a path, and of what a node calls.

The plain name is `conv2d` for `F.conv2d`, `torch.conv2d` and `aten.conv2d.default` alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node


def plain(target: Any) -> str:
    """Name of a function, an operator without its overload, or a tensor method; "" for anything else."""
    if isinstance(target, str):
        return target.rpartition("::")[2].partition(".")[0]
    if isinstance(target, OpOverload):
        return str(target._schema.name.rpartition("::")[2])
    return str(getattr(target, "__name__", ""))


def torch_name(node: Node) -> str:
    """The plain name of what a node calls; "" for a module, and for a function that is not PyTorch's or Python's."""
    if node.op not in ("call_function", "call_method"):
        return ""
    home = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return plain(node.target) if home in ("torch", "_operator", "builtins", "math") else ""


def operator_name(target: OpOverload) -> str:
    """`aten::add.Tensor`: the name that `operator_named` takes."""
    return str(target.name())  # type: ignore[no-untyped-call]


def operator_named(name: str) -> OpOverload:
    """The operator called `aten::add.Tensor`: by its name it can be pickled and hashed."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    return found


def is_aten(node: Node) -> bool:
    """Whether a node calls one overload of an ATen operator."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def above(path: str) -> list[str]:
    """The modules that hold what is at `path`: `a` and `a.b` for `a.b.c`."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def below(holder: str, path: str) -> str:
    """The path from the model on of what is at `path` below its module at `holder`, "" for the model itself."""
    return f"{holder}.{path}" if holder else path


def shown(text: str) -> str:
    """`text` for one line on a terminal: what cannot be printed, as escapes and ends of lines, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place(node: Node) -> str:
    """The path or name by which a message speaks of a node."""
    return shown(str(node.target)) if node.op == "call_module" else "the output" if node.op == "output" else node.name
