"""conv1 -> padded conv2  =>  conv + frame      frame[n,j] = sum over m of W2[n,m,j] * (padded value - b1[m])

A pointwise layer with a bias gives that bias on zeros, but a convolution after it pads with another value. So the two
are one convolution (Diverse Branch Block, Ding et al. 2021, transform III) except where a tap reads out of bounds,
and there they differ by the same number for each tap, whatever the input: the convolution of one more channel, 1 out
of bounds and 0 inside, that is added to every sample. It depends on height and width alone. Such frames add, scale
and concatenate with their convolutions. They cost 1 / (channels * batch) of the convolution.
"""

from __future__ import annotations

from torch.nn import AvgPool2d, BatchNorm2d, Conv2d, Sequential

from fxfuse.algebra.chain import pads_wide, pads_with_bias, product, same_layout
from fxfuse.algebra.combine import meet
from fxfuse.algebra.operator import Operator
from fxfuse.pattern import Example, Model, Pattern, register
from fxfuse.refusal import Refusal


def framed(f: Operator, g: Operator) -> Operator | Refusal:
    """g(f(x)) as one operator with a frame, where g pads with another value than f gives out of bounds."""
    f, g = same_layout(f, g)
    return meet(f, g, f.out_channels, g.in_channels) or _refuse(f, g) or product(f, g, frame=True)


def needs_frame(f: Operator, g: Operator) -> bool:
    """Whether g(f(x)) is one operator with a frame and none without."""
    f, g = same_layout(f, g)
    able = f.kind != "identity" and f.spatial == g.spatial and g.pads and not _refuse(f, g)
    return able and not pads_with_bias(f, g)


def _refuse(f: Operator, g: Operator) -> Refusal | None:
    if f.transposed or g.transposed or "warp" in (f.kind, g.kind):
        return Refusal("a transposed or deformable convolution has no frame")
    if g.padding_mode != "zeros":
        return Refusal(f"{g.padding_mode} padding repeats what is inside: a frame is about constants")
    if f.pads:
        return Refusal("both of them pad: a frame is about one border")
    return pads_wide(f, g)


@register
class Border(Pattern):
    name = "border"
    law = "conv1 -> padded conv2 => conv + frame;  batch_norm -> padded conv => conv + frame"
    refused_when = (
        "the first layer pads or has more than one tap, or the frame costs more than the merge saves (as for a batch "
        "norm alone, which has no multiply-accumulates to save)"
    )

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        return needs_frame(f, g)

    def rewrite(self, relation: str, f: Operator, g: Operator) -> Operator | Refusal:
        return framed(f, g)

    examples = (
        Example(
            "1x1 with bias before a padded 3x3",
            lambda: Sequential(Conv2d(2, 8, 1), Conv2d(8, 2, 3, padding=1)),
            (2, 2, 7, 6),
        ),
        Example(
            "a branch of batch norm and padded average pool beside a 3x3",
            lambda: Model(
                lambda x, conv, pool: conv(x) + pool(x),
                Conv2d(16, 16, 3, padding=1),
                Sequential(Conv2d(16, 16, 1), BatchNorm2d(16), AvgPool2d(3, 1, 1)),
            ),
            (2, 16, 7, 6),
        ),
        Example(
            "batch norm before a zero-padded convolution, merged whatever it costs",
            lambda: Sequential(BatchNorm2d(3), Conv2d(3, 5, 3, padding=1)),
            patterns=("border!",),
        ),
        Example(
            "batch norm before a zero-padded convolution",
            lambda: Sequential(BatchNorm2d(3), Conv2d(3, 5, 3, padding=1)),
            reason="would cost more",
        ),
        Example(
            "a 3x3 before a padded 3x3",
            lambda: Sequential(Conv2d(2, 8, 3), Conv2d(8, 2, 3, padding=1)),
            (2, 2, 7, 6),
            reason="more than one tap made",
        ),
    )
