"""A second opinion: a model and its graph, run on the same inputs, must do the same ATen calls on the same tensors.

Outputs alone would not show a branch that happens to agree, nor a counter. Each call is noted with where its
arguments come from: an input, a tensor of the model, an earlier call. Two runs in a row show what the first leaves
behind. What the calls compute is not compared, so random numbers may be drawn.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.capture.captured import Captured
from fxfuse.capture.copying import copied
from fxfuse.capture.example_inputs import arguments as given
from fxfuse.capture.export.questions import of_user, place
from fxfuse.capture.export.state import forget
from fxfuse.capture.shadow import Shadow
from fxfuse.refusal import CaptureError

_ATEN = torch.ops.aten
_SAME_VALUE = {_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default, _ATEN.lift_fresh_copy.default}
_SAME_VALUE |= {_ATEN.detach_.default, _ATEN.lift.default}


@dataclass(frozen=True, eq=False)
class _State:
    """A tensor that no call of the run made and nobody gave: of the model, or made from Python numbers."""

    value: Tensor
    name: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _State):
            return False
        if self.name and other.name:
            return self.name == other.name
        a, b = self.value, other.value
        if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
            return False
        if a.is_meta or a.layout is not torch.strided or a is b:
            return True  # as far as can be seen
        return bool(((a == b) | ((a != a) & (b != b))).all())

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Call:
    function: Any
    arguments: Any
    where: str = ""


class _Log(TorchDispatchMode):
    """Notes every call of a run; `names` are those of the model's tensors, by id."""

    def __init__(self, names: Mapping[int, str], lines: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.lines = names, lines
        self.calls: list[_Call] = []
        self.made: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def know(self, tensor: Tensor, origin: Any) -> None:
        self.made[id(tensor)] = weakref.ref(tensor), origin

    def origin(self, value: Any) -> Any:
        """Where a value comes from; numbers and the like are themselves."""
        if isinstance(value, Tensor):
            made = self.made.get(id(value))
            if made is not None and made[0]() is value:
                return made[1]
            return _State(value, self.names.get(id(value), ""))
        if isinstance(value, (list, tuple)):
            return [self.origin(v) for v in value]
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = [self.origin(args), [(k, self.origin(v)) for k, v in sorted((kwargs or {}).items())]]
        result = func(*args, **(kwargs or {}))
        if func in _SAME_VALUE or (args and _is_same_view(args[0], result)):
            self.know(result, self.origin(args[0]))
            return result
        self.calls.append(_Call(func, arguments, _user_line() if self.lines else ""))
        for i, tensor in enumerate(result if isinstance(result, (list, tuple)) else (result,)):
            if isinstance(tensor, Tensor) and not any(tensor is a for a in args):
                self.know(tensor, ("call", len(self.calls), i))
        return result


def _is_same_view(given: Any, result: Any) -> bool:
    """Whether an operation gave back all of what it was given: a whole slice, an expansion to the same size."""
    if not isinstance(given, Tensor) or not isinstance(result, Tensor) or given is result:
        return False
    if given.layout is not torch.strided or result.layout is not torch.strided or given.shape != result.shape:
        return False
    same = given.dtype == result.dtype and given.storage_offset() == result.storage_offset()
    same = same and given.stride() == result.stride()
    return same and given.untyped_storage()._cdata == result.untyped_storage()._cdata


def _user_line() -> str:
    frame = sys._getframe(2)
    while frame is not None and not of_user(frame):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else place(frame)


def check(model: nn.Module, captured: Captured, inputs: tuple[Any, ...]) -> None:
    """Run copies of the model and of its graph twice on copies of the inputs.

    Raises:
        CaptureError: they do not do the same; the message names the line of the first call that differs.
    """
    found = _first_difference(model, captured, inputs, gradients=False)
    # torch's own layers have faster ways to the same result for where no gradient can be asked for
    if found and _first_difference(model, captured, inputs, gradients=True):
        raise CaptureError(f"{type(model).__name__} does something else than its exported graph: {found}")


def _first_difference(model: nn.Module, captured: Captured, inputs: tuple[Any, ...], gradients: bool) -> str:
    bare, other = copied(model), copied(model)
    for name in ("_forward_hooks", "_forward_pre_hooks"):  # which stay around the graph
        vars(bare)[name].clear()
    shadow = Shadow(bare)
    own = shadow.root
    for name, tensor in captured.constants.items():
        setattr(other, name, tensor.detach().clone())
    graph = _module(other, captured.graph)
    constant = _same_memos(bare, inputs)
    for turn in ("", " when it is called again"):
        logs = []
        forget(own)  # the graph has no caches,
        if turn and constant:
            shadow.changed()  # and no memos
        for module in (own, graph):
            log = _Log(_names(module), module is own)
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
                torch.manual_seed(0)
                logs.append(_run(module, copy.deepcopy(inputs), log))
        if found := _difference(*logs):
            return found + turn
    return ""


def _same_memos(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether what the forward keeps in dicts is the same for other inputs: then it is no state."""
    kept = []
    for change in (0.0, 1.0):
        shadow = Shadow(model, tensors=True)
        other = pytree.tree_map(lambda v: v + change if isinstance(v, Tensor) and v.is_floating_point() else v, inputs)  # noqa: B023
        args, kwargs = given(model, other)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            shadow.root(*args, **kwargs)
        kept.append(shadow.memos())
    pairs = zip(*map(pytree.tree_leaves, kept), strict=False)
    return bool(kept[0]) and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def _module(root: nn.Module, graph: Graph) -> GraphModule:
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return GraphModule(root, new)


def _run(module: nn.Module, inputs: tuple[Any, ...], log: _Log) -> tuple[list[_Call], Any]:
    for i, value in enumerate(pytree.tree_leaves(inputs)):
        if isinstance(value, Tensor):
            log.know(value, ("input", i))
    buffers = dict(module.named_buffers())
    with log:
        args, kwargs = given(module, inputs)
        output = module(*args, **kwargs)
    for name, tensor in module.named_buffers():
        if name in buffers and tensor is not buffers[name]:  # which a graph does by a copy at its end
            arguments = [[_State(buffers[name], log.names[id(buffers[name])]), log.origin(tensor)], []]
            log.calls.append(_Call(_ATEN.copy_.default, arguments))
    leaves, spec = pytree.tree_flatten(output)
    return log.calls, (str(spec), [log.origin(leaf) for leaf in leaves])


def _names(module: nn.Module) -> dict[int, str]:
    """Every parameter and buffer by the first of its names."""
    tables = *module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)
    return {id(tensor): name for name, tensor in reversed(tables)}


def _difference(own: tuple[list[_Call], Any], graph: tuple[list[_Call], Any]) -> str:
    """The first call in which two runs differ, in words; "" where there is none."""
    for ours, theirs in zip(own[0], graph[0], strict=False):
        if ours.function is not theirs.function:
            return f"{ours.function} at {ours.where} is {theirs.function} there"
        if not _equal(ours.arguments, theirs.arguments):
            return f"{ours.function} at {ours.where} is called with other arguments there"
    if len(own[0]) > len(graph[0]):
        call = own[0][len(graph[0])]
        return f"{call.function} at {call.where} is missing there"
    if len(own[0]) < len(graph[0]):
        return f"{graph[0][len(own[0])].function} is done there alone"
    return "" if _equal(own[1], graph[1]) else "it returns other tensors"


def _equal(a: Any, b: Any) -> bool:
    """Origins and numbers are equal, floats up to the way that Python and torch.export compute them."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)):
        return a == b or abs(a - b) <= 1e-12 * abs(a) or (a != a and b != b)
    return bool(a == b)
