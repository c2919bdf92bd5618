"""Every example script runs by itself, from the repository root and from elsewhere, and shows what it claims."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("[!_]*.py"))

CLAIMS = {
    "optimize": (
        r"before +44 conv, +61 batch norm, state_dict of 36\.\d MB\n"
        r"after +22 conv, +0 batch norm, state_dict of 33\.\d MB\n"
        r"outputs differ by [\d.]+e-\d+ of the largest one"
    ),
    "report": (
        r"fxfuse: Model: fused 1 sites.*border would differ.*would cost more.*4,608 instead of 656"
        r".*statistics of the batch.*as data: .*'sites': 1.*at separable\.1: patterns=\[\"conv_chain!\"\]"
        r".*as Markdown:\n## fxfuse: Model"
    ),
    "own_pattern": (
        r"0\.depthwise: 2 conv2d -> conv2d 8->16 k3x3 p1\n2\.depthwise: 2 conv2d -> conv2d 16->16 k5x5 s2 p2\n"
        r"with the pattern: 2 conv, error [\d.]+e-\d+\nwithout: 4 conv; .*would cost more"
    ),
    "refresh": r"optimize: \d+ ms, refresh: \d+ ms\ndifference after a training step: \S+, after refresh: \S+e-\d+",
    "torch_compile": (
        r"first call, compiles .*difference \S+e-\d+\nsecond call .*after a weight changed .*and again .*"
        r"after load_state_dict .*fxfuse: graph 0/0: fused 5 sites"
    ),
}
WORDS = {"torch_compile": ["aot_eager"]}


def output(name: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *WORDS.get(name, [])]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name: str) -> None:
    text = output(name, EXAMPLES.parent)
    assert re.match(CLAIMS[name], text, re.DOTALL), text
    assert len(text.splitlines()) < 70


def test_examples_run_from_any_folder(tmp_path: Path) -> None:
    assert output("own_pattern", tmp_path) == output("own_pattern", EXAMPLES.parent)


def test_every_example_is_small_and_says_what_it_shows() -> None:
    assert set(SCRIPTS) == set(CLAIMS)
    for name in SCRIPTS:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert text.startswith('"""') and len(text.splitlines()) <= 80
