"""Output shapes of every node for given example inputs, found without running the model."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter, Node

from .capture import Captured
from .copying import copied
from .guards import restored

logger = logging.getLogger("fxfuse")


class Shapes(dict[Node, torch.Size]):
    """Shape of every tensor by the node that gives it, and its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[Node, torch.dtype] = {}


class _Shapes(Interpreter):
    """Runs a captured graph on fake tensors and notes what shape each node gives."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.root, graph=captured.graph)
        self.constants = captured.constants
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


def propagate(captured: Captured, inputs: tuple[Any, ...] | None) -> dict[Node, torch.Size]:
    """Shape of every tensor in the graph; empty without inputs.

    Raises:
        ValueError: the model does not run on the inputs.
    """
    if inputs is None:
        return {}
    try:
        inspect.signature(captured.root.forward).bind(*inputs)
    except TypeError as error:
        raise ValueError(f"{type(captured.root).__name__} does not run on example_inputs: {error}") from error
    runner = _Shapes(captured)
    try:
        with restored(captured.root), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            _fake_state(runner, mode)
            fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
            runner.run(*fakes, enable_io_processing=True)
    except Exception as error:  # fake tensors cannot run everything: does the model itself?
        run_copy(captured.root, inputs)
        logger.info("no shapes known ahead: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        return {}
    return runner.shapes


def _fake_state(runner: _Shapes, mode: FakeTensorMode) -> None:
    """Put fake tensors in the place of the model's own, which a forward that counts its calls would write to."""
    for module in runner.module.modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose state is not in Python
            continue
        for table in (module._parameters, module._buffers, module.__dict__):
            real = {k: v for k, v in table.items() if isinstance(v, Tensor)}
            fake: dict[str, Any] = {k: mode.from_tensor(v) for k, v in real.items()}
            table.update(fake)
    runner.constants = {k: mode.from_tensor(v) for k, v in runner.constants.items()}


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
