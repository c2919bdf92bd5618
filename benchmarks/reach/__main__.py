"""Runs the list of well-known models through fxfuse and says which come out whole.

    python -m benchmarks.reach --page docs/reach.md
    python -m benchmarks.reach --only yolov8n "self[0](x)" --json reach.json

Each library is installed in a virtual environment of its own, each model runs in a process of its own with limits of
time and memory. The exit code is 1 if a model was wrong, crashed or took too long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import MODELS
from .environments import python_of, surroundings
from .page import FAILURES, between_markers, describe, tables

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    names = [n for n in MODELS if not args.only or any(wanted in n for wanted in args.only)]
    if not names:
        parser.error("no model has such a name")
    if args.page and len(names) < len(MODELS):
        parser.error("--page needs all models: leave out --only")
    pythons = _pythons(names, args.envs)
    records = run(names, pythons, args)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    text = tables(records)
    if args.page:
        args.page.write_text(between_markers(args.page.read_text(), text))
    else:
        print(text)
    ways = [record[way] for record in records.values() for way in ("with", "without") if way in record]
    return 1 if any(r["status"] in FAILURES for r in ways) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.reach", description="Which models come out whole.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models whose name contains one of these")
    parser.add_argument(
        "--envs", type=Path, default=Path.home() / ".cache" / "fxfuse-reach", metavar="DIR",
        help="where the environments are kept; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="models at a time; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds a model; default: %(default)s")
    parser.add_argument("--memory", type=float, default=8, metavar="GIB", help="of each process; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables into this page, else print them")
    return parser


def _pythons(names: list[str], folder: Path) -> dict[str, str | RuntimeError]:
    """The interpreter of every environment that is needed, or why there is none."""
    pythons: dict[str, str | RuntimeError] = {}
    needed = dict.fromkeys(MODELS[n].needs for n in names)
    for name in tqdm(needed, "environments", leave=False, disable=not sys.stderr.isatty()):
        try:
            pythons[name] = python_of(name, folder.absolute())
        except RuntimeError as error:
            pythons[name] = error
    return pythons


def run(names: list[str], pythons: dict[str, str | RuntimeError], args: argparse.Namespace) -> dict[str, Record]:
    """The record of each model: what it executes (`eager`), and what became of it `with` and `without` inputs."""
    done: dict[str, Record] = {}
    terminal, running = sys.stderr.isatty(), set[subprocess.Popen[str]]()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(names), desc="reach", disable=not terminal) as bar,
    ):
        futures = {
            pool.submit(
                attempt, name, pythons[MODELS[name].needs], args, Path(folder) / f"{number}.jsonl", running
            ): name
            for number, name in enumerate(names)
        }
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                bar.update()
                if terminal:
                    bar.write(describe(futures[future], future.result()), file=sys.stderr)
        except BaseException:  # an interrupt: what has not started will not, and what has ends here
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise
    return {name: done[name] for name in names}


def attempt(
    name: str, python: str | RuntimeError, args: argparse.Namespace, results: Path, running: set[subprocess.Popen[str]]
) -> Record:
    """The record of one model, whatever becomes of its process; that is in `running` meanwhile."""
    if isinstance(python, RuntimeError):
        return {"eager": {"status": "skipped", "message": str(python)}}
    command = [python, "-m", f"{__package__}.check", name, str(results)]
    command += ["--threads", str(args.threads), "--memory", str(args.memory)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=surroundings(args.threads, args.envs), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    running.add(process)
    try:
        _, log = process.communicate(timeout=args.timeout)
        end = {"status": "crash", "message": f"the process exited with {process.returncode}", "traceback": log[-3000:]}
    except subprocess.TimeoutExpired:
        end = {"status": "timeout", "message": f"not done after {args.timeout:g} s"}
    finally:
        process.kill()
        process.communicate()
        running.discard(process)
    lines = results.read_text().splitlines() if results.exists() else []
    record: Record = {line.pop("way"): line for line in map(json.loads, lines)}
    ways = ["eager"] if record.get("eager", {}).get("status") == "skipped" else ["eager", "with", "without"]
    return record | {way: end for way in ways if way not in record}


if __name__ == "__main__":
    sys.exit(main())
