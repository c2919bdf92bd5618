"""Fused layers under an autocast of the caller's: a second way through the code of a graph, over the same layers.

The layers stay plain ones. Those that would give a lower dtype than the model's own carry, as `under_autocast`, how
they are to run; the code of a graph with such layers asks once a call whether an autocast is active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Proxy
from torch.fx.graph import CodeGen

from fxfuse.capture.tracer import Reader
from fxfuse.planning.autocast_forms import FORM, SOURCE, WIDEN


def run_under_autocast(layer: Any, x: Any, *beside: Any) -> Any:
    """What a fused layer gives for `x` where an autocast may be active: in the dtype of what it stands for."""
    form = getattr(layer, FORM, None)
    if form is None or isinstance(x, Proxy) or layer.weight.dtype != torch.float32:
        return layer(x, *beside)
    device = x.device.type
    lowered = torch.is_autocast_enabled(device) and x.dtype in (torch.float32, torch.get_autocast_dtype(device))
    if not lowered or (form == SOURCE and x.dtype != torch.float32):
        return layer(x, *beside)
    if form == WIDEN:
        return layer(x, *beside).float()
    with torch.autocast(device, enabled=False):
        return layer(x.float(), *beside)


class TwoWays(CodeGen):
    """Code with a second body for calls under autocast, in which the layers at `targets` run by their forms."""

    def __init__(self, targets: list[str]) -> None:
        super().__init__()
        self.targets = targets
        self._body_transformer = self._both

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("torch", torch), ("run_under_autocast", run_under_autocast)]

    def _both(self, body: list[str]) -> list[str]:
        """torch.jit.script reads no further where it finds that it is scripting."""
        asked = ("if not torch.jit.is_scripting():\n", "    if torch._C._is_any_autocast_enabled():\n")
        return [*asked, *self._second(body), *body]

    def _second(self, body: list[str]) -> Iterator[str]:
        calls = {f" = {called}(": f" = run_under_autocast({called}, " for called in map(_spelled, self.targets)}
        lines = "".join(body).removesuffix("\n").split("\n")
        for line in lines:
            if line.startswith("# COUNTER"):  # torch.fx takes it away, with all of its line
                yield f"{line}\n"
                continue
            for old, new in calls.items():
                line = line.replace(old, new, 1)
            yield f"        {line}\n"


def _spelled(target: str) -> str:
    """How the code of a graph calls the module at a path."""
    code = Graph()
    code.call_module(target, (code.placeholder("x"),))
    return code.python_code("self").src.split(" = ", 1)[1].split("(x)", 1)[0]


class TwoWaysReader(Reader):
    """Code back into its graph when a module is unpickled: its second way is made anew."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        graph = super().trace(root, concrete_args)
        prepare_for_autocast(graph, dict(root.named_modules(remove_duplicate=False)))
        return graph


def prepare_for_autocast(graph: Graph, modules: Mapping[str, Any]) -> None:
    """Give a graph that calls `modules` by path its second way, if one of them needs it."""
    called = (str(n.target) for n in graph.find_nodes(op="call_module"))
    if targets := [name for name in dict.fromkeys(called) if hasattr(modules[name], FORM)]:
        graph.set_codegen(TwoWays(targets))
        graph._tracer_cls = TwoWaysReader
