"""Whole models: the deploy forms that people write by hand, reached without knowing the class."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import assert_untouched, count, fingerprint, randomize, relative_error
from torch import nn

import fxfuse
from examples.blocks import dbb_resnet18, repvgg_a0

SHAPES = ((2, 3, 97, 65), (1, 3, 64, 96))
# name: (convs before, BNs before, convs after, parameters after in units of 10,000)
MODELS = {
    "repvgg_a0": (44, 61, 22, 831),
    "mobileone_s0": (191, 226, 43, 208),
    "resnet50": (53, 53, 53, 2553),
    "dbb_resnet18": (84, 100, 20, 1168),
    "fastvit_t8": (68, 70, 52, 399),
    "repvit_m1": (126, 108, 103, 507),
    "ghostnetv3_050": (309, 326, 137, 284),
}


def build(name: str) -> nn.Module:
    model = dbb_resnet18() if name == "dbb_resnet18" else timm.create_model(name, pretrained=False)
    return randomize(model)


@pytest.mark.parametrize("name", MODELS)
def test_reaches_the_deploy_form(name: str) -> None:
    convs, norms, fewer, params = MODELS[name]
    model = build(name)
    before = fingerprint(model)
    x, y = (torch.randn(s) for s in SHAPES)
    fused = fxfuse.optimize(model, x)
    assert_untouched(model, before)
    assert (count(model, x)["conv"], count(model, x)["bn"]) == (convs, norms)
    assert (count(fused, x)["conv"], count(fused, x)["bn"]) == (fewer, 0)
    report = fxfuse.report(fused)
    assert round(sum(p.numel() for p in fused.parameters()) / 1e4) == params == round(report.after.params / 1e4)
    assert report.after.macs is not None and report.before.macs is not None
    assert report.after.macs <= report.before.macs
    with torch.no_grad():
        for value in (x, y):
            assert relative_error(fused(value), model(value)) < 1e-5
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_exact_to_rounding_in_double_precision(name: str) -> None:
    model = build(name).double()
    fused = fxfuse.optimize(model)
    x = torch.randn(SHAPES[0], dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-12


def test_the_repvgg_of_the_examples_is_the_one_of_timm() -> None:
    ours, theirs = repvgg_a0(), timm.create_model("repvgg_a0")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 9_108_968


def test_plan_reads_no_weight_and_agrees_with_the_result() -> None:
    model = build("repvgg_a0")
    dry, real = fxfuse.plan(model), fxfuse.report(fxfuse.optimize(model))
    assert dry.dry_run and not real.dry_run
    assert dry.after == real.after and dry.fired == real.fired and dry.refused == real.refused
    # on the meta device there is no weight to read
    assert fxfuse.plan(model.to("meta")).after == real.after


def test_optimizing_again_changes_nothing() -> None:
    fused = fxfuse.optimize(build("repvgg_a0"))
    again = fxfuse.optimize(fused)
    assert fxfuse.report(again).fired == ()
    assert [n.target for n in again.graph.nodes] == [n.target for n in fused.graph.nodes]
    x = torch.randn(SHAPES[0])
    assert torch.equal(again(x), fused(x))


def test_result_is_deterministic() -> None:
    model = build("mobileone_s0")
    one, two = fxfuse.optimize(model), fxfuse.optimize(model)
    assert one.code == two.code
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_fused_layers_go_by_the_path_they_replace() -> None:
    model = build("repvgg_a0")
    paths = {name for name, _ in model.named_modules()}
    fused = fxfuse.optimize(model)
    for entry in fxfuse.report(fused).fired:
        assert entry.path in paths
        assert isinstance(fused.get_submodule(entry.path), nn.Conv2d)
    node = next(n for n in fused.graph.nodes if n.target == fxfuse.report(fused).fired[0].path)
    assert node.meta["nn_module_stack"] and node.meta["fxfuse"]
