"""The report, verification and refresh: what a user reads and relies on after the fact."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from helpers import randomize, relative_error
from safety import Careless
from torch import nn

import fxfuse
from examples.blocks import BLOCKS, repvgg_a0


def model_with_refusals() -> nn.Module:
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.BatchNorm2d(8, track_running_stats=False),
        )
    )


def test_text_has_all_parts_in_order() -> None:
    text = str(fxfuse.report(fxfuse.optimize(model_with_refusals(), torch.randn(1, 3, 9, 8))))
    parts = [
        "fxfuse: Sequential: fused 2 sites",
        "nodes",
        "params",
        "MACs",
        "batch_norm",
        "conv_bn",
        "conv2d, batch_norm",
        "conv2d 3->8 k3x3 p1",
        "not fused, 1x: batch_norm normalizes with the statistics of the batch",
        "-> call model.eval()",
    ]
    assert all(p in text for p in parts)
    assert text.index("pattern") < text.index("conv2d, batch_norm") < text.index("not fused")
    assert text.isascii()


def test_dict_is_json_and_agrees_with_the_text() -> None:
    report = fxfuse.report(fxfuse.optimize(model_with_refusals(), torch.randn(1, 3, 9, 8)))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sites"] == len(report.fired) == len(data["fired"]) == 2
    assert data["before"]["ops"]["batch_norm"] == 3 and data["after"]["ops"]["batch_norm"] == 2
    assert sum(len(r["sites"]) for r in data["refused"]) == len(report.refused)
    assert {r["reason"] for r in data["refused"]} == {r.reason for r in report.refused}
    assert data["fired"][0] == {
        "path": "0",
        "patterns": ["conv_bn"],
        "before": ["conv2d 3->8 k3x3 p1", "batch_norm 8->8"],
        "after": "conv2d 3->8 k3x3 p1",
        "macs_before": 216 * 72,
        "macs_after": 216 * 72,
    }


def test_macs_and_params_are_counted() -> None:
    report = fxfuse.report(fxfuse.optimize(repvgg_a0().eval(), torch.randn(1, 3, 224, 224)))
    assert report.before.macs == pytest.approx(1513e6, rel=1e-3)
    assert report.after.macs == pytest.approx(1361e6, rel=1e-3)
    assert (report.before.params, report.after.params) == (9_108_968, 8_309_384)


def test_macs_need_example_inputs() -> None:
    report = fxfuse.report(fxfuse.optimize(model_with_refusals()))
    assert report.before.macs is None and "MACs" not in str(report)


def test_markdown_has_tables() -> None:
    text = fxfuse.report(fxfuse.optimize(model_with_refusals())).to_markdown()
    assert text.startswith("## fxfuse: Sequential") and "| conv_bn" in text and "### not fused" in text


@pytest.mark.parametrize("keep", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["dbb", "repvgg_network", "split_transform_concat"])
def test_report_and_function_survive(keep: object, name: str) -> None:
    block = BLOCKS[name]
    fused = fxfuse.optimize(randomize(block.build()).double())
    kept = keep(fused)  # type: ignore[operator]
    assert fxfuse.report(kept) == fxfuse.report(fused)
    x = torch.randn(block.shapes[1], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(kept(x), fused(x))


def test_report_of_a_stranger() -> None:
    with pytest.raises(TypeError, match="does not come from"):
        fxfuse.report(nn.ReLU())
    with pytest.raises(TypeError, match="does not come from"):
        fxfuse.refresh(nn.ReLU(), nn.ReLU())  # type: ignore[arg-type]


def test_verify_reports_the_error() -> None:
    model, x = randomize(BLOCKS["dbb"].build()), torch.randn(BLOCKS["dbb"].shapes[0])
    report = fxfuse.report(fxfuse.optimize(model, x, verify=True))
    assert report.max_error is not None and 0 < report.max_error < 1e-5
    assert "max relative error" in report.headline


def test_verify_needs_inputs_that_fit() -> None:
    with pytest.raises(ValueError, match="verify needs example_inputs"):
        fxfuse.optimize(nn.ReLU().eval(), verify=True)
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        fxfuse.optimize(nn.Conv2d(3, 4, 1).eval(), torch.randn(1, 5, 4, 4))


def test_verify_catches_a_wrong_pattern_and_says_where() -> None:
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 3, 3, padding=1),
        )
    )
    fxfuse.register(Careless)
    try:
        with pytest.raises(fxfuse.VerificationError, match=r"outputs differ by .* first site that differs is [34] "):
            fxfuse.optimize(model, torch.randn(2, 3, 8, 9), verify=True, patterns=["conv_bn", "careless"])
    finally:
        fxfuse.unregister("careless")


@pytest.mark.parametrize("name", ["dbb", "repvgg_identity", "residual_linear_norm", "split_transform_concat", "mbconv"])
def test_refresh_gives_the_new_weights(name: str) -> None:
    block = BLOCKS[name]
    model = randomize(block.build(), seed=1).double()
    fused = fxfuse.optimize(model)
    pointers = [p.data_ptr() for p in fused.parameters()]
    with torch.no_grad():
        for tensor in (t for t in model.state_dict().values() if t.is_floating_point()):
            tensor.uniform_(0.5, 2)
    x = torch.randn(block.shapes[0], dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) > 1e-3
        assert fxfuse.refresh(fused, model) is fused
        assert relative_error(fused(x), model(x)) < 1e-13
    assert [p.data_ptr() for p in fused.parameters()] == pointers


def test_refresh_with_another_model_changes_nothing() -> None:
    fused = fxfuse.optimize(randomize(BLOCKS["dbb"].build()))
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    with pytest.raises(ValueError, match="ReLU"):
        fxfuse.refresh(fused, nn.ReLU())
    assert all(torch.equal(before[k], v) for k, v in fused.state_dict().items())
