"""Lists, sets, deques and dicts that a module keeps: what a trace did to them is undone."""

from __future__ import annotations

from typing import Any


def put_back(value: Any, copy: Any) -> bool:
    """Give a list, set, deque or dict its old content; whether the change could matter to a later call.

    New keys in a dict are a memo: without them a forward computes what it had stored.
    """
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
