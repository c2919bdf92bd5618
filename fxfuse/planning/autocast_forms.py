"""What dtype a fused stretch has under torch.autocast in the model, where its one layer would give a lower one.

Autocast lowers convolutions and linear layers alone. A batch norm keeps what it reads, and a parameter of float32
lifts what it is multiplied with or added to. A merged layer is lowered whatever it was made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from functools import reduce

import torch

from fxfuse.algebra.constants import Apply, Attr
from fxfuse.planning.regions import Part, Step
from fxfuse.planning.sites import Fuse
from fxfuse.reading.view import View

FORM = "under_autocast"  # the attribute of a layer that holds one of these:
WIDEN = "widen"  # the layer as it is, its output as float32
SOURCE = "source"  # in the dtype of what it reads, when that is float32
FLOAT32 = "float32"  # in float32, whatever it reads

_LOWERED = {"conv", "conv_transpose", "linear", "mm", "matmul", "bmm"}
_KEEPING = {"batch_norm", "deform"}


class _Dtype(IntEnum):
    """The dtype of a value under autocast; of a sum, that of the greatest of its summands."""

    LOWER = 0
    SOURCE = 1  # that of what the stretch reads
    FLOAT32 = 2


_Value = tuple[_Dtype, bool]  # and whether part of it, x itself or a shift, is added to it without being lowered


def autocast_form(view: View, fuse: Fuse) -> str | None:
    """How the layer of a stretch is to run under autocast; None where it gives what the model does."""
    if fuse.op.dtype != torch.float32:
        return None
    dtype, direct = _through(view, fuse.parts, (_Dtype.SOURCE, True))
    if dtype is _Dtype.LOWER:
        return None
    if fuse.op.kind == "warp":  # which autocast does not lower
        return WIDEN if dtype is _Dtype.FLOAT32 else None
    if dtype is _Dtype.SOURCE:
        return SOURCE
    return FLOAT32 if direct else WIDEN


def _through(view: View, parts: Iterable[Part], value: _Value) -> _Value:
    """The dtype behind `parts` of a value with the dtype `value`."""
    for part in parts:
        if isinstance(part, Step):
            value = _after(view, part, value)
        else:
            values = [_through(view, branch.parts, value) for branch in part.branches]
            value = reduce(lambda a, b: (max(a[0], b[0]), a[1] or b[1]), values)
    return value


def _after(view: View, step: Step, value: _Value) -> _Value:
    node = step.node
    call = None if node is None else view.calls.get(node)
    if node is None or call is None or call.op in _KEEPING:
        shifted = call is not None and call.op == "batch_norm" and value[0] is _Dtype.FLOAT32
        return value[0], value[1] or shifted
    form = getattr(view.captured.modules.get(str(node.target)), FORM, None)
    if form is not None:  # of a model that was optimized before
        return (value[0] if form == SOURCE else _Dtype.FLOAT32), value[1] and form != WIDEN
    if call.op in _LOWERED:
        return _Dtype.LOWER, False
    constants = (a for a in call.args.values() if isinstance(a, (Attr, Apply)) and a.shape)
    if not any(a.dtype == torch.float32 for a in constants):
        return value
    return _Dtype.FLOAT32, value[1] or call.op in ("add", "sub")  # rounded with a large shift the rest is lost
