"""Composition, sum and concatenation of operators: the structure of the result, or a Refusal.

Each function says exactly when the result is exact and what shape it has; the numbers follow in
`values`. For a dim with kernel K, stride s, dilation d, padding (low, high) on a length L, an
operator gives floor((L + low + high - d*(K-1) - 1) / s) + 1 positions, so two operators agree on
every L iff their strides and their `low + high - d*(K-1)` agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxfuse.algebra import border
from fxfuse.algebra.operator import Ints, Operator
from fxfuse.refusal import Refusal

Result = Operator | Refusal
FRAME = 2  # executed nodes of a frame


def compose(f: Operator, g: Operator) -> Result:
    """g(f(x)) as one operator.

    With f: K1, s1, d1, P1 and g: K2, s2, d2, P2 it has stride s1*s2, padding P1 + s1*P2 and taps at
    i*d1 + j*d2*s1. Exact in a dim iff g does not pad it, or f has one tap there and the value f
    takes outside of its input (its bias) is the value that g pads with. See `framed` where it is not.
    """
    f, g = _same_layout(f, g)
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
    return _transposed_chain(f, g) or border.refuse(f, g) or product(f, g)


def framed(f: Operator, g: Operator) -> Result:
    """g(f(x)) as one operator with a frame, where g pads with another value than f gives out of bounds.

    The frame holds, for each tap, what the two differ by: W2 * (padded value - b1), summed over the channels.
    """
    f, g = _same_layout(f, g)
    refusal = meet(f, g, f.out_channels, g.in_channels) or border.refuse_frame(f, g)
    return refusal or product(f, g, frame=True)


def needs_frame(f: Operator, g: Operator) -> bool:
    """Whether g(f(x)) is one operator with a frame and none without."""
    f, g = _same_layout(f, g)
    if f.kind == "identity" or f.spatial != g.spatial or not g.pads or border.refuse_frame(f, g):
        return False
    return not border.matches(f, g)


def product(f: Operator, g: Operator, frame: bool = False) -> Operator:
    """What g(f(x)) is away from the border, for two of one layout; `compose` says when it is all, `framed` the rest."""
    f = _select_rows(f, g.reads)
    groups = math.gcd(f.groups, g.groups)
    geometry = [_chain_taps(f, g, d) for d in range(f.spatial or 0)]
    kernel = tuple(k for k, _ in geometry)
    dilation = tuple(d for _, d in geometry)
    padding = tuple((a[0] + s * b[0], a[1] + s * b[1]) for a, b, s in zip(f.padding, g.padding, f.stride, strict=True))
    source = f if f.transposed else g
    return _permuted(
        replace(
            f,
            **_made_of("compose", f, g),
            in_channels=f.in_channels,
            reads=f.reads,
            out_channels=g.out_channels,
            kernel=kernel,
            stride=tuple(a * b for a, b in zip(f.stride, g.stride, strict=True)),
            dilation=dilation,
            padding=padding,
            output_padding=source.output_padding,
            groups=groups,
            bias=f.bias or g.bias,
            padding_mode=f.padding_mode if f.pads else g.padding_mode,
            pad_value=f.pad_value if f.pads else 0 if frame or (g.pads and border.matches(f, g)) else g.pad_value,
            framed=frame or f.framed or g.framed,
        )
    )


def add(ops: Sequence[Operator]) -> Result:
    """The sum of operators on one tensor: taps aligned by the input offset they read."""
    ops = _common_layout(ops)
    if refusal := _branches(ops):
        return refusal
    if len({o.out_channels for o in ops}) > 1:
        return Refusal("the summands have different channel counts and broadcast")
    if len({o.reads for o in ops}) > 1:
        ops = [densify(o, 1, full=True) for o in ops]
    united = _unite_taps(ops)
    return united if isinstance(united, Refusal) else replace(united, groups=math.gcd(*(o.groups for o in ops)))


def concat(ops: Sequence[Operator]) -> Result:
    """The operators' outputs one after the other on the channel axis.

    Dense when all read the same channels; one grouped operator when each reads a run of its own.
    """
    ops = _common_layout(ops)
    if refusal := _branches(ops):
        return refusal
    if any(o.transposed for o in ops):
        return Refusal("transposed convolutions are not concatenated")
    if ops[0].spatial is None:
        return Refusal("nothing that is concatenated has a known number of channels")
    reads = [o.reads if o.reads is not None else tuple(range(o.in_channels)) for o in ops]
    joined = tuple(c for r in reads for c in r)
    rows = {o.out_channels // o.groups for o in ops}
    columns = {o.input_width // o.groups for o in ops}
    in_order = joined == tuple(range(joined[0], joined[0] + len(joined)))
    if in_order and len(rows) == len(columns) == 1:
        united = _unite_taps(ops)
        if isinstance(united, Refusal):
            return united
        reads_all = None if len(joined) == united.in_channels else joined
        merged = replace(united, groups=sum(o.groups for o in ops), reads=reads_all)
    else:
        full = len(set(reads)) > 1
        united = _unite_taps([densify(o, 1, full=full) for o in ops])
        if isinstance(united, Refusal):
            return united
        merged = united
    return replace(merged, law="concat", out_channels=sum(o.out_channels for o in ops))


def densify(op: Operator, groups: int, full: bool = False) -> Operator:
    """The same operator with fewer groups (`groups` divides `op.groups`), and with `full` of all channels: zeros."""
    if op.groups == groups and (not full or op.reads is None):
        return op
    return replace(op, **_made_of("dense", op), groups=groups, reads=None if full else op.reads)


def _made_of(law: str, *operands: Operator) -> dict[str, Any]:
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


def _same_layout(f: Operator, g: Operator) -> tuple[Operator, Operator]:
    if f.spatial is None and g.spatial is not None:
        f = f.at(g.spatial, g.in_channels)
    elif g.spatial is None and f.spatial is not None:
        g = g.at(f.spatial, f.out_channels)
    return f, g


def _common_layout(ops: Sequence[Operator]) -> list[Operator]:
    known = next((o for o in ops if o.spatial is not None), None)
    if known is None:
        return list(ops)
    return [o.at(known.spatial or 0, known.in_channels) for o in ops]


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


def _transposed_chain(f: Operator, g: Operator) -> Refusal | None:
    if f.transposed and not g.pointwise:
        return Refusal("after a transposed convolution only a pointwise operator can be absorbed")
    if g.transposed and (not f.pointwise or f.bias):
        return Refusal(
            "before a transposed convolution only a pointwise operator without bias can be absorbed",
            remedy="drop the bias of the first one" if f.pointwise else "",
        )
    return None


def _chain_taps(f: Operator, g: Operator, dim: int) -> tuple[int, int]:
    """Kernel size and dilation of taps i*d1 + j*d2*s1."""
    k1, k2 = f.kernel[dim], g.kernel[dim]
    d1, d2 = f.dilation[dim], g.dilation[dim] * (1 if f.transposed else f.stride[dim])
    if k2 == 1:
        return k1, d1
    if k1 == 1:
        return k2, d2
    step = math.gcd(d1, d2)
    return ((k1 - 1) * d1 + (k2 - 1) * d2) // step + 1, step


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
        reads = tuple(
            source[i] for c in chunks for i in range(c[0] // per_group * width, (c[0] // per_group + 1) * width)
        )
        groups = len(chunks)
    else:
        f = densify(f, 1)
        reads, groups = f.reads or tuple(range(f.in_channels)), 1
    all_in_order = reads == tuple(range(f.in_channels))
    return replace(
        f,
        **_made_of("rows", f) | {"consts": (("rows", rows),)},
        out_channels=len(rows),
        groups=groups,
        reads=None if all_in_order else reads,
    )


def _permuted(op: Operator) -> Operator:
    """An operator whose groups read all their channels in another order reads them in order instead."""
    if op.reads is None or len(op.reads) != op.in_channels:
        return op
    width = op.in_channels // op.groups
    own = (set(op.reads[i : i + width]) == set(range(i, i + width)) for i in range(0, op.in_channels, width))
    return densify(op, op.groups, full=True) if all(own) else op


def _branches(ops: Sequence[Operator]) -> Refusal | None:
    first = ops[0]
    if any(o.kind == "warp" for o in ops):
        return Refusal("a deformable convolution reads between positions, where no other kernel does")
    for other in ops[1:]:
        if refusal := meet(first, other, first.in_channels, other.in_channels):
            return refusal
        if first.transposed != other.transposed:
            return Refusal("a transposed convolution beside an ordinary operator")
        if first.stride != other.stride:
            return Refusal("the branches have different strides", detail=f"{first.stride}, {other.stride}")
    return None


def _unite_taps(ops: Sequence[Operator]) -> Result:
    """The operators on the smallest common grid of taps; groups and channels are the caller's."""
    first = ops[0]
    kernel, dilation, padding = [], [], []
    same = all((o.kernel, o.dilation, o.padding) == (first.kernel, first.dilation, first.padding) for o in ops)
    if first.transposed and not (same and all(o.output_padding == first.output_padding for o in ops)):
        return Refusal("transposed convolutions of different geometry")
    for d in range(first.spatial or 0):
        reach = {sum(o.padding[d]) - o.dilation[d] * (o.kernel[d] - 1) for o in ops}
        if len(reach) > 1:
            return Refusal("the branches give different output sizes", detail=", ".join(o.describe() for o in ops))
        offsets = sorted({i * o.dilation[d] - o.padding[d][0] for o in ops for i in range(o.kernel[d])})
        start = min(offsets[0], 0)
        step = math.gcd(*(o - start for o in offsets)) or 1
        # one tap more at the far end keeps the size right when every branch stops short of it
        taps = max((offsets[-1] - start) // step, -(-(-start - reach.copy().pop()) // step)) + 1
        kernel.append(taps)
        dilation.append(step if taps > 1 else 1)
        padding.append((-start, reach.pop() + step * (taps - 1) + start))
    if same:
        kernel, dilation, padding = list(first.kernel), list(first.dilation), list(first.padding)
    padders = [o for o in ops if o.pads]
    modes = {(o.padding_mode, o.pad_value) for o in padders}
    if len(modes) > 1:
        return Refusal("the branches pad with different modes or values")
    mode, value = modes.pop() if modes else ("zeros", 0)
    grows = not same and tuple(padding) not in {o.padding for o in padders}
    if grows and (mode, value) != ("zeros", 0):
        return Refusal(f"the union of the branches needs more {mode} padding than each of them")
    return replace(
        first,
        **_made_of("sum", *ops),
        kernel=tuple(kernel),
        dilation=tuple(dilation),
        padding=tuple(padding),
        bias=any(o.bias for o in ops),
        framed=any(o.framed for o in ops),
        padding_mode=mode,
        pad_value=value,
    )


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
