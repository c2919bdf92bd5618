"""Makes fxfuse importable from a bare checkout too; an installed one comes first."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
