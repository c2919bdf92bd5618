"""Programs that measure fxfuse; run them from a checkout: `python -m benchmarks.zoo --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "shared"))  # where helpers are
