"""README.md shows what really happens: its code runs, its report is the one printed, its table is the registry's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fxfuse
from fxfuse import pattern

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```(python|text)\n(.*?)```", TEXT, re.S)


def timeless(report: str) -> str:
    """Without the time taken and the exact size of a rounding error."""
    return re.sub(r"error \S+", "error E", re.sub(r"in [\d.]+ s", "in T s", report)).strip()


def test_the_report_is_the_one_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.chdir(tmp_path)  # type: ignore[attr-defined]
    (_, code), (_, printed) = BLOCKS[:2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    exec(compile(code, "README.md", "exec"), {})
    assert timeless(capsys.readouterr().out) == timeless(printed)


def test_own_pattern_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(c for kind, c in BLOCKS if "class Blueprint" in c)
    try:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    finally:
        fxfuse.unregister("blueprint")
    assert capsys.readouterr().out.strip() == "{'blueprint': 1}"


def test_a_model_that_is_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(next(c for kind, c in BLOCKS if "retinanet" in c), "README.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert "backbone symbolic " in printed
    assert any(line.startswith("head.classification_head python ") and "retinanet.py:" in line for line in printed)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in names[k].modules()) for k in ("model", "fused")]
    assert norms == [53, 0] and type(names["fused"]) is type(names["model"])


def test_table_names_every_pattern() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.M))
    assert set(rows) == set(pattern.known())
    for name, law in rows.items():
        assert law.replace("`", "") == pattern.known()[name].law.replace(";  ", "; ")


def test_two_quick_start_commands() -> None:
    section = TEXT.split("<!-- quick start -->")[1].split("<!-- /quick start -->")[0]
    assert len([line for line in section.splitlines() if line.startswith("python3 ")]) == 2
