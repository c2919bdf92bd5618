"""Eager time of a model before and after, measured side by side so that a busy machine slows both alike."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fxfuse.capture.failures import said

ROUND_SECONDS = 0.05  # of each model in one round: long against the clock and short against the machine's moods
BUDGET_SECONDS = 10.0
ROUNDS = (5, 25)


def compare(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Milliseconds a call of both, and the ratio after / before with its spread.

    Each round times both, in alternating order, and gives one ratio: `ratio` is the median of them, `low`
    and `high` are their quartiles. Both run in eager mode without gradients.

    Raises:
        ValueError: `before` does not run on the inputs.
    """
    device = next((t.device for t in (*before.parameters(), *before.buffers())), torch.device("cpu"))
    sides = [(before, copy.deepcopy(inputs)), (after, copy.deepcopy(inputs))]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        try:
            _seconds(*sides[0], 1, device)
        except Exception as error:  # whatever the user's model raises is reported with its first line
            raise ValueError(f"{type(before).__name__} does not run on example_inputs: {said(error)}") from error
        _seconds(*sides[1], 1, device)
        once = [_seconds(*side, 1, device) for side in sides]
        calls = [max(1, round(ROUND_SECONDS / max(seconds, 1e-6))) for seconds in once]
        expected = sum(seconds * count for seconds, count in zip(once, calls, strict=True))
        rounds = min(ROUNDS[1], max(ROUNDS[0], int(BUDGET_SECONDS / expected)))
        for number in tqdm(range(rounds), "timing", leave=False, file=sys.stderr, disable=not sys.stderr.isatty()):
            for k in (0, 1) if number % 2 == 0 else (1, 0):
                times[k].append(_seconds(*sides[k], calls[k], device))
    low, ratio, high = ratio_of(times[0], times[1])
    return {
        "before_ms": 1e3 * statistics.median(times[0]),
        "after_ms": 1e3 * statistics.median(times[1]),
        "ratio": ratio,
        "low": low,
        "high": high,
        "rounds": rounds,
        "device": _name(device),
    }


def ratio_of(before: Iterable[float], after: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of after / before, round by round."""
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def _seconds(model: nn.Module, inputs: tuple[Any, ...], calls: int, device: torch.device) -> float:
    """Seconds one call takes, averaged over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        model(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
