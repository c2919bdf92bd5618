"""What the submodules of a model are called with, seen by running it on example inputs; and inputs made up for that."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.capture.copying import copied
from fxfuse.capture.example_inputs import arguments, own_tensors
from fxfuse.capture.failures import said
from fxfuse.capture.guards import ParametersStay, WritesAParameter, random_kept
from fxfuse.capture.shadow import Shadow

logger = logging.getLogger("fxfuse")
Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[str, list[Call]]

_KINDS = 3  # calls of one module that are kept: of other kinds, not of other data
_BUDGET = 2**30  # bytes of inputs that are kept
_SIZES = (64, 224, 256, 32)


def calls_of(model: nn.Module, inputs: tuple[Any, ...]) -> Calls:
    """The calls of each submodule with children, by path, when the model runs on `inputs`; those before it fails."""
    try:
        return _calls_of(model, inputs)
    except WritesAParameter:
        return _calls_of(copied(model), inputs, ours=True)


def _calls_of(model: nn.Module, inputs: tuple[Any, ...], ours: bool = False) -> Calls:
    shadow = Shadow(model, tensors=True)
    found: Calls = {}
    kinds: dict[str, set[str]] = {}
    held = 0

    def note(path: str, args: Any, kwargs: Any) -> None:
        nonlocal held
        kind = str(pytree.tree_map(_kind, (args, kwargs)))
        known = kinds.setdefault(path, set())
        if kind in known or len(known) >= _KINDS or held > _BUDGET:
            return
        known.add(kind)
        own = own_tensors((args, kwargs))
        held += sum(t.nbytes for t in pytree.tree_leaves(own) if isinstance(t, Tensor))
        found.setdefault(path, []).append(own)

    for path, module in shadow.root.named_modules(remove_duplicate=False):
        if path and any(module.children()) and not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(lambda _, args, kwargs, p=path: note(p, args, kwargs), with_kwargs=True)
    try:
        with torch.no_grad(), random_kept(), nullcontext() if ours else ParametersStay(shadow.root):
            args, kwargs = arguments(model, own_tensors(inputs))
            shadow.root(*args, **kwargs)
    except WritesAParameter:
        raise
    except Exception as error:  # whatever the model raises: the calls before it are known
        logger.info("no calls known ahead: %s", said(error))
    finally:
        shadow.changed()  # puts back what no shadow holds
    return found


def _kind(value: Any) -> Any:
    return (value.dim(), value.dtype) if isinstance(value, Tensor) else value


def made_up(model: nn.Module) -> tuple[Any, ...] | None:
    """Inputs that the model runs on, by its first layer; None where there is none, or they do not fit."""
    layer = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    first = next(iter(model.parameters()), None)
    if layer is None or first is None or first.is_meta or getattr(layer, "transposed", False):
        return None
    for size in _SIZES:
        sizes = (
            (layer.in_features,)
            if isinstance(layer, nn.Linear)
            else (layer.in_channels, *(size,) * (layer.weight.dim() - 2))
        )
        shadow = Shadow(model, tensors=True)
        try:
            with torch.no_grad(), random_kept(), ParametersStay(shadow.root):
                inputs = (torch.randn(2, *sizes).to(first),)
                shadow.root(*inputs)
            return inputs
        except WritesAParameter:
            return inputs
        except Exception as error:  # it takes something else
            logger.debug("made-up inputs do not fit: %s", said(error))
        finally:
            shadow.changed()
    return None
