"""New weights for an optimized model: the recipes of its plan replayed, nothing planned again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .assemble import spelled
from .constants import model_values
from .materialize import tensors
from .refusal import Refusal
from .report import Report
from .rewrite import Recipe

STORE = "_fxfuse"


def store(fused: GraphModule, report: Report, recipes: tuple[Recipe, ...], constants: dict[str, Any]) -> None:
    """Keep the report and the recipes where deepcopy (meta) and pickle (attributes) both find them."""
    content = {"report": report, "recipes": recipes, "constants": constants}
    fused.meta[STORE] = content
    setattr(fused, STORE, content)


def stored(fused: nn.Module) -> dict[str, Any]:
    """What `store` kept.

    Raises:
        TypeError: the module does not come from `optimize`.
    """
    content = getattr(fused, STORE, None) or getattr(fused, "meta", {}).get(STORE)
    if not isinstance(content, dict):
        raise TypeError(f"{type(fused).__name__} does not come from fxfuse.optimize")
    return content


def refresh(fused: GraphModule, model: nn.Module) -> GraphModule:
    """Give `fused` the weights that `model` has now, in place; returns `fused`.

    `model` is the module that `fused` was made of, or one of the same structure. Nothing is changed
    unless every weight is there in the right shape.

    Raises:
        TypeError: `fused` does not come from `optimize`.
        ValueError: `model` lacks a weight, holds it in another shape, or a merged weight is not finite.
    """
    content = stored(fused)
    fresh = _fused_weights(content, model)
    state = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    source = {spelled(model, name): tensor for name, tensor in state}
    targets = dict(fused.named_parameters(remove_duplicate=False)) | dict(fused.named_buffers(remove_duplicate=False))
    for name, target in targets.items():
        value = fresh.setdefault(name, source.get(name, content["constants"].get(name)))
        if value is None or value.shape != target.shape:
            raise ValueError(f"{type(model).__name__} has no such tensor as {name} of {tuple(target.shape)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(fresh[name])
    return fused


def _fused_weights(content: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    values = model_values(model, content["constants"])
    try:
        computed = tensors((recipe.op for recipe in content["recipes"]), values)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} is not the model that was optimized: {error}") from error
    fresh: dict[str, Any] = {}
    for recipe in content["recipes"]:
        numbers = computed[recipe.op]
        if isinstance(numbers, Refusal):
            raise ValueError(str(numbers.at(recipe.target)))
        fresh[f"{recipe.target}.weight"] = numbers[0]
        if numbers[1] is not None:
            fresh[f"{recipe.target}.bias"] = numbers[1]
    return fresh
