"""What each rewrite gains on layers of real models: work, bytes, eager and compiled time, after / before.

    python -m benchmarks.rewrites [REWRITE ...] [--rounds N] [--threads N] [--eager]

Before is the model with everything but the rewrite in question, after is the model with it, whatever the planner
makes of its cost (see `rewrite_cases.py`). Both run side by side in one process, interleaved; printed are medians of
the ratios with their quartiles, and whether the planner takes the rewrite by itself. Bytes are what the operators of
eager mode read and write; compiled is inductor with freezing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from helpers import randomize
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import fxfuse
from fxfuse.reporting.timing import ratio_of

from .rewrite_cases import REWRITES, Case

ROUND_SECONDS = 0.03


class Traffic(TorchDispatchMode):
    """Bytes that the operators of eager mode read and write, views aside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = (t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def traffic(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), Traffic() as counted:
        model(x)
    return counted.total


def compiled(model: nn.Module) -> Callable[[Tensor], Any]:
    """The model under inductor with freezing, as a function with code of its own."""
    space: dict[str, Any] = {"model": model}
    exec("def run(x):\n    return model(x)", space)
    run: Callable[[Tensor], Any] = torch.compile(space["run"], dynamic=False)
    return run


def ratios(
    before: Callable[[Tensor], Any], after: Callable[[Tensor], Any], x: Tensor, rounds: int
) -> tuple[float, ...]:
    """Milliseconds before, and the median of the ratios after / before with its quartiles."""
    calls, times = [], list[list[float]]([[], []])
    for run in (before, after):
        run(x)
        run(x)
        calls.append(max(1, round(ROUND_SECONDS / _seconds(run, x, 2))))
    for number in range(rounds):
        for k in (0, 1) if number % 2 == 0 else (1, 0):
            times[k].append(_seconds((before, after)[k], x, calls[k]))
    low, middle, high = ratio_of(times[0], times[1])
    return 1e3 * statistics.median(times[0]), middle, low, high


def _seconds(run: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    return (time.perf_counter() - start) / calls


def measure(case: Case, rounds: int, eager: bool) -> list[str]:
    """One line of the table."""
    model, x = randomize(case.model()), torch.randn(case.shape)
    before, after = (fxfuse.optimize(model, x, patterns=p) for p in case.patterns)
    taken = case.pattern in fxfuse.plan(model, x).by_pattern
    assert case.pattern in fxfuse.report(after).by_pattern, f"{case.name}: nothing to measure"
    macs = fxfuse.report(after).after.macs / fxfuse.report(before).after.macs
    moved = traffic(after, x) / traffic(before, x)
    row = [case.pattern, case.name, "yes" if taken else "no", f"{macs:.2f}", f"{moved:.2f}"]
    with torch.no_grad():
        torch._dynamo.reset()
        pairs = [(before, after)] if eager else [(before, after), (compiled(before), compiled(after))]
        for one, two in pairs:
            ms, middle, low, high = ratios(one, two, x, rounds)
            row += [f"{ms:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description="What each rewrite gains on layers of real models.")
    parser.add_argument("rewrites", nargs="*", metavar="REWRITE", help=f"of {', '.join(REWRITES)}; default: all")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: %(default)s")
    parser.add_argument("--eager", action="store_true", help="without compiling")
    options = parser.parse_args()
    if unknown := set(options.rewrites) - REWRITES.keys():
        parser.error(f"unknown rewrite {min(unknown)}; known: {', '.join(REWRITES)}")
    torch.set_num_threads(options.threads)
    import torch._inductor.config as inductor

    inductor.freezing = True
    cases = [case for name in options.rewrites or REWRITES for case in REWRITES[name]()]
    bar = tqdm(cases, disable=not sys.stderr.isatty())
    rows = [measure(case, options.rounds, options.eager) for case in bar]
    heads = ["rewrite", "layers", "taken", "MACs", "bytes", "eager ms", "eager ratio", "compiled ms", "compiled ratio"]
    print(tabulate(rows, heads[: len(rows[0])], "github", disable_numparse=True))
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
