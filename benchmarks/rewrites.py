"""What each rewrite gains on layers of real models: multiply-accumulates, eager and compiled time, after / before.

    python benchmarks/rewrites.py [REWRITE ...] [--rounds N] [--threads N] [--eager]

Before is the model with everything but the rewrite in question, after is the model with it, whatever the planner
makes of its cost. Both run side by side in one process, interleaved; printed are medians of the ratios with their
quartiles, and whether the planner takes the rewrite by itself. Compiled is inductor with freezing.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from helpers import randomize  # noqa: E402

import fxfuse  # noqa: E402

ROUND_SECONDS = 0.03


@dataclass(frozen=True)
class Case:
    """A model, its input's shape, and the pattern in question."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    pattern: str


class Branches(nn.Module):
    """Convolutions of one input, an activation after each, and a layer that reads each."""

    def __init__(self, width: int, outputs: tuple[int, ...], kernel: int = 1, stride: int = 1, after: int = 1) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(width, n, kernel, stride, kernel // 2) for n in outputs)
        self.after = nn.ModuleList(nn.Conv2d(n, 32, after, padding=after // 2) for n in outputs)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.first, self.after, strict=True)
        return torch.cat([after(F.relu(first(x), inplace=True)) for first, after in pairs], 1)


class Attention(nn.Module):
    """Linear layers for query, key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return out


def siblings() -> Iterator[Case]:
    """Layers of one tensor as one wide layer."""
    inception = {"Inception 35x35": (192, (64, 48, 64), 35), "Inception 17x17": (768, (192, 128, 128), 17)}
    inception |= {"Inception 8x8": (2048, (320, 384, 448), 8), "GoogLeNet 28x28": (192, (64, 96, 16), 28)}
    for name, (width, outputs, size) in inception.items():
        for batch in (1, 8):
            model = _build(Branches, width, outputs, after=3 if size == 35 else 1)
            yield Case(f"{name}, 1x1, batch {batch}", model, (batch, width, size, size), "siblings")
    yield Case("ResNet stage 1, 1x1", _build(Branches, 64, (64, 256)), (1, 64, 56, 56), "siblings")
    yield Case("ResNet stage 2, 1x1, stride 2", _build(Branches, 256, (128, 512), 1, 2), (1, 256, 56, 56), "siblings")
    yield Case("two 1x1 at 112x112", _build(Branches, 64, (16, 16)), (1, 64, 112, 112), "siblings")
    yield Case("two 3x3 at 56x56", _build(Branches, 64, (64, 64), 3), (1, 64, 56, 56), "siblings")
    yield Case("two 3x3 at 14x14", _build(Branches, 256, (256, 256), 3), (1, 256, 14, 14), "siblings")
    yield Case("q, k, v of 192", _build(Attention, 192), (1, 196, 192), "siblings")
    yield Case("q, k, v of 768", _build(Attention, 768), (1, 197, 768), "siblings")


def pool_swap() -> Iterator[Case]:
    """A pool and a pointwise layer in the other order."""
    for width, outputs, size in ((192, 32, 35), (768, 192, 17), (2048, 192, 8)):
        model = _build(_pooled, nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, outputs, 1))
        yield Case(f"Inception {size}x{size}", model, (1, width, size, size), "pool_swap")
    model = _build(_pooled, nn.Conv2d(256, 128, 1), nn.AvgPool2d(2))
    yield Case("DenseNet transition 56x56", model, (1, 256, 56, 56), "pool_swap")


def _pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *layers, nn.ReLU())


REWRITES = {f.__name__: f for f in (siblings, pool_swap)}


def _build(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(make(*args, **kwargs))


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
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4, method="inclusive")
    return 1e3 * statistics.median(times[0]), middle, low, high


def _seconds(run: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    return (time.perf_counter() - start) / calls


def measure(case: Case, rounds: int, eager: bool) -> list[str]:
    """One line of the table."""
    model, x = randomize(case.model()), torch.randn(case.shape)
    before = fxfuse.optimize(model, x, patterns=[f"-{case.pattern}", "-avg_pool"])
    after = fxfuse.optimize(model, x, patterns=[f"{case.pattern}!", "-avg_pool"])
    taken = case.pattern in fxfuse.plan(model, x).by_pattern
    assert case.pattern in fxfuse.report(after).by_pattern, f"{case.name}: nothing to measure"
    macs = fxfuse.report(after).after.macs / fxfuse.report(before).after.macs
    row = [case.pattern, case.name, "yes" if taken else "no", f"{macs:.2f}"]
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
    heads = ["rewrite", "layers", "taken", "MACs", "eager ms", "eager ratio", "compiled ms", "compiled ratio"]
    print(tabulate(rows, heads[: len(rows[0])], "github", disable_numparse=True))
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
