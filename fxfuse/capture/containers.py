"""Lists, sets, deques and dicts that a module keeps: what a trace did to them is undone."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

from torch import nn

TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = vars(nn.Module()).keys() - set(TABLES)
WITHOUT_KEYS = (list, set, deque)
ALL = (*WITHOUT_KEYS, dict, OrderedDict)


def contents(module: nn.Module, kinds: tuple[type, ...] = ALL) -> list[tuple[str, Any, Any]]:
    """Its containers of these classes by name, torch's own tables but not its hooks included, each with a copy."""
    return [(n, v, v.copy()) for n, v in vars(module).items() if type(v) in kinds and n not in _HOOKS]


def put_back(saved: list[tuple[str, Any, Any]]) -> list[str]:
    """Give containers their old content; the names of those whose change could matter to a later call."""
    return [name for name, value, copy in saved if _put_back(value, copy)]


def _put_back(value: Any, copy: Any) -> bool:
    """New keys in a dict are a memo: without them a forward computes what it had stored."""
    if isinstance(value, dict):
        same = all(k in value and value[k] is v for k, v in copy.items())
        value.clear()
        value.update(copy)
        return not same
    if isinstance(value, set):
        same = value == copy
    else:
        same = len(value) == len(copy) and all(a is b for a, b in zip(value, copy, strict=True))
    if not same:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(copy)
    return not same
