"""Guards around a trace: what a forward does beside computing values is seen, stopped and undone.

A trace runs the forward once. Whatever it does to real tensors or to attributes would happen then,
and never again in the graph; what it draws at random would become a constant. Each raises before it
happens, at the user's line, and the modules are as they were afterwards.
"""

from __future__ import annotations

import operator
import pickle
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fxfuse.capture.held import give_back
from fxfuse.ops.memory import INPLACE, storage
from fxfuse.ops.modules import has_hooks
from fxfuse.refusal import CaptureError

_WRITES = set(INPLACE.values())
_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = vars(nn.Module()).keys() - set(_TABLES)
_CONTAINERS = (list, set, deque, dict, OrderedDict)


@contextmanager
def nothing_set(model: nn.Module) -> Iterator[None]:
    """Stop assignments to attributes of modules at their line, and random numbers of Python and numpy afterwards.

    Raises:
        CaptureError: the forward set an attribute or drew random numbers.
    """
    with random_kept() as drawn, _attributes(model):
        yield
    if drawn:
        raise CaptureError("the forward changes the state of a random number generator, which a graph does not repeat")


@contextmanager
def random_kept() -> Iterator[list[str]]:
    """The random numbers of torch, Python and numpy go on afterwards as if nothing had run; yields what had drawn."""
    states = _random_states()
    drawn: list[str] = []
    try:
        yield drawn
    finally:
        if _random_states() != states:
            drawn.append("the state of a random number generator")
            _set_random_states(states)


@contextmanager
def restored(model: nn.Module) -> Iterator[list[str]]:
    """Put attributes, lists, dicts and random states back; yields names of what had to be put back."""
    modules = [(p, m) for p, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    saved = [(p, m, dict(m.__dict__), contents(m)) for p, m in modules]
    changed: list[str] = []
    try:
        with random_kept() as drawn:
            yield changed
    finally:
        changed += drawn
        for path, module, attributes, containers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            names = [name for name in put_back(containers) if name not in _TABLES]
            changed += ["self." + f"{path}.{name}".lstrip(".") for name in names]


def contents(module: nn.Module) -> list[tuple[str, Any, Any]]:
    """Its containers of these classes by name, torch's own tables but not its hooks included, each with a copy."""
    return [(n, v, v.copy()) for n, v in vars(module).items() if type(v) in _CONTAINERS and n not in _HOOKS]


def put_back(saved: list[tuple[str, Any, Any]]) -> list[str]:
    """Give containers their old content; the names of those whose change could matter to a later call."""
    return [name for name, value, copy in saved if _put_back(value, copy)]


def _put_back(value: Any, copy: Any) -> bool:
    """New keys in a dict are a memo: without them a forward computes what it had stored."""
    if isinstance(value, dict):
        same = all(k in value and value[k] is v for k, v in copy.items())
    elif isinstance(value, set):
        same = value == copy
    else:
        same = len(value) == len(copy) and all(map(operator.is_, value, copy))
    if isinstance(value, dict) or not same:
        give_back(value, copy)
    return not same


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Stop `self.name = value` on the modules of `model`, unless it changes nothing."""
    known = {id(m): f"{path}.".lstrip(".") for path, m in model.named_modules()}
    original, thread = nn.Module.__setattr__, threading.get_ident()

    def guarded_set(module: nn.Module, name: str, value: Any) -> None:
        others = id(module) not in known or threading.get_ident() != thread
        others = others or name.startswith(("_tensor_constant", "_torchbind_obj"))
        if others:
            original(module, name, value)
        elif not (_is_itself(value, known[id(module)] + name) or _same(vars(module).get(name, _same), value)):
            raise CaptureError(f"the forward sets self.{name}, which a graph does not repeat")

    nn.Module.__setattr__ = guarded_set  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


def _is_itself(value: Any, path: str) -> bool:
    """Whether `value` is the tensor at `path`, written in place: `self.count += 1` assigns that."""
    if not issubclass(type(value), Proxy):
        return False
    node = value.node
    while node.op == "call_function" and node.target in _WRITES and isinstance(node.args[0], Node):
        node = node.args[0]
    return bool(node.op == "get_attr" and node.target == path)


def _same(old: Any, new: Any) -> bool:
    plain = (bool, int, float, str, type(None))
    return old is new or (type(old) is type(new) and isinstance(old, plain) and old == new)


class Effect(CaptureError):
    """Of a call on real tensors that would do more than compute a value."""


class RealTensors(TorchDispatchMode):
    """Stops in-place writes to tensors that the trace did not make itself, and random numbers.

    And arithmetic on a weight that a hook computes anew at every call (pruning, the older weight_norm).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: dict[int, Any] = {}
        self.computed = {storage(t) for m in model.modules() if has_hooks(m) for t in _tensors([*vars(m).values()])}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Effect("the forward draws random numbers, which a graph would hold as constants")
        if any(storage(tensor) not in self.own for tensor in _written(func, args, kwargs)):
            raise Effect("the forward writes to a tensor of the model, which a graph does not repeat")
        result = func(*args, **kwargs)
        inputs = {storage(t) for a in (*args, *kwargs.values()) for t in _tensors(a)}
        if not inputs.isdisjoint(self.computed):
            raise CaptureError("the forward computes with a tensor that a hook replaces at every call")
        for tensor in _tensors(result):
            if storage(tensor) not in inputs or func is torch.ops.aten.lift_fresh.default:
                self.own[storage(tensor)] = tensor.untyped_storage()
        return result


class WritesAParameter(CaptureError):
    """Of a forward that may only be run on a copy of all that it has."""


class ParametersStay(TorchDispatchMode):
    """Stops in-place writes to the parameters of a module that is run only to look at it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = {storage(p) for p in module.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(storage(tensor) in self.held for tensor in _written(func, args, kwargs)):
            raise WritesAParameter("the forward writes to a parameter")
        return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator of ATen writes in place."""
    if func._schema.is_mutable:
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _tensors(named.get(argument.name))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else ()
    with _disable_current_modes():
        state = torch.get_rng_state().tolist()
    return state, random.getstate(), pickle.dumps(numbers)  # which compare by content


def _set_random_states(states: tuple[Any, ...]) -> None:
    with _disable_current_modes():  # a fake tensor has no numbers
        torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8, device="cpu"))
    random.setstate(states[1])
    if numbers := pickle.loads(states[2]):
        sys.modules["numpy"].random.set_state(numbers)
