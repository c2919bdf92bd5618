"""The runner over model collections: every fate of a model, results that outlive an interrupt, what it counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks import zoo, zoo_models, zoo_table
from benchmarks.executed import Executed, Layer
from benchmarks.zoo_check import check

OPTIONS: dict[str, Any] = {
    "threads": 1,
    "optimizer": "fxfuse:optimize",
    "optimize_options": {},
    "float64": False,
    "example_inputs": True,
}
FATES = {
    "right": ("ok", ""),
    "wrong": ("wrong", "relative error"),
    "raises": ("crash", "IndexError: nothing there"),
    "dies": ("crash", "the process was ended by SIGABRT"),
    "hangs": ("timeout", "not done after 10 s"),
    "refused": ("refused", "no graph"),
    "writes": ("wrong", "the model was changed: conv.weight"),
    "eager_fails": ("skipped", "ValueError: this model cannot run"),
}


def run(results: Path, *arguments: str) -> int:
    return zoo.main(["--results", str(results), "--jobs", "2", "--timeout", "10", *arguments])


def test_every_fate_of_a_model_and_none_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, names = tmp_path / "r.jsonl", [f"zoo_fakes:{f}" for f in FATES]
    assert run(results, *names, "--optimizer", "zoo_fakes:fateful") == 1
    records = zoo.load(results)
    assert {n: records[n]["status"] for n in names} == {f"zoo_fakes:{f}": s for f, (s, _) in FATES.items()}
    for fate, (_, message) in FATES.items():
        assert message in records[f"zoo_fakes:{fate}"].get("message", "")
    assert "Fatal Python error: Aborted" in records["zoo_fakes:dies"]["traceback"]
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("8 models: 2 wrong, 2 crash, 1 ok")

    # what has a record is not run again, unless it is asked for: now with an optimizer that is right
    assert run(results, *names) == 1
    assert zoo.load(results) == records
    assert run(results, *names, "--again", "wrong", "crash", "timeout") == 0
    again = zoo.load(results)
    assert [n for n in names if again[n] != records[n]] == [n for n in names if records[n]["status"] in zoo.FAILURES]
    assert all(again[n]["status"] == "ok" for n in names if records[n]["status"] in zoo.FAILURES)


def test_an_interrupt_ends_it_and_loses_no_record(tmp_path: Path) -> None:
    results, root = tmp_path / "r.jsonl", Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.zoo", "zoo_fakes:right", "zoo_fakes:hangs", "--results", str(results)]
    path = os.pathsep.join((str(root), str(root / "tests" / "shared")))
    process = subprocess.Popen(
        [*command, "--optimizer", "zoo_fakes:fateful"], cwd=root, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        for _ in range(600):
            if results.exists() and results.read_text():
                break
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert {n: r["status"] for n, r in zoo.load(results).items()} == {"zoo_fakes:right": "ok"}


def test_goes_on_after_a_line_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "r.jsonl"
    kept = {"model": "zoo_fakes:right", "status": "skipped"}
    results.write_text(json.dumps(kept) + '\n{"model": "zoo_fakes:wro')
    assert run(results, "zoo_fakes:right", "zoo_fakes:wrong") == 0
    assert [(r["model"], r["status"]) for r in map(json.loads, results.read_text().splitlines())] == [
        ("zoo_fakes:right", "skipped"),
        ("zoo_fakes:wrong", "ok"),
    ]
    assert "[1/1] zoo_fakes:wrong: ok" in capsys.readouterr().out


def test_a_record_holds_sizes_before_and_after() -> None:
    record = check("zoo_fakes:right", OPTIONS)
    convs, fc = 2 * 7 * 5 * 5 * 27, 2 * 5 * 4
    before, after = record["before"], record["after"]
    assert record["inputs"] == [[[2, 3, 9, 7]], [[1, 3, 9, 7]]]
    assert before == {"convs": 1, "linears": 1, "norms": 1, "macs": convs + fc, "params": 5 * 28 + 10 + 24}
    assert after == before | {"norms": 0, "params": 5 * 28 + 24}
    assert record["status"] == "ok" and record["error"] < 1e-5 and record["capture"] == "symbolic"
    assert (record["norms_after_layers"], record["unexplained"], record["fired"]) == (0, [], 1)
    assert record["optimize_s"] > 0 and record["capture_s"] > 0


def test_options_reach_the_optimizer() -> None:
    record = check(
        "zoo_fakes:right", OPTIONS | {"optimizer": "zoo_fakes:told", "example_inputs": False, "float64": True}
    )
    assert "TypeError: inputs None, options {}" in record["message"]
    record = check("zoo_fakes:right", OPTIONS | {"optimizer": "zoo_fakes:told", "optimize_options": {"cost": "nodes"}})
    assert "TypeError: inputs [(2, 3, 9, 7)], options {'cost': 'nodes'}" in record["message"]
    assert check("zoo_fakes:right", OPTIONS | {"float64": True})["error_64"] < 1e-12


def test_batch_norms_left_behind_are_found_and_need_a_reason() -> None:
    record = check("zoo_fakes:right", OPTIONS | {"optimizer": "zoo_fakes:nothing"})
    assert (record["norms_after_layers"], record["status"]) == (1, "ok")
    record = check("zoo_fakes:right", OPTIONS | {"optimizer": "zoo_fakes:speechless"})
    assert record["unexplained"] == ["left.bn after conv left.conv"]
    assert "no refusal says why this stays: left.bn" in zoo.describe(record)
    # kept back by the option: whether the report then names it is fxfuse's own affair, tested with the report
    record = check("zoo_fakes:right", OPTIONS | {"optimize_options": {"patterns": "-conv_bn"}})
    assert record["norms_after_layers"] == 1


class Chains(nn.Module):
    """Batch norms after a linear layer and a view, after an activation, after a computed weight, by batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(3, 4), nn.Conv1d(4, 4, 1)
        self.after_view, self.after_relu, self.after_computed = (nn.BatchNorm1d(4) for _ in range(3))
        self.by_batch = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after_view(self.fc(x).transpose(1, 2).contiguous())
        x = self.after_relu(x.relu())
        x = self.after_computed(nn.functional.conv1d(x, self.conv.weight * 2))
        return self.by_batch(self.conv(x)) @ x.transpose(1, 2)


def test_what_runs_is_counted_and_followed_through_views() -> None:
    model = Chains().eval()
    mode = Executed(model)
    with torch.no_grad(), mode:
        model(torch.randn(2, 6, 3))
    macs = 2 * 6 * (3 * 4 + 4 * 4 + 4 * 4) + 2 * 4 * 4 * 6
    assert mode.sizes() == {"convs": 2, "linears": 1, "norms": 3, "macs": macs}
    assert mode.left == [
        (Layer("linear", "fc"), Layer("batch_norm", "after_view")),
        (None, Layer("batch_norm", "after_relu")),
        (Layer("conv", ""), Layer("batch_norm", "after_computed")),
    ]


def test_no_parameter_stays_constant_and_weights_repeat() -> None:
    model = zoo_models.build("timm:test_convnext")
    constant = [n for n, p in model.named_parameters() if p.numel() > 1 and p.std() == 0]
    assert constant == []
    again = zoo_models.build("timm:test_convnext")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_statistics_fit_the_inputs_but_not_exactly() -> None:
    model, x = zoo_models.build("zoo_fakes:right"), torch.randn(4, 3, 9, 7) * 50 + 20
    zoo_models.calibrate(model, (x,))
    with torch.no_grad():
        seen = model.conv(x).transpose(0, 1).flatten(1)
    off = (model.bn.running_mean - seen.mean(1)) / seen.std(1)
    ratio = model.bn.running_var / (seen.var(1) + seen.var(1).mean() / 2)
    assert off.abs().min() > 0 and off.abs().max() < 0.51
    assert 0.5 < ratio.min() < ratio.max() < 1.51 and (ratio - 1).abs().min() > 1e-3


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_detection_models_find_boxes_to_compare(name: str) -> None:
    name = f"torchvision:{name}"
    model = zoo_models.build(name)
    calls = [tries[0] for tries in zoo_models.inputs(name, model)]
    zoo_models.calibrate(model, calls[0])
    with torch.no_grad():
        for found in (f for args in calls for f in model(*args)):
            assert len(found["boxes"]) > 5
            assert len(found["scores"].unique()) > 5


def test_names_of_collections(tmp_path: Path) -> None:
    cache = tmp_path / "sizes.json"
    params = {n: len(n) for n in timm.list_models()}
    cache.write_text(json.dumps({"timm": timm.__version__, "params": params}))
    smallest = zoo_models.timm_names(["files"], cache)
    assert len(smallest) == len(timm.list_modules())
    assert "timm:" + min(timm.list_models(module="vgg"), key=len) in smallest
    everything = zoo_models.torchvision_names(["all"])
    assert {"torchvision:raft_small", "torchvision:resnet18", "torchvision:s3d"} < set(everything)
    assert not [n for n in everything if "quantized" in n]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--timm", "resnet17"], "timm has no model 'resnet17'"),
        (["--torchvision", "resnet17"], "torchvision has no model 'resnet17'"),
        (["--torchvision", "quantized_resnet18"], "computes in integers"),
        ([], "no models named"),
    ],
)
def test_names_that_do_not_exist_are_usage_errors(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "r.jsonl", *arguments)
    assert said in capsys.readouterr().err


def test_tables_of_what_fired_and_what_was_refused() -> None:
    records = [check(name, OPTIONS) for name in ("timm:repvgg_a0", "torchvision:resnet18")]
    page = zoo_table.tables([*records, {"model": "timm:gone", "status": "timeout"}])
    assert "3 models: 2 ok, 1 timeout" in page
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    rows = {first: rest for first, *rest in cells}
    assert rows["`parallel_conv`"] == ["22", "1", "0"]
    assert rows["timm byobnet"][:3] == ["1", "44 → 22", "61 → 0"]
    assert rows["torchvision classification"][:3] == ["1", "20 → 20", "20 → 0"]
    reason = "what is summed is not all made of one tensor by layers that can be merged"
    assert rows[reason] == ["8", "1"]
