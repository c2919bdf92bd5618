"""Deep copies of any module, those included that deepcopy refuses."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy; tensors that were computed (by weight_norm, pruning, ...) are copied as plain values."""
    memo = {} if memo is None else memo
    values = [value]
    if isinstance(value, nn.Module):
        values += [v for m in value.modules() for v in (*m.__dict__.values(), *m._buffers.values())]
    for tensor in values:
        if isinstance(tensor, Tensor) and not tensor.is_leaf and id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)
