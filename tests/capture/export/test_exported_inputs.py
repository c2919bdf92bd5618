"""Inputs unlike those torch.export ran on: they get eager's answer or one clear error, never another answer."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from safety import model_of, pickled, usual
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.copying import copied

Pair = namedtuple("Pair", "first second")
SIZES = [(1, 4, 4, 4), (2, 4, 4, 6), (3, 4, 6, 4), (2, 4, 1, 6), (1, 4, 1, 1), (2, 4, 7, 1), (4, 4, 3, 3), (2, 4, 8, 8)]

# What these do depends on sizes: each with the examples it is captured on and the sizes it must not refuse.
DEPENDENT: dict[str, tuple[Callable[..., Any], set[int]]] = {
    "a batch of 1": (lambda s, x: s(x) if x.shape[0] == 1 else s(x) * 2, set()),
    "even": (lambda s, x: s(x) if x.shape[2] % 2 == 0 else s(x) * 2, set()),
    "wider": (lambda s, x: s(x) if x.shape[3] > x.shape[2] else s(x) * 2, set()),
    "length": (lambda s, x: s(x) * len(x), set()),
    "largest": (lambda s, x: s(x) * max(x.shape[2], x.shape[3]), {0, 7}),
    "smallest": (lambda s, x: s(x) * min(x.shape[0], 3), {0, 7}),
    "a loop": (lambda s, x: torch.stack([s(x[i : i + 1]) for i in range(x.shape[0])]), set()),
    "squeezed": (lambda s, x: s(x).squeeze(0).sum(0), {0, 7}),
    "all squeezed": (lambda s, x: s(x).squeeze().sum(0), {0, 7}),
    "pooled and squeezed": (lambda s, x: s(x).mean((2, 3), keepdim=True).squeeze(), {0, 7}),
    "broadcast": (lambda s, x: s(x) + x[:1] * x[:, :, :1], {0, 7}),
    "transposed": (lambda s, x: s(x) @ s(x).transpose(2, 3), {0, 7}),
    "unbound": (lambda s, x: sum(s(x).unbind(0)), set()),
    "chunked": (lambda s, x: [t * i for i, t in enumerate(s(x).chunk(3, 3))], set()),
    "windows": (lambda s, x: s(x).unfold(2, 1, 1).reshape(x.shape[0], -1, 2).sum(1), {0, 7}),
    "padded to four": (lambda s, x: s(F.pad(x, (0, (4 - x.shape[3] % 4) % 4))), set()),
    "divided": (lambda s, x: s(x) / (x.shape[2] * x.shape[3]) + x.numel(), {0, 7}),
    "sliced": (lambda s, x: s(x)[:, :, :-2:2] * x.shape[2] ** 0.5, {0, 7}),
    "resized": (lambda s, x: F.interpolate(s(x), size=(x.shape[2] * 2, 5)), {0, 7}),
    "of its own size": (lambda s, x: s(x) + torch.arange(x.shape[3], dtype=x.dtype), {0, 7}),
    "views": (lambda s, x: s(x).permute(0, 2, 3, 1).contiguous().view(-1, 4), {0, 7}),
}


def layers(forward: Callable[..., Any]) -> nn.Module:
    return usual(lambda self, x: forward(lambda y: self.b(self.a(y)), x))


@pytest.mark.parametrize("example", [0, 1, 7], ids=[str(SIZES[i]) for i in (0, 1, 7)])
@pytest.mark.parametrize("name", DEPENDENT)
def test_other_sizes_agree_or_raise(name: str, example: int) -> None:
    forward, accepted = DEPENDENT[name]
    model = layers(forward)
    fused = fxfuse.optimize(model, torch.randn(SIZES[example]).double(), capture="export")
    assert fxfuse.report(fused).fired
    for number, size in enumerate(SIZES):
        x = torch.randn(size).double()
        try:
            want = model(x)
        except (RuntimeError, IndexError):
            with pytest.raises((RuntimeError, IndexError, AssertionError)):
                fused(x)
            continue
        if number == example or number in accepted:
            assert relative_error(fused(x), want) < 1e-12
            continue
        try:
            got = fused(x)
        except AssertionError as error:
            assert re.match("the graph was made for inputs with .*x.size.*; optimize with example_inputs", str(error))
            continue
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("name", ["a batch of 1", "even", "wider", "length", "a loop", "unbound"])
def test_a_branch_not_taken_raises(name: str) -> None:
    fused = fxfuse.optimize(layers(DEPENDENT[name][0]), torch.randn(SIZES[0]).double(), capture="export")
    refused = {"a batch of 1": 1, "even": 6, "wider": 1, "length": 1, "a loop": 1, "unbound": 1}[name]
    for candidate in (fused, pickled(fused), copied(fused)):
        with pytest.raises(AssertionError, match="the graph was made for inputs with"):
            candidate(torch.randn(SIZES[refused]).double())


def test_the_message_names_input_size_line_and_remedy() -> None:
    fused = fxfuse.optimize(layers(DEPENDENT["even"][0]), torch.randn(1, 4, 4, 6).double(), capture="export")
    with pytest.raises(AssertionError) as raised:
        fused(torch.randn(1, 4, 5, 6).double())
    assert re.fullmatch(
        r"the graph was made for inputs with x\.size\(2\) % 2 == 0, as decided at \S*test_exported_inputs\.py:\d+; "
        r"optimize with example_inputs like these",
        str(raised.value),
    )
    for wrong, text in (
        (torch.randn(4, 6, 6).double(), r"made for x of 4 dims; optimize with"),
        (torch.randn(1, 4, 4, 6), r"made for x of torch\.float64; optimize with"),
        (torch.randn(1, 3, 4, 6).double(), r"made for inputs with x\.size\(1\) == 4; optimize with"),
    ):
        with pytest.raises(AssertionError, match=text):
            fused(wrong)


def several(self: Any, xs: list[Tensor], pair: Pair, *, scale: float = 2.0) -> dict[str, Tensor]:
    return {"sum": self.b(self.a(xs[0])) + xs[1], "pair": self.p(pair.first) * scale + pair.second["k"]}


def draw(batch: int, height: int) -> tuple[Any, ...]:
    a, b, c, d = (torch.randn(batch, 4, height, 5).double() for _ in range(4))
    return [a, b], Pair(c, {"k": d})


def test_inputs_in_containers() -> None:
    model = usual(several)
    fused = fxfuse.optimize(model, draw(2, 3), capture="export")
    assert {f.path for f in fxfuse.report(fused).fired} >= {"a"}
    for candidate in (fused, pickled(fused), copied(fused)):
        for inputs in (draw(1, 3), draw(3, 7)):
            assert relative_error(candidate(*inputs), model(*inputs)) < 1e-12
        xs, pair = draw(2, 3)
        with pytest.raises(AssertionError, match=r"made for xs of 2 entries"):
            candidate([*xs, xs[0]], pair)
        with pytest.raises(AssertionError, match=r"made for pair.second of 1 entries"):
            candidate(xs, Pair(xs[0], {"k": xs[1], "l": xs[0]}))
        with pytest.raises(AssertionError, match=r"xs\[1\].size\(2\)"):
            candidate([xs[0], xs[1][:, :, :2]], pair)
        with pytest.raises(AssertionError, match=r"made for scale=2.0"):
            candidate(xs, pair, scale=3.0)


def test_a_parameter_called_as_torch_export_calls_its_table_of_inputs() -> None:
    model = usual(lambda self, L: self.b(self.a(L[0])) if L[0].shape[2] % 2 == 0 else L[1])
    xs = list(torch.randn(2, 2, 4, 6, 5).double())
    fused = fxfuse.optimize(model, (xs,), capture="export")
    assert relative_error(fused(xs), model(xs)) < 1e-12
    with pytest.raises(AssertionError, match=r"made for inputs with L\[0\]\.size\(2\) % 2 == 0"):
        fused([xs[0][:, :, 1:], xs[1]])


def test_one_tensor_given_twice_is_two_inputs() -> None:
    model = usual(lambda self, x, y: self.b(self.a(x)) + 2 * y)
    x, y = torch.randn(2, 2, 4, 5, 5).double()
    fused = fxfuse.optimize(model, (x, x), capture="export")
    assert relative_error(fused(x, y), model(x, y)) < 1e-12
    assert relative_error(fused(y=y, x=x), model(x, y)) < 1e-12


def options(self: Any, x: Tensor, twice: bool = False, mask: Tensor | None = None, *rest: Tensor, k: int = 1) -> Tensor:
    y = self.b(self.a(x)) * k
    y = y * 2 if twice else y
    return sum(rest, y if mask is None else y * mask)


def test_parameters_with_defaults_and_values() -> None:
    model, x = usual(options), torch.randn(2, 4, 5, 5).double()
    fused = fxfuse.optimize(model, x, capture="export")
    assert relative_error(fused(x, False, None, k=1), model(x)) < 1e-12
    for arguments, named, text in (
        ((x, True), {}, "twice=False"),
        ((x, False, x), {}, "mask=None"),
        ((x,), {"k": 2}, "k=1"),
    ):
        with pytest.raises(AssertionError, match=f"the graph was made for {text}; optimize with"):
            fused(*arguments, **named)
    fused = fxfuse.optimize(model, (x, True, x, x, x), capture="export")
    assert relative_error(fused(x, True, x, x, x), model(x, True, x, x, x)) < 1e-12
    with pytest.raises(AssertionError, match="twice=True"):
        fused(x, False, x, x, x)
    with pytest.raises(AssertionError, match="rest of 2 entries"):
        fused(x, True, x, x)


def test_sizes_that_grow_out_of_hand_are_not_left_open() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.a(F.pad(x, (0, -x.shape[3] % 4 + 2)))
        return self.b(x)

    model = usual(forward)
    x = torch.randn(2, 4, 5, 6).double()
    fused = fxfuse.optimize(model, x, capture="export")
    for batch in (1, 2, 5):
        y = torch.randn(batch, 4, 5, 6).double()
        assert relative_error(fused(y), model(y)) < 1e-12
    with pytest.raises(AssertionError, match=r"x.size\(3\) == 6"):
        fused(torch.randn(2, 4, 5, 7).double())


def test_scalars_strings_and_no_tensors() -> None:
    model = model_of(lambda self, n, name: torch.ones(n) * len(name)).eval()
    fused = fxfuse.optimize(model, (3, "abc"), capture="export")
    assert torch.equal(fused(3, "abc"), torch.full((3,), 3.0))
    for wrong in ((4, "abc"), (3, "xyz")):
        with pytest.raises(AssertionError, match=r"the graph was made for (n=3|name='abc')"):
            fused(*wrong)


def test_by_itself_no_graph_is_taken_that_holds_for_the_numbers_of_the_examples_alone() -> None:
    def forward(self: Any, x: Tensor, k: int) -> Tensor:
        assert x.dim() == 4
        return cast(Tensor, self.b(self.a(x)) * k)

    model, x = usual(forward), torch.randn(2, 4, 5, 5).double()
    fused = fxfuse.optimize(model, (x, 2))
    for k in (2, 3):
        assert torch.equal(fused(x, k), model(x, k))

    def several(self: Any, xs: list[Tensor]) -> Tensor:
        assert xs[0].dim() == 4
        return cast(Tensor, sum(self.b(self.a(x)) for x in xs))

    model = usual(several)
    fused = fxfuse.optimize(model, ([x, x],))
    assert torch.equal(fused([x]), model([x])) and torch.equal(fused([x] * 3), model([x] * 3))
