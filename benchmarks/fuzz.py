"""The long hunt: random models by the hundred thousand, optimized and compared with eager.

    python -m benchmarks.fuzz --examples 50000 --jobs 2 --seed 0

Example number s is made of seed s alone, so a hunt is continued where one ended by `--seed`, shared out by
ranges of seeds, and a failure seen again with `--seed S --examples 1`. A failing model is made smaller and
printed as code.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from fuzz_check import NoModel, check
from random_models import Program, seeded, smaller
from tqdm import tqdm


def start() -> None:
    """Settings of a worker."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def signature(program: Program) -> tuple[str, str] | None:
    """Kind and beginning of the error that a program leads to; None where it agrees with eager."""
    try:
        check(program)
    except NoModel:
        return None
    except Exception as error:
        return type(error).__name__, str(error)[:12]
    return None


def examine(seed: int) -> tuple[int, str, str]:
    """(seed, what became of it, the failing model as text)."""
    try:
        program = seeded(seed)
    except Exception:  # a mistake of the fuzz itself must not end the hunt
        return seed, "NOT WRITTEN", traceback.format_exc(limit=-3)
    try:
        outcome = check(program)
    except NoModel:
        return seed, "no model", ""
    except Exception:
        what = signature(program)
        least = smaller(program, lambda other: signature(other) == what)
        return seed, "FAILED", f"{traceback.format_exc(limit=-3)}\n{least!r}"
    kind = (
        "refused" if outcome.refused else "guarded" if outcome.guarded else "fused" if outcome.fired else "left alone"
    )
    return seed, kind, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    seeds, counts = range(options.seed, options.seed + options.examples), Counter[str]()
    context = multiprocessing.get_context("spawn")
    silent = not sys.stderr.isatty()
    with context.Pool(options.jobs, start) as pool, tqdm(total=len(seeds), smoothing=0.05, disable=silent) as bar:
        results: Any = pool.imap_unordered(examine, seeds, chunksize=16)
        for seed, kind, text in results:
            counts[kind] += 1
            bar.update()
            bar.set_postfix(counts, refresh=False)
            if text:
                tqdm.write(f"\nseed {seed}\n{text}")
    print(f"seeds {seeds.start} to {seeds.stop - 1}:", ", ".join(f"{n} {k}" for k, n in counts.most_common()))
    print(f"go on with --seed {seeds.stop}")
    return 1 if counts["FAILED"] + counts["NOT WRITTEN"] else 0


if __name__ == "__main__":
    sys.exit(main())
