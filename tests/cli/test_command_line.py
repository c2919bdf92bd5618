"""The command line: every subcommand, every way of naming a model, every mistake one line and exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_untouched, fingerprint
from torch import nn

import fxfuse
from fxfuse.cli.main import main
from fxfuse.pattern import known
from fxfuse.reporting import timing

ROOT = Path(__file__).resolve().parents[2]
REPVGG = str(ROOT / "examples" / "blocks" / "repvgg.py")
SMALL = "models.py:small"

NOISE = "noise that belongs to no report\n"

MODELS = """
import torch
from torch import nn
import neighbour

print("noise that belongs to no report")

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))

class Holder:
    nested = Small

small = Small().eval()
width = 3

def branches(x=None):
    class Branches(Small):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branches()

def needs(width):
    return Small()

def fails():
    raise KeyError("no such\\nweights")

def nothing():
    return None

def two():
    class Two(Small):
        def forward(self, x, y):
            return self.bn(self.conv(x)) + y
    return Two()

def wide():
    return Small().double()

def lies():
    class Lies(Small):
        calls = 0
        def forward(self, x):
            return self.bn(self.conv(x)) * neighbour.factor()
    return Lies()
"""

NEIGHBOUR = """
calls = 0

def factor():
    global calls
    calls += 1
    return float(calls)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with models, current for the test; what comes out of it is forgotten afterwards."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard output of a command that succeeds, says nothing else and leaves `sys.path` alone."""
    path = list(sys.path)
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert (code, sys.path) == (0, path), err
    assert err in ("", NOISE), err
    return out


def fail(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    assert main(list(argv)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"fxfuse: error: .+\n", err.removeprefix(NOISE)), err
    return err.removeprefix(NOISE)


def data(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    result = json.loads(run(capsys, "report", *argv, "--json"))
    assert isinstance(result, dict)
    return result


def test_text_json_and_markdown_are_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    import models

    report = fxfuse.report(fxfuse.optimize(models.small))
    capsys.readouterr()

    def stripped(text: str) -> str:
        return re.sub(r"in [\d.]+ s", "", text).strip()

    assert stripped(run(capsys, "report", SMALL)) == stripped(str(report))
    assert stripped(run(capsys, "report", SMALL, "--markdown")) == stripped(report.to_markdown())
    expected = json.loads(json.dumps(report.to_dict()))
    assert data(capsys, SMALL) | {"seconds": 0} == expected | {"seconds": 0}


@pytest.mark.parametrize("target", [SMALL, "models:small", "models:Small", "models.py:Holder.nested", "models.py:wide"])
def test_every_kind_of_factory_loads(folder: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    found = data(capsys, target, "--input", "2,3,8,9", "--verify")
    assert found["patterns"] == {"conv_bn": 1}
    assert found["before"]["macs"] == 2 * 4 * 6 * 7 * 27
    assert found["max_error"] < (1e-13 if target == "models.py:wide" else 1e-5)


def test_a_file_in_a_package_may_import_relatively(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = folder / "far" / "pack" / "inner"
    inner.mkdir(parents=True)
    for name in (inner, inner.parent):
        (name / "__init__.py").write_text("")
    (inner.parent / "base.py").write_text("from models import Small\n")
    (inner / "sibling.py").write_text("factor = 1\n")
    (inner / "net.py").write_text("import sibling\nfrom ..base import Small\nfrom . import sibling as same\n")
    assert data(capsys, "far/pack/inner/net.py:Small")["sites"] == 1
    assert sys.modules["pack.inner.net"].__file__ == str(inner / "net.py")


def test_the_readme_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = data(capsys, "examples/blocks/repvgg.py:repvgg_a0", "--input", "1,3,32,32")
    assert (found["sites"], found["before"]["ops"]["conv"], found["after"]["ops"]["conv"]) == (22, 44, 22)
    assert "batch_norm" not in found["after"]["ops"] and found["refused"] == []


def test_several_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "models.py:two", "--input", "1,3,8,9", "--input", "1,4,6,7", "--verify")
    assert found["sites"] == 1 and found["max_error"] < 1e-5
    assert "missing" in fail(capsys, "report", "models.py:two", "--input", "1,3,8,9")


def test_patterns_and_cost_reach_the_planner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data(capsys, SMALL, "--patterns", "identity")["sites"] == 0
    assert data(capsys, SMALL, "--patterns", "identity", "conv_bn!")["sites"] == 1
    assert data(capsys, SMALL, "--patterns=-conv_bn,identity")["sites"] == 0
    assert data(capsys, SMALL, "--cost", "nodes")["cost"] == "nodes"


def test_a_dry_run_touches_no_weight(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    import models

    with torch.no_grad():
        models.small.conv.weight.fill_(float("nan"))
    before = fingerprint(models.small)
    capsys.readouterr()
    dry = data(capsys, SMALL, "--dry-run")
    assert (dry["dry_run"], dry["sites"], dry["refused"]) == (True, 1, [])
    assert_untouched(models.small, before)
    assert data(capsys, SMALL)["sites"] == 0, "weights that are not finite are refused by a real run alone"
    assert "would fuse 1 sites" in run(capsys, "report", SMALL, "--dry-run")


def test_timing(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", (5, 5))
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.005)
    found = data(capsys, SMALL, "--input", "1,3,8,8", "--time")["timing"]
    assert found["rounds"] == 5 and found["device"].startswith("cpu")
    assert 0 < found["low"] <= found["ratio"] <= found["high"]
    assert found["before_ms"] > 0 and found["after_ms"] > 0
    text = run(capsys, "report", SMALL, "--time", "--markdown")
    assert re.search(r"time per call: [\d.]+ ms -> [\d.]+ ms, ratio [\d.]+ \(.* 5 interleaved rounds, cpu", text)
    assert re.search(r"MACs +\| 5.32M", text), "the default input is 1,3,224,224"


def test_the_ratio_is_after_to_before(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleep(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(self.seconds)
            return x

    monkeypatch.setattr(timing, "ROUNDS", (5, 5))
    found = timing.compare(Sleep(0.02), Sleep(0.005), (torch.ones(1),))
    assert found["before_ms"] >= 20 and found["after_ms"] >= 5
    assert 0.15 < found["low"] <= found["ratio"] <= found["high"] < 0.6


def test_progress_is_for_terminals(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ROUNDS", (2, 2))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["report", SMALL, "--input", "1,3,8,8", "--time", "--json"]) == 0
    out, err = capsys.readouterr()
    assert SMALL in err and "timing" in err and json.loads(out)["sites"] == 1


def test_zoo_models_need_no_download(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    assert data(capsys, "timm:test_resnet", "--input", "1,3,64,64", "--verify")["max_error"] < 1e-4
    found = data(capsys, "torchvision:mobilenet_v3_small", "--dry-run")
    assert found["before"]["ops"]["batch_norm"] == 34 and "batch_norm" not in found["after"]["ops"]
    assert data(capsys, "torchvision:lraspp_mobilenet_v3_large", "--dry-run")["sites"] > 40
    assert "resnet18" in fail(capsys, "report", "timm:resnet_18")
    assert "mobilenet_v3_small" in fail(capsys, "report", "torchvision:mobilenet_v3_smal")


def test_zoo_that_is_missing_or_broken(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "no module timm: install it" in fail(capsys, "report", "timm:resnet18")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "broken").mkdir()
    (folder / "broken" / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(folder / "broken")
    line = fail(capsys, "report", "torchvision:resnet18")
    assert "RuntimeError: operator torchvision::nms does not exist; install versions that fit torch" in line


MISTAKES = {
    "nothing.py:Model": "there is no file nothing.py",
    "models.py": "'models.py' names no model: give timm:NAME",
    "models.py:": "names no model",
    ":small": "names no model",
    "no.such.module:Model": "no module no: install it",
    "models.sub:Model": "no module models.sub",
    "models.py:Smal": r"models.py has no 'Smal'; did you mean (\w+ or )*Small",
    "models.py:small.conv.nothing": "models.py has no 'small.conv.nothing'",
    "models.py:width": "is of type int: name an nn.Module",
    "models.py:needs": "missing 1 required positional argument: 'width'; name a class or function that works without",
    "models.py:fails": r"does not build: KeyError: .*no such.*weights",
    "models.py:nothing": "gives an object of type NoneType: it has to give an nn.Module",
    "models.py:branches --capture symbolic": r"Branches cannot be traced at .*models.py:\d+",
    "syntax.py:Model": "syntax cannot be imported: SyntaxError",
    "exits.py:Model": "exits cannot be imported: SystemExit: 3",
    "lacks.py:Model": "lacks cannot be imported: it needs not_installed_here; install that",
    "json.py:Model": r"json.py has the name of the module json, which is in use already: rename it",
    "models.py:small --patterns conv_bm": "unknown pattern 'conv_bm'; known: .*conv_bn",
    "models.py:small --cost mac": "unknown cost 'mac'; known: macs, nodes, params",
    "models.py:small --capture dynamo": "unknown capture 'dynamo'; known: symbolic, export, hierarchical",
    "models.py:small --input 1,3,x,8": "--input '1,3,x,8' is no shape: give whole numbers above 0",
    "models.py:small --input 1,0,8,8": "'1,0,8,8' is no shape",
    "models.py:small --input=": "'' is no shape",
    "models.py:small --input 9999999999,9999999999": "--input 9999999999,9999999999 cannot be made: .*smaller",
    "models.py:small --input 1,5,8,8": "Small does not run on example_inputs: .*; tried --input 1,5,8,8: give shapes",
    "models.py:small --input 1,3,2,2 --time": "Small does not run on example_inputs",
    "models.py:small --dry-run --time": "--dry-run builds nothing to run: leave out --dry-run or --time",
    "models.py:small --dry-run --verify": "leave out --dry-run or --verify",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    (folder / "syntax.py").write_text("def Model(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "lacks.py").write_text("import not_installed_here\n")
    (folder / "json.py").write_text("Model = None\n")
    assert re.search(MISTAKES[words], fail(capsys, "report", *words.split()))


def test_a_failed_verification_is_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(capsys, "report", "models.py:lies", "--input", "1,3,8,8", "--verify", code=1)
    assert "outputs differ by" in line


def test_patterns_lists_every_law(capsys: pytest.CaptureFixture[str]) -> None:
    words = set(run(capsys, "patterns").split())
    for name, pattern in known().items():
        assert {name, *pattern.law.split(), *pattern.refused_when.split()} <= words


@pytest.mark.parametrize("name", sorted(known()))
def test_explain_runs_the_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = run(capsys, "explain", name)
    pattern = known()[name]
    docstring = sys.modules[type(pattern).__module__].__doc__ or ""
    assert text.startswith(f"{name}\n\n{docstring.strip().splitlines()[0]}")
    assert pattern.refused_when in " ".join(text.split())
    for example in pattern.examples:
        block = text.split(f"\n{example.title}:\n")[1].split("\n\n")[0]
        if example.fires:
            assert block.startswith("  fires: ") and "relative error" in block
        else:
            assert "  refused: " in block and re.search(example.reason, block)


def test_explain_an_unknown_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown pattern 'bn'; known: " in fail(capsys, "explain", "bn")


def test_what_argparse_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: fxfuse" in capsys.readouterr().err
    for words, code in {"nonsense": 2, "report": 2, "report a:b --json --markdown": 2, "--help": 0}.items():
        with pytest.raises(SystemExit) as stop:
            main(words.split())
        assert stop.value.code == code
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fxfuse {fxfuse.__version__}\n"


def test_as_a_process() -> None:
    def process(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fxfuse", *argv]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    good = process("report", f"{REPVGG}:repvgg_a0", "--dry-run", "--json")
    assert (good.returncode, good.stderr) == (0, "") and json.loads(good.stdout)["sites"] == 22
    bad = process("report", f"{REPVGG}:repvgg_b0")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("fxfuse: error: ") and "repvgg_a0" in bad.stderr and bad.stderr.count("\n") == 1
