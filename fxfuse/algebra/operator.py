"""The operator record: every affine layer is one `Operator`, whatever its name or rank.

On a tensor [B, C, *S] an operator holds a weight [N, C/g, *K], a bias [N] or none, stride s,
dilation d, padding (low, high) per spatial dim, the value padded, and groups g: output position
o along a dim reads input positions s*o + i*d - low for taps i. The channel axis is -(S+1), so
`spatial == 0` is a linear layer on the last axis. One that is `framed` adds a frame [N, 1, *K]: its
number of a tap counts at every position where that tap reads out of bounds, as a weight on one more
input channel that is 1 there and 0 inside. The record describes structure only; the numbers are
computed from `law`, `operands` and `consts` by `numbers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from fxfuse.algebra.constants import Apply, Attr, Const, leaves

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """One affine map on the channels and positions of a tensor.

    `spatial` is None for what acts alike on every layout (`x * 2`, dropout): it takes the layout
    of whatever it meets, see `at`. `reads` names the input channels used, in order; None means
    all of them. `kind` is what patterns match on: conv, warp (a deformable conv), scale,
    identity, pool, pad or select.
    """

    kind: str
    law: str
    spatial: int | None = None
    in_channels: int = 0
    out_channels: int = 0
    kernel: Ints = ()
    stride: Ints = ()
    dilation: Ints = ()
    padding: Pads = ()
    groups: int = 1
    bias: bool = False
    reads: Ints | None = None
    padding_mode: str = "zeros"
    pad_value: Const = 0
    framed: bool = False
    transposed: bool = False
    output_padding: Ints = ()
    dtype: torch.dtype | None = None
    path: str = ""
    consts: tuple[tuple[str, Any], ...] = ()
    operands: tuple[Operator, ...] = ()
    applied: tuple[str, ...] = ()

    @property
    def weighted(self) -> bool:
        """Whether a conv or linear is in it, so that it runs as one and can absorb others."""
        return self.kind in ("conv", "warp")

    @property
    def computed(self) -> bool:
        """Whether it is one layer whose weight or bias is an expression, evaluated at every call."""
        return self.weighted and any(isinstance(c, Apply) for _, c in self.consts)

    @property
    def input_width(self) -> int:
        """Number of channels it reads."""
        return self.in_channels if self.reads is None else len(self.reads)

    @property
    def pointwise(self) -> bool:
        """One tap, stride 1, no padding: the value at a position depends on that position alone."""
        ones = all(n == 1 for n in (*self.kernel, *self.stride))
        return ones and not (self.transposed or self.pads or self.kind == "warp")

    @property
    def depthwise(self) -> bool:
        """One input channel for each output channel."""
        return self.groups == self.out_channels == self.input_width

    @property
    def keeps_size(self) -> bool:
        """Whether its output has the size of its input, whatever that is."""
        if self.kind == "identity" or self.spatial is None:
            return self.kind != "commuting"
        whole = self.in_channels == self.out_channels and self.reads is None and not self.transposed
        geometry = zip(self.kernel, self.stride, self.dilation, self.padding, strict=True)
        return whole and all(s == 1 and sum(p) == d * (k - 1) for k, s, d, p in geometry)

    @property
    def pads(self) -> bool:
        return any(low or high for low, high in self.padding)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one output position; 0 for what is not a conv or linear."""
        if not self.weighted:
            return 0
        return self.out_channels * (self.input_width // self.groups) * math.prod(self.kernel)

    @property
    def pixels(self) -> Fraction:
        """Output positions for each input position, borders aside."""
        size = math.prod(self.stride)
        return Fraction(size) if self.transposed else Fraction(1, size)

    @property
    def params(self) -> int:
        return self.macs + self.weighted * self.bias * self.out_channels

    @property
    def frame_conv(self) -> Operator:
        """What makes the frame: a convolution of the one channel that is 1 out of bounds, once for a whole batch."""
        return replace(self, in_channels=1, reads=None, groups=1, bias=False, framed=False)

    def const(self, name: str) -> Any:
        return dict(self.consts)[name]

    def at(self, spatial: int, channels: int) -> Operator:
        """This layout-free operator on a tensor of `channels` channels and `spatial` dims."""
        if self.spatial is not None:
            return self
        operands = tuple(o.at(spatial, channels) for o in self.operands)
        return self.on_layout(spatial, channels, operands=operands)

    def on_layout(self, spatial: int | None, channels: int | None = None, **fields: Any) -> Operator:
        """This factor and shift a channel on a tensor with another number of dims after its channels, or of those.

        What is None stays: layout-free, or as many channels as before. `fields` are set besides.
        """
        layout: dict[str, Any] = {}
        if spatial is not None:
            ones, none = (1,) * spatial, (0,) * spatial
            layout = {"spatial": spatial, "kernel": ones, "stride": ones, "dilation": ones, "output_padding": none}
            layout["padding"] = ((0, 0),) * spatial
            layout |= {} if channels is None else dict.fromkeys(("in_channels", "out_channels", "groups"), channels)
        return replace(self, **layout | fields)

    def describe(self) -> str:
        """`conv2d 64->128 k3x3 s2 p1 g4`: the shape of the operator for a report."""
        rank = "" if self.spatial is None else f"{self.spatial}d"
        names = {"conv": "linear" if self.spatial == 0 else f"conv{rank}", "warp": f"deform_conv{rank}"}
        name = names.get(self.kind, self.kind)
        if self.transposed:
            name = f"conv_transpose{rank}"
        text = f"{name} {self.input_width}->{self.out_channels}" if self.spatial is not None else name
        if any(k != 1 for k in self.kernel):
            text += " k" + "x".join(map(str, self.kernel))
        if any(s != 1 for s in self.stride):
            text += " s" + "x".join(map(str, dict.fromkeys(self.stride)))
        if self.pads:
            text += " p" + "x".join(str(lo) if lo == hi else f"{lo}:{hi}" for lo, hi in dict.fromkeys(self.padding))
        if any(d != 1 for d, k in zip(self.dilation, self.kernel, strict=True) if k > 1):
            text += " d" + "x".join(map(str, dict.fromkeys(self.dilation)))
        if self.groups > 1 and self.weighted:
            text += f" g{self.groups}"
        return text + " + border" * self.framed


IDENTITY = Operator(kind="identity", law="identity")


def sources(op: Operator) -> list[Attr]:
    """The parameters and buffers an operator is computed from, each once."""
    found = [a for _, c in op.consts for a in leaves(c)]
    return list(dict.fromkeys(found + [a for o in op.operands for a in sources(o)]))


def pointwise(kind: str, law: str, spatial: int, channels: int, **fields: Any) -> Operator:
    """A depthwise 1x1 operator: batch norm, a per-channel factor, a channel selection, a pad."""
    return Operator(kind=kind, law=law).on_layout(spatial, channels, **fields)


def shuffled(channels: int, groups: int) -> Ints:
    """The channels that a channel shuffle reads, in order (ShuffleNet, Zhang et al. 2018, section 3.1)."""
    size = channels // groups
    return tuple((j % groups) * size + j // groups for j in range(channels))
