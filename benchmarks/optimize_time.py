"""Time of fxfuse.optimize against capturing alone, and its peak memory against the model's weights.

    python -m benchmarks.optimize_time [[WAY:]MODEL ...] [--rounds N] [--threads N] [--no-memory]

Time: both run in one process, interleaved, with a garbage collection between. The baseline is
torch.fx.symbolic_trace, and for diverse branch blocks, whose item assignments it cannot record, the same with
fxfuse's tracer. `export:MODEL` optimizes a timm model with capture="export", against torch.export.export with
open sizes; `hierarchical:MODEL` with capture="hierarchical", against finding and tracing
the parts that can be graphs. Printed are medians, and quartiles of the ratio per round.
A ratio must not exceed 4 on the networks, and on the longest chain not 1.3 times that of the
shortest: neither may grow faster than the graph.

Memory: measured in a fresh process that has optimized something small before, so that all code is loaded.
"growth" is the high-water mark of resident memory during optimize, minus what was resident before, over the
bytes of the model's parameters and buffers. "peak" is growth + 1: all that is held beyond the process itself,
the model's own weights included. It must not exceed 2.5: the model, the result (about as large), and half
a model of intermediate tensors, graph and slack of the allocator, which counts too and weighs more on small
models. Chains have next to no weights, so their memory says nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.fx import GraphModule
from torchvision_ops import declare_missing_ops
from tqdm import tqdm

import fxfuse
from examples.blocks import dbb_resnet18
from fxfuse.capture.parts import survey
from fxfuse.capture.symbolic import FuseTracer
from fxfuse.reporting.timing import ratio_of

MAX_RATIO, MAX_GROWTH_OF_RATIO, MAX_PEAK = 4.0, 1.3, 2.5
NETWORKS = ("repvgg_a0", "mobileone_s0", "resnet50", "dbb_resnet18")
OTHER_WAYS = ("export:repvgg_a0", "export:resnet50", "hierarchical:repvgg_a0", "hierarchical:retinanet_resnet50_fpn")
CHAINS = ("chain_1k", "chain_3k", "chain_10k", "chain_30k")


def build(name: str) -> nn.Module:
    """The model of that name, in eval mode."""
    if name in CHAINS:
        triples = int(name.removeprefix("chain_").removesuffix("k")) * 1000 // 3
        layers = [m for _ in range(triples) for m in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())]
        return nn.Sequential(*layers).eval()
    if name == "dbb_resnet18":
        return dbb_resnet18().eval()
    declare_missing_ops()
    import timm

    if timm.is_model(name):
        model: nn.Module = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return model.eval()


def baseline(model: nn.Module, way: str, inputs: Any) -> Callable[[], list[Any]]:
    """What captures the model the same way without fxfuse; returns graphs."""
    if way == "export":
        sizes = dict.fromkeys(range(4), torch.export.Dim.AUTO)
        return lambda: [torch.export.export(model, (inputs,), dynamic_shapes=(sizes,), strict=False)]
    if way == "hierarchical":
        return lambda: [p.captured for p in survey(model, None, way).walk() if p.captured]
    work = trace(model)
    return lambda: [work()]


def trace(model: nn.Module) -> Callable[[], GraphModule]:
    """torch.fx.symbolic_trace; where it cannot record an item assignment, the same with fxfuse's tracer."""
    try:
        torch.fx.symbolic_trace(model)
    except TypeError:
        return lambda: GraphModule(model, FuseTracer().trace(model))
    return lambda: torch.fx.symbolic_trace(model)


def captured(name: str) -> tuple[str, nn.Module, torch.Tensor | None]:
    """The way of capture, the model, and an example for torch.export."""
    way, _, rest = name.rpartition(":")
    return way, build(rest), torch.randn(2, 3, 224, 224) if way == "export" else None


def seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    result = work()
    taken = time.perf_counter() - start
    del result
    return taken


def measure_time(name: str, rounds: int) -> dict[str, float]:
    way, model, inputs = captured(name)
    capture = baseline(model, way, inputs)
    nodes = sum(len(g.graph.nodes) for g in capture())
    optimize = partial(fxfuse.optimize, model, inputs, capture=way or None)
    optimize()
    traced, optimized = [], []
    for number in tqdm(range(rounds), name, leave=False, disable=not sys.stderr.isatty()):
        for kind in ("trace", "optimize") if number % 2 == 0 else ("optimize", "trace"):
            if kind == "trace":
                traced.append(seconds(capture))
            else:
                optimized.append(seconds(optimize))
    low, ratio, high = ratio_of(traced, optimized)
    return {
        "nodes": nodes,
        "trace_ms": 1e3 * statistics.median(traced),
        "optimize_ms": 1e3 * statistics.median(optimized),
        "low": low,
        "ratio": ratio,
        "high": high,
    }


def measure_memory(name: str) -> dict[str, float]:
    """Runs in a process of its own: the high-water mark cannot be taken back everywhere."""
    way, model, inputs = captured(name)
    small = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    fxfuse.optimize(small, inputs, capture=way or None)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    gc.collect()
    try:  # on Linux the mark can be set back to what is resident now, and belongs to this process alone
        Path("/proc/self/clear_refs").write_text("5")
        mark = _high_water
    except OSError:
        mark = _max_resident
    before = mark()
    fused = fxfuse.optimize(model, inputs, capture=way or None)
    growth = mark() - before
    del fused
    return {"weights": weights, "growth": growth / weights, "peak": growth / weights + 1}


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(name: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.optimize_time", name, "--memory-of-one", f"--threads={threads}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of fxfuse.optimize.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"timm or torchvision, or {', '.join(CHAINS)}")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds for each model, at least 2")
    parser.add_argument("--threads", type=int, help="of torch; 1 is steadier where other work shares the cores")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--memory-of-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of_one:
        print(json.dumps(measure_memory(args.models[0])))
        return 0
    rows, failed, shortest = [], 0, None
    for name in args.models or (*NETWORKS, *OTHER_WAYS, *CHAINS):
        t = measure_time(name, max(2, args.rounds))
        memory = {} if args.no_memory or name in CHAINS else in_own_process(name, torch.get_num_threads())
        problems = []
        if name in CHAINS:
            shortest = shortest or t["ratio"]
            if t["ratio"] > MAX_GROWTH_OF_RATIO * shortest:
                problems.append(f"ratio > {MAX_GROWTH_OF_RATIO} x {shortest:.2f}")
        elif t["ratio"] > MAX_RATIO:
            problems.append(f"ratio > {MAX_RATIO}")
        if memory and memory["peak"] > MAX_PEAK:
            problems.append(f"peak > {MAX_PEAK}")
        failed += bool(problems)
        ratio = f"{t['ratio']:.2f} ({t['low']:.2f} to {t['high']:.2f})"
        row = [name, f"{t['nodes']:,}", f"{t['trace_ms']:.1f}", f"{t['optimize_ms']:.1f}", ratio]
        if memory:
            row += [f"{memory['weights'] / 1e6:.1f}", f"{memory['growth']:.2f}", f"{memory['peak']:.2f}"]
        else:
            row += [""] * 3
        rows.append([*row, ", ".join(problems) or "ok"])
    heads = "model", "nodes", "trace ms", "optimize ms", "ratio (quartiles)", "weights MB", "growth", "peak", "verdict"
    print(tabulate(rows, heads, "simple", disable_numparse=True))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {max(2, args.rounds)} rounds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
