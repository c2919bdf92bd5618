"""Every block of the registry: outputs, executed operations, and what the report says of the rest."""

from __future__ import annotations

import re

import pytest
import torch
from block_results import EXPECTED, OPERATIONS, ROUNDING
from exactly import exactly
from helpers import randomize

import fxfuse
from examples.blocks import BLOCKS

REASONS = {
    "cost": "exact, but merged it would cost more",
    "border": "pads with a value that is not the bias of the first: the border would differ",
    "sources": "is not all made of one tensor by layers that can be merged",
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


def test_every_block_has_a_row() -> None:
    assert set(BLOCKS) == {*EXPECTED, "dbb_resnet18"}


@pytest.mark.parametrize("name", EXPECTED)
def test_block(name: str) -> None:
    block, (operations, reasons) = BLOCKS[name], EXPECTED[name]
    model = randomize(block.build()).double()
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in block.shapes]
    counts = dict(zip(OPERATIONS, map(int, operations.split()), strict=True))
    report = fxfuse.report(exactly(model, *tensors, counts=counts, tolerance=1e-13))
    assert {r.reason for r in report.refused} == {
        r.reason for r in report.refused for k in reasons.split() if re.search(REASONS[k], r.reason)
    }
    assert len({r.reason for r in report.refused}) == len(reasons.split())
    assert all(r.where for r in report.refused)


@pytest.mark.parametrize("name", [n for n in EXPECTED if not ROUNDING.search(n)])
def test_block_is_exact_on_integers(name: str) -> None:
    block = BLOCKS[name]
    model = randomize(block.build().double(), seed=3, integer=True)
    exactly(model, *(torch.randint(-3, 4, shape).double() for shape in block.shapes))


@pytest.mark.parametrize(
    "name", ["bsconv_u", "depthwise_separable", "depthwise_separable_conv", "spatially_separable", "flattened"]
)
def test_a_pair_that_costs_more_is_merged_when_asked_for(name: str) -> None:
    block = BLOCKS[name]
    model = randomize(block.build().double(), integer=True)
    tensors = (torch.randint(-3, 4, shape).double() for shape in block.shapes)
    exactly(model, *tensors, patterns=["conv_chain!"], counts={"conv": 1})


@pytest.mark.parametrize("name", ["bsconv_u", "bsconv_u_bn", "depthwise_separable"])
def test_a_kept_pair_is_reported_with_its_two_numbers(name: str) -> None:
    report = fxfuse.report(fxfuse.optimize(randomize(BLOCKS[name].build())))
    (refusal,) = report.refused
    merged, apart = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) instead of ([\d,]+)", refusal.detail)[0])
    assert merged > 2 * apart
    assert refusal.remedy and refusal.where
