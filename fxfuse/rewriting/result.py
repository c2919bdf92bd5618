"""The GraphModule that a graph becomes, whole in every copy: torch.fx's own forget what no node of the graph reads.

A deepcopy of a GraphModule has no hooks and no plain attributes, one that was pickled no `meta` either, and both give
hidden buffers back to the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule

from fxfuse.attributes import owner_of

_KEPT = "_fxfuse_kept"  # names of attributes, and paths of buffers that the state dict leaves out


class Result(GraphModule):
    """A GraphModule that copies and pickles as other modules do: with its hooks and all that it was given to `keep`."""

    def __copy__(self) -> Result:
        return _whole(super().__copy__(), *_kept(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Result:
        made = super().__deepcopy__(memo)
        return _whole(made, *copy.deepcopy(_kept(self), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        load, arguments = super().__reduce__()
        return _loaded, (load, arguments, *_kept(self))


def keep(result: Result, attributes: Mapping[str, Any], hidden: tuple[str, ...] = ()) -> None:
    """Set plain `attributes`, and hide the buffers at `hidden` from the state dict, here and in every copy."""
    names, paths = vars(result).get(_KEPT, ((), ()))
    vars(result)[_KEPT] = (*dict.fromkeys((*names, *attributes)),), (*dict.fromkeys((*paths, *hidden)),)
    for name, value in attributes.items():
        setattr(result, name, value)
    for path in hidden:
        owner, name = owner_of(result, path)
        owner._non_persistent_buffers_set.add(name)


def _kept(result: Result) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The name of its class, attributes, and hidden buffers."""
    names, hidden = vars(result).get(_KEPT, ((), ()))
    return type(result).__name__, {name: vars(result)[name] for name in names if name in vars(result)}, hidden


def _loaded(load: Any, arguments: Any, name: str, attributes: dict[str, Any], hidden: tuple[str, ...]) -> Result:
    return _whole(load(*arguments), name, attributes, hidden)


def _whole(made: GraphModule, name: str, attributes: dict[str, Any], hidden: tuple[str, ...]) -> Result:
    """What torch.fx made of a `Result`, as one again."""
    if not isinstance(made, Result):
        made.__class__ = type(Result.__new__(Result))  # every GraphModule has a class of its own, for its forward
        made.recompile()
    made.__class__.__name__ = name
    assert isinstance(made, Result)
    keep(made, attributes, hidden)
    return made
