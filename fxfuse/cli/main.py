"""The `fxfuse` command: report on a model, list the patterns, explain one.

MODEL is `timm:NAME`, `torchvision:NAME` (random weights, nothing is downloaded), `package.module:factory`
or `path.py:factory`, where the factory is an nn.Module, or a class or function without required arguments
that gives one. A model in training mode is put in eval mode. What the user got wrong is one line on
stderr and exit code 2; a failed `--verify` is one line and exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fxfuse import __version__
from fxfuse.capture.parts import WAYS
from fxfuse.cli.models import FORMS, UsageError, load, one_line
from fxfuse.cost import COSTS
from fxfuse.optimize import optimize, plan, report
from fxfuse.pattern import Example, Pattern, known
from fxfuse.refusal import CaptureError, VerificationError
from fxfuse.reporting.timing import compare

DEFAULT_INPUT = (1, 3, 224, 224)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code. Usage that argparse itself rejects raises SystemExit(2)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    path = list(sys.path)
    try:
        print(args.command(args), flush=True)
    except (UsageError, VerificationError) as error:
        print(f"fxfuse: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    finally:
        sys.path[:] = path
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fxfuse", description="Merges linear branches and layers of PyTorch models.")
    parser.add_argument("--version", action="version", version=f"fxfuse {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")

    sub = commands.add_parser("report", help="optimize a model and say what fused, what did not and why")
    sub.set_defaults(command=_report)
    sub.add_argument("model", metavar="MODEL", help=FORMS)
    default = ",".join(map(str, DEFAULT_INPUT))
    sub.add_argument(
        "--input", action="append", metavar="SHAPE",
        help=f"shape of an example input, as {default}; repeat it for several inputs; default: none, and {default} "
        "where --time or --verify needs one",
    )  # fmt: skip
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the report as one JSON document")
    form.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    sub.add_argument("--time", action="store_true", help="time eager calls before and after, side by side")
    sub.add_argument("--verify", action="store_true", help="compare outputs on random inputs; exit 1 if they differ")
    sub.add_argument("--dry-run", action="store_true", help="plan only: no weight is computed")
    sub.add_argument(
        "--patterns", nargs="+", action="extend", metavar="NAME",
        help="use these alone; NAME! merges whatever it costs; --patterns=-NAME leaves one out; commas separate too",
    )  # fmt: skip
    sub.add_argument("--cost", default="macs", metavar="NAME", help=f"{', '.join(COSTS)}; default: macs")
    ways = f"{', '.join(WAYS)}; default: the first that works (export needs --input)"
    sub.add_argument("--capture", metavar="WAY", help=ways)

    sub = commands.add_parser("patterns", help="list the patterns and the law of each")
    sub.set_defaults(command=_patterns)

    sub = commands.add_parser("explain", help="one pattern: its law, why it is exact, and examples run here")
    sub.set_defaults(command=_explain)
    sub.add_argument("pattern", metavar="PATTERN")
    return parser


def _report(args: argparse.Namespace) -> str:
    runs = [f"--{name}" for name in ("time", "verify") if getattr(args, name)]
    if args.dry_run and runs:
        raise UsageError(f"--dry-run builds nothing to run: leave out --dry-run or {runs[0]}")
    shapes = [_shape(text) for text in args.input or ()]
    if not shapes and runs:
        shapes = [DEFAULT_INPUT]
    patterns = None if args.patterns is None else [n for text in args.patterns for n in text.split(",") if n]
    # what a model prints or warns about on its way must not get between the lines of the report
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), _shown(args.model):
        warnings.simplefilter("ignore")
        model = load(args.model)
        if model.training:
            model.eval()
        inputs = tuple(_random(shape, model) for shape in shapes) or None
        try:
            how = {"patterns": patterns, "cost": args.cost, "capture": args.capture}
            if args.dry_run:
                result = plan(model, inputs, **how)
            else:
                fused = optimize(model, inputs, verify=args.verify, **how)
                result = report(fused)
                if args.time and inputs is not None:
                    result = replace(result, timing=compare(model, fused, inputs))
        except (ValueError, CaptureError) as error:
            tried = " ".join("--input " + ",".join(map(str, s)) for s in shapes)
            hint = f"; tried {tried}: give shapes it takes" if "example_inputs" in str(error) else ""
            raise UsageError(f"{one_line(error)}{hint}") from error
    if args.json:
        return json.dumps(result.to_dict(), indent=2)
    return result.to_markdown() if args.markdown else str(result)


@contextlib.contextmanager
def _shown(name: str) -> Iterator[None]:
    """A line on a terminal for as long as the work takes."""
    terminal = sys.stderr.isatty()
    if terminal:
        print(f"fxfuse: {name} ...", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if terminal:
            print("\033[2K", end="\r", file=sys.stderr, flush=True)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input {text!r} is no shape: give whole numbers above 0, as 1,3,224,224")
    return shape


def _random(shape: tuple[int, ...], model: nn.Module) -> Tensor:
    """A random input in the dtype and on the device of the model's weights, the same in every run."""
    weights = (p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point() or p.is_complex())
    like = next(weights, torch.empty(0))
    try:
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return numbers.to(like.device, like.dtype)
    except (RuntimeError, TypeError) as error:
        text = ",".join(map(str, shape))
        raise UsageError(f"--input {text} cannot be made: {one_line(error)}; use a smaller one") from error


def _patterns(args: argparse.Namespace) -> str:
    rows = [(p.name, p.law, p.refused_when) for p in known().values()]
    return tabulate(rows, ("pattern", "law", "refused when"), "simple", maxcolwidths=[None, 44, 56])


def _explain(args: argparse.Namespace) -> str:
    pattern = known().get(args.pattern)
    if pattern is None:
        raise UsageError(f"unknown pattern {args.pattern!r}; known: {', '.join(known())}")
    law = type(pattern).__doc__ or sys.modules[type(pattern).__module__].__doc__ or pattern.law
    refused = textwrap.fill(f"Refused when {pattern.refused_when}.", 110) if pattern.refused_when else ""
    examples = [_shown_example(pattern, example) for example in pattern.examples]
    return "\n\n".join(block for block in (pattern.name, inspect.cleandoc(law), refused, *examples) if block)


def _shown_example(pattern: Pattern, example: Example) -> str:
    """An example's title, and what really happened when it ran."""
    torch.manual_seed(0)
    model = example.build().eval()
    told = report(optimize(model, torch.randn(example.shape), patterns=example.patterns, verify=True))
    lines = [
        f"  fires: {f.summary} -> {f.after} (relative error {told.max_error:.0e})"
        for f in told.fired
        if pattern.name in f.patterns
    ]
    lines += [f"  refused: {refusal}" for refusal in told.refused]
    return "\n".join([f"{example.title}:", *(lines or ["  neither fires nor is refused"])])
