"""Is any model slower with all patterns than with its batch norms folded alone? A sample of the zoo, side by side.

    python -m benchmarks.zoo_speed [MODEL ...] [--sample 30] [--seed 0] [--threads N]

Both forms run in eager mode in one process, interleaved (see `fxfuse.reporting.timing`); printed are the ratio of all
patterns over `conv_bn` and `constant_weight` alone, its quartiles, and at the end the distribution. Models where both
forms execute the same layers are counted, not timed. Under 5% is noise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import fxfuse
from fxfuse.reporting import timing

from . import zoo_models
from .zoo_check import accepted

FOLDED = ("conv_bn", "constant_weight")
NOISE = 1.05


def forms(name: str) -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, ...]] | None:
    """The model with its batch norms folded, with all patterns, and an input; None where the two are the same."""
    model = zoo_models.build(name)
    inputs = tuple(accepted(model, next(iter(zoo_models.inputs(name, model)))))
    zoo_models.calibrate(model, inputs)
    folded, fused = (fxfuse.optimize(model, inputs, patterns=p) for p in (FOLDED, None))
    used = {p for f in fxfuse.report(fused).fired for p in f.patterns}
    return None if used <= set(FOLDED) else (folded, fused, inputs)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.zoo_speed", description="All patterns against folding.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm:NAME or torchvision:NAME")
    parser.add_argument("--sample", type=int, default=30, help="models out of timm's files and of torchvision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", type=Path, default=Path("zoo.sizes.json"), help="numbers of parameters, kept here")
    parser.add_argument("--seconds", type=float, default=4.0, help="for timing each model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timing.BUDGET_SECONDS = args.seconds
    names = list(args.models)
    if not names:
        names = zoo_models.timm_names(["files"], args.sizes) + zoo_models.torchvision_names(["all"])
        random.Random(args.seed).shuffle(names)
    rows, ratios, same = [], list[float](), 0
    wanted = len(args.models) or args.sample
    with torch.no_grad(), tqdm(total=wanted, disable=not sys.stderr.isatty()) as bar:
        for name in names:
            if len(ratios) == wanted:
                break
            try:
                both = forms(name)
            except Exception as error:  # a model that does not build or run here is not what is measured
                print(f"{name}: left out, {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
            if both is None:
                same += 1
                continue
            found = timing.compare(*both)
            ratios.append(found["ratio"])
            rows.append((name, found["before_ms"], found["after_ms"], found["ratio"], found["low"], found["high"]))
            bar.update()
            print(f"{name}: {found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})", flush=True)
    rows.sort(key=lambda row: row[3])
    print(tabulate(rows, ("model", "folded ms", "all ms", "ratio", "low", "high"), "simple", floatfmt=".2f"))
    slower = [row[0] for row in rows if row[4] > NOISE]  # even the lower quartile
    if len(ratios) > 1:
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"{len(ratios)} models: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}, from {min(ratios):.2f}")
    told = ", ".join(slower) or "none"
    print(f"to {max(ratios, default=1):.2f}; {same} models that only fold; slower than noise: {told}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
