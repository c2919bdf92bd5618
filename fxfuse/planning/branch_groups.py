"""Which branches of a join to merge: the cheapest partition of a sum, the cheapest cut of a concatenation.

Pure combinatorics over a price for each group of branches; what a group costs is the planner's.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import combinations

Price = tuple[int, Fraction, int]
Group = tuple[int, ...]
PriceOf = Callable[[Group], Price | None]
FREE: Price = (0, Fraction(0), 0)
NODE: Price = (0, Fraction(0), 1)
EXACT = 6  # groups up to which every partition is tried


def plus(*prices: Price) -> Price:
    return sum(p[0] for p in prices), sum((p[1] for p in prices), Fraction(0)), sum(p[2] for p in prices)


def partition(count: int, price: PriceOf) -> list[Group]:
    """Cheapest partition of `count` branches; `price` is None for a group that cannot be one operator.

    More than EXACT branches are first merged greedily. A tie merges less.
    """
    units: list[Group] = [(i,) for i in range(count)]
    units = _greedy(units, price) if count > EXACT else units
    if len(units) > EXACT:
        return units

    @cache
    def solve(rest: Group) -> tuple[Price, list[Group]]:
        if not rest:
            return FREE, []
        options, others = list[tuple[Price, list[Group]]](), rest[1:]
        for mask in range(1 << len(others)):  # smallest group first
            taken = (rest[0], *(o for k, o in enumerate(others) if mask >> k & 1))
            group = tuple(i for unit in taken for i in units[unit])
            if (alone := price(group)) is not None:
                tail = solve(tuple(o for o in others if o not in taken))
                options.append((plus(alone, tail[0], NODE), [group, *tail[1]]))
        return min(options, key=lambda o: o[0])

    return solve(tuple(range(len(units))))[1]


def _greedy(groups: list[Group], price: PriceOf) -> list[Group]:
    """Merge the first two groups that get cheaper by it, until no two do."""

    def gains(a: Group, b: Group) -> bool:
        together, one, two = price(a + b), price(a), price(b)
        return together is not None and one is not None and two is not None and together < plus(one, two, NODE)

    while pair := next((p for p in combinations(groups, 2) if gains(*p)), None):
        a, b = pair
        groups = [a + b if g == a else g for g in groups if g != b]
    return groups


def cut(count: int, price: PriceOf, longest: int) -> list[Group]:
    """Cheapest cut of `count` branches, whose order counts, into runs of at most `longest`."""
    best: list[tuple[Price, list[Group]]] = [(FREE, [])]
    for j in range(count):
        options = []
        for i in range(j, max(j - longest, -1), -1):  # shortest run first: a tie merges less
            run = tuple(range(i, j + 1))
            if (alone := price(run)) is not None:
                options.append((plus(best[i][0], alone, NODE), [*best[i][1], run]))
        best.append(min(options, key=lambda o: o[0]))
    return best[-1][1]
