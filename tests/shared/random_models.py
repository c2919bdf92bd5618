"""Random models as readable code, from a list of genes: they shrink well and a seed makes them again.

A gene is a statement with its choices, in bytes. Deleting a gene or making a choice smaller leaves the
others what they were, so that both hypothesis and `smaller` find the few lines that matter.
"""

from __future__ import annotations

import linecache
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fuzz_parts
import torch
from hypothesis import strategies as st
from random_body import Body, Reader, Scope, table
from random_modules import write_down

SQUARE = ((2, 4, 5, 4), (4, 4, 4, 4))  # as many channels as columns, and in one run as samples
SHAPES = (
    *(((2, 4, 5, 6), (3, 4, 7, 5)), SQUARE, ((2, 2, 6, 5), (1, 2, 5, 7))) * 3,
    *(SQUARE, ((2, 4, 6), (3, 4, 9)), ((2, 4, 4), (4, 4, 4)), ((3, 4), (2, 4)), ((4, 6, 5), (4, 5, 8))),
    *(((1, 2, 4, 5, 3), (2, 2, 3, 4, 4)), ((2, 3, 6, 6), (3, 3, 6, 6))),
)
NAMES = "avg_pool border concat conv_bn conv_chain identity parallel_conv pool_swap siblings".split()
PATTERNS = (None, None, None, tuple(f"{name}!" for name in NAMES))
THEN = ("", "", "", "", "optimize again", "copy", "verify")
FILE = "random_model.py"


@dataclass(frozen=True)
class Program:
    """A model as code, and how it is to be run."""

    source: str
    after: tuple[str, ...]
    inputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    last: bool
    grad: bool
    exact: bool
    examples: bool
    patterns: tuple[str, ...] | None
    then: str
    genes: tuple[bytes, ...]

    def build(self) -> Any:
        """The model in eval mode, the same at every call."""
        linecache.cache[FILE] = (len(self.source), None, self.source.splitlines(True), FILE)
        names: dict[str, Any] = {n: getattr(fuzz_parts, n) for n in fuzz_parts.__all__}
        exec(compile(self.source, FILE, "exec"), names)
        names["model"] = names["Model"]().eval()
        for line in self.after:
            exec(line, names)
        return names["model"]

    def draw(self, run: int) -> tuple[Any, ...]:
        """The inputs of run 0 or 1."""
        return tuple(drawn(name, run, self.shapes, self.last) for name in self.inputs)

    def __repr__(self) -> str:
        last, grad = " channels last" * self.last, "gradients" if self.grad else "no gradients"
        given = "examples" if self.examples else "no examples"
        lines = ["from fuzz_parts import *", "", self.source, "", "model = Model().eval()", *self.after, ""]
        lines.append(f"# inputs {', '.join(self.inputs)} of {self.shapes}{last}, {grad}, exact={self.exact}")
        lines.append(f"# optimize with {given}, patterns={self.patterns}, then {self.then or 'run'}")
        return "\n".join(["", *lines])


def drawn(name: str, run: int, shapes: tuple[tuple[int, ...], ...], last: bool) -> Any:
    """An input: a tensor of integers, or for `k` a number."""
    if name == "k":
        return run + 2
    tensor = fuzz_parts.const(run * 10 + ord(name), *shapes[run])
    return tensor.contiguous(memory_format=torch.channels_last) if last and tensor.dim() == 4 else tensor


RESULTS = table("""
    {0} ; {0} ; {0} ; {0} ; {0}, {1} ; {{'a': {0}, 'b': {1}}} ; [{0}, {1}, {2}] ; ({0}, ({1}, None, 2)) ;
    Pair({0}, {1}) ; {0}, {0} ; {0}, {i}
""")


def program(genes: tuple[bytes, ...]) -> Program:
    """The model that the genes write; the first of them says how it is run."""
    rest = deque(genes[1:])
    g = Reader(genes[0], rest)
    shapes = g.pick(*SHAPES)
    inputs = ("x", *("y" * g.chance(5)), *("k" * g.chance(8)))
    last, grad, examples, then = g.chance(8), g.chance(3), g.chance(2), g.pick(*THEN)
    patterns, how = g.pick(*PATTERNS), g.pick(*RESULTS)
    scope = Scope()
    body = Body(scope, {n: [drawn(n, run, shapes, last) for run in (0, 1)] for n in inputs}, 0)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        write_down(body, rest, len(genes))
    others = [body.names[-1 - g.next(len(body.names))] for _ in range(2)]
    result = how.format(body.names[-1], *others, i=inputs[-1])
    source = "\n\n\n".join([*scope.classes, body.source("Model", result)])
    after = tuple(f"model.{line}" for line in body.after)
    last = last and "dropout" not in source  # what is dropped depends on the layout
    return Program(source, after, inputs, shapes, last, grad, scope.exact, examples, patterns, then, genes)


_genes = st.lists(st.binary(max_size=20), min_size=2, max_size=10)
programs = _genes.map(lambda genes: program(tuple(genes)))


def seeded(seed: int) -> Program:
    """The program of a seed: hypothesis's are smaller, and take longer to draw."""
    source = random.Random(seed)
    return program(tuple(source.randbytes(24) for _ in range(source.randrange(4, 14))))


def smaller(failing: Program, fails: Callable[[Program], bool]) -> Program:
    """The failing program with as few statements and as simple choices as still fail."""
    best = failing
    while True:
        for genes in _less(best.genes):
            found = program(genes)
            if _size(found) < _size(best) and fails(found):
                best = found
                break
        else:
            return best


def _less(genes: tuple[bytes, ...]) -> Iterator[tuple[bytes, ...]]:
    """Every way to leave out one gene, or to make one choice simpler."""
    for i in range(len(genes) - 1, 0, -1):
        yield genes[:i] + genes[i + 1 :]
    for i, gene in enumerate(genes):
        for j in range(1, len(gene)):
            yield (*genes[:i], gene[:j], *genes[i + 1 :])
            if gene[j]:
                yield (*genes[:i], gene[:j] + b"\0" + gene[j + 1 :], *genes[i + 1 :])


def _size(one: Program) -> tuple[int, int, int]:
    choices = b"".join(one.genes)
    return len(one.source), len(choices), sum(c > 0 for c in choices)
