"""Deep copies of any module, those included that deepcopy refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import CellType, FunctionType
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
    closures = [new for function in _hooks(value) for new in _with_own_cells(function, memo)]
    made = copy.deepcopy(value, memo)
    for cell, content in closures:
        cell.cell_contents = memo.get(id(content), content)  # what is not the model's stays what it is
    return made


def _hooks(value: Any) -> Iterator[FunctionType]:
    """The functions that modules hold, as hooks and in attributes."""
    for module in value.modules() if isinstance(value, nn.Module) else ():
        for held in vars(module).values():
            inner = held.values() if isinstance(held, dict) and held else (held,)
            yield from (f for f in inner if isinstance(f, FunctionType) and f.__closure__)


def _with_own_cells(function: FunctionType, memo: dict[int, Any]) -> Iterator[tuple[CellType, Any]]:
    """Have a copy with new cells stand for a function, which deepcopy shares: a hook would write into the original."""
    if id(function) in memo:
        return
    cells = [(CellType(), cell.cell_contents) for cell in function.__closure__ or () if filled(cell)]
    if len(cells) != len(function.__closure__ or ()):
        return
    memo[id(function)] = with_cells(function, tuple(cell for cell, _ in cells))
    yield from cells


def with_cells(function: FunctionType, closure: tuple[CellType, ...]) -> FunctionType:
    """The same function over other variables of its surroundings."""
    new = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    vars(new).update(vars(function))
    return new


def filled(cell: CellType) -> bool:
    """Whether a cell of a closure holds anything yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _special(tensor: Tensor) -> Tensor:
    """A copy of a tensor that is computed, or of another class or layout."""
    try:
        return copy.deepcopy(tensor)
    except RuntimeError:  # a computed one, a class without a __deepcopy__ of its own, a sparse parameter
        clone = tensor.detach().clone()
        return nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
