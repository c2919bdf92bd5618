"""Capture by torch.export: what torch.fx cannot trace, as one graph of ATen operators.

torch.export runs the forward on fake tensors with symbolic sizes and takes the branches that the
example inputs take. Nothing of that run stays with the model: it is put back as it was, or the
capture is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .capture import REMEDY, Captured, _where
from .guards import attributes, restored
from .rebuild import rebuild
from .refusal import CaptureError
from .tracer import HOOKS, has_hooks

# How many dims of an input are left open, most first: what a model cannot leave open is tried narrower.
_OPEN = (lambda t: t.dim(), lambda t: min(1, t.dim()), lambda t: 0)


def export(model: nn.Module, inputs: tuple[Any, ...]) -> Captured:
    """The graph of `model` for inputs of the kinds and ranks of `inputs`, and of all sizes it does the same for.

    Raises:
        CaptureError: torch.export fails; the message names the line that stopped it.
    """
    for path, module in model.named_modules():
        if module is not model and has_hooks(module):
            raise CaptureError(f"{path} has hooks, which torch.export would run once and forget; remove them first")
    first: Exception | None = None
    for dims in _OPEN:
        try:
            return rebuild(model, inputs, _program(model, inputs, dims))
        except CaptureError:
            raise
        except Exception as error:  # what a forward raises on fake tensors can be anything
            first = first or error
    assert first is not None
    raise CaptureError(f"{type(model).__name__} cannot be exported{_where(first)}; {REMEDY}") from first


def _program(model: nn.Module, inputs: tuple[Any, ...], dims: Any) -> Any:
    """The ExportedProgram of `model`, which is as it was afterwards."""

    def sizes(value: Any) -> Any:
        return dict.fromkeys(range(dims(value)), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None

    shapes, own = pytree.tree_map(sizes, inputs), pytree.tree_map_only(Tensor, _own, inputs)
    autocast = (torch.autocast(d, enabled=False) for d in ("cpu", "cuda"))
    with _unchanged(model), torch.enable_grad(), _sizes_of_one(), next(autocast), next(autocast):
        return torch.export.export(model, own, dynamic_shapes=shapes, strict=False)


def _own(tensor: Tensor) -> Tensor:
    """A copy: torch.export takes one tensor given twice for one input."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def _sizes_of_one() -> Iterator[None]:
    """A size of 1 is one like any other.

    Else no other size would do where the examples have it, and where they have not, torch.export would answer
    `if len(x) == 1` without noting that it was asked. Fake writes ask so too, to see whether a tensor overlaps itself;
    real ones ask again.
    """
    unknown = 2  # MemOverlap::TooHard
    settings: Any = torch.fx.experimental._config
    config = settings.patch(backed_size_oblivious=True)
    with config, patch.object(torch, "_debug_has_internal_overlap", lambda tensor: unknown):
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """The model put back as it was; raises where its forward changes more of it than buffers."""
    with restored(model) as changed, attributes(model, buffers=True):
        for name in HOOKS:  # those of the model itself stay around the graph, and must not be in it too
            model.__dict__[name] = OrderedDict()
        yield
    if changed:
        raise CaptureError(f"the forward changes {changed[0]}, which a graph does not repeat")
