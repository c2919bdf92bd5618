"""Models in train form with random statistics, and their hand-written deploy forms."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn

from examples.blocks.dbb import DBB

from .optimize_time import build

HAND = ("repvgg_a0", "mobileone_s1", "fastvit_t8", "repvit_m0_9", "dbb_resnet18")
MODELS = (*HAND, "resnet50")


def train_form(name: str) -> nn.Module:
    """The model as it is trained, in eval mode; the same numbers at every call."""
    torch.manual_seed(0)
    return randomize(build(name))


def hand_written(name: str, model: nn.Module) -> nn.Module:
    """A copy of the model in the deploy form that its authors wrote the conversion for."""
    if name != "dbb_resnet18":
        from timm.utils.model import reparameterize_model

        return reparameterize_model(model)
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, DBB):
                setattr(parent, key, nn.Sequential(_one_convolution(child), child.act))
    return model


def _folded(weight: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Transform I of Diverse Branch Block (Ding et al. 2021): a batch norm into the convolution before it."""
    assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return weight.double() * factor[:, None, None, None], bn.bias.double() - bn.running_mean.double() * factor


def _one_convolution(block: DBB) -> nn.Conv2d:
    """The four branches of a dense block as one convolution (Ding et al. 2021, transforms I to VI)."""
    origin, chain, average = block.dbb_origin, block.dbb_1x1_kxk, block.dbb_avg
    conv = origin[0]
    k = conv.kernel_size[0]
    weight, bias = _folded(conv.weight, origin[1])
    one, one_bias = _folded(block.dbb_1x1[0].weight, block.dbb_1x1[1])
    weight, bias = weight + F.pad(one, [k // 2] * 4), bias + one_bias
    flat = torch.eye(conv.out_channels, dtype=torch.float64)[:, :, None, None].expand(-1, -1, k, k) / k**2
    for first, pad, (last, last_bias) in (
        (chain[0], chain[1], _folded(chain[2].weight, chain[3])),
        (average[0], average[1], _folded(flat, average[3])),
    ):
        inner, inner_bias = _folded(first.weight, pad.bn)
        weight = weight + F.conv2d(last, inner.transpose(0, 1))
        bias = bias + last_bias + (last * inner_bias[None, :, None, None]).sum((1, 2, 3))
    merged = nn.Conv2d(conv.in_channels, conv.out_channels, k, conv.stride, conv.padding)
    merged.weight = nn.Parameter(weight.to(conv.weight.dtype))
    merged.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return merged.to(conv.weight.device)
