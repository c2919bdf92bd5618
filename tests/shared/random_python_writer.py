"""Idioms written down: classes with their constructor, forward and arguments, in one source."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from random_python_arguments import ARGUMENTS
from random_python_parts import PARTS
from random_python_prelude import LAYERS, RESULTS
from random_python_questions import QUESTIONS
from random_python_state import STATE
from random_python_tensors import TENSORS

Random = random.Random


def table(text: str) -> dict[str, str]:
    """The idioms of a text, by the name in the line `== name` before each."""
    pieces = re.split(r"^== (\w+)\n", re.sub(r"\|\|\n +", "||", text), flags=re.M)[1:]
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


KINDS = {
    "arguments": table(ARGUMENTS),
    "state": table(STATE),
    "questions": table(QUESTIONS),
    "parts": table(PARTS),
    "tensors": table(TENSORS),
}
IDIOMS = {name: text for kind in KINDS.values() for name, text in kind.items()}


@dataclass(frozen=True)
class Gene:
    """One idiom, its choices, and the genes of the block in it."""

    idiom: str
    seed: int
    inner: tuple[Gene, ...] = ()

    def walk(self) -> Iterator[Gene]:
        """This gene and all in it."""
        yield self
        for gene in self.inner:
            yield from gene.walk()


@dataclass
class Body:
    """A class while it is written: the arguments of its forward with their default and the values they are given."""

    file: File
    name: str
    arguments: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    attributes: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def write(self, gene: Gene) -> None:
        """Write an idiom down; what it has in its braces is documented in `random_python_prelude`."""
        choose, number = Random(gene.seed), self.file.number()
        text = re.sub(r"<<(.*?)>>", lambda m: choose.choice(m[1].split("||")), IDIOMS[gene.idiom])
        text = text.replace("$", str(number)).replace("CLS", self.name)
        made: dict[str, Body | None] = {}

        def module(name: str, kind: str) -> str:
            inner = gene.inner if name == "1" and kind != "L" else ()
            made[name] = self.file.block(inner) if inner else None
            block = made[name]
            return f"{block.name}()" if block else "conv_bn(4, 4)" if kind == "L" else choose.choice(LAYERS)

        def attribute(match: re.Match[str]) -> str:
            kind, name, called = match.groups()
            path = f"{kind.lower()}{number}_{name}"
            if name not in made:
                self.init.append(f"self.{path} = {module(name, kind)}")
            inner = made[name]
            more = self.values(inner, choose) if inner and called and here is self.forward else ""
            return f"self.{path}" + (f"({called[1:-1]}{more})" if called else "")

        places = {"@top": self.file.top, "@class": self.attributes, "@init": self.init, "@methods": self.methods}
        here = self.forward
        for line in text.splitlines():
            word, _, rest = line.partition(" ")
            if word == "@arg":
                name, _, default = rest.partition("=")
                default, *values = (part.strip() for part in default.split(";"))
                self.arguments[name] = (default, tuple(values))
            elif word == "@out":
                self.outputs.append(rest)
            elif word in (*places, "@forward"):
                here = places.get(word, self.forward)
            else:
                line = re.sub(r"\bM(\d)\b", lambda m: module(m[1], "M"), line)
                here.append(re.sub(r"\b([PL])(\d)\b(\(\w+\))?", attribute, line))

    def values(self, called: Body, choose: Random) -> str:
        """What a call of a block gives for its arguments; some are handed on from the arguments of this forward."""
        for name, (default, values) in called.arguments.items():
            if values and not name.startswith("*") and choose.random() < 0.4:
                self.arguments.setdefault(name, (default, values))
        handed = {name for name in called.arguments if name in self.arguments}
        return given(called.arguments, choose, handed)

    def signature(self) -> str:
        star = [n for n in self.arguments if n.startswith("*") and not n.startswith("**")][:1]
        named = [n for n in self.arguments if n.startswith("**")][:1]
        plain = [f"{n}={default}" for n, (default, _) in self.arguments.items() if not n.startswith("*")]
        return ", ".join(["self", "x", *plain, *star, *named])

    def text(self, result: str) -> str:
        """The class."""
        made = ["super().__init__()", *self.init]
        inside = [*self.attributes, "def __init__(self):", *_deeper(made), "", *self.methods]
        inside += [f"def forward({self.signature()}):", *_deeper([*self.forward, f"return {result}"])]
        return "\n".join([f"class {self.name}(nn.Module):", *_deeper(inside)])


@dataclass
class File:
    """A source while it is written."""

    top: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    numbers: int = 0

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def block(self, genes: tuple[Gene, ...], top: bool = False, choose: Random | None = None) -> Body:
        """A class that does what the genes say, one after the other."""
        body = Body(self, "Net" if top else f"Block{self.number()}")
        if top:
            body.forward.append("inp = x")
        for gene in genes:
            body.write(gene)
        result = choose.choice(RESULTS) if choose else "x"
        other = choose.choice([*body.outputs, *body.outputs, "x.mean((2, 3))", "x.relu()", "inp"]) if choose else ""
        self.classes.append(body.text(result.replace("OUT", other)))
        return body


def given(arguments: dict[str, tuple[str, tuple[str, ...]]], choose: Random, handed: Collection[str] = ()) -> str:
    """Random arguments of a call, each preceded by a comma: left out, the default, given, by position or by name.

    Those `handed` on have in the caller the name that they have in the called.
    """
    texts, by_name = [], False
    for name, (default, values) in sorted(arguments.items(), key=lambda item: len(item[0]) - len(item[0].lstrip("*"))):
        how = choose.random()
        if name.startswith("*"):
            if how < 0.6 and not (by_name and name.count("*") == 1):
                texts.append(choose.choice(values))
        elif how < 0.35 or not values:
            by_name = True
        else:
            value = name if name in handed else default if how < 0.5 else choose.choice(values)
            by_name = by_name or choose.random() < 0.3
            texts.append(f"{name}={value}" if by_name else value)
    return "".join(f", {text}" for text in texts)


def _deeper(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else line for line in lines]
