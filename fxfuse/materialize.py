"""From records to layers: weights computed in float64, rounded once, in an ordinary nn.Module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .constants import Attr, Values, leaves
from .record import Operator
from .refusal import Refusal
from .values import compute

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def sources(op: Operator) -> list[Attr]:
    """The parameters and buffers an operator is computed from, each once."""
    found = [a for _, c in op.consts for a in leaves(c)]
    return list(dict.fromkeys(found + [a for o in op.operands for a in sources(o)]))


def tensors(op: Operator, values: Values) -> tuple[Tensor, Tensor | None] | Refusal:
    """Weight and bias of `op` as its layer stores them, in the layer's dtype and on its device.

    Refused where a number of the result is not finite in that dtype.
    """
    inputs = [values(a) for a in sources(op)]
    device = next((t.device for t in inputs), torch.device("cpu"))
    dtype = op.dtype or torch.float32

    def reachable(attr: Attr) -> Tensor:
        tensor = values(attr)
        return tensor.cpu() if tensor.device.type == "mps" else tensor  # which has no float64

    with torch.no_grad():
        weight, bias = compute(op, reachable)
        if op.transposed:  # back to [C, N/g, *K]
            weight = weight.reshape(op.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        weight = weight.to(dtype=dtype, device=device).contiguous()
        if op.bias:
            bias = weight.new_zeros(op.out_channels) if bias is None else bias.to(weight).contiguous()
        else:
            bias = None
    if device.type != "meta":
        for tensor in (weight, bias):
            if tensor is not None and not torch.isfinite(tensor).all():
                return Refusal(
                    f"the merged weight has numbers that are not finite in {dtype}",
                    detail="overflow, or already there in the model",
                    remedy="fuse in a wider dtype and convert afterwards",
                )
    return weight, bias


def layer(op: Operator, weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Module:
    """The nn.Conv*, nn.ConvTranspose* or nn.Linear that executes `op`, in eval mode."""
    built: nn.Module
    if op.spatial == 0:
        built = nn.Linear(op.in_channels, op.out_channels, bias is not None, device="meta")
    else:
        mode = op.padding_mode
        padding = tuple(low for low, _ in op.padding)
        outside = any(low != high for low, high in op.padding) or op.pad_value != 0
        if outside and op.pads:  # an F.pad before the layer does it
            padding, mode = (0,) * len(padding), "zeros"
        fields = {"stride": op.stride, "padding": padding, "dilation": op.dilation, "groups": op.groups}
        fields |= {"output_padding": op.output_padding} if op.transposed else {"padding_mode": mode}
        cls = (_CONV_TRANSPOSE if op.transposed else _CONV)[op.spatial or 0]
        built = cls(op.input_width, op.out_channels, op.kernel, **fields, bias=bias is not None, device="meta")  # type: ignore[operator, arg-type]
    built.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        built.bias = nn.Parameter(bias, requires_grad)
    return built.eval()


def size(op: Operator) -> int:
    """Numbers stored by the layer of `op`."""
    return op.out_channels * (op.input_width // op.groups) * math.prod(op.kernel) + op.bias * op.out_channels
