"""One operation by its canonical name, whatever the graph spelled it as, and which functions and methods are one."""

from __future__ import annotations

import operator
from ast import literal_eval
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.refusal import Refusal

# Calls with several results: whoever reads the tensor reads it where one of them is taken out.
SEVERAL = {"chunk", "split", "batch_norm_outputs"}
PIECES = {"chunk", "split", "split_with_sizes"}  # plain names of what cuts a tensor into several


@dataclass(frozen=True, slots=True)
class Call:
    """One operation: canonical name, arguments by name, spatial dims where the name fixes them."""

    op: str
    args: dict[str, Any]
    spatial: int | None = None
    path: str = ""
    inplace: bool = False
    refusal: Refusal | None = None


Calls = Mapping[Node, Call]

# Other names under which PyTorch takes the same arguments.
_ALSO = {"axis": "dim", "keepdims": "keepdim", "mat2": "other"}
_ALSO |= {"tensor": "input", "split_size_or_sections": "split_size"}


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a function or method in order, which become those of one canonical operation."""

    op: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    spatial: int | None = None
    inplace: bool = False

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call; None where arguments are missing, or there are some that the operation does not know."""
        given = {n if n in self.names else _ALSO.get(n, n): v for n, v in kwargs.items()}
        extra = [v for n, v in given.items() if n not in self.names and n != "_stacklevel"]
        if len(args) > len(self.names) or any(v is not None for v in extra):
            return None
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **given}
        if any(n not in bound for n in self.names):
            return None
        return Call(self.op, {n: bound[n] for n in self.names}, self.spatial, inplace=self.inplace)


def signature(op: str, text: str, spatial: int | None = None, inplace: bool = False) -> Signature:
    """A signature whose `text` names the arguments, those that may be left out with their defaults: "input dim=0"."""
    fields = [field.partition("=") for field in text.split()]
    defaults = {name: literal_eval(value) for name, equals, value in fields if equals}
    return Signature(op, tuple(name for name, _, _ in fields), defaults, spatial, inplace)


def piece_sizes(call: Call, whole: int | None) -> Sequence[Any] | None:
    """What chunk or split cuts an axis of size `whole` into; None where that is not known."""
    sizes = call.args["chunks" if call.op == "chunk" else "split_size"]
    if isinstance(sizes, int) and sizes > 0 and whole:
        size = -(-whole // sizes) if call.op == "chunk" else sizes
        return [min(size, whole - i) for i in range(0, whole, size)]
    return sizes if isinstance(sizes, (list, tuple)) else None


def pad_pairs(pad: Any) -> list[tuple[int, int]] | None:
    """(low, high) of each dim in order, of what `F.pad` takes; None where it is not known, or cuts."""
    if not isinstance(pad, (tuple, list)) or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    return list(zip(pad[::2], pad[1::2], strict=True))[::-1]


_CONV = "input weight bias=None stride=1 padding=0"
_TRANSPOSED = _CONV + " output_padding=0 groups=1 dilation=1"
_POOL = "input kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True"
FUNCTIONS: dict[Any, Signature] = {
    F.batch_norm: signature(
        "batch_norm", "input running_mean running_var weight=None bias=None training=False momentum=0.1 eps=1e-5"
    ),
    torch.batch_norm: signature(
        "batch_norm", "input weight bias running_mean running_var training momentum eps cudnn_enabled"
    ),
    F.linear: signature("linear", "input weight bias=None", 0),
    F.avg_pool1d: signature("avg_pool", _POOL, 1),
    F.avg_pool2d: signature("avg_pool", _POOL + " divisor_override=None", 2),
    F.avg_pool3d: signature("avg_pool", _POOL + " divisor_override=None", 3),
    F.pad: signature("pad", "input pad mode='constant' value=None"),
    F.dropout: signature("dropout", "input p=0.5 training=True inplace=False"),
    torch.mm: signature("mm", "input other"),
    operator.neg: signature("neg", "input"),
    operator.getitem: signature("getitem", "input index"),
    operator.setitem: signature("setitem", "input index value", inplace=True),
    torch.chunk: signature("chunk", "input chunks dim=0"),
    torch.split: signature("split", "input split_size dim=0"),
    torch.narrow: signature("narrow", "input dim start length"),
    torch.flip: signature("flip", "input dims"),
    torch.index_select: signature("index_select", "input dim index"),
    torch.cat: signature("cat", "tensors dim=0"),
    torch.channel_shuffle: signature("channel_shuffle", "input groups"),
}
for _d in (1, 2, 3):
    FUNCTIONS[getattr(F, f"conv{_d}d")] = signature("conv", _CONV + " dilation=1 groups=1", _d)
    FUNCTIONS[getattr(F, f"conv_transpose{_d}d")] = signature("conv_transpose", _TRANSPOSED, _d)
    FUNCTIONS[getattr(F, f"dropout{_d}d")] = FUNCTIONS[F.dropout]
FUNCTIONS[torch.concat] = FUNCTIONS[torch.concatenate] = FUNCTIONS[torch.cat]
FUNCTIONS[torch.matmul] = FUNCTIONS[operator.matmul] = FUNCTIONS[torch.mm]
FUNCTIONS[torch._C._nn.pad] = FUNCTIONS[F.pad]  # what torch.compile makes of it
FUNCTIONS[F.channel_shuffle] = FUNCTIONS[F.native_channel_shuffle] = FUNCTIONS[torch.channel_shuffle]
FUNCTIONS[torch.neg] = FUNCTIONS[torch.negative] = FUNCTIONS[operator.neg]

METHODS: dict[str, Signature] = {
    n: FUNCTIONS[getattr(torch, n)]
    for n in ("chunk", "split", "narrow", "flip", "index_select", "neg", "negative", "mm", "matmul")
}
for _op, _more in {"add": " alpha=1", "sub": " alpha=1", "mul": "", "div": " rounding_mode=None"}.items():
    _alias = "truediv" if _op == "div" else _op
    _plain, _writes = (signature(_op, "input other" + _more, inplace=inplace) for inplace in (False, True))
    FUNCTIONS[getattr(operator, _alias)] = FUNCTIONS[getattr(torch, _op)] = METHODS[_op] = _plain
    FUNCTIONS[getattr(operator, "i" + _alias)] = METHODS[_op + "_"] = _writes
for _long, _short in (("multiply", "mul"), ("subtract", "sub"), ("divide", "div"), ("true_divide", "div")):
    FUNCTIONS[getattr(torch, _long)] = METHODS[_long] = METHODS[_short]
    METHODS[_long + "_"] = METHODS[_short + "_"]
