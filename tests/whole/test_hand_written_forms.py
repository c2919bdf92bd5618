"""timm's hand-written deploy forms, model by model, each equalled or beaten by rules that know no class.

`timm.utils.reparameterize_model` calls what each model's author wrote for it. Both results are measured the
same way, by PyTorch: operators that the dispatcher runs, multiply-accumulates of torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
from exactly import exactly
from helpers import count, randomize
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxfuse


class Size(NamedTuple):
    """Parameters, executed convolutions, linear layers and batch norms, multiply-accumulates."""

    params: int
    convs: int
    linears: int
    norms: int
    macs: int

    def rounded(self) -> Size:
        return self._replace(params=round(self.params / 1e3), macs=round(self.macs / 1e6))


# What the models are before, and what the hand-written form makes of them; thousands of parameters, millions of MACs.
ORACLES = {
    "repvgg_a0": (Size(9109, 44, 1, 61, 1513), Size(8309, 22, 1, 0, 1361)),
    "mobileone_s0": (Size(5293, 191, 1, 226, 1052), Size(2079, 43, 1, 0, 275)),
    "mobileone_s1": (Size(4825, 65, 1, 99, 830), Size(4765, 43, 1, 0, 825)),
    "fastvit_t8": (Size(4026, 68, 1, 70, 690), Size(3996, 52, 1, 10, 685)),
    "fastvit_mci0": (Size(11407, 119, 5, 114, 2384), Size(11358, 95, 5, 22, 2377)),
    "repvit_m1": (Size(5485, 126, 2, 108, 817), Size(5067, 103, 1, 0, 816)),
    "repghostnet_050": (Size(2314, 95, 1, 112, 43), Size(2307, 95, 1, 48, 43)),
    "ghostnetv3_050": (Size(3395, 309, 1, 326, 118), Size(2853, 137, 1, 54, 50)),
    "nextvit_small": (Size(31763, 93, 17, 61, 5761), Size(31742, 93, 17, 34, 5761)),
    "levit_128s": (Size(7777, 4, 48, 52, 305), Size(7756, 4, 48, 0, 305)),
    "levit_conv_128s": (Size(7777, 50, 2, 52, 305), Size(7756, 50, 2, 0, 305)),
    "efficientvit_m0": (Size(2349, 116, 1, 113, 79), Size(2335, 116, 1, 0, 79)),
    "tiny_vit_5m_224": (Size(12083, 27, 41, 27, 1262), Size(12078, 27, 41, 0, 1262)),
    "iformer_t": (Size(2886, 74, 1, 75, 530), Size(2873, 74, 1, 0, 530)),
    "efficientvim_m1": (Size(6679, 66, 4, 38, 236), Size(6665, 66, 4, 0, 236)),
    "shvit_s1": (Size(6331, 77, 1, 74, 241), Size(6309, 77, 1, 0, 241)),
    "lcnetv2_small": (Size(4129, 46, 1, 37, 283), Size(4093, 36, 1, 21, 280)),
}
# Where the hand-written form leaves exact work undone: what must be strictly less after fxfuse.
BEATEN = {
    "fastvit_t8": ("bn", "mul"),
    "fastvit_mci0": ("bn", "mul"),
    "repghostnet_050": ("bn",),
    "ghostnetv3_050": ("bn",),
    "nextvit_small": ("bn",),
    "lcnetv2_small": ("bn",),
    "efficientvit_m0": ("add", "mul"),
    "efficientvim_m1": ("mul",),
}
WHOLE = dict.fromkeys(("copy", "pickle", "again", "refresh"), "takes long on a whole model")
IN_DOUBLE = ("repvgg_a0", "fastvit_t8", "repghostnet_050", "shvit_s1", "lcnetv2_small", "iformer_t")


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The model with random statistics, its usual input, and one of another batch, and size where it may be."""
    model = randomize(timm.create_model(name, pretrained=False))
    config = model.default_cfg
    channels, height, width = config["input_size"]
    other = (height, width) if config.get("fixed_input_size") else (height - 64, width - 32)
    return model, torch.randn(1, channels, height, width), torch.randn(2, channels, *other)


def measure(model: Callable[..., Tensor], x: Tensor) -> tuple[Size, dict[str, int]]:
    assert isinstance(model, nn.Module)
    flops = FlopCounterMode(display=False)
    with flops:
        ops = count(model, x)
    params = sum(p.numel() for p in model.parameters())
    macs = flops.get_total_flops() // 2  # one multiplication and one addition
    return Size(params, ops["conv"], ops["linear"], ops["bn"], macs), ops


@pytest.mark.parametrize("name", ORACLES)
def test_at_or_below_the_hand_written_form(name: str) -> None:
    before, oracle = ORACLES[name]
    model, x, y = build(name)
    hand, fused = reparameterize_model(model), exactly(model, x, y, examples=x, tolerance=1e-4, without=WHOLE)
    (by_hand, ops_by_hand), (size, ops) = measure(hand, x), measure(fused, x)
    assert (measure(model, x)[0].rounded(), by_hand.rounded()) == (before, oracle)
    assert [n for n, ours, theirs in zip(Size._fields, size, by_hand, strict=True) if ours > theirs] == []
    assert [op for op in BEATEN.get(name, ()) if ops[op] >= ops_by_hand[op]] == []
    alone = measure(fxfuse.optimize(model), x)[0]
    assert alone._replace(params=0) == size._replace(params=0), "example inputs must not be needed"


@pytest.mark.parametrize("name", IN_DOUBLE)
def test_equal_in_double_precision(name: str) -> None:
    model, x, y = build(name)
    model.double()
    exactly(model, x.double(), y.double(), examples=x.double(), tolerance=1e-9, without=WHOLE)
