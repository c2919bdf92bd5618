"""Capture by torch.export: what torch.fx cannot trace, as one graph of ATen operators.

torch.export runs the forward on fake tensors with symbolic sizes and takes the branches that the
example inputs take. Nothing of that run stays with the model: it is put back as it was, or the
capture is refused.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxfuse.capture.captured import Captured
from fxfuse.capture.example_inputs import arguments, bound, refuse_required, run_copy
from fxfuse.capture.export.any_batch import for_any_batch
from fxfuse.capture.export.calls import check
from fxfuse.capture.export.graph import rebuild, sweep
from fxfuse.capture.export.holds import Holds, holds_for
from fxfuse.capture.export.questions import Asked, Questions
from fxfuse.capture.export.state import still
from fxfuse.capture.failures import cannot
from fxfuse.capture.guards import restored
from fxfuse.ops.modules import HOOKS, has_hooks
from fxfuse.refusal import CaptureError

# How many dims of an input are left open, most first: what a model cannot leave open is tried narrower.
_OPEN = (None, 1, 0)
_TERMS = 40


def export(model: nn.Module, inputs: tuple[Any, ...]) -> Captured:
    """The graph of `model` for inputs of the kinds and ranks of `inputs`, and of all sizes it does the same for.

    It begins with assertions of all that it was made for.

    Raises:
        CaptureError: torch.export fails, or what it gives is not what the model does; the message names the line.
        ValueError: the model does not run on the inputs.
    """
    captured, holds = _exported(model, inputs, checks=True)
    if holds.modes:
        (text, where), *_ = holds.modes.items()
        raise CaptureError(f"the forward at {where} decides by {text}, which no graph can check")
    return captured


def export_behind(model: nn.Module, inputs: tuple[Any, ...], checked: bool = True) -> tuple[Captured, Holds]:
    """The graph of `model` without assertions, and what tells for a call whether the graph was made for it.

    Without `checked` no model is run beside the graph for a second opinion (`calls.check`). Raises as `export`.
    """
    return _exported(model, inputs, checks=False, checked=checked)


def _exported(model: nn.Module, inputs: tuple[Any, ...], checks: bool, checked: bool = True) -> tuple[Captured, Holds]:
    bound(model, inputs)
    refuse_required(model.forward)
    for path, module in model.named_modules():
        if module is not model and has_hooks(module):
            raise CaptureError(f"{path} has hooks, which torch.export would run once and forget; remove them first")
    last: Exception | None = None
    for dims in _OPEN:
        asked = Asked()
        try:
            program, needs = for_any_batch(model, inputs, partial(_program, model, dims=dims, asked=asked))
            needs = asked.conditions | needs
            captured = rebuild(model, inputs, program, needs, checks)
            holds = holds_for(model, inputs, needs, asked.modes)
        except Exception as error:  # what a forward raises on fake tensors can be anything
            last = error
            if isinstance(error, CaptureError):  # which no other sizes would help
                break
            continue
        with _quiet(), _usual_modes(), torch.no_grad():
            decided = needs | asked.modes
            args, kwargs = arguments(model, inputs)
            for failing in holds.failing(*args, **kwargs):
                if failing in decided or not checks:
                    at = f" ({decided[failing]})" if decided.get(failing) else ""
                    raise CaptureError(f"the exported graph is not for example_inputs, as not {failing}{at}")
            if checked:
                check(model, captured, inputs)
        sweep(captured.graph)
        return captured, holds
    if not isinstance(last, CaptureError):
        with restored(model):
            run_copy(model, inputs)  # or is it the inputs that do not fit?
    assert last is not None
    raise cannot(model, "exported", last) from last


def _program(model: nn.Module, inputs: tuple[Any, ...], dims: int | None, asked: Asked | None = None) -> Any:
    """The ExportedProgram of `model`, which is as it was afterwards; the first `dims` of each input are left open."""

    def sizes(value: Any) -> Any:
        return dict.fromkeys(range(value.dim())[:dims], torch.export.Dim.AUTO) if isinstance(value, Tensor) else None

    shapes, own = pytree.tree_map(sizes, bound(model, inputs)), pytree.tree_map_only(Tensor, _own, inputs)
    with restored(model) as changed, ExitStack() as stack:
        questions = Questions(model, own, Asked() if asked is None else asked)
        for name in HOOKS:  # those of the model itself stay around the graph, and must not be in it too
            stack.enter_context(patch.dict(vars(model), {name: OrderedDict()}))
        stack.enter_context(questions.asked_by(model))
        questions.over = stack.enter_context(still(model))
        for context in (_quiet(), _usual_modes(), torch.enable_grad(), _sizes_of_one(), _PlainSizes()):
            stack.enter_context(context)
        args, kwargs = arguments(model, own)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    if changed:
        raise CaptureError(f"the forward changes {changed[0]}, which a graph does not repeat")
    for where in questions.kept():
        raise CaptureError(f"the forward keeps a tensor that it makes at {where}, which a graph does not repeat")
    return program


@contextmanager
def _usual_modes() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _own(tensor: Tensor) -> Tensor:
    """A copy: torch.export takes one tensor given twice for one input."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export logs and prints of an attempt that fails, and warnings that the model gives."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _PlainSizes(TorchFunctionMode):
    """Gives up on sizes that grow out of hand.

    Padding to a multiple, layer after layer, triples the expression for a size each time, and torch.export then
    takes minutes to compare two. Sizes behind plain convolutions, pools and windows stay far below the limit.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes: tuple[Any, ...] = tuple(result.shape) if isinstance(result, Tensor) else ()
        for size in sizes:
            terms = [] if isinstance(size, int) else [size.node.expr]
            for term in terms:
                terms.extend(term.args)
                if len(terms) > _TERMS:
                    raise OverflowError("the size of a tensor is too intricate an expression in the inputs' sizes")
        return result


@contextmanager
def _sizes_of_one() -> Iterator[None]:
    """A size of 1 is one like any other.

    Else no other size would do where the examples have it, and where they have not, torch.export would answer
    `if len(x) == 1` without noting that it was asked. Fake writes ask so too, to see whether a tensor overlaps itself;
    real ones ask again.
    """
    unknown = 2  # MemOverlap::TooHard
    settings: Any = _config
    config = settings.patch(backed_size_oblivious=True)
    with config, patch.object(torch, "_debug_has_internal_overlap", lambda tensor: unknown):
        yield
