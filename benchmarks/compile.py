"""Compiled inference side by side: what torch.compile makes of a train form with and without fxfuse.

    python -m benchmarks.compile [MODEL ...] [--rounds N] [--threads N] [--size N] [--batch N] [--device cuda]

Every form of a model is compiled in one process and called in turns, so that a busy machine slows all alike:
eager; inductor; inductor with its global freezing; backend "fxfuse"; the hand-written deploy form under inductor with
freezing (for resnet50 there is none: its train form is what inductor with freezing folds itself); and what
fxfuse.optimize gives, likewise. Every call of a compiled model begins with Dynamo's guards, which take the longer the
more modules and tensors it has: the train form pays for all its branches there, merged or not, the last two do not.
Printed are median milliseconds, and for two ratios their medians and quartiles over the rounds: fxfuse over
the hand-written form, which must not exceed 1.02, and fxfuse over inductor with freezing on the train form, which
must not exceed what re-parameterizing by hand gained when it was first measured. Outputs are first compared
with eager's.

Also printed: the oneDNN reorders of weights in one call of each form on a CPU (a weight that is not packed beforehand
is laid out anew at every call; fxfuse must have none), and what the check of 200 unchanged weights costs.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

import fxfuse
from fxfuse.compiling.weight_sets import WeightSet
from fxfuse.reporting.timing import ratio_of

from .compile_forms import HAND, MODELS, hand_written, train_form

FORMS = ("eager", "inductor", "inductor, freezing", "fxfuse", "by hand, freezing", "optimized, freezing")
TO_HAND = 1.02
TO_FREEZING = {
    "repvgg_a0": 0.83, "mobileone_s1": 0.76, "fastvit_t8": 0.84, "repvit_m0_9": 0.88, "dbb_resnet18": 0.39,
    "resnet50": 1.02,
}  # fmt: skip
CHECK_US = 60.0
MARK = "calls begin"
Form = Callable[[torch.Tensor], Any]


def forms(name: str, x: torch.Tensor, wanted: Iterable[str] = FORMS) -> dict[str, Form]:
    """The `wanted` forms of a model, compiled and called."""
    model = train_form(name).to(x.device)
    made: dict[str, Form] = {"eager": model}
    for form in FORMS[1:]:
        if form not in wanted or (form == FORMS[4] and name not in HAND):
            continue
        source = hand_written(name, model) if form == FORMS[4] else train_form(name).to(x.device)
        source = fxfuse.optimize(source) if form == FORMS[5] else source
        torch._inductor.config.freezing = "freezing" in form
        run: Any = torch.compile(source, backend=own("fxfuse" if form == "fxfuse" else "inductor"))
        for _ in range(3):
            run(x)
        made[form] = run
    torch._inductor.config.freezing = False
    return made


def own(name: str) -> Callable[..., Any]:
    """The backend of that name as a function of its own, or Dynamo would run one form's graph for another's model."""
    return lambda gm, inputs: torch._dynamo.lookup_backend(name)(gm, inputs)


def differences(made: dict[str, Form], x: torch.Tensor) -> dict[str, float]:
    """The largest difference of each form's output from eager's, over its largest number."""
    want = made["eager"](x)
    return {name: float((form(x) - want).abs().max() / want.abs().max()) for name, form in made.items()}


def times(made: dict[str, Form], x: torch.Tensor, rounds: int, name: str) -> dict[str, list[float]]:
    """Seconds a call, for each form one number a round, in an order that turns."""
    found: dict[str, list[float]] = {form: [] for form in made}
    order = list(made)
    for number in tqdm(range(rounds), name, leave=False, disable=not sys.stderr.isatty()):
        for form in order[number % len(order) :] + order[: number % len(order)]:
            run = made[form]
            run(x)  # back into the caches
            calls = []
            for _ in range(3):
                start = time.perf_counter()
                run(x)
                if x.device.type == "cuda":
                    torch.cuda.synchronize(x.device)
                calls.append(time.perf_counter() - start)
            found[form].append(statistics.median(calls))
    return found


def weight_reorders(name: str, form: str, threads: int) -> int:
    """Reorders of weights that oneDNN reports for one call of a compiled form, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compile", name, "--call-once", form, f"--threads={threads}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "ONEDNN_VERBOSE": "1"}
    )
    lines = done.stdout.partition(MARK)[2].splitlines()
    sizes = [re.split(r",", line)[-2] for line in lines if ",exec," in line and ",reorder," in line]
    return sum(not size.startswith("1x") for size in sizes)  # those of the image have the batch of 1 in front


def call_once(name: str, form: str) -> None:
    with torch.no_grad():
        x = torch.randn(1, 3, 224, 224)
        run = forms(name, x, [form])[form]
        run(x)
        print(MARK, flush=True)
        run(x)


def check_microseconds(count: int = 200, calls: int = 2000) -> float:
    """What it costs to see that `count` tensors are unchanged, a quarter of them running statistics."""
    tensors = [torch.randn(64) for _ in range(count)]
    known = WeightSet(tensors, "full", range(0, count, 4), lambda gone: None)
    found = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            known.fresh(tensors)
        found.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(found)


def verdicts(name: str, made: dict[str, list[float]]) -> tuple[list[str], list[str]]:
    """The two ratios as text, and what is wrong with them."""
    text, wrong = [], []
    for base, bound in ((FORMS[4], TO_HAND), (FORMS[2], TO_FREEZING.get(name))):
        if base not in made:
            text.append("")
            continue
        low, middle, high = ratio_of(made[base], made["fxfuse"])
        text.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        wrong += [f"> {bound} of {base}"] if bound is not None and middle > bound else []
    return text, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}, or any of timm")
    parser.add_argument("--rounds", type=int, default=25, help="at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-reorders", action="store_true", help="leave out what oneDNN reports")
    parser.add_argument("--call-once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.call_once:
        call_once(args.models[0], args.call_once)
        return 0
    rows, failed = [], 0
    for name in args.models or MODELS:
        torch._dynamo.reset()
        x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        with torch.no_grad():
            made = forms(name, x)
            error = max(differences(made, x).values())
            found = times(made, x, max(2, args.rounds), name)
        text, wrong = verdicts(name, found)
        wrong += [f"error {error:.0e}"] if error > 1e-4 else []
        reorders = ""
        if args.device == "cpu" and not args.no_reorders:
            counts = [weight_reorders(name, form, args.threads) for form in ("inductor", "fxfuse")]
            reorders = f"{counts[0]} / {counts[1]}"
            wrong += ["reorders weights"] if counts[1] else []
        failed += bool(wrong)
        cells = [f"{1e3 * statistics.median(found[f]):.1f}" if f in found else "" for f in FORMS]
        rows.append([name, *cells, *text, f"{error:.0e}", reorders, ", ".join(wrong) or "ok"])
        print(
            f"{name}: fxfuse {text[0] or '-'} of the hand-written form, {text[1]} of inductor with freezing", flush=True
        )
    heads = ("model", *(f"{f} ms" for f in FORMS), "to hand", "to freezing", "error", "reorders", "verdict")
    print(tabulate(rows, heads, "simple", disable_numparse=True))
    check = check_microseconds()
    failed += check > CHECK_US
    print(f"check of 200 unchanged weights: {check:.0f} us a call")
    print(
        f"torch {torch.__version__}, fxfuse {fxfuse.__version__}, {args.device}, {args.threads} threads, "
        f"{max(2, args.rounds)} rounds"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
