"""A second opinion on a captured graph: the model's own execution and the graph's must be the same, call by call.

Both are run on example inputs under a mode that notes every call to torch and where each of its arguments comes from:
an earlier call, an input, a tensor of the state. Outputs alone would not show a branch that happens to agree, nor
state: that shows in a second run. What the example inputs do not reach (other kinds of arguments) is not seen here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Interpreter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxfuse.capture.captured import Captured
from fxfuse.capture.copying import copied
from fxfuse.capture.example_inputs import own_tensors
from fxfuse.capture.guards import ParametersStay, WritesAParameter, random_kept
from fxfuse.capture.questions import nearest_line
from fxfuse.capture.shadow import Shadow
from fxfuse.refusal import CaptureError

_ORIGIN = "_fxfuse_origin"
_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout)
_RUNS = 2


def agrees(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Compare the graph with its root's own forward on these arguments, two runs each; neither is changed by it.

    Raises:
        CaptureError: they differ; the message names the first call that differs, and its line.
        ValueError: the model itself does not run on the arguments.
    """
    try:
        _agrees(captured, captured.root, args, kwargs or {})
    except WritesAParameter:
        _agrees(captured, copied(captured.root), args, kwargs or {})


def _agrees(captured: Captured, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    others = (root, root) if root is captured.root else (root, copied(root))
    model, graph = (_Subject(other, captured) for other in others)
    run = Interpreter(graph.root, graph=captured.graph)
    for _ in range(_RUNS):
        try:
            own = model.log(model.root.forward, args, kwargs)  # hooks stay around either
        except CaptureError:
            raise
        except Exception as error:
            raise ValueError(f"{type(captured.root).__name__} does not run on example_inputs: {error}") from error
        try:
            other = graph.log(lambda *a, **k: run.run(*_bound(captured, a, k)), args, kwargs)
        except Exception as error:
            raise CaptureError(f"the graph does not run where the forward does ({error})") from error
        _compare(own, other)


def _bound(captured: Captured, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments in the order of the graph's placeholders; a default where none is given."""
    given, names = list(args), dict(kwargs)
    for node in captured.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("**"):
            yield from names.values()
        elif name.startswith("*"):
            yield from given
            given = []
        elif given:
            yield given.pop(0)
        else:
            yield names.pop(name) if name in names else node.args[0] if node.args else None


class _Subject:
    """What is run: a shadow of the root with buffers of its own, which persist from run to run."""

    def __init__(self, root: nn.Module, captured: Captured) -> None:
        self.shared = root is captured.root  # its parameters are the model's
        self.shadow = Shadow(root, tensors=True)
        self.root = self.shadow.root
        self.names: dict[int, Any] = {}
        for name, tensor in captured.constants.items():
            own = self.shadow.of(tensor)
            vars(self.root)[name] = own
            self.names[id(own)] = ("constant", name)
        state = [*self.root.named_buffers(remove_duplicate=False), *self.root.named_parameters(remove_duplicate=False)]
        self.names |= {id(t): ("state", n) for n, t in reversed(state)}

    def log(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        own_args, own_kwargs = own_tensors((args, kwargs))
        with (
            random_kept(),
            torch.no_grad(),
            ParametersStay(self.root) if self.shared else nullcontext(),
            _Log((own_args, own_kwargs), self.names) as seen,
        ):
            torch.manual_seed(0)
            random.seed(0)
            result = forward(*own_args, **own_kwargs)
        calls: list[Any] = seen.calls
        return [*calls, ("return", seen.of(result), None)]


class _Value:
    """The origin of what no input decides: a tensor that equals another one comes from the same place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Value):
            return False
        a, b = self.tensor, other.tensor
        alike = a.shape == b.shape and a.dtype == b.dtype
        numbers = not any(t.is_meta or isinstance(t, FakeTensor) for t in (a, b))
        return alike and (a is b or not numbers or torch.equal(a, b))

    __hash__ = None  # type: ignore[assignment]


class _Log(TorchFunctionMode):
    """Every call that gives a tensor: its name, where its arguments come from, and the line of the user's it is at."""

    def __init__(self, inputs: Any, names: dict[int, Any]) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.names = names
        for path, value in pytree.tree_flatten_with_path(inputs)[0]:
            self._name(value, ("input", str(path)))

    def _name(self, value: Any, origin: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                setattr(value, _ORIGIN, origin)
        elif isinstance(value, (tuple, list)):
            for i, inner in enumerate(value):
                self._name(inner, (*origin, i))

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.names.get(id(value)) or getattr(value, _ORIGIN, None) or _Value(value)
        if isinstance(value, (tuple, list)):
            kind = "list" if isinstance(value, list) else "tuple" if isinstance(value, torch.Size) else _kind(value)
            return (kind, *map(self.of, value))
        if isinstance(value, dict):
            return (_kind(value), *((k, self.of(v)) for k, v in value.items()))
        if isinstance(value, slice):
            return ("slice", self.of(value.start), self.of(value.stop), self.of(value.step))
        return value if isinstance(value, _PLAIN) else _kind(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = f".{func.__self__.__name__}"
        told = (name, self.of(args), self.of(dict(sorted(kwargs.items()))))
        result = func(*args, **kwargs)
        if _constant(name, told) and isinstance(result, Tensor):
            return result  # its origin is its value, whether computed anew or kept from before
        if any(isinstance(v, Tensor) for v in pytree.tree_leaves(result)) or name in ("__setitem__", "copy_"):
            self.calls.append((*told, nearest_line()))
            self._name(result, ("call", len(self.calls)))
        return result


def _constant(name: str, told: Any) -> bool:
    """Whether a call computes with nothing but what no input decides, writes nothing and draws nothing."""
    if (
        (name.endswith("_") and not name.endswith("__"))
        or name.startswith("__i")
        or "rand" in name
        or name == "dropout"
    ):
        return False
    origins = [part for part in _tuples(told[1:]) if part and part[0] in ("input", "call")]
    return not origins


def _tuples(value: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, tuple):
        yield value
        for inner in value:
            yield from _tuples(inner)


def _kind(value: Any) -> str:
    return type(value).__name__.removeprefix("immutable_")


def _compare(own: list[Any], graph: list[Any]) -> None:
    for i, call in enumerate(own):
        if i < len(graph) and call[:-1] == graph[i][:-1]:
            continue
        place = next((c[-1] for c in own[i::-1] if c[-1] is not None), None)
        where = f" at {place[0]}:{place[1]}" if place else ""
        if i >= len(graph):
            raise CaptureError(f"the forward goes on where the graph ends: it calls {call[0]}{where}")
        if call[0] != graph[i][0]:
            raise CaptureError(f"the forward calls {call[0]}{where} where the graph calls {graph[i][0]}")
        raise CaptureError(f"the forward gives {call[0]}{where} other arguments than the graph")
    if len(graph) > len(own):
        raise CaptureError(f"the graph goes on where the forward ends: it calls {graph[len(own)][0]}")
