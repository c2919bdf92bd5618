"""Objects that a forward returns (dataclasses, transformers' ModelOutput): taken apart and put together by pytree."""

from __future__ import annotations

import base64
import importlib
import pickle
from collections.abc import Sequence
from functools import reduce
from typing import Any

from torch.utils import _pytree as pytree

from fxfuse.refusal import CaptureError


def recipe(spec: pytree.TreeSpec) -> tuple[str, str]:
    """The class that `spec` is one level of, and what pytree noted of the object, both as text for `remade`.

    Raises:
        CaptureError: the class cannot be found by its name, as one inside of a function, or the note cannot be pickled.
    """
    kind = f"{spec.type.__module__}:{spec.type.__qualname__}"
    try:
        if _found(kind) is spec.type:
            return kind, base64.b64encode(pickle.dumps(spec.context)).decode()
        reason = "whose name means another class in its module"
    except (AttributeError, ImportError, TypeError, pickle.PicklingError) as error:
        reason = f"which cannot be made again by name: {error}"
    name = getattr(spec.type, "__name__", spec.type)
    raise CaptureError(f"the forward returns a {name}, {reason}; return tensors, or a tuple, list or dict of them")


def remade(kind: str, context: str, parts: Sequence[Any]) -> Any:
    """An object of the class `kind` (`module:name`) of its parts, as pytree puts it together."""
    node = pytree.SUPPORTED_NODES[_found(kind)]
    return node.unflatten_fn(parts, pickle.loads(base64.b64decode(context)))


def _found(kind: str) -> Any:
    module, _, name = kind.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))
