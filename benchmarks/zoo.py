"""Runs fxfuse over whole model collections and says where it is wrong, crashes, or leaves a batch norm behind.

    python -m benchmarks.zoo --timm files --torchvision all --results zoo.jsonl
    python -m benchmarks.zoo --timm resnet18 fastvit_t8
    python -m benchmarks.zoo examples.blocks:dbb_resnet18

Every model gets random weights and batch statistics, and a process of its own with a time limit: none can stop
the run. Its record, a line of JSON in the results file, holds what zoo_check.py lists; a run that was interrupted
goes on where it stopped. The exit code is 1 if a model was wrong, crashed or took too long, or if a batch norm
stays that no refusal names.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]
FAILURES = ("wrong", "crash", "timeout")
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    results = Path(args.results)
    try:
        names = _names(args, results)
    except ValueError as error:
        parser.error(str(error))
    if not names:
        parser.error("no models named: give --timm, --torchvision or package.module:factory")
    done = load(results)
    if args.again is not None:
        done = {n: r for n, r in done.items() if n not in names or (args.again and r["status"] not in args.again)}
    _rewrite(results, done.values())
    todo = [n for n in names if n not in done]
    options = {
        "threads": args.threads,
        "optimizer": args.optimizer,
        "optimize_options": {} if args.capture is None else {"capture": args.capture},
        "float64": args.float64,
        "example_inputs": not args.without_inputs,
    }
    done |= run(todo, options, args.jobs, args.timeout, results)
    print(summary([done[n] for n in names]))
    bad = [n for n in names if done[n]["status"] in FAILURES or done[n].get("unexplained")]
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.zoo", description="fxfuse over whole model collections.")
    parser.add_argument("models", nargs="*", metavar="package.module:factory", help="functions that give a model")
    parser.add_argument(
        "--timm", nargs="+", default=[], metavar="NAME",
        help="`all` architectures, `files`: the smallest of each of timm's files, or names",
    )  # fmt: skip
    parser.add_argument("--torchvision", nargs="+", default=[], metavar="NAME", help="`all` (none quantized) or names")
    parser.add_argument("--results", default="zoo.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--again", nargs="*", metavar="STATUS", help="check models anew that have a record, or one with such a status"
    )
    parser.add_argument("--jobs", type=int, default=2, help="models at a time; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process; default: %(default)s")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds a model; default: %(default)s")
    parser.add_argument("--capture", metavar="WAY", help="passed to fxfuse.optimize")
    parser.add_argument("--without-inputs", action="store_true", help="optimize without example inputs")
    parser.add_argument("--float64", action="store_true", help="compare in double precision too, not only in doubt")
    parser.add_argument(
        "--optimizer", default="fxfuse:optimize", metavar="package.module:function", help="check another optimizer"
    )
    return parser


def _names(args: argparse.Namespace, results: Path) -> list[str]:
    if not (args.timm or args.torchvision):
        return list(dict.fromkeys(args.models))
    from . import zoo_models

    sizes = results.with_suffix(".sizes.json")
    timm = zoo_models.timm_names(args.timm, sizes) if args.timm else []
    torchvision = zoo_models.torchvision_names(args.torchvision) if args.torchvision else []
    return list(dict.fromkeys([*args.models, *timm, *torchvision]))


def load(results: Path) -> dict[str, Record]:
    """The records of a results file by model; a last line that was cut off does not count."""
    lines = results.read_text().split("\n")[:-1] if results.exists() else []
    return {r["model"]: r for r in map(json.loads, lines)}


def _rewrite(results: Path, records: Iterable[Record]) -> None:
    new = results.with_suffix(".new")
    new.write_text("".join(json.dumps(r) + "\n" for r in records))
    new.replace(results)


def run(names: list[str], options: Record, jobs: int, timeout: float, results: Path) -> dict[str, Record]:
    """Check each model in its own process and append its record to the results file."""
    context = multiprocessing.get_context(METHOD)
    if METHOD == "forkserver":  # torch is imported once, not once for each model
        context.set_forkserver_preload(["benchmarks.zoo_check", "timm", "torchvision"])
    terminal, done, running = sys.stderr.isatty(), dict[str, Record](), set[Any]()
    with (
        tempfile.TemporaryDirectory() as logs,
        ThreadPoolExecutor(jobs) as pool,
        results.open("a") as file,
        tqdm(total=len(names), desc="zoo", disable=not terminal) as bar,
    ):
        one = partial(attempt, options=options, timeout=timeout, context=context, logs=Path(logs), running=running)
        futures = [pool.submit(one, n) for n in names]
        try:
            for future in as_completed(futures):
                record = future.result()
                done[record["model"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                bar.update()
                if not terminal or record["status"] != "ok" or record.get("unexplained"):
                    bar.write(f"[{len(done)}/{len(names)}] {describe(record)}")
        except BaseException:  # an interrupt: what has not started will not, and what has ends here
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.kill()
            raise
    return done


def attempt(name: str, options: Record, timeout: float, context: Any, logs: Path, running: set[Any]) -> Record:
    """The record of one model, whatever becomes of the process that checks it; that is in `running` meanwhile."""
    from .zoo_check import in_process

    start = time.perf_counter()
    log = logs / name.replace("/", "_").replace(":", ".")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=in_process, args=(name, options, sender, str(log)), daemon=True)
    process.start()
    running.add(process)
    sender.close()
    try:
        if receiver.poll(timeout):
            record = receiver.recv()
            process.join(10)
        else:
            record = {"model": name, "status": "timeout", "message": f"not done after {timeout:g} s"}
    except (EOFError, OSError, UnpicklingError):  # it is gone, and has sent nothing or a part
        process.join()
        record = {"model": name, "status": "crash", "message": f"the process {_death(process.exitcode)}"}
        record["traceback"] = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    finally:
        process.kill()
        running.discard(process)
        receiver.close()
    return record | {"total_s": time.perf_counter() - start}


def _death(code: int | None) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"


def describe(record: Record) -> str:
    """One line of a record."""
    text = f"{record['model']}: {record['status']}"
    if "error" in record:
        b, a = record["before"], record["after"]
        text += f", error {record['error']:.0e}, batch norms {b['norms']} -> {a['norms']}"
        text += f", convs {b['convs']} -> {a['convs']}, optimize {record['optimize_s']:.1f} s"
    for unexplained in record.get("unexplained", ())[:3]:
        text += f"\n    no refusal says why this stays: {unexplained}"
    return "\n    ".join(filter(None, (text, record.get("note"), record.get("message"))))


def summary(records: list[Record]) -> str:
    """The totals on one line."""
    statuses = Counter(r["status"] for r in records)
    both = [r for r in records if "after" in r]
    text = f"{len(records)} models: " + ", ".join(f"{n} {status}" for status, n in statuses.most_common())
    for key, name in (("convs", "convs"), ("norms", "batch norms"), ("params", "params"), ("macs", "MACs")):
        before, after = (sum(r[side][key] for r in both) for side in ("before", "after"))
        text += f"; {name} {before:,} -> {after:,}"
    left = sum(r.get("norms_after_layers", 0) for r in both)
    text += (
        f"; {left:,} batch norms left behind a layer, {sum(len(r.get('unexplained', ())) for r in both)} unexplained"
    )
    ways = Counter(r["capture"] for r in both if "capture" in r)
    text += "; capture " + (", ".join(f"{way} {n}" for way, n in ways.most_common()) or "none")
    error = max((r["error"] for r in both if r["status"] == "ok" and "error_64" not in r), default=0.0)
    return text + f"; largest error {error:.0e}; optimizing took {sum(r['optimize_s'] for r in both):.0f} s"


if __name__ == "__main__":
    sys.exit(main())
