"""Names of modules as the code of a graph can say them: a name is never code.

torch.fx writes `self.stem.conv`, and `getattr(self.stem, "1x1")` for what is no identifier. A keyword of Python, a
quote or the end of a line in a name would be part of the program, and a GraphModule has attributes of its own.
"""

from __future__ import annotations

import keyword
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule


def spelled(root: nn.Module, path: str) -> str:
    """`path` as the code of a graph of `root` can say it: the same but for names that it cannot."""
    parts = path.split(".")
    if all(map(_plain, parts)) and parts[0] not in _own_names():
        return path
    module: Any = root
    names = []
    for part in parts:
        names.append(_spellings(module, module is root, part).get(part, part))
        module = getattr(module, part, None)
    return ".".join(names)


def unspelled(root: nn.Module, path: str) -> str:
    """The path in `root` that became `path` in a module made of it, whichever of its names had to be spelled anew."""
    module: Any = root
    names = []
    for part in path.split("."):
        if part not in _names(module):
            found = (n for at_root in (True, False) for n, new in _spellings(module, at_root).items() if new == part)
            part = next(found, part)
        names.append(part)
        module = getattr(module, part, None)
    return ".".join(names)


def _plain(name: str) -> bool:
    """Whether it can be written as it is, behind a dot or between quotes."""
    printed = name.isprintable() and not set('"\\') & set(name)
    return printed and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name


@cache
def _own_names() -> frozenset[str]:
    """What a GraphModule keeps under names of its own, and nn.Module does not."""
    return frozenset({*dir(GraphModule(nn.Module(), Graph()))} - {*dir(nn.Module())})


def _names(module: Any) -> Iterable[str]:
    """What a path can go on with from a module."""
    tables = vars(module) if isinstance(module, nn.Module) else {}
    return [*tables, *(name for t in ("_modules", "_parameters", "_buffers") for name in tables.get(t, {}).keys())]  # noqa: SIM118


def _spellings(module: Any, at_root: bool, *asked: str) -> dict[str, str]:
    """New names, different from all others, for those of a module that code cannot say; and for those `asked` for."""
    names = dict.fromkeys((*_names(module), *asked))
    taken = set(names) | (_own_names() if at_root else frozenset())
    found: dict[str, str] = {}
    for name in names:
        if _plain(name) and not (at_root and name in _own_names()):
            continue
        found[name] = next(n for n in _variants(name) if n not in taken and not hasattr(module, n))
        taken.add(found[name])
    return found


def _variants(name: str) -> Iterator[str]:
    stem = "".join(c if (c.isalnum() and c.isascii()) or c in "_-" else f"_x{ord(c):x}_" for c in name)
    stem = name if _plain(f"{name}_") else stem
    for number in count(1):
        yield stem + "_" * number if stem == name else stem + "_" * (number - 1)
