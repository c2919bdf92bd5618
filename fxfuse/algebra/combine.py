"""What every combination of operators shares: which may meet, what the result is called, and how it runs as a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxfuse.algebra.operator import Operator
from fxfuse.refusal import Refusal

Result = Operator | Refusal
FRAME = 2  # executed nodes of a frame


def made_of(law: str, *operands: Operator) -> dict[str, Any]:
    """The fields every combination shares; it goes by the path of the heaviest weight inside."""
    heaviest = max(operands, key=lambda o: (o.weighted, o.macs, bool(o.path)))
    kinds = [o.kind for o in operands]
    plain = "scale" if law == "sum" else "select"  # x + x is no identity, nor is cat([x, x])
    return {
        "law": law,
        "operands": operands,
        "consts": (),
        "kind": next((k for k in ("warp", "conv", "pool", "pad", "scale", "select") if k in kinds), plain),
        "dtype": next((o.dtype for o in operands if o.dtype), None),
        "path": heaviest.path,
        "transposed": any(o.transposed for o in operands),
    }


def meet(f: Operator, g: Operator, left: int, right: int) -> Refusal | None:
    """What keeps two operators from acting on one tensor, of which each has its own idea how many channels it has."""
    if f.spatial != g.spatial:
        return Refusal(
            "the two act on different axes",
            detail=f"{f.describe()} and {g.describe()}",
            remedy="keep the channels on one axis between them",
        )
    if left != right:
        return Refusal("the channel counts differ and broadcast", detail=f"{left} and {right}")
    if f.dtype and g.dtype and f.dtype != g.dtype:
        return Refusal(
            "the two have different dtypes",
            detail=f"{f.dtype} and {g.dtype}",
            remedy="convert the model to one dtype with model.to(dtype)",
        )
    return None


def densify(op: Operator, groups: int, full: bool = False) -> Operator:
    """The same operator with fewer groups (`groups` divides `op.groups`), and with `full` of all channels: zeros."""
    if op.groups == groups and (not full or op.reads is None):
        return op
    return replace(op, **made_of("dense", op), groups=groups, reads=None if full else op.reads)


def dense(f: Operator, weight: Tensor, groups: int, full: bool = False) -> Tensor:
    """The weight of `f` with `groups` groups, and with a column for every channel if `full`."""
    count, width = weight.shape[:2]
    rows = torch.arange(count, device=weight.device)
    if f.groups != groups:
        ratio = f.groups // groups
        wide = weight.new_zeros(count, ratio, width, *weight.shape[2:])
        wide[rows, (rows // (count // f.groups)) % ratio] = weight
        weight = wide.flatten(1, 2)
    if full and f.reads is not None:
        columns = torch.tensor(f.reads, device=weight.device).reshape(groups, -1)
        wide = weight.new_zeros(count, f.in_channels // groups, *weight.shape[2:])
        if groups == 1:  # which may read a channel twice
            return wide.index_add_(1, columns[0], weight)
        wide[rows[:, None], columns[rows // (count // groups)] % wide.shape[1]] = weight
        weight = wide
    return weight


def finish(op: Operator) -> tuple[Operator, int] | Refusal:
    """`op` in a form that PyTorch's layers can hold, and how many nodes execute it.

    A run of channels costs one `narrow`, a padding that no layer can express one `F.pad`, a frame its
    convolution and a sum.
    """
    if not op.weighted:
        return Refusal("there is no convolution or linear layer to absorb it")
    if op.spatial == 0 and op.groups > 1:
        op = densify(op, 1)
    if op.reads is not None and op.reads != tuple(range(op.reads[0], op.reads[0] + len(op.reads))):
        if op.groups > 1:
            return Refusal("it would have to gather channels before a grouped convolution")
        op = densify(op, 1, full=True)
    if op.pads and not isinstance(op.pad_value, (int, float)):
        return Refusal("it would need a padding with a value for each channel")
    return op, 1 + (op.reads is not None) + needs_pad(op) + FRAME * op.framed


def needs_pad(op: Operator) -> bool:
    """Whether the padding of `op` needs an `F.pad` of its own."""
    return op.pads and not op.framed and (op.pad_value != 0 or any(low != high for low, high in op.padding))
