"""What happens at the border when a layer g pads what a layer f made: when the two are one, and when with a frame.

Out of bounds f gives its bias, as it reads zeros there, while g reads the value that it pads with. Where the two
agree nothing is to be said; where they differ, f has one tap and does not pad itself, the difference is the same at
every position out of bounds: that is what a frame adds (see `operator`).
"""

from __future__ import annotations

from fxfuse.algebra.operator import Operator
from fxfuse.algebra.proof import bias_is
from fxfuse.refusal import Refusal


def matches(f: Operator, g: Operator) -> bool:
    """Whether f, fed zeros, gives on every channel the value that g pads with."""
    if not f.bias:
        return isinstance(g.pad_value, (int, float)) and g.pad_value == 0
    return bias_is(f, g.pad_value)


def refuse(f: Operator, g: Operator) -> Refusal | None:
    """What keeps g(f(x)) from being one operator at the border."""
    if not g.pads or g.transposed:
        return None
    if refusal := wide(f, g):
        return refusal
    if g.padding_mode != "zeros":
        plain = not f.pads and all(f.stride[d] == 1 for d in _padded(g))
        return None if plain else Refusal(f"{g.padding_mode} padding after a stride or another padding")
    if f.pads and (f.padding_mode != "zeros" or f.pad_value != 0 or f.framed):
        return Refusal("two paddings of different values meet")
    if f.pads and g.framed:
        return Refusal("both of them pad: a frame is about one border")
    if not matches(f, g):
        return Refusal(
            "the second one pads with a value that is not the bias of the first: the border would differ",
            detail=f"{f.describe()} then {g.describe()}",
            remedy="drop the first bias, pad before the first layer, or pad with its bias",
        )
    return None


def _padded(g: Operator) -> list[int]:
    return [d for d, p in enumerate(g.padding) if p != (0, 0)]


def wide(f: Operator, g: Operator) -> Refusal | None:
    """The refusal of a g that pads what more than one tap of f made."""
    if any(f.kernel[d] != 1 for d in _padded(g)):
        return Refusal(
            "the second one pads what a kernel of more than one tap made: the border would differ",
            detail=f"{f.describe()} then {g.describe()}",
            remedy="put the whole padding in the first layer and none in the second",
        )
    return None
