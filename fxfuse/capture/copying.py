"""Deep copies of any module, those included that deepcopy refuses."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy; tensors that deepcopy refuses are copied as plain values.

    These are computed ones (by weight_norm, pruning, ...), sparse ones, and those of a class that does not say
    how to copy it.
    """
    memo = {} if memo is None else memo
    values = [value]
    if isinstance(value, nn.Module):
        tables = [t for m in value.modules() for t in (m.__dict__, m._buffers, m._parameters)]
        values += [v for table in tables for v in table.values()]
    for tensor in values:
        if isinstance(tensor, Tensor) and id(tensor) not in memo:
            strided = tensor.is_leaf and tensor.layout is torch.strided
            if not (strided and type(tensor) in (Tensor, nn.Parameter, nn.Buffer)):
                memo[id(tensor)] = _special(tensor)
    return copy.deepcopy(value, memo)


def _special(tensor: Tensor) -> Tensor:
    """A copy of a tensor that is computed, or of another class or layout."""
    try:
        return copy.deepcopy(tensor)
    except RuntimeError:  # a computed one, a class without a __deepcopy__ of its own, a sparse parameter
        clone = tensor.detach().clone()
        return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
