"""One model, optimized with and without example inputs and compared with an untouched twin; a process of its own.

    python -m benchmarks.reach.check NAME RESULTS

Appends a line of JSON to the file RESULTS for the model itself and then for each way, so that what is done is
known if the process dies. A status is as in benchmarks/zoo_check.py; `whole` says that nothing is left to merge.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from helpers import assert_untouched, fingerprint, randomize, relative_error
from torch import nn
from torch.utils._pytree import tree_map_only

import fxfuse
from benchmarks import zoo_models
from benchmarks.executed import called

from .entry import Entry
from .left import Watched, standing, why, without_folders

MAX_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5}
Record = dict[str, Any]


class Subject:
    """The twin, what it gives on three calls (the third is the first again), and fresh copies of it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.calls = [entry.inputs(0), entry.inputs(1)]
        try:
            self._prepare(torch.float64)
        except (RuntimeError, ValueError, TypeError):  # something in it makes float32 whatever it is given
            self._prepare(torch.float32)

    def _prepare(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        calls = [self._cast(call) for call in self.calls]
        self.twin = randomize(self._build(), seed=0).to(dtype)
        zoo_models.calibrate(self.twin, calls[0])
        self.before = Watched(self.twin)
        first = called(self.twin, calls[0], self.before)
        self.wants = [first, called(self.twin, calls[1]), called(self.twin, calls[0])]

    def _build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.entry.build()

    def _cast(self, value: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, value)

    def fresh(self) -> nn.Module:
        """A model with the twin's weights that was never called."""
        model: nn.Module = randomize(self._build(), seed=0).to(self.dtype)
        model.load_state_dict(self.twin.state_dict())
        return model

    def call(self, number: int) -> Any:
        """The arguments of a call, made anew: a model may write into them."""
        return self._cast(self.entry.inputs(number % 2))


def looked_at(entry: Entry) -> tuple[Subject | None, Record]:
    """The model by itself: what it executes."""
    try:
        subject = Subject(entry)
    except Exception as error:  # a model may raise anything; then there is nothing to compare with
        return None, {"status": "skipped", "message": line_of(error)}
    model = subject.twin
    about = {"dtype": str(subject.dtype).removeprefix("torch."), "params": sum(p.numel() for p in model.parameters())}
    return subject, {"status": "ok", **about, **subject.before.sizes(), "standing": standing(model)}


def optimized(subject: Subject, with_inputs: bool) -> Record:
    """What becomes of a fresh model."""
    model = subject.fresh()
    state = fingerprint(model)
    start = time.process_time()
    try:
        fused = fxfuse.optimize(model, subject.call(0) if with_inputs else None)
    except fxfuse.CaptureError as error:
        return {"status": "refused", "message": line_of(error)}
    record: Record = {"optimize_s": time.process_time() - start}
    mode = Watched(fused)
    largest = 0.0
    for number, want in enumerate(subject.wants):
        got = called(fused, subject.call(number), None if number else mode)
        largest = max(largest, relative_error(got, want))
    report = fxfuse.report(fused)
    record |= {"status": "ok", "capture": report.capture, "fired": len(report.fired), "error": largest}
    record |= mode.sizes() | {"params": sum(p.numel() for p in fused.parameters()), "standing": standing(fused)}
    record |= {"whole": whole(subject.entry, record), "why": why(report, mode)}
    if largest > MAX_ERROR[subject.dtype]:
        record |= {"status": "wrong", "message": f"relative error {largest:.1e}"}
    try:
        assert_untouched(model, state)
    except AssertionError as problem:
        record |= {"status": "wrong", "message": line_of(problem)}
    return record


def whole(entry: Entry, record: Record) -> bool:
    """Nothing is left that could have been merged."""
    left = record["behind"] or record["frozen"] or record["computed"]
    too_many = [record[k] > most for k, most in (("convs", entry.convs), ("norms", entry.norms)) if most is not None]
    return not left and not any(too_many)


def line_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def place_of(error: BaseException) -> str:
    """The last line outside of torch that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "__torch_dispatch__" not in f.name] or frames
    return without_folders(f"{own[-1].filename}:{own[-1].lineno}: `{own[-1].line}`")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reach.check")
    parser.add_argument("name")
    parser.add_argument("results", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=8, help="GiB of address space")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (int(args.memory * 2**30),) * 2)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    from . import MODELS

    def write(record: Record) -> None:
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")

    fxfuse.optimize(nn.Conv2d(1, 1, 1).eval())  # what is imported late is not part of a model's seconds
    subject, record = looked_at(MODELS[args.name])
    write({"way": "eager", **record})
    if subject is None:
        return
    for way in ("with", "without"):
        try:
            record = optimized(subject, way == "with")
        except Exception as error:  # what is being looked for
            message = f"{line_of(error)}, at {place_of(error)}"
            record = {"status": "crash", "message": message, "traceback": traceback.format_exc()[-3000:]}
        write({"way": way, **record})
        gc.collect()


if __name__ == "__main__":
    main()
