"""Every block of the registry: outputs, executed operations, and what the report says of the rest."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import assert_untouched, count, fingerprint, randomize, relative_error

import fxfuse
from examples.blocks import BLOCKS

REASONS = {
    "cost": "exact, but merged it would cost more",
    "border": "pads with a value that is not the bias of the first: the border would differ",
    "sources": "does not start at one tensor: something between is not linear",
    "norm": "batch_norm follows no convolution or linear layer of constant weight",
    "whole": "the module stays Python: its forward cannot be traced",
    "computed": "its weight is computed from data",
    "slices": "the slices of a wide layer would cost more",
    "geometry": "layers of one tensor have different",
    "wide": "a grouped layer has no wide form",
    "taps": "a kernel of several taps is no faster for being wide",
    "channels": "more channels to average",
    "permutation": "a permutation of channels stays: no layer before it or after it can take it",
    "product": "a product of two computed tensors is not linear",
}
OPERATIONS = ("conv", "bn", "add", "cat", "pool", "linear")

# block: (executed convs, batch norms, adds, concatenations, average pools, linear layers afterwards; reasons given)
EXPECTED = {
    "acb_k3": ("1 0 0 0 0 0", ""),
    "acb_k5": ("1 0 0 0 0 0", ""),
    "acb_stride2": ("1 0 0 0 0 0", ""),
    "acb_groups": ("1 0 0 0 0 0", ""),
    "repvgg_identity": ("1 0 0 0 0 0", ""),
    "repvgg_widen": ("1 0 0 0 0 0", ""),
    "repvgg_stride2": ("1 0 0 0 0 0", ""),
    "repvgg_groups": ("1 0 0 0 0 0", ""),
    "repvgg_widen_groups_stride2": ("1 0 0 0 0 0", ""),
    "repvgg_depthwise": ("1 0 0 0 0 0", ""),
    "repvgg_network": ("7 0 0 0 0 1", ""),
    "repvgg_network_g2": ("7 0 0 0 0 1", ""),
    "dbb": ("1 0 0 0 0 0", ""),
    "dbb_same": ("1 0 0 0 0 0", ""),
    "dbb_k5": ("1 0 0 0 0 0", ""),
    "dbb_stride2": ("1 0 0 0 0 0", ""),
    "dbb_groups": ("1 0 0 0 0 0", ""),
    "dbb_depthwise": ("1 0 0 0 0 0", ""),
    "dbb_padding2": ("1 0 0 0 0 0", ""),
    "dbb_k1": ("1 0 0 0 0 0", ""),
    "dbb_naive": ("2 0 1 0 0 0", ""),  # one convolution, and one of one channel that is added at the border
    "dbb_naive_k5": ("2 0 1 0 0 0", ""),
    "dbb_naive_stride2": ("2 0 1 0 0 0", ""),
    "dbb_naive_groups": ("2 0 1 0 0 0", ""),
    "transform_i": ("1 0 0 0 0 0", ""),
    "transform_i_bias_groups_stride2": ("1 0 0 0 0 0", ""),
    "transform_ii": ("1 0 0 0 0 0", ""),
    "transform_ii_groups_stride2": ("1 0 0 0 0 0", ""),
    "transform_iii": ("1 0 0 0 0 0", ""),
    "transform_iii_narrow": ("2 0 0 0 0 0", "cost"),
    "transform_iii_wide": ("1 0 0 0 0 0", ""),
    "transform_iii_padded": ("1 0 0 0 0 0", ""),
    "transform_iii_padded_bias": ("2 0 1 0 0 0", ""),
    "transform_iii_groups": ("1 0 0 0 0 0", ""),
    "transform_iv": ("1 0 0 0 0 0", ""),
    "transform_v_alone": ("0 0 0 0 1 0", ""),
    "transform_v_conv": ("1 0 0 0 1 0", "cost"),
    "transform_vi": ("1 0 0 0 0 0", ""),
    "transform_vi_thin": ("2 0 1 0 0 0", "cost"),
    "transform_vi_stride2": ("1 0 0 0 0 0", ""),
    "bsconv_u": ("2 0 0 0 0 0", "cost"),
    "bsconv_u_bn": ("2 0 0 0 0 0", "cost"),
    "bsconv_u_bn_no_bias": ("2 0 0 0 0 0", "cost"),
    "bsconv_u_k5_stride2_dilated": ("2 0 0 0 0 0", "cost"),
    "bsconv_s": ("3 0 0 0 0 0", "cost"),
    "bsconv_s_bn": ("3 0 0 0 0 0", "cost"),
    "bsconv_s_wide_middle": ("2 0 0 0 0 0", "cost"),
    "dynamic_simple": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_simple_no_bias": ("3 0 0 0 0 1", "computed"),
    "dynamic_groups_stride2": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_full": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_simple_bn": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_full_bn": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_full_bn_bias": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_full_bn_groups": ("3 0 0 0 0 2", "computed slices"),
    "dynamic_full_bn_k1": ("3 0 0 0 0 2", "computed slices"),
    "conv_norm_act": ("1 0 0 0 0 0", ""),
    "conv_norm_act_k1_stride2": ("1 0 0 0 0 0", ""),
    "conv_norm_identity": ("1 0 0 0 0 0", ""),
    "residual_linear": ("1 0 0 0 0 0", ""),
    "residual_linear_norm": ("1 0 0 0 0 0", ""),
    "residual_linear_groups": ("1 0 0 0 0 0", ""),
    "residual_conv_shortcut": ("1 0 0 0 0 0", ""),
    "residual_norm_shortcut": ("1 0 0 0 0 0", ""),
    "residual_nonlinear": ("1 0 1 0 0 0", ""),
    "residual_nonlinear_deep": ("2 0 1 0 0 0", "sources"),
    "bottleneck": ("3 0 1 0 0 0", "sources"),
    "bottleneck_shortcut": ("4 0 1 0 0 0", "sources slices"),
    "inverted_residual": ("3 0 1 0 0 0", "sources"),
    "inverted_residual_shortcut": ("4 0 1 0 0 0", "sources slices"),
    "linear_bottleneck": ("3 0 1 0 0 0", "sources"),
    "linear_bottleneck_shortcut": ("4 0 1 0 0 0", "sources slices"),
    "mobilenet_like": ("3 0 1 0 0 0", "sources"),
    "mobilenet_like_widen": ("3 0 0 0 0 0", ""),
    "mbconv": ("3 0 1 0 0 0", "sources"),
    "mbconv_widen": ("3 0 0 0 0 0", ""),
    "fused_mbconv": ("2 0 1 0 0 0", "sources"),
    "fused_mbconv_widen": ("2 0 0 0 0 0", ""),
    "depthwise_separable": ("2 0 0 0 0 0", "cost"),
    "depthwise_separable_stride2": ("2 0 0 0 0 0", "cost"),
    "inception_a": ("4 0 1 1 1 0", "cost"),
    "inception_a_full": ("7 0 0 1 1 0", "cost slices channels"),
    "grouped": ("1 0 0 0 0 0", ""),
    "split_transform_concat": ("1 0 0 0 0 0", ""),
    "split_transform_concat_stride2": ("1 0 0 0 0 0", ""),
    "split_transform_concat_relu": ("2 0 0 1 0 0", ""),
    "spatially_separable": ("2 0 0 0 0 0", "cost"),
    "spatially_separable_wide": ("1 0 0 0 0 0", ""),
    "spatially_separable_bias": ("2 0 0 0 0 0", "border"),
    "spatially_separable_bn": ("2 0 0 0 0 0", "border"),
    "flattened": ("3 0 0 0 0 0", "cost"),
    "flattened_k5_bias": ("3 0 0 0 0 0", "cost border"),
    "depthwise_separable_conv": ("2 0 0 0 0 0", "cost"),
    "depthwise_separable_conv_relu": ("2 0 0 0 0 0", ""),
    "shuffle_unit": ("3 0 1 0 0 0", "cost sources permutation"),
    "shuffle_unit_wide": ("3 0 1 0 0 0", "cost sources permutation"),
    "shuffle_dense_after": ("2 0 0 0 0 0", ""),
    "shuffle_grouped_after": ("2 0 0 0 0 0", "permutation"),
    "dilated": ("1 0 0 0 0 0", ""),
    "dilated_k5_stride2": ("1 0 0 0 0 0", ""),
    "parallel_dilated": ("2 0 1 0 0 0", "cost"),
    "parallel_dilated_same": ("1 0 0 0 0 0", ""),
    "parallel_dilated_three": ("3 0 2 0 0 0", "cost geometry"),
    "parallel_dilated_depthwise": ("2 0 1 0 0 0", "cost"),
    "deformable_v1": ("1 0 0 0 0 0", ""),
    "deformable_v1_no_bias": ("1 0 0 0 0 0", ""),
    "deformable_v1_groups_stride2": ("1 0 0 0 0 0", ""),
    "deformable_v2": ("2 0 0 0 0 0", "taps"),
    "deformable_layer": ("1 0 0 0 0 0", ""),
    "se": ("0 0 0 0 0 2", "product"),
    "se_conv": ("2 0 0 0 0 2", "product"),
    "cbam": ("5 0 1 1 1 0", "product sources"),
    "cbam_channel": ("4 0 1 0 1 0", "sources"),
    "cbam_spatial": ("1 0 0 1 0 0", ""),
    "cbam_after_conv": ("6 0 1 1 1 0", "product sources"),
}
# Averages over nine values, sigmoids and softmaxes round: integers do not stay integers there.
ROUNDING = re.compile("dbb|transform_v_|inception|dynamic|^se|cbam|deformable")


def test_every_block_has_a_row() -> None:
    assert set(BLOCKS) == {*EXPECTED, "dbb_resnet18"}


@pytest.mark.parametrize("name", EXPECTED)
def test_block(name: str) -> None:
    block, (operations, reasons) = BLOCKS[name], EXPECTED[name]
    model = randomize(block.build()).double()
    before = fingerprint(model)
    fused = fxfuse.optimize(model)
    assert_untouched(model, before)
    for shape in block.shapes:
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-13
        counted = count(fused, x)
        assert " ".join(str(counted[o]) for o in OPERATIONS) == operations
    assert_untouched(model, before)
    report = fxfuse.report(fused)
    assert {r.reason for r in report.refused} == {
        r.reason for r in report.refused for k in reasons.split() if re.search(REASONS[k], r.reason)
    }
    assert len({r.reason for r in report.refused}) == len(reasons.split())
    assert all(r.where for r in report.refused)


@pytest.mark.parametrize("name", [n for n in EXPECTED if not ROUNDING.search(n)])
def test_block_is_exact_on_integers(name: str) -> None:
    block = BLOCKS[name]
    model = randomize(block.build().double(), seed=3, integer=True)
    fused = fxfuse.optimize(model)
    for shape in block.shapes:
        x = torch.randint(-3, 4, shape).double()
        with torch.no_grad():
            assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize(
    "name", ["bsconv_u", "depthwise_separable", "depthwise_separable_conv", "spatially_separable", "flattened"]
)
def test_a_pair_that_costs_more_is_merged_when_asked_for(name: str) -> None:
    block = BLOCKS[name]
    model = randomize(block.build().double(), integer=True)
    fused = fxfuse.optimize(model, patterns=["conv_chain!"])
    x = torch.randint(-3, 4, block.shapes[0]).double()
    assert count(fused, x)["conv"] == 1
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("name", ["bsconv_u", "bsconv_u_bn", "depthwise_separable"])
def test_a_kept_pair_is_reported_with_its_two_numbers(name: str) -> None:
    report = fxfuse.report(fxfuse.optimize(randomize(BLOCKS[name].build())))
    (refusal,) = report.refused
    merged, apart = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) instead of ([\d,]+)", refusal.detail)[0])
    assert merged > 2 * apart
    assert refusal.remedy and refusal.where
