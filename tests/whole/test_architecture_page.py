"""docs/architecture.md runs: its code prints what stands below it, and the files that it names are there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_the_block_goes_through_the_stages_as_it_says() -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", TEXT, re.M | re.S)
    names: dict[str, Any] = {"__name__": "docs"}
    compared, printed = 0, None
    for kind, body in blocks:
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, "architecture.md", "exec"), names)
            printed = out.getvalue()
        elif printed:
            assert printed == body
            compared, printed = compared + 1, None
    assert compared == 5


def test_the_files_it_names_are_there() -> None:
    paths = set(re.findall(r"`((?:fxfuse|patterns|tests|docs|benchmarks|examples)/[\w/.]*)", TEXT))
    assert len(paths) > 12
    assert [p for p in sorted(paths) if not (ROOT / p).exists()] == []


def test_every_package_and_module_of_the_root_has_its_row() -> None:
    room = {p.stem for p in (ROOT / "fxfuse").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    table = TEXT[TEXT.index("## The rooms") : TEXT.index("## One block")]
    missing = [name for name in sorted(room) if not name.startswith("_") and f"`{name}" not in table]
    assert missing == []
