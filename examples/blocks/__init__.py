"""Small modules of the published blocks, and a registry of one or more instances of each.

`BLOCKS[name].build()` is a fresh module in training mode with random weights; both shapes in
`BLOCKS[name].shapes` are valid inputs for it. Channel counts are uneven and heights differ from
widths, so that a swapped axis shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import transforms as t
from .acnet import ACBlock
from .attention import CBAM, ChannelAttention, SEBlock, SEConv, SpatialAttention
from .bsconv import BSConvS, BSConvU
from .dbb import DBB, BNAndPadLayer, NaiveDBB
from .dbb_resnet import DBBResNet18, dbb_resnet18
from .dilated import DilatedConv, ParallelDilated
from .dynamic_conv import Attention, DynamicConv2d, DynamicConvBNReLU, SimpleAttention
from .grouped import GroupedConv, SplitTransformConcat
from .inception import InceptionA
from .repvgg import RepVGG, RepVGGBlock, repvgg_a0, repvgg_b1g2
from .residual import (
    BottleNeck,
    ConvNormAct,
    DepthwiseSeparable,
    FusedMBConv,
    InvertedResidual,
    LinearBottleneck,
    MBConv,
    MobileNetLikeBlock,
    ResidualAdd,
)
from .separable import DepthwiseSeparableConv, FlattenedConv, SpatiallySeparable
from .shuffle import ShuffledGroupedConv, ShuffleUnit

__all__ = [
    "BLOCKS",
    "CBAM",
    "DBB",
    "ACBlock",
    "Attention",
    "BNAndPadLayer",
    "BSConvS",
    "BSConvU",
    "Block",
    "BottleNeck",
    "ChannelAttention",
    "ConvNormAct",
    "DBBResNet18",
    "DepthwiseSeparable",
    "DepthwiseSeparableConv",
    "DilatedConv",
    "DynamicConv2d",
    "DynamicConvBNReLU",
    "FlattenedConv",
    "FusedMBConv",
    "GroupedConv",
    "InceptionA",
    "InvertedResidual",
    "LinearBottleneck",
    "MBConv",
    "MobileNetLikeBlock",
    "NaiveDBB",
    "ParallelDilated",
    "RepVGG",
    "RepVGGBlock",
    "ResidualAdd",
    "SEBlock",
    "SEConv",
    "ShuffleUnit",
    "ShuffledGroupedConv",
    "SimpleAttention",
    "SpatialAttention",
    "SpatiallySeparable",
    "SplitTransformConcat",
    "dbb_resnet18",
    "repvgg_a0",
    "repvgg_b1g2",
]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One instance of a block.

    Attributes:
        name: its key in `BLOCKS`.
        section: "A" re-parameterization, "B" blueprint separable, "C" dynamic, "D" residual,
            "E" the convolution family.
        build: makes a fresh instance, in training mode.
        shapes: two valid input shapes with different batch sizes and maps.
        required: what optimizing it has to reach.
        needs: a package beyond torch that `build` imports, or "".
    """

    name: str
    section: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, Shape]
    required: str
    needs: str = ""


BLOCKS: dict[str, Block] = {}


def _add(
    section: str,
    required: str,
    channels: int,
    builds: dict[str, Callable[[], nn.Module]],
    shapes: tuple[Shape, Shape] | None = None,
    needs: str = "",
) -> None:
    shapes = shapes or ((2, channels, 9, 13), (5, channels, 11, 7))
    for name, build in builds.items():
        if name in BLOCKS:
            raise ValueError(f"two blocks are named {name}")
        BLOCKS[name] = Block(name, section, build, shapes, required, needs)


def _deformable(**options: Any) -> nn.Module:
    from .deformable import DeformableConv

    return DeformableConv(6, 10, **options)


def _deformable_layer() -> nn.Module:
    from .deformable import DeformableLayer

    return DeformableLayer(6, 10)


_IMAGES = ((2, 3, 45, 67), (3, 3, 71, 38))

# A: train form -> one convolution
_add(
    "A",
    "1 conv kxk with bias",
    6,
    {
        "acb_k3": lambda: ACBlock(6, 10),
        "acb_k5": lambda: ACBlock(6, 10, 5),
        "acb_stride2": lambda: ACBlock(6, 10, stride=2),
        "acb_groups": lambda: ACBlock(6, 10, groups=2),
    },
)
_add(
    "A",
    "1 conv 3x3 with bias",
    6,
    {
        "repvgg_identity": lambda: RepVGGBlock(6, 6),
        "repvgg_widen": lambda: RepVGGBlock(6, 10),
        "repvgg_stride2": lambda: RepVGGBlock(6, 6, stride=2),
        "repvgg_groups": lambda: RepVGGBlock(6, 6, groups=3),
        "repvgg_widen_groups_stride2": lambda: RepVGGBlock(6, 10, stride=2, groups=2),
        "repvgg_depthwise": lambda: RepVGGBlock(6, 6, groups=6),
    },
)
_add(
    "A",
    "every block 1 conv 3x3 with bias; 0 BN",
    3,
    {
        "repvgg_network": lambda: RepVGG((1, 2, 2, 1), (6, 10, 12, 14), stem=6, num_classes=7),
        "repvgg_network_g2": lambda: RepVGG((1, 2, 2, 1), (6, 10, 12, 14), 6, 7, groups=2),
    },
    _IMAGES,
)
_add(
    "A",
    "1 conv kxk with bias, also when the pad layer is written with slice assignments",
    6,
    {
        "dbb": lambda: DBB(6, 10),
        "dbb_same": lambda: DBB(6, 6),
        "dbb_k5": lambda: DBB(6, 10, 5),
        "dbb_stride2": lambda: DBB(6, 10, stride=2),
        "dbb_groups": lambda: DBB(6, 10, groups=2, internal_channels=8),
        "dbb_depthwise": lambda: DBB(6, 6, groups=6),
        "dbb_padding2": lambda: DBB(6, 10, padding=2),
        "dbb_k1": lambda: DBB(6, 10, 1),
    },
)
_add(
    "A",
    "1 conv kxk with bias and the border term of the zero padding between the layers; exact",
    6,
    {
        "dbb_naive": lambda: NaiveDBB(6, 10),
        "dbb_naive_k5": lambda: NaiveDBB(6, 10, 5),
        "dbb_naive_stride2": lambda: NaiveDBB(6, 10, stride=2),
        "dbb_naive_groups": lambda: NaiveDBB(6, 10, groups=2),
    },
)
_add("A", "20 convs, 0 BN", 3, {"dbb_resnet18": lambda: dbb_resnet18(7, 6)}, _IMAGES)
_add(
    "A",
    "1 conv",
    6,
    {
        "transform_i": lambda: t.TransformI(6, 10),
        "transform_i_bias_groups_stride2": lambda: t.TransformI(6, 10, 3, 2, 2, True),
        "transform_ii": lambda: t.TransformII(6, 10),
        "transform_ii_groups_stride2": lambda: t.TransformII(6, 10, stride=2, groups=2),
    },
)
_add(
    "A",
    "1 conv where that lowers the cost",
    6,
    {
        "transform_iii": lambda: t.TransformIII(6, 10, 8),
        "transform_iii_narrow": lambda: t.TransformIII(6, 10, 3),
        "transform_iii_wide": lambda: t.TransformIII(6, 10, 24, bias=True),
        "transform_iii_padded": lambda: t.TransformIII(6, 10, 24, padding=1),
        "transform_iii_padded_bias": lambda: t.TransformIII(6, 10, 24, padding=1, bias=True),
        "transform_iii_groups": lambda: t.TransformIII(6, 10, 8, groups=2),
    },
)
_add("A", "1 conv of N1+N2 outputs", 6, {"transform_iv": lambda: t.TransformIV(6, 10, 7)})
_add(
    "A",
    "is a conv: used when a neighbour can absorb it; a lone pool stays a pool",
    6,
    {
        "transform_v_alone": lambda: t.TransformV(6),
        "transform_v_conv": lambda: t.TransformV(6, 10, stride=2),
    },
)
_add(
    "A",
    "1 conv 3x3",
    6,
    {
        "transform_vi": lambda: t.TransformVI(6, 10),
        "transform_vi_thin": lambda: t.TransformVI(6, 10, square=False),
        "transform_vi_stride2": lambda: t.TransformVI(6, 10, stride=2),
    },
)

# B: blueprint separable convolutions
_add(
    "B",
    "BN folded into the 1x1; the pair kept, with the two costs in the report; merged when asked "
    "for by name or when the cost model says it pays",
    6,
    {
        "bsconv_u": lambda: BSConvU(6, 10),
        "bsconv_u_bn": lambda: BSConvU(6, 10, with_bn=True),
        "bsconv_u_bn_no_bias": lambda: BSConvU(6, 10, bias=False, with_bn=True),
        "bsconv_u_k5_stride2_dilated": lambda: BSConvU(6, 10, 5, 2, 2, with_bn=True),
    },
)
_add(
    "B",
    "BNs folded; the two 1x1 merged only if C*N <= C*M' + M'*N",
    22,
    {
        "bsconv_s": lambda: BSConvS(22, 26),
        "bsconv_s_bn": lambda: BSConvS(22, 26, with_bn=True),
        "bsconv_s_wide_middle": lambda: BSConvS(22, 10, with_bn=True, p=0.75),
    },
)

# C: dynamic convolution
_add(
    "C",
    "kept, exact at every batch size",
    6,
    {
        "dynamic_simple": lambda: DynamicConv2d(6, 10),
        "dynamic_simple_no_bias": lambda: DynamicConv2d(6, 10, bias=False),
        "dynamic_groups_stride2": lambda: DynamicConv2d(6, 10, groups=2, stride=2),
    },
)
_add(
    "C",
    "kept, exact at every batch size; att / temperature folded into the last 1x1 of the attention",
    6,
    {"dynamic_full": lambda: DynamicConv2d(6, 10, Attention(6))},
)
_add(
    "C",
    "BN folded into the weight bank and the bias: 0 BN left; exact at every batch size",
    6,
    {
        "dynamic_simple_bn": lambda: DynamicConvBNReLU(6, 10, bias=True, temperature=None),
        "dynamic_full_bn": lambda: DynamicConvBNReLU(6, 10),
        "dynamic_full_bn_bias": lambda: DynamicConvBNReLU(6, 10, bias=True),
        "dynamic_full_bn_groups": lambda: DynamicConvBNReLU(6, 10, groups=2, stride=2),
        "dynamic_full_bn_k1": lambda: DynamicConvBNReLU(6, 10, 1, bias=True),
    },
)

# D: residual blocks
_add(
    "D",
    "1 conv + act; Identity gone",
    6,
    {
        "conv_norm_act": lambda: ConvNormAct(6, 10),
        "conv_norm_act_k1_stride2": lambda: ConvNormAct(6, 10, 1, 2),
        "conv_norm_identity": lambda: ConvNormAct(6, 10, act=nn.Identity),
    },
)
_add(
    "D",
    "the identity joins the conv (W + I) and the add disappears: 1 conv",
    6,
    {
        "residual_linear": lambda: ResidualAdd(nn.Conv2d(6, 6, 3, padding=1)),
        "residual_linear_norm": lambda: ResidualAdd(ConvNormAct(6, 6, act=nn.Identity)),
        "residual_linear_groups": lambda: ResidualAdd(nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    },
)
_add(
    "D",
    "the two convs merge: 1 conv",
    6,
    {
        "residual_conv_shortcut": lambda: ResidualAdd(nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(6, 10, 1)),
        "residual_norm_shortcut": lambda: ResidualAdd(
            ConvNormAct(6, 10, 3, 2, act=nn.Identity), ConvNormAct(6, 10, 1, 2, act=nn.Identity)
        ),
    },
)
_add(
    "D",
    "kept: the block is not linear; every BN folded",
    6,
    {
        "residual_nonlinear": lambda: ResidualAdd(ConvNormAct(6, 6)),
        "residual_nonlinear_deep": lambda: ResidualAdd(
            nn.Sequential(ConvNormAct(6, 10), ConvNormAct(10, 6, act=nn.Identity))
        ),
    },
)
_add(
    "D",
    "every BN folded; 4 convs (3 without shortcut), 0 BN",
    6,
    {
        "bottleneck": lambda: BottleNeck(6, 6, 2),
        "bottleneck_shortcut": lambda: BottleNeck(6, 10, 2),
        "inverted_residual": lambda: InvertedResidual(6, 6),
        "inverted_residual_shortcut": lambda: InvertedResidual(6, 10),
        "linear_bottleneck": lambda: LinearBottleneck(6, 6),
        "linear_bottleneck_shortcut": lambda: LinearBottleneck(6, 10),
    },
)
_add(
    "D",
    "3 convs, 0 BN; residual only if C == N",
    6,
    {
        "mobilenet_like": lambda: MobileNetLikeBlock(6, 6),
        "mobilenet_like_widen": lambda: MobileNetLikeBlock(6, 10),
        "mbconv": lambda: MBConv(6, 6),
        "mbconv_widen": lambda: MBConv(6, 10),
    },
)
_add(
    "D",
    "2 convs, 0 BN; residual only if C == N",
    6,
    {
        "fused_mbconv": lambda: FusedMBConv(6, 6),
        "fused_mbconv_widen": lambda: FusedMBConv(6, 10),
    },
)
_add(
    "D",
    "kept (cost), reason in the report; merged when asked for by name",
    6,
    {
        "depthwise_separable": lambda: DepthwiseSeparable(6, 10),
        "depthwise_separable_stride2": lambda: DepthwiseSeparable(6, 10, 5, 2, bias=False),
    },
)

# E: the convolution family
_add(
    "E",
    "BNs folded; the three 1x1 of the same input merged into one whose slices feed the rest (when "
    "the cost model says it pays); pool -> 1x1 swapped or merged when it pays",
    12,
    {
        "inception_a": lambda: InceptionA(12, 4, 10, (6, 8), (8, 14)),
        "inception_a_full": lambda: InceptionA(12),
    },
)
_add("E", "1 grouped conv, 0 BN", 6, {"grouped": lambda: GroupedConv(6, 10, 2)})
_add(
    "E",
    "one grouped conv",
    6,
    {
        "split_transform_concat": lambda: SplitTransformConcat(6, 10, 2),
        "split_transform_concat_stride2": lambda: SplitTransformConcat(6, 9, 3, 5, 2),
        "split_transform_concat_relu": lambda: SplitTransformConcat(6, 10, 2, norm_act=True),
    },
)
_add(
    "E",
    "kept or merged by cost; exact both ways",
    6,
    {
        "spatially_separable": lambda: SpatiallySeparable(6, 10),
        "spatially_separable_wide": lambda: SpatiallySeparable(6, 10, 40),
        "spatially_separable_bias": lambda: SpatiallySeparable(6, 10, 40, bias=True),
        "spatially_separable_bn": lambda: SpatiallySeparable(6, 10, stride=2, with_bn=True),
        "flattened": lambda: FlattenedConv(6, 10),
        "flattened_k5_bias": lambda: FlattenedConv(6, 10, 5, bias=True),
    },
)
_add(
    "E",
    "kept (cost), reason in the report; merged when asked for by name; 0 BN",
    6,
    {
        "depthwise_separable_conv": lambda: DepthwiseSeparableConv(6, 10),
        "depthwise_separable_conv_relu": lambda: DepthwiseSeparableConv(6, 10, norm_act=True),
    },
)
_add(
    "E",
    "BNs folded; the shuffle absorbed into neighbouring weights where the group structure allows, "
    "else kept with the reason",
    12,
    {
        "shuffle_unit": lambda: ShuffleUnit(12, 3),
        "shuffle_unit_wide": lambda: ShuffleUnit(12, 2, 20),
        "shuffle_dense_after": lambda: ShuffledGroupedConv(12, 18, 10, 3),
        "shuffle_grouped_after": lambda: ShuffledGroupedConv(12, 18, 9, 3, 3),
    },
)
_add(
    "E",
    "1 conv, 0 BN",
    6,
    {
        "dilated": lambda: DilatedConv(6, 10),
        "dilated_k5_stride2": lambda: DilatedConv(6, 10, 5, 3, 2),
    },
)
_add(
    "E",
    "one conv with the union of taps, when it pays; 0 BN",
    6,
    {
        "parallel_dilated": lambda: ParallelDilated(6, 10),
        "parallel_dilated_same": lambda: ParallelDilated(6, 10, (2, 2), with_bn=False),
        "parallel_dilated_three": lambda: ParallelDilated(6, 10, (1, 2, 3), stride=2),
        "parallel_dilated_depthwise": lambda: ParallelDilated(6, 6, (1, 3), groups=6),
    },
)
_add(
    "E",
    "kept; the BN after it folds into its weight and bias: 0 BN",
    6,
    {
        "deformable_v1": _deformable,
        "deformable_v1_no_bias": lambda: _deformable(bias=False),
        "deformable_v1_groups_stride2": lambda: _deformable(groups=2, offset_groups=3, stride=2),
        "deformable_v2": lambda: _deformable(modulated=True),
        "deformable_layer": _deformable_layer,
    },
    needs="torchvision",
)
_add(
    "E",
    "never folded: the factor depends on the input",
    10,
    {"se": lambda: SEBlock(10), "se_conv": lambda: SEConv(10, 12)},
)
_add(
    "E",
    "kept exactly; the shared module stays shared",
    10,
    {
        "cbam": lambda: CBAM(10),
        "cbam_channel": lambda: ChannelAttention(10),
        "cbam_spatial": lambda: SpatialAttention(),
        "cbam_after_conv": lambda: nn.Sequential(ConvNormAct(10, 10), CBAM(10, 2)),
    },
)
