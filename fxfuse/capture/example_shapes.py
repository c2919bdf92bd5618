"""Output shapes of every node for given example inputs, found without running the model."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfuse.capture.captured import Captured, Shapes
from fxfuse.capture.copying import copied
from fxfuse.capture.guards import restored

logger = logging.getLogger("fxfuse")


class _Shapes(Interpreter):
    """Runs a captured graph on fake tensors and notes what shape each node gives."""

    def __init__(self, captured: Captured, constants: dict[str, Tensor]) -> None:
        super().__init__(captured.root, graph=captured.graph)
        self.constants = constants
        self.shapes = Shapes()

    def fetch_attr(self, target: str) -> Any:
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
            self.shapes.dtypes[n] = result.dtype
        return result


def as_tuple(example_inputs: Any) -> tuple[Any, ...] | None:
    """Example inputs as positional arguments: a lone tensor is one, a list or tuple is all of them."""
    if example_inputs is None:
        return None
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


def propagate(captured: Captured, inputs: tuple[Any, ...] | None) -> Shapes:
    """Shape of every tensor in the graph; empty without inputs, or where they are not known ahead.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    if inputs is None:
        return Shapes()
    try:
        inspect.signature(captured.root.forward).bind(*inputs)
    except TypeError as error:
        raise ValueError(f"{type(captured.root).__name__} does not run on example_inputs: {error}") from error
    try:
        with restored(captured.root), _fake(inputs) as (mode, fakes), torch.no_grad():
            _fake_state(captured.root, mode)
            runner = _Shapes(captured, tree_map_only(Tensor, mode.from_tensor, captured.constants))
            runner.run(*fakes, enable_io_processing=True)
    except Exception as error:  # fake tensors cannot run everything: does the model itself?
        if not any(isinstance(t, FakeTensor) for t in tree_leaves(inputs)):
            run_copy(captured.root, inputs)
        _unknown(error)
        return Shapes()
    return runner.shapes


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

    handles = [
        m.register_forward_pre_hook(lambda _, args, kwargs, p=p: note(p, args, kwargs), with_kwargs=True)
        for p, m in modules.items()
    ]
    try:
        with restored(model), _fake(inputs) as (mode, fakes), torch.no_grad():
            _fake_state(model, mode)
            model(*fakes)
    except Exception as error:  # a forward that looks at data stops where it does: what came before is known
        _unknown(error)
    finally:
        for handle in handles:
            handle.remove()
    return {path: args for path, args in found.items() if path not in varied}


def _ranks(args: tuple[Any, ...]) -> list[int | None]:
    return [t.dim() if isinstance(t, Tensor) else None for t in tree_leaves(args)]


@contextmanager
def _fake(inputs: tuple[Any, ...]) -> Iterator[tuple[FakeTensorMode, tuple[Any, ...]]]:
    """A mode and the inputs as fake tensors in it; those that are fake already stay."""
    known = [t for t in tree_leaves(inputs) if isinstance(t, FakeTensor)]
    with known[0].fake_mode if known else FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode, inputs if known else tree_map_only(Tensor, mode.from_tensor, inputs)


def _unknown(error: Exception) -> None:
    text = str(error).strip().splitlines()
    logger.info("no shapes known ahead: %s", text[0] if text else type(error).__name__)


def _fake_state(root: nn.Module, mode: FakeTensorMode) -> None:
    """Put fakes in the place of all tensors of the model: an operation on real ones alone would run for real."""
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for table in tables:
            for name, value in list(table.items()):
                if type(value) in (Tensor, nn.Parameter, nn.Buffer):
                    table[name] = mode.from_tensor(value)


def run_copy(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Outputs of a copy of `model`, so that nothing it writes reaches the model or the inputs.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that two models that draw at random can be compared
            return copied(model)(*copy.deepcopy(inputs))
    except Exception as error:  # whatever the user's model raises is reported with its first line
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {text[0]}") from error
