"""The long hunt for what capture gets wrong: random sources as people write them, compared with eager call by call.

    python -m benchmarks.fuzz_python --count 10000 --jobs 2 --seed 0

Source number s is made of seed s alone, so one is seen again with `--seed S --count 1`. A failing source is made
smaller, with as few idioms as still fail alike, and stays as a file, whose path is in its line.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from python_check import NoModel, Wrong, check
from python_ways import WAYS
from random_python import Program, seeded, smaller
from tqdm import tqdm


class Found(NamedTuple):
    """What became of a seed; of a failure also the idioms that matter, the error and the smallest source's path."""

    seed: int
    what: str
    idioms: str = ""
    text: str = ""
    path: str = ""
    norms: tuple[int, int] = (0, 0)


def start() -> None:
    """Settings of a worker."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)


def examine(seed: int, folder: Path, way: str, norms: bool, shrink: bool, small: bool) -> Found:
    """Check one seed."""
    optimize = WAYS[way]
    program = seeded(seed, small)
    try:
        outcome = check(program, folder, optimize, norms)
    except NoModel:
        return Found(seed, "not run by eager")
    except Wrong as wrong:
        least = smaller(program, _like(wrong.kind, folder, optimize)) if shrink else program
        path = folder / f"wrong_{seed}.py"
        head = f"# optimize after a call: {least.used}; example inputs of call: {least.examples}; seed {seed}"
        path.write_text(f"# {_line(wrong)}\n{head}\n{least.source}")
        return Found(seed, wrong.kind, " + ".join(least.idioms), _line(wrong), str(path))
    except Exception:  # a mistake of the fuzz itself must not end the hunt
        return Found(seed, "NOT CHECKED", "", traceback.format_exc(limit=-3))
    finally:
        (folder / f"python_{seed}.py").unlink(missing_ok=True)
    what = "refused" if outcome.refused else "right"
    return Found(seed, what, "", outcome.refused, norms=(outcome.before, outcome.after))


def _like(kind: str, folder: Path, optimize: Any) -> Callable[[Program], bool]:
    """Whether a program fails in the same kind."""

    def fails(program: Program) -> bool:
        try:
            check(program, folder, optimize)
        except Wrong as wrong:
            return wrong.kind == kind
        except Exception:
            return False
        return False

    return fails


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--way", choices=list(WAYS), default="fxfuse", help="what is compared with eager")
    parser.add_argument("--folder", type=Path, help="where failing sources are kept (default: a new one)")
    parser.add_argument("--small", action="store_true", help="fewer idioms in each, as in the tests")
    parser.add_argument("--no-norms", action="store_true", help="do not count the batch norms left")
    parser.add_argument("--no-shrink", action="store_true", help="keep failing sources as they are")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz_python_"))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "way": options.way,
        "norms": not options.no_norms,
        "shrink": not options.no_shrink,
        "small": options.small,
    }
    work = partial(examine, folder=folder, **settings)
    seeds, silent = range(options.seed, options.seed + options.count), not sys.stderr.isatty()
    found: list[Found] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, start, maxtasksperchild=250) as pool, tqdm(total=len(seeds), disable=silent) as bar:
        for one in pool.imap_unordered(work, seeds, chunksize=4):
            found.append(one)
            bar.update()
            if one.path or one.what == "NOT CHECKED":
                tqdm.write(f"{one.seed}: [{one.idioms}] {one.text} {one.path}")
                sys.stdout.flush()
    return _summary(found, options.count)


def _summary(found: list[Found], count: int) -> int:
    """Print what was found of how many, and which idioms alone make a failure; 1 if there is any."""
    counts = Counter(one.what for one in found)
    wrong: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for one in found:
        if one.path:
            wrong[one.idioms, one.what].append(one)
    print(f"\n{count} seeds:", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    before, after = (sum(one.norms[i] for one in found) for i in (0, 1))
    print(f"batch norms run where it is right: {before} before, {after} after")
    for (idioms, what), ones in sorted(wrong.items(), key=lambda item: -len(item[1])):
        print(f"{len(ones):5}  {idioms}: {what}, {ones[0].path}")
    return 1 if wrong or counts["NOT CHECKED"] else 0


if __name__ == "__main__":
    sys.exit(main())
