"""New weights for an optimized model: the recipes of its plan replayed, nothing planned again."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from fxfuse.algebra.constants import changed, model_values
from fxfuse.attributes import tensor_at
from fxfuse.compiling.weight_sets import bump
from fxfuse.guarded import GRAPHS, without_graphs
from fxfuse.names import below, shown
from fxfuse.process import undisturbed
from fxfuse.refusal import Refusal
from fxfuse.reporting.report import Report
from fxfuse.rewriting.layers import PARAMETERS, Replay, tensors
from fxfuse.rewriting.result import Result, keep
from fxfuse.rewriting.spelling import unspelled

STORE = "_fxfuse"


def store(fused: nn.Module, report: Report, replays: tuple[Replay, ...]) -> None:
    """Keep the report and the recipes with a module, and in its copies."""
    content = {"report": report, "replays": replays}
    if isinstance(fused, Result):
        keep(fused, {STORE: content})
    else:
        setattr(fused, STORE, content)


def stored(fused: nn.Module) -> dict[str, Any]:
    """What `store` kept.

    Raises:
        TypeError: the module does not come from `optimize`.
    """
    content = getattr(fused, STORE, None)
    if not isinstance(content, dict):
        raise TypeError(f"{type(fused).__name__} does not come from fxfuse.optimize")
    return content


@overload
def refresh() -> None: ...


@overload
def refresh(fused: nn.Module, model: nn.Module) -> nn.Module: ...


def refresh(fused: nn.Module | None = None, model: nn.Module | None = None) -> nn.Module | None:
    """Give `fused` the weights that `model` has now, in place; returns `fused`.

    Without arguments: whatever torch.compile's backend "fxfuse" made of weights is made anew at the next
    call. That is for changes that leave no trace on a tensor: `p.data.mul_()`, writes through numpy.

    `model` is the module that `fused` was made of, or one of the same structure. Nothing is changed
    unless every weight is there in the right shape.

    Raises:
        TypeError: `fused` does not come from `optimize`.
        ValueError: `model` lacks a weight, holds it in another shape, or a merged weight is not finite; or it takes
            channels by a tensor of indices that holds others now.
    """
    if fused is None or model is None:
        if fused is not model:
            raise TypeError("refresh takes the optimized module and its model, or nothing")
        bump()
        return None
    with undisturbed(model), torch.no_grad():
        for target, value in _new_values(fused, model):
            target.copy_(value)
    return fused


def _new_values(fused: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every tensor of `fused` with what it should hold."""
    fresh: dict[tuple[str, ...], Any] = {}
    for replay in stored(fused)["replays"]:
        fresh.update({_key(model, name): value for name, value in _fused_weights(replay, model).items()})
    source, targets = _state(model), _state(fused)
    found = []
    for name, target in targets.items():
        path = unspelled(model, without_graphs(name))
        value = fresh.get(_key(model, name), source.get(path))
        if value is None:  # a plain tensor among the model's attributes, which a graph holds as a buffer
            value = tensor_at(model, path)
        if value is None or value.shape != target.shape:
            raise ValueError(f"{type(model).__name__} has no such tensor as {shown(path)} of {tuple(target.shape)}")
        found.append((target, value))
    return found


def _key(model: nn.Module, name: str) -> tuple[str, ...]:
    """A name by the model's own path, and the graphs that it lies in."""
    graphs = [part for part in name.split(".") if part.startswith(GRAPHS)]
    return (*graphs, unspelled(model, without_graphs(name)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _fused_weights(replay: Replay, model: nn.Module) -> dict[str, Any]:
    """The tensors of one part's fused layers, by full name."""
    try:
        values = model_values(model.get_submodule(replay.path), replay.constants)
        other = changed(replay.held, values)
        computed = tensors(replay.operators.values(), values)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} is not the model that was optimized: {error}") from error
    if other is not None:
        where = below(replay.path, other)
        raise ValueError(f"{where} holds other values than the graph was made for: call fxfuse.optimize again")
    fresh: dict[str, Any] = dict(replay.constants)
    for path, op in replay.operators.items():
        numbers = computed[op]
        if isinstance(numbers, Refusal):
            raise ValueError(str(numbers.at(path)))
        held = zip(PARAMETERS, numbers, strict=True)
        fresh.update({f"{path}.{name}": value for name, value in held if value is not None})
    holder = below(replay.path, replay.inside) if replay.inside else replay.path
    return {below(holder, name): value for name, value in fresh.items()}
