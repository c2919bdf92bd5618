"""Which well-known models come out whole: `python -m benchmarks.reach --help`."""

from .entry import Entry
from .idioms import MODELS as _IDIOMS
from .libraries import MODELS as _LIBRARIES

MODELS: dict[str, Entry] = _LIBRARIES | _IDIOMS
