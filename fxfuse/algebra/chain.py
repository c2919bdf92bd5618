"""g(f(x)) as one operator: what it has to be exact, and its structure; the numbers are in `chain_numbers`.

With f: K1, s1, d1, P1 and g: K2, s2, d2, P2 it has stride s1*s2, padding P1 + s1*P2 and taps at
i*d1 + j*d2*s1. Exact in a dim iff g does not pad it, or f has one tap there and the value f
takes outside of its input (its bias) is the value that g pads with. Where only these two differ, f has one tap and
does not pad itself, the difference is the same at every position out of bounds: that is what a frame adds.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fxfuse.algebra import taps
from fxfuse.algebra.combine import Result, densify, made_of, meet
from fxfuse.algebra.operator import Ints, Operator
from fxfuse.algebra.proof import bias_is
from fxfuse.refusal import Refusal


def compose(f: Operator, g: Operator) -> Result:
    """g(f(x)) as one operator, or what stands in the way; where it is only the border, a frame may help."""
    f, g = same_layout(f, g)
    if refusal := meet(f, g, f.out_channels, g.in_channels):
        return refusal
    if f.kind != "identity" and g.kind == "warp":
        return Refusal("a deformable convolution reads between positions, so what is before it stays there")
    if f.kind == "warp" and g.kind not in ("scale", "identity"):
        return Refusal("only factors and shifts a channel can follow a deformable convolution into its weight")
    if f.kind == "identity":
        return replace(g, dtype=g.dtype or f.dtype)
    if g.kind == "identity":
        return replace(f, dtype=f.dtype or g.dtype)
    return _transposed(f, g) or _at_border(f, g) or product(f, g)


def same_layout(f: Operator, g: Operator) -> tuple[Operator, Operator]:
    """Both in the layout of the one that has one."""
    if f.spatial is None and g.spatial is not None:
        f = f.at(g.spatial, g.in_channels)
    elif g.spatial is None and f.spatial is not None:
        g = g.at(f.spatial, f.out_channels)
    return f, g


def product(f: Operator, g: Operator, frame: bool = False) -> Operator:
    """What g(f(x)) is away from the border, for two of one layout; `compose` says when that is all of it."""
    f = _select_rows(f, g.reads)
    return _permuted(
        replace(
            f,
            **made_of("compose", f, g),
            **taps.of_chain(f, g),
            out_channels=g.out_channels,
            output_padding=(f if f.transposed else g).output_padding,
            groups=math.gcd(f.groups, g.groups),
            bias=f.bias or g.bias,
            padding_mode=f.padding_mode if f.pads else g.padding_mode,
            pad_value=f.pad_value if f.pads else 0 if frame or (g.pads and pads_with_bias(f, g)) else g.pad_value,
            framed=frame or f.framed or g.framed,
        )
    )


def _transposed(f: Operator, g: Operator) -> Refusal | None:
    if f.transposed and not g.pointwise:
        return Refusal("after a transposed convolution only a pointwise operator can be absorbed")
    if g.transposed and (not f.pointwise or f.bias):
        return Refusal(
            "before a transposed convolution only a pointwise operator without bias can be absorbed",
            remedy="drop the bias of the first one" if f.pointwise else "",
        )
    return None


def pads_with_bias(f: Operator, g: Operator) -> bool:
    """Whether f, fed zeros, gives on every channel the value that g pads with."""
    if not f.bias:
        return isinstance(g.pad_value, (int, float)) and g.pad_value == 0
    return bias_is(f, g.pad_value)


def _at_border(f: Operator, g: Operator) -> Refusal | None:
    """What keeps g(f(x)) from being one operator at the border."""
    if not g.pads or g.transposed:
        return None
    if refusal := pads_wide(f, g):
        return refusal
    if g.padding_mode != "zeros":
        plain = not f.pads and all(f.stride[d] == 1 for d in _padded(g))
        return None if plain else Refusal(f"{g.padding_mode} padding after a stride or another padding")
    if f.pads and (f.padding_mode != "zeros" or f.pad_value != 0 or f.framed):
        return Refusal("two paddings of different values meet")
    if f.pads and g.framed:
        return Refusal("both of them pad: a frame is about one border")
    if not pads_with_bias(f, g):
        return Refusal(
            "the second one pads with a value that is not the bias of the first: the border would differ",
            detail=f"{f.describe()} then {g.describe()}",
            remedy="drop the first bias, pad before the first layer, or pad with its bias",
        )
    return None


def _padded(g: Operator) -> list[int]:
    return [d for d, p in enumerate(g.padding) if p != (0, 0)]


def pads_wide(f: Operator, g: Operator) -> Refusal | None:
    """The refusal of a g that pads what more than one tap of f made."""
    if any(f.kernel[d] != 1 for d in _padded(g)):
        return Refusal(
            "the second one pads what a kernel of more than one tap made: the border would differ",
            detail=f"{f.describe()} then {g.describe()}",
            remedy="put the whole padding in the first layer and none in the second",
        )
    return None


def _select_rows(f: Operator, rows: Ints | None) -> Operator:
    """f with only the output channels `rows`, in that order."""
    if rows is None:
        return f
    per_group = f.out_channels // f.groups
    width = f.input_width // f.groups
    chunks = [rows[i : i + per_group] for i in range(0, len(rows), per_group)]
    whole = f.groups > 1 and all(len(c) == per_group and len({r // per_group for r in c}) == 1 for c in chunks)
    if whole:
        source = f.reads if f.reads is not None else tuple(range(f.in_channels))
        starts = [c[0] // per_group * width for c in chunks]
        reads, groups = tuple(i for start in starts for i in source[start : start + width]), len(chunks)
    else:
        f = densify(f, 1)
        reads, groups = f.reads or tuple(range(f.in_channels)), 1
    return replace(
        f,
        **made_of("rows", f) | {"consts": (("rows", rows),)},
        out_channels=len(rows),
        groups=groups,
        reads=None if reads == tuple(range(f.in_channels)) else reads,
    )


def _permuted(op: Operator) -> Operator:
    """An operator whose groups read all their channels in another order reads them in order instead."""
    if op.reads is None or len(op.reads) != op.in_channels:
        return op
    width = op.in_channels // op.groups
    own = (set(op.reads[i : i + width]) == set(range(i, i + width)) for i in range(0, op.in_channels, width))
    return densify(op, op.groups, full=True) if all(own) else op
