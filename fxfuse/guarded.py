"""A module whose forward is a graph where the call is of the kind that the graph was made for.

The module keeps its class, its children and its attributes, so that Python code around it may use it in any way. Its
graphs are no children of it: a loop over the children does not meet them. They are found where a module is walked for
its tensors (`named_modules`, `parameters`, `state_dict`, `to`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

GRAPHS = "fxfuse_graph_"
_OVERRIDDEN = ("forward", "named_modules", "_apply", "_save_to_state_dict", "_load_from_state_dict")


@dataclass(frozen=True)
class Form:
    """The kind of call a graph holds for, by the parameters of the forward.

    `fixed` have this value, others are given and not None, except `free`, which may be left out.
    """

    names: tuple[str, ...]
    fixed: tuple[tuple[str, Any], ...] = ()
    free: frozenset[str] = frozenset()

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments is of this kind."""
        if len(args) > len(self.names):
            return False
        given = dict(zip(self.names, args, strict=False))
        if not given.keys().isdisjoint(kwargs) or not kwargs.keys() <= set(self.names):
            return False
        given |= kwargs
        fixed = dict(self.fixed)
        for name in self.names:
            if name in fixed:
                if name in given and not _is(given[name], fixed[name]):
                    return False
            elif name not in self.free and given.get(name) is None:
                return False
        return True


def _is(value: Any, wanted: Any) -> bool:
    return value is wanted or (type(value) is type(wanted) and not isinstance(value, Tensor) and bool(value == wanted))


class Guard:
    """Chooses, for each call of `module`, the graph of its kind, or the module's own forward."""

    def __init__(self, module: nn.Module, graphs: list[tuple[Form, GraphModule]]) -> None:
        self.module, self.forms = module, [form for form, _ in graphs]
        self.own: Callable[..., Any] | None = vars(module).get("forward")
        self.stripped = False
        for i, (_, graph) in enumerate(graphs):
            vars(module)[f"{GRAPHS}{i}"] = graph
        vars(module).update({name: getattr(self, name) for name in _OVERRIDDEN})

    def graphs(self) -> dict[str, GraphModule]:
        return {f"{GRAPHS}{i}": vars(self.module)[f"{GRAPHS}{i}"] for i in range(len(self.forms))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            for form, graph in zip(self.forms, self.graphs().values(), strict=True):
                if form.fits(args, kwargs):
                    return graph.forward(*args, **kwargs)  # not a call: the hooks are the module's own
        if self.stripped:
            name = type(self.module).__name__
            raise RuntimeError(
                f"{name} is called in a way that its graphs were not made for, and was stripped of the rest"
            )
        return (
            type(self.module).forward(self.module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
        )

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from type(self.module).named_modules(self.module, memo, prefix, remove_duplicate)
        for name, graph in self.graphs().items() if not _in_a_call() else ():
            yield from graph.named_modules(memo, f"{prefix}.{name}".lstrip("."), remove_duplicate)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        type(self.module)._apply(self.module, fn, recurse)  # type: ignore[no-untyped-call]
        for graph in self.graphs().values() if recurse else ():
            graph._apply(fn)  # type: ignore[no-untyped-call]
        return self.module

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        type(self.module)._save_to_state_dict(self.module, destination, prefix, keep_vars)
        for name, graph in self.graphs().items():
            graph.state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        graphs = self.graphs()
        type(self.module)._load_from_state_dict(
            self.module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        unexpected[:] = [k for k in unexpected if not k.startswith(tuple(f"{prefix}{name}." for name in graphs))]
        for name, graph in graphs.items():
            start = f"{prefix}{name}."
            inner = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
            found = graph.load_state_dict(inner, strict=False)
            missing += [start + key for key in found.missing_keys]
            unexpected += [start + key for key in found.unexpected_keys]


def _in_a_call() -> bool:
    """Whether a module is running: a forward that walks its parameters must not meet the graphs'."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False


def guard_of(module: nn.Module) -> Guard | None:
    """The guard of a module that has one."""
    own = getattr(vars(module).get("forward"), "__self__", None)
    return own if isinstance(own, Guard) else None


def kept_parameters(module: nn.Module) -> int:
    """How many parameters are there for calls alone that no graph was made for."""
    own: dict[int, int] = {}
    used = set[int]()
    for inner in module.modules():
        if (guard := guard_of(inner)) is not None:
            used |= {id(p) for graph in guard.graphs().values() for p in graph.parameters()}
            originals = type(inner).named_modules(inner, set())
            own |= {id(p): p.numel() for _, m in originals for p in m._parameters.values() if p is not None}
    return sum(n for p, n in own.items() if p not in used)


def strip(module: nn.Module) -> nn.Module:
    """Drop what an optimized model keeps for calls that its graphs were not made for; in place, and returned.

    Afterwards such a call, and Python code that reads the inside of a replaced part, raises.
    """
    for inner in list(module.modules()):
        if (guard := guard_of(inner)) is not None and not guard.stripped:
            guard.stripped = True
            inner._modules.clear()
            inner._parameters.clear()
            inner._buffers.clear()
    return module


def without_graphs(name: str) -> str:
    """The name of a tensor without the graphs that it lies in."""
    return ".".join(part for part in name.split(".") if not part.startswith(GRAPHS))
