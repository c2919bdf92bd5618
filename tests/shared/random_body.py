"""A forward under construction: each statement is run on two inputs as it is written, and kept if it runs.

So no rule about shapes, axes or broadcasting is written down here a second time: what eager accepts is
what the models hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import fuzz_parts
from torch import Tensor, nn

LARGEST, FINEST = 2.0**30, 2.0**10
INDENT = "    "


def table(text: str) -> list[str]:
    """Templates set apart by semicolons."""
    return [part.strip() for part in text.split(";")]


class Rejected(Exception):
    """The statement does not fit here; the model goes on without it."""


class Reader:
    """Reads the choices of a gene, all but its first byte; 0, the simplest, when they are used up.

    A gene is a statement in bytes: its kind and the choices it makes in order. `rest` are the genes
    behind it, of which a module takes some for its own forward.
    """

    def __init__(self, gene: bytes, rest: deque[bytes]) -> None:
        self.gene, self.rest, self.at = gene, rest, 0

    def next(self, count: int) -> int:
        self.at += 1
        return self.gene[self.at] % count if self.at < len(self.gene) else 0

    def pick(self, *options: Any) -> Any:
        return options[self.next(len(options))]

    def chance(self, count: int) -> bool:
        """True once in `count` times."""
        return self.next(count) == count - 1


class Scope:
    """What all modules of one model share: names, classes, and whether all numbers so far are exact."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {n: getattr(fuzz_parts, n) for n in fuzz_parts.__all__}
        self.classes: list[str] = []
        self.exact = True
        self.seeds = 0

    def seed(self) -> int:
        self.seeds += 1
        return self.seeds


class Layer(NamedTuple):
    """A declared module: how the forward names it, and itself."""

    name: str
    module: nn.Module


class Body:
    """The `__init__` and the `forward` of one module."""

    def __init__(self, scope: Scope, inputs: dict[str, Sequence[Any]], depth: int) -> None:
        self.scope, self.depth = scope, depth
        self.this: Any = nn.Module()
        self.this.eval()
        self.inputs = list(inputs)
        self.runs: list[dict[str, Any]] = [
            {**scope.names, "self": self.this} | {n: v[i] for n, v in inputs.items()} for i in (0, 1)
        ]
        self.names = [n for n, values in inputs.items() if isinstance(values[0], Tensor)]
        self.init: list[str] = []
        self.after: list[str] = []
        self.lines: list[str] = []
        self.layers: list[Layer] = []
        self.constants: list[str] = []
        self.count, self.sharp = 0, False

    def add(self, statement: Any, g: Reader) -> None:
        """Write one statement of the menu, or nothing if it does not fit."""
        lists: list[list[Any]] = [self.init, self.after, self.lines, self.names, self.layers, self.constants]
        lists.append(self.scope.classes)
        lengths, exact, count = [len(one) for one in lists], self.scope.exact, self.count
        try:
            statement(self, g)
        except (Rejected, RuntimeError):  # of some tensors that were written not even a copy can be had
            self.scope.exact, self.count = exact, count
            for one, length in zip(lists, lengths, strict=True):
                del one[length:]

    def values(self, name: str) -> list[Any]:
        return [run[name] for run in self.runs]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape on the first input."""
        return tuple(self.runs[0][name].shape)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [tuple(run[name].shape) for run in self.runs]

    def var(self, g: Reader, like: str | None = None) -> str:
        """The latest tensor, or now and then another; with `like` one of the same shape."""
        names = self.names if like is None else [n for n in self.names if self.shapes(n) == self.shapes(like)]
        if not names:
            raise Rejected
        choice = g.next(64)
        back = 0 if choice % 2 == 0 else 1 if choice % 4 == 1 else choice // 4
        return names[-1 - back % len(names)]

    def other(self, g: Reader, like: str) -> str:
        """A tensor of the same shape, another one if there is one."""
        names = [n for n in self.names if self.shapes(n) == self.shapes(like) and n != like]
        return names[-1 - g.next(8) % len(names)] if names else like

    def declare(self, prefix: str, expression: str) -> str:
        """`self.prefixN = expression`; returns `self.prefixN`."""
        name = f"{prefix}{len(self.init)}"
        try:
            value = eval(expression, self.scope.names | {"self": self.this})
        except Exception as error:
            raise Rejected from error
        if hasattr(self.this, name):  # of a statement that did not fit
            delattr(self.this, name)
        setattr(self.this, name, value)
        if isinstance(value, nn.Module):
            value.eval()
            self.layers.append(Layer(f"self.{name}", value))
        elif isinstance(value, Tensor):
            self.constants.append(f"self.{name}")
        self.init.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def assign(self, expression: str, sharp: bool = False) -> str:
        """`vN = expression`; returns `vN`."""
        self.count += 1
        name = f"v{self.count}"
        self.run(f"{name} = {expression}", [name], sharp)
        return name

    def run(self, line: str, results: Iterable[str], sharp: bool = False) -> None:
        """Add a line after which `results` are new or changed tensors; it must run and give tame numbers.

        `sharp`: it, or a module that it calls, can turn a rounding error into a large one: only for exact numbers.
        """
        sharp = sharp or any(name in line and getattr(module, "sharp", False) for name, module in self.layers)
        if sharp and not self.scope.exact:
            raise Rejected
        try:
            code = compile(line, "fuzz", "exec")
            for run in self.runs:
                exec(code, run)
        except Exception as error:
            raise Rejected from error
        for name in results:
            for run in self.runs:
                self._judge(run[name])
            if name not in self.names:
                self.names.append(name)
        self.lines.append(line)
        self.sharp = self.sharp or sharp

    def _judge(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel() or value.dim() > 6:
            raise Rejected
        value = value.detach()
        if value.numel() > 4000 or not float(value.abs().max()) < LARGEST:  # NaN too
            raise Rejected
        if self.scope.exact:
            fine = value.double() * FINEST
            self.scope.exact = bool((fine == fine.round()).all())

    def source(self, name: str, result: str) -> str:
        """The class, as code."""
        init = [f"{INDENT * 2}{line}" for line in ("super().__init__()", *self.init)]
        lines = [part for line in (*self.lines, f"return {result}") for part in line.split("\n")]
        return "\n".join(
            [
                f"class {name}(nn.Module):",
                f"{INDENT}def __init__(self):",
                *init,
                "",
                f"{INDENT}def forward(self, {', '.join(self.inputs)}):",
                *(f"{INDENT * 2}{line}" for line in lines),
            ]
        )
