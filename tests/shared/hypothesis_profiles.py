"""How many examples hypothesis draws: the same few each time, or thousands of others with `HYPOTHESIS_PROFILE=hunt`."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
settings.register_profile("fixed", deadline=None, derandomize=True, suppress_health_check=SLOW, database=None)
settings.register_profile("hunt", deadline=None, max_examples=3000, suppress_health_check=SLOW)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "fixed")
settings.load_profile(PROFILE)


def few(count: int) -> Any:
    """So many examples, unless the profile hunts."""
    return settings() if PROFILE == "hunt" else settings(max_examples=count)
