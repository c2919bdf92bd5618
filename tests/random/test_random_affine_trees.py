"""Properties of every rewrite, on random affine regions whose arithmetic is exact.

`HYPOTHESIS_PROFILE=hunt` draws thousands of other examples instead of the fixed ones.
"""

from __future__ import annotations

import math
import random
from itertools import product
from typing import Any

import pytest
import torch
from affine_trees import exact_bits, models
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis_profiles import few
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse
from fxfuse import Operator, pattern
from fxfuse.algebra.operator import IDENTITY

NAMES = "avg_pool border concat conv_bn conv_chain identity parallel_conv pool_swap siblings".split()
Case = tuple[nn.Module, tuple[int, int]]
Run = tuple[Tensor, Tensor]


def runs(case: Case) -> tuple[nn.Module, list[Run]]:
    """The model, and inputs of two sizes and batches with its outputs; sizes it cannot take are left out."""
    model, (channels, spatial) = case
    assume(exact_bits(model) <= 50)
    generator, found = torch.Generator().manual_seed(7), list[Run]()
    for batch, size in ((2, (9, 11)), (1, (12, 7))):
        x = torch.randint(-3, 4, (batch, channels, *size[:spatial]), generator=generator).double()
        try:
            found.append((x, model(x)))
        except RuntimeError:  # smaller than a kernel or a reflection
            continue
    assume(found)
    return model, found


class _Macs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiply-accumulates of the convolutions that run, from their real shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            transposed, spread = args[6], args[0] if args[6] else result
            assert isinstance(transposed, bool)
            self.total += spread.numel() * math.prod(args[1].shape[1:])
        return result


def macs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), _Macs() as mode:
        model(x)
    return mode.total


def same(one: nn.Module, two: nn.Module) -> bool:
    """The same code with the same state under the same names."""
    here, there = one.state_dict(), two.state_dict()
    return one.code == two.code and list(here) == list(there) and all(torch.equal(here[n], there[n]) for n in here)


@few(100)
@given(models())
def test_the_rewrite_is_exact_and_never_costs_more(case: Case) -> None:
    model, found = runs(case)
    fused = fxfuse.optimize(model, example_inputs=found[0][0])
    for x, expected in found:
        assert torch.equal(fused(x), expected)
    assert macs(fused, found[0][0]) <= macs(model, found[0][0])


@few(100)
@given(models(depth=3, nonlinear=True), st.sets(st.sampled_from(NAMES)), st.sampled_from(("macs", "nodes", "params")))
def test_the_rewrite_is_exact_whatever_is_forced(case: Case, forced: set[str], cost: str) -> None:
    model, found = runs(case)
    patterns = [name + "!" * (name in forced) for name in NAMES]
    for examples in (found[0][0], None):
        fused = fxfuse.optimize(model, examples, patterns=patterns, cost=cost)
        for x, expected in found:
            assert torch.equal(fused(x), expected)


@few(60)
@given(models(nonlinear=True, slices=False))
def test_the_rewrite_is_deterministic_and_a_fixpoint(case: Case) -> None:
    """Without slices: one that moved to the front of a layer can shrink what comes before it in a second run."""
    model, found = runs(case)
    x = found[0][0]
    fused = fxfuse.optimize(model, x)
    assert same(fused, fxfuse.optimize(model, x))
    again = fxfuse.optimize(fused, x)
    assert not fxfuse.report(again).fired
    assert all(torch.equal(again(x), expected) for x, expected in found)


@few(40)
@given(models(depth=3), st.randoms(use_true_random=False))
def test_the_order_in_which_patterns_are_registered_does_not_matter(case: Case, shuffler: random.Random) -> None:
    model, found = runs(case)
    fused = fxfuse.optimize(model, found[0][0])
    registered = list(pattern.known().items())
    shuffled = shuffler.sample(registered, len(registered))
    try:
        for name, _ in registered:
            fxfuse.unregister(name)
        for _, one in shuffled:
            fxfuse.register(one)
        assert same(fused, fxfuse.optimize(model, found[0][0]))
    finally:
        for name, _ in registered:
            fxfuse.unregister(name)
        for _, one in registered:
            fxfuse.register(one)


def _kinds() -> list[Operator]:
    kinds = ("conv", "scale", "pool", "pad", "select")
    return [IDENTITY, *(Operator(kind=kind, law=kind).at(2, 4) for kind in kinds)]


@pytest.mark.parametrize("relation", ("chain", "sum", "concat", "siblings", "swap"))
def test_built_in_patterns_never_overlap(relation: str) -> None:
    """Which is why their order cannot matter."""
    known = [pattern.known()[name] for name in NAMES if relation in pattern.known()[name].relations]
    for f, g in product(_kinds(), repeat=2):
        about = [one.name for one in known if one.matches(relation, f, g)]
        assert len(about) <= 1, (f.kind, g.kind, about)
