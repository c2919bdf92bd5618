"""Guards around a trace: what a forward does beside computing values is seen, stopped and undone.

A trace runs the forward once. Whatever it does to real tensors or to attributes would happen then,
and never again in the graph; what it draws at random would become a constant. Each raises before it
happens, at the user's line, and the modules are as they were afterwards.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.capture.containers import TABLES, contents, put_back
from fxfuse.ops.memory import INPLACE, storage
from fxfuse.ops.modules import has_hooks
from fxfuse.refusal import CaptureError

_WRITES = set(INPLACE.values())


@contextmanager
def guarded(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Run a trace of `model`; yields a dict that holds, afterwards, the constants the trace added to it.

    Raises:
        CaptureError: the forward drew random numbers, or changed a list or dict that a module keeps.
    """
    created: dict[str, Any] = {}
    with unchanged(model, created), _RealTensors(model), torch.enable_grad():
        yield created


@contextmanager
def unchanged(model: nn.Module, created: dict[str, Any] | None = None, buffers: bool = False) -> Iterator[None]:
    """The model put back as it was; raises where its forward changes more of it than, if asked for, buffers."""
    with restored(model, created) as changed, _attributes(model, buffers):
        yield
    if changed:
        raise CaptureError(f"the forward changes {changed[0]}, which a graph does not repeat")


@contextmanager
def restored(model: nn.Module, created: dict[str, Any] | None = None) -> Iterator[list[str]]:
    """Put attributes, lists, dicts and random states back; yields names of what had to be put back."""
    modules = [(p, m) for p, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    saved = [(p, m, dict(m.__dict__), contents(m)) for p, m in modules]
    states = _random_states()
    changed: list[str] = []
    try:
        yield changed
    finally:
        if _random_states() != states:
            changed.append("the state of a random number generator")
            _set_random_states(states)
        if created is not None:
            created.update({k: v for k, v in model.__dict__.items() if k not in saved[0][2]})
        for path, module, attributes, containers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            names = [name for name in put_back(containers) if name not in TABLES]
            changed += ["self." + f"{path}.{name}".lstrip(".") for name in names]


@contextmanager
def _attributes(model: nn.Module, buffers: bool) -> Iterator[None]:
    """Stop `self.name = value` on the modules of `model`, unless it changes nothing or, if asked for, sets a buffer."""
    known = {id(m): path for path, m in model.named_modules()}
    original = nn.Module.__setattr__

    def guarded_set(module: nn.Module, name: str, value: Any) -> None:
        ours = id(module) in known and not name.startswith(("_tensor_constant", "_torchbind_obj"))
        if not ours:
            original(module, name, value)
            return
        path = f"{known[id(module)]}.{name}".lstrip(".")
        # an RNN keeps lists of its weights, which torch.export exchanges for fake ones
        listed = isinstance(module, nn.RNNBase) and name.startswith("_flat_weight")
        if buffers and (listed or (isinstance(value, Tensor) and name in module._buffers)):
            original(module, name, value)
            return
        if not _is_itself(value, path) and not _same(module.__dict__.get(name, _same), value):
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


class _RealTensors(TorchDispatchMode):
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
            raise CaptureError("the forward draws random numbers, which a graph would hold as constants")
        if func._schema.is_mutable:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                written = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in _tensors(named.get(argument.name)) if written else ():
                    if storage(tensor) not in self.own:
                        raise CaptureError("the forward writes to a tensor of the model, which a graph does not repeat")
        result = func(*args, **kwargs)
        inputs = {storage(t) for a in (*args, *kwargs.values()) for t in _tensors(a)}
        if not inputs.isdisjoint(self.computed):
            raise CaptureError("the forward computes with a tensor that a hook replaces at every call")
        for tensor in _tensors(result):
            if storage(tensor) not in inputs or func is torch.ops.aten.lift_fresh.default:
                self.own[storage(tensor)] = tensor.untyped_storage()
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else ()
    return (
        bytes(torch.get_rng_state().tolist()),  # numpy need not be there
        random.getstate(),
        [n.tobytes() if hasattr(n, "tobytes") else n for n in numbers],
    )


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))
    random.setstate(states[1])
    if states[2]:
        numpy = sys.modules["numpy"]
        name, keys, *rest = states[2]
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
