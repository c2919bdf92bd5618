"""Random models as people write them: source text made of idioms, and the calls that are made of it.

A gene is an idiom with the seed of its choices, and perhaps genes of a block that the idiom has in it. Leaving out
a gene changes nothing in the others, so that `smaller` finds the few idioms that matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from random_python_prelude import PRELUDE
from random_python_writer import IDIOMS as IDIOMS
from random_python_writer import KINDS, File, Gene, Random, given

SIZES = ((2, 4, 6, 7), (1, 4, 6, 7), (3, 4, 5, 8), (2, 4, 8, 6), (1, 4, 7, 7), (4, 4, 6, 7))
MODES = (*("no_grad",) * 5, "inference_mode", "default", "mixed")


@dataclass(frozen=True)
class Program:
    """A model as source, and how it is optimized: `used` before, with `examples`, the number of a call, or None."""

    genes: tuple[Gene, ...]
    seed: int
    source: str
    double: bool
    used: bool
    examples: int | None

    @property
    def idioms(self) -> tuple[str, ...]:
        """The names of all idioms in it, sorted."""
        return tuple(sorted({g.idiom for top in self.genes for g in top.walk()}))

    @property
    def tolerance(self) -> float:
        """The largest relative error that rounding may make."""
        if "bfloat16" in self.source.partition("# The model.")[2]:
            return 0.05
        return 1e-4 if "# in float32" in self.source or not self.double else 1e-9


def program(genes: tuple[Gene, ...], seed: int, like: Program | None = None) -> Program:
    """The model that the genes write; the seed chooses what it returns and how it is called, if not `like` another."""
    choose, file = Random(seed), File()
    mode, double, used, examples = choose.choice(MODES), choose.random() < 0.3, choose.random() < 0.2, None
    if choose.random() < 0.25:
        examples = choose.choice((0, 0, 1))
    sizes = [choose.choice(SIZES) for _ in range(2)]
    net = file.block(genes, top=True, choose=choose)
    calls = []
    for i in range(choose.choice((3, 3, 4))):
        choose = Random(f"{seed} {i}")
        way = choose.choice(("no_grad", "inference_mode", "default", "enable_grad")) if mode == "mixed" else mode
        size = sizes[(0, 1, 0, 1)[i]] if choose.random() < 0.8 else choose.choice(SIZES)
        calls.append(f'    ("{way}", {size}, lambda x: given(x{given(net.arguments, choose)})),')
    model = "\n\n\n".join(["\n".join(file.top), *file.classes])
    text = PRELUDE.replace("DTYPE = torch.float32", f"DTYPE = torch.{'float64' if double else 'float32'}")
    text = f"{text}\n\n# The model.\n{model}\n\n\nCALLS = [\n" + "\n".join(calls) + "\n]\n"
    made = Program(genes, seed, text, double, used, examples)
    return replace(made, used=like.used, examples=like.examples) if like else made


def seeded(seed: int, small: bool = False) -> Program:
    """The program of a seed; a small one has fewer idioms, and blocks without blocks in them."""
    choose = Random(seed)
    count = choose.choice((1, 1, 2) if small else (1, 1, 2, 2, 3))
    return program(tuple(_gene(choose, 1 if small else 0) for _ in range(count)), seed)


def _gene(choose: Random, depth: int) -> Gene:
    name = choose.choice(list(KINDS[choose.choice(list(KINDS))]))
    inside = depth < 2 and choose.random() < 0.4
    inner = tuple(_gene(choose, depth + 1) for _ in range(choose.choice((1, 1, 2)))) if inside else ()
    return Gene(name, choose.randrange(2**32), inner)


def smaller(failing: Program, fails: Callable[[Program], bool]) -> Program:
    """The failing program with as few idioms as still fail, a single one where that is enough, and no examples."""
    best = failing
    for simple in (replace(best, examples=None), replace(best, examples=None, used=False)):
        if simple != best and fails(simple):
            best = simple
    alone = {g.idiom: (replace(g, inner=()),) for top in best.genes for g in top.walk()}
    for genes in alone.values() if len(alone) > 1 else ():
        if fails(found := program(genes, best.seed, best)):
            return found
    while True:
        for genes in _less(best.genes):
            if fails(found := program(genes, best.seed, best)):
                best = found
                break
        else:
            return best


def _less(genes: tuple[Gene, ...]) -> Iterator[tuple[Gene, ...]]:
    """Every way to leave out one gene, with what is in it or without."""
    for i, gene in enumerate(genes):
        before, after = genes[:i], genes[i + 1 :]
        if before or after:
            yield before + after
        if gene.inner:
            yield before + gene.inner + after
            for inner in ((), *_less(gene.inner)):
                yield (*before, replace(gene, inner=inner), *after)
