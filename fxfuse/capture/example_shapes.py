"""Output shapes of every node for given example inputs, found without running the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Interpreter
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfuse.capture.captured import Captured, Shapes
from fxfuse.capture.example_inputs import arguments, bound, run_copy
from fxfuse.capture.failures import said
from fxfuse.capture.shadow import Shadow

logger = logging.getLogger("fxfuse")
_UNKNOWN = "no shapes known ahead: %s"


def propagate(captured: Captured, inputs: tuple[Any, ...] | None) -> Shapes:
    """Shape of every tensor in the graph; empty without inputs, or where they are not known ahead.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    shapes = Shapes()
    if inputs is None:
        return shapes
    bound(captured.root, inputs)
    shadow = Shadow(captured.root).root
    run = Interpreter(shadow, garbage_collect_values=False, graph=captured.graph)
    try:
        with _on_fakes(shadow, inputs) as (mode, fakes):
            vars(shadow).update(tree_map_only(Tensor, mode.from_tensor, captured.constants))
            run.run(*fakes)
    except Exception as error:  # fake tensors cannot run everything: does the model itself?
        if not any(isinstance(t, FakeTensor) for t in tree_leaves(inputs)):
            run_copy(captured.root, inputs)
        logger.info(_UNKNOWN, said(error))
        return shapes
    for node, value in run.env.items():
        if isinstance(value, Tensor):
            shapes[node], shapes.dtypes[node] = value.shape, value.dtype
    return shapes


def inputs_of(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: tuple[Any, ...] | None
) -> dict[str, tuple[Any, ...]]:
    """What each of `modules`, by path, is first called with when `model` runs on stand-ins of the inputs.

    One that is called with other ranks later, or by keyword, is left out.
    """
    found: dict[str, tuple[Any, ...]] = {}
    if inputs is None or not modules:
        return found
    varied = set[str]()

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs or _ranks(found.setdefault(path, args)) != _ranks(args):
            varied.add(path)

    shadow = Shadow(model)
    inside = dict(shadow.root.named_modules(remove_duplicate=False))
    for p in modules:
        inside[p].register_forward_pre_hook(lambda _, args, kwargs, p=p: note(p, args, kwargs), with_kwargs=True)
    try:
        with _on_fakes(shadow.root, inputs) as (_, fakes):
            args, kwargs = arguments(model, fakes)
            shadow.root(*args, **kwargs)
    except Exception as error:  # a forward that looks at data stops where it does: what came before is known
        logger.info(_UNKNOWN, said(error))
    finally:
        shadow.changed()  # puts back what no shadow holds
    return {path: args for path, args in found.items() if path not in varied}


def _ranks(args: tuple[Any, ...]) -> list[int | None]:
    return [t.dim() if isinstance(t, Tensor) else None for t in tree_leaves(args)]


@contextmanager
def _on_fakes(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[FakeTensorMode, tuple[Any, ...]]]:
    """A mode and the inputs as fake tensors in it; those that are fake already stay.

    Fakes are in the place of all tensors of the model too, which has to be a shadow: an operation on real ones alone
    would run for real.
    """
    known = [t for t in tree_leaves(inputs) if isinstance(t, FakeTensor)]
    mode = known[0].fake_mode if known else FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for table in tables:
                tensors = {n: v for n, v in table.items() if type(v) in (Tensor, nn.Parameter, nn.Buffer)}
                table.update(tree_map_only(Tensor, mode.from_tensor, tensors))
        yield mode, inputs if known else tree_map_only(Tensor, mode.from_tensor, inputs)
