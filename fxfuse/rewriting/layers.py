"""From records to layers: weights computed in float64, rounded once, in an ordinary nn.Module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.algebra.constants import Apply, Attr, Held, Values
from fxfuse.algebra.numbers import compute
from fxfuse.algebra.operator import Operator, sources
from fxfuse.algebra.terms import Numbers, overflow
from fxfuse.framed import FRAMED
from fxfuse.ops.deformable import torchvision_ops
from fxfuse.refusal import Refusal

Stored = tuple[Tensor, Tensor | None, Tensor | None]
PARAMETERS = ("weight", "bias", "frame")  # of a layer, in the order in which they are stored


def tensors(ops: Iterable[Operator], values: Values) -> dict[Operator, Stored | Refusal]:
    """Weight, bias and frame of every operator as its layer stores them, in the layer's dtype and on its device.

    Refused where that dtype cannot hold the result: numbers that overflow, a channel that vanishes.
    """

    def reachable(attr: Attr) -> Tensor:
        tensor = values(attr)
        return tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no float64

    with torch.no_grad():
        return {op: _stored(op, compute(op, reachable), values) for op in dict.fromkeys(ops)}


def _stored(op: Operator, numbers: Numbers, values: Values) -> Stored | Refusal:
    device = next((values(a).device for a in sources(op)), torch.device("cpu"))
    dtype = op.dtype or torch.float32
    weight = numbers.rounded(dtype, op.groups)
    if isinstance(weight, Refusal):
        return weight
    more = list[Tensor | None]()
    for wanted, shape, exact in (
        (op.bias, (op.out_channels,), numbers.bias),
        (op.framed, (op.out_channels, 1, *op.kernel), numbers.frame),
    ):
        # a copy, not the model's own
        rounded = torch.zeros(shape, dtype=dtype) if exact is None else exact.to(dtype, copy=True)
        if wanted and exact is not None and exact.device.type != "meta" and not torch.isfinite(rounded).all():
            return overflow(exact, dtype)
        more.append(rounded.contiguous().to(device) if wanted else None)
    if op.transposed:  # back to [C, N/g, *K]
        weight = weight.reshape(op.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    weight = weight.contiguous(memory_format=_memory_format(op, values, weight))
    return weight.to(device), more[0], more[1]


def _memory_format(op: Operator, values: Values, weight: Tensor) -> torch.memory_format:
    """Channels last where a kernel in it is, for then PyTorch's convolutions give such outputs."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim(), torch.contiguous_format)
    kernels = [values(a) for a in sources(op) if len(a.shape) == weight.dim()]
    found = any(not k.is_contiguous() and k.is_contiguous(memory_format=last) for k in kernels)
    return last if found else torch.contiguous_format


def blank(op: Operator) -> Stored:
    """Weight, bias and frame of the right shapes without storage, for a dry run."""
    pair = (op.out_channels, op.input_width // op.groups)
    if op.transposed:
        pair = (op.input_width, op.out_channels // op.groups)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=op.dtype, device="meta")

    bias = empty(op.out_channels) if op.bias else None
    return empty(*pair, *op.kernel), bias, empty(op.out_channels, 1, *op.kernel) if op.framed else None


@dataclass(frozen=True)
class Replay:
    """How the fused layers of one part of a model are computed, and the tensors that only its trace knew.

    It is what is kept of a plan, for new weights without a new plan. `operators` are those of the layers by the path of
    each; `held` are tensors that decided the graph, with what they held; `inside` is the graph within the part that
    the layers lie in, where the part itself has stayed.
    """

    path: str
    operators: dict[str, Operator]
    constants: dict[str, Any]
    held: dict[Attr | Apply, Held] = field(default_factory=dict)
    inside: str = ""


@cache
def _uninitialized(cls: Any) -> Any:
    """`cls` without the random initial weights that would be overwritten at once."""
    return type(cls.__name__, (cls,), {"reset_parameters": lambda self: None})


def layer(op: Operator, stored: Stored, requires_grad: bool) -> nn.Module:
    """The nn.Conv*, nn.ConvTranspose*, nn.Linear, framed or deformable convolution that executes `op`, in eval mode."""
    cls: Any = nn.Linear
    sizes: tuple[Any, ...] = (op.input_width, op.out_channels)
    fields: dict[str, Any] = {}
    if op.spatial != 0:
        mode, padding = op.padding_mode, tuple(low for low, _ in op.padding)
        outside = any(low != high for low, high in op.padding) or op.pad_value != 0
        if outside and op.pads:  # an F.pad before the layer does it, or a framed layer itself
            padding, mode = (0,) * len(padding), "zeros"
        sizes = (*sizes, op.kernel)
        fields = {"stride": op.stride, "padding": padding, "dilation": op.dilation, "groups": op.groups}
        if op.kind == "warp":
            cls = torchvision_ops().DeformConv2d
        else:
            name = f"Conv{'Transpose' * op.transposed}{op.spatial}d"
            cls = FRAMED[op.spatial or 0] if op.framed else getattr(nn, name)
            fields |= {"output_padding": op.output_padding} if op.transposed else {"padding_mode": mode}
            fields |= {"sides": op.padding} if op.framed else {}
    with torch.device("meta"):
        built: nn.Module = _uninitialized(cls)(*sizes, **fields, bias=op.bias)
    built.__class__ = cls
    for name, tensor in zip(PARAMETERS, stored, strict=True):
        if tensor is not None:
            setattr(built, name, nn.Parameter(tensor, requires_grad))
    return built.eval()
