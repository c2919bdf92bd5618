"""Makes `fxfuse.patterns` importable from a checkout, where the folder is `patterns/` beside the package.

An installed fxfuse holds it as `fxfuse/patterns`; then nothing is done here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


class _PatternsFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "fxfuse.patterns":
            return None
        folder = _HERE.parent / "patterns"
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


def mount() -> None:
    """Install the finder once, where the package is not there already and the checkout's is."""
    beside = _HERE.parent / "patterns" / "__init__.py"
    mounted = any(isinstance(f, _PatternsFinder) for f in sys.meta_path)
    if not mounted and not (_HERE / "patterns").exists() and beside.exists():
        sys.meta_path.insert(0, _PatternsFinder())  # before that of another checkout, installed for editing
