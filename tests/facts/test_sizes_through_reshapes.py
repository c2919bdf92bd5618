"""An axis that a reshape is said to keep is kept: every element has the same index along it before and after."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safety import model_of
from torch import nn

from fxfuse.capture.symbolic import capture
from fxfuse.facts.sizes import ONE, Dims, Size, kept_axes, product
from fxfuse.ops.movement import read_shaping
from fxfuse.reading.view import look

B, C, H, W = (Size(1, (name,)) for name in "bchw")


def places(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """The index along `axis` of each element, in row-major order."""
    sizes = [shape[a] if a - len(shape) == axis else 1 for a in range(len(shape))]
    return torch.arange(shape[axis]).reshape(sizes).expand(shape).flatten()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_kept_axes_keep_the_index_of_every_element(data: st.DataObject) -> None:
    before = tuple(data.draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4)))
    total, after = math.prod(before), []
    while total > 1:
        after.append(data.draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0])))
        total //= after[-1]
    kept = kept_axes(tuple(map(Size, before)), tuple(map(Size, after)))
    for out, into in kept.items():
        assert torch.equal(places(tuple(after), out), places(before, into))
    prefix = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    assert {i - len(after) for i in range(len(prefix))} <= kept.keys()


KEPT = {
    "flatten the map": ((B, C, H, W), (B, C, H * W), {-3: -4, -2: -3}),
    "flatten the tokens": ((B, H, C), (B * H, C), {-1: -1}),
    "heads": ((B, H, C), (B, H, Size(2), Size(2)), {-4: -3, -3: -2}),
    "into windows": ((B, H * W, C), (B, H, W, C), {-4: -3, -1: -1}),
    "other sizes in the same places": ((B, H, C), (B, C, H), {-3: -3}),
    "the same number by another name": ((B, Size(4), Size(4)), (Size(4), B, Size(4)), {-1: -1}),
    "ones come and go": ((B, C, ONE, ONE), (B, C), {-2: -4, -1: -3}),
}


@pytest.mark.parametrize("name", KEPT)
def test_unknown_sizes_are_equal_only_to_themselves(name: str) -> None:
    before, after, kept = KEPT[name]
    assert kept_axes(before, after) == kept


def test_a_quotient_is_exact_or_nothing() -> None:
    assert (B * C * Size(6)).over(C * Size(3)) == B * Size(2)
    assert (B * C).over(H) is None and Size(6).over(Size(4)) is None
    assert product([B, C, B]) == B * B * C


def test_sizes_of_sizes_do_not_grow_without_end() -> None:
    def forward(s, x):  # type: ignore[no-untyped-def]
        x = s.b(x)
        for _ in range(30):
            y = x.flatten(2).transpose(1, 2)
            y = y.reshape(y.shape[0] * y.shape[1] // 3, -1).reshape(x.shape[0], -1, 4).transpose(1, 2)
            x = y.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, -1)
        return x

    captured = capture(model_of(forward, b=nn.BatchNorm2d(4)).eval())
    view = look(captured)
    shapings = {n: c for n in captured.graph.nodes if (c := read_shaping(n, captured.modules)) is not None}
    dims = Dims(captured.graph, view.calls, shapings, view.facts, captured.modules)
    assert len(dims.shapes) > 100
    assert max(len(str(shape)) for shape in dims.shapes.values()) < 1000
