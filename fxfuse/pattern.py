"""Patterns: theorems about two neighbouring operators, and the registry that finds them.

A pattern never sees a graph and never weighs cost. It says for two operators in a relation whether it is about them
(`matches`), what stands in the way (`refuse`), and what they become (`rewrite`, by default the algebra's law). The
planner composes patterns and decides what pays.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from torch import Tensor, nn

from fxfuse.algebra.branches import add, concat
from fxfuse.algebra.chain import compose
from fxfuse.algebra.operator import Operator
from fxfuse.refusal import Refusal

RELATIONS: dict[str, Callable[[Operator, Operator], Operator | Refusal]] = {
    "chain": compose,
    "sum": lambda f, g: add((f, g)),
    "concat": lambda f, g: concat((f, g)),
    "siblings": lambda f, g: Refusal("its pattern does not say what layers of one tensor become"),
    "swap": lambda f, g: Refusal("its pattern does not say what a layer is on the other side of a pool"),
    "alone": lambda f, g: f,
}


@dataclass(frozen=True)
class Example:
    """A model that shows a pattern firing, or refusing with `reason` (a regular expression), and its input's shape."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 7, 6)
    reason: str = ""
    patterns: tuple[str, ...] | None = None

    @property
    def fires(self) -> bool:
        return not self.reason


class Model(nn.Module):
    """What an example builds where no `nn.Sequential` would do: layers, and as its forward a function of x and them."""

    def __init__(self, formula: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.formula, self.layers = formula, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *self.layers)


class Pattern:
    """Base class of all patterns: subclass, set the attributes, register with `register`.

    Attributes:
        name: what `patterns=` and the report call it.
        law: one line, left => right.
        relations: those it is about, out of "chain" (g after f), "sum" and "concat" (two branches), "siblings" (two
            layers of one tensor that nothing joins), "swap" (a layer and a pool in a row; what `rewrite` returns is
            the layer on the other side of the pool) and "alone" (f by itself, given twice: a layer that can be
            written better).
        refused_when: for the documentation, when the law does not hold or does not pay.
        always: fuse even where the cost rises (as `patterns=["name!"]` does for one call).
        examples: models that show it firing and refusing; the tests run them.
    """

    name: str = ""
    law: str = ""
    relations: tuple[str, ...] = ("chain",)
    refused_when: str = ""
    always: bool = False
    examples: tuple[Example, ...] = ()

    def matches(self, relation: str, f: Operator, g: Operator) -> bool:
        """Whether this pattern is about `f` and `g`.

        Patterns are asked in the order of their names; the first result counts, and if all refuse, the first refusal.
        """
        raise TypeError(f"pattern {self.name!r} does not define matches(relation, f, g)")

    def refuse(self, relation: str, f: Operator, g: Operator) -> Refusal | None:
        """What this pattern has against the pair beyond the algebra's own conditions."""
        return None

    def rewrite(self, relation: str, f: Operator, g: Operator) -> Operator | Refusal:
        """The one operator that the two become; the algebra refuses what is not exact.

        It is used where a convolution or linear layer is in it, or in what it is merged with. Siblings and swaps have
        no law in the algebra: their pattern defines it here, or inherits from a built-in one.
        """
        return RELATIONS[relation](f, g)


_registry: dict[str, Pattern] = {}
_loaded = False


def register(pattern: type[Pattern] | Pattern) -> type[Pattern] | Pattern:
    """Make a pattern known under its name; usable as a class decorator.

    Raises:
        ValueError: no name, an unknown relation, or a name already taken by another class.
    """
    instance = pattern() if isinstance(pattern, type) else pattern
    if not instance.name or not instance.relations or set(instance.relations) - set(RELATIONS):
        raise ValueError(
            f"a pattern needs a name and relations out of {', '.join(RELATIONS)}: "
            f"{type(instance).__name__} has name={instance.name!r}, relations={instance.relations!r}"
        )
    taken = _registry.get(instance.name)
    if taken is not None and type(taken).__qualname__ != type(instance).__qualname__:
        raise ValueError(f"a pattern named {instance.name!r} is registered already: {type(taken).__name__}")
    _registry[instance.name] = instance
    return pattern


def unregister(name: str) -> None:
    """Forget a pattern registered before; unknown names are ignored."""
    _registry.pop(name, None)


def known() -> dict[str, Pattern]:
    """All patterns by name, in alphabetical order: built-in, from entry points, registered."""
    global _loaded
    if not _loaded:
        _loaded = True
        package = importlib.import_module("fxfuse.patterns")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"fxfuse.patterns.{module.name}")
        for entry in entry_points(group="fxfuse.patterns"):
            loaded = entry.load()
            if isinstance(loaded, type) and issubclass(loaded, Pattern):
                register(loaded)
    return dict(sorted(_registry.items()))


@dataclass(frozen=True)
class Selection:
    """The patterns of one run, and which of them fuse whatever it costs."""

    active: dict[str, Pattern]
    forced: frozenset[str]
    excluded: dict[str, Pattern]

    def combine(self, relation: str, f: Operator, g: Operator) -> Operator | Refusal:
        """`f` and `g` as one operator by the first pattern, by name, that is about them."""
        refusal = None
        for name, pattern in self.active.items():
            if relation in pattern.relations and pattern.matches(relation, f, g):
                result = pattern.refuse(relation, f, g) or pattern.rewrite(relation, f, g)
                if isinstance(result, Operator):
                    return replace(result, applied=tuple(sorted((*f.applied, *g.applied, name))))
                refusal = refusal or result.by(name)
        if refusal is not None:
            return refusal
        for name, pattern in self.excluded.items():
            if relation in pattern.relations and pattern.matches(relation, f, g):
                return Refusal(f"pattern {name} is switched off", remedy=f"allow {name} in patterns=")
        return Refusal(f"no pattern is about a {relation} of {f.kind} and {g.kind}")


def select(names: Iterable[str] | str | None) -> Selection:
    """Read a `patterns=` argument.

    None: all. Bare names: these alone. "-name": without it. "name!": also where the cost rises.

    Raises:
        ValueError: a name nobody registered; the message lists the known ones.
    """
    everything = known()
    picked = [names] if isinstance(names, str) else list(names or ())
    bare, forced, out = set[str](), set[str](), set[str]()
    for text in picked:
        name = str(text).removeprefix("-").removesuffix("!")
        if name not in everything:
            raise ValueError(f"unknown pattern {name!r}; known: {', '.join(everything)}")
        (out if str(text).startswith("-") else forced if str(text).endswith("!") else bare).add(name)
    chosen = ({*everything} if names is None or (picked and not bare) else bare | forced) - out
    return Selection(
        {n: p for n, p in everything.items() if n in chosen},
        frozenset(forced | {n for n in chosen if everything[n].always}),
        {n: p for n, p in everything.items() if n not in chosen},
    )
