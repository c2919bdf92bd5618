"""Models captured by torch.export: the same fusions as from a trace, exactly what eager does, call after call."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_results import EXPECTED, OPERATIONS, ROUNDING
from exactly import MISSED
from helpers import assert_untouched, count, fingerprint, randomize, relative_error
from safety import agrees, pickled, usual
from torch import Tensor, nn

import fxfuse
from examples.blocks import BLOCKS
from fxfuse.capture.copying import copied

Forward = Callable[..., Any]
Pair = namedtuple("Pair", "first second")
EXAMPLES = torch.randn(2, 4, 8, 7, dtype=torch.float64)


def exported(model: nn.Module, *inputs: Any) -> Any:
    return fxfuse.optimize(model, inputs or EXAMPLES, capture="export")


@pytest.mark.parametrize("name", EXPECTED)
def test_block(name: str) -> None:
    block, (operations, _) = BLOCKS[name], EXPECTED[name]
    exact = not ROUNDING.search(name)
    model = randomize(block.build().double(), seed=3, integer=exact)
    example = torch.randn(block.shapes[0], dtype=torch.float64)
    before, state = fingerprint(model), torch.get_rng_state()
    fused = exported(model, example)
    assert_untouched(model, before)
    assert torch.equal(state, torch.get_rng_state())
    assert fxfuse.report(fused).capture == "export"
    for shape in block.shapes:
        x = torch.randint(-3, 4, shape).double()
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) <= (0 if exact else 1e-13)
        counted = count(fused, x)
        assert " ".join(str(counted[o]) for o in OPERATIONS) == operations
    assert_untouched(model, before)


def plain(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x))


def relu_in_place(self: Any, x: Tensor) -> Tensor:
    return F.relu_(self.b(self.a(x)))


def sum_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    y += self.p(x)
    return y.mul_(2)


def writes_its_input(self: Any, x: Tensor) -> Tensor:
    x.add_(1)
    return self.b(self.a(x))


def writes_a_slice_of_its_input(self: Any, x: Tensor) -> Tensor:
    x[:, 1:2] = 0
    return self.b(self.a(x))


def writes_between(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    z = y.clone()
    y.mul_(2)
    return self.b(y) + z


def writes_through_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, 0].mul_(3)
    return self.b(y)


def writes_after(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    y.view(y.shape[0], -1).add_(1)
    return y


def returns_views(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = self.b(self.a(x))
    return y[:, 1:3], y, x, y[:, 0]


def returns_a_dict(self: Any, x: Tensor) -> dict[str, Any]:
    return {"y": self.b(self.a(x)), "parts": (x, [self.p(x)])}


def returns_an_ordered_dict(self: Any, x: Tensor) -> OrderedDict[str, Any]:
    return OrderedDict(y=self.b(self.a(x)), pair=Pair(x, x.shape[0]))


def returns_a_pair(self: Any, x: Tensor) -> Pair:
    return Pair(self.b(self.a(x)), self.p(x))


def returns_no_tensors_too(self: Any, x: Tensor) -> tuple[Any, ...]:
    return self.b(self.a(x)), None, 3, "text", x.shape[0]


def functional(self: Any, x: Tensor) -> Tensor:
    y = F.conv2d(x, self.a.weight, self.a.bias, padding=1)
    return F.batch_norm(y, self.b.running_mean, self.b.running_var, self.b.weight, self.b.bias)


def without_weight(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(self.a(x), self.b.running_mean, self.b.running_var)


def constants_of_its_own(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype).view(4, 1, 1)
    return y + torch.ones(4, 1, 1, dtype=x.dtype) * 3 + torch.arange(4, dtype=x.dtype).view(4, 1, 1)


def a_constant_it_writes(self: Any, x: Tensor) -> Tensor:
    c = torch.zeros(4, 1, 1, dtype=x.dtype)
    c[1] = 5
    c += 1
    return self.b(self.a(x)) * c


def a_weight_it_computes_and_writes(self: Any, x: Tensor) -> Tensor:
    scale = self.b.weight.view(4, 1, 1) * 2
    scale[1:2].mul_(3)
    return self.a(x) * scale


def pieces(self: Any, x: Tensor) -> Tensor:
    first, second = self.a(x).chunk(2, 1)
    return self.b(torch.cat([second, first], 1))


def splits(self: Any, x: Tensor) -> Tensor:
    first, second = torch.split(x, [1, 3], 1)
    return self.b(self.a(torch.cat([second, first], 1)))


def slices(self: Any, x: Tensor) -> Tensor:
    return self.p(self.a(x)[:, [2, 0, 1, 3]]) + self.b(torch.cat([self.a(x)[:, :2], self.p(x)[:, 2:]], 1))


def selections(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x.flip(1))) + self.p(F.channel_shuffle(self.a(x), 2))


def arithmetic(self: Any, x: Tensor) -> Tensor:
    return 1 - self.b(-self.a(x) / 2) - torch.sub(x, self.p(x), alpha=2) + torch.rsub(self.b(x), 2, alpha=3)


def rounds(self: Any, x: Tensor) -> Tensor:
    return torch.div(self.b(self.a(x)), 2, rounding_mode="floor")


def drops_out(self: Any, x: Tensor) -> Tensor:
    y = F.dropout(self.b(F.dropout2d(self.a(x), training=False)), 0.5, True)
    return y + torch.rand_like(x) + torch.rand(4, 1, 1, dtype=x.dtype)


def pads(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    return self.b(self.a(F.pad(x, (1, 1, 2, 2)))), self.p(F.pad(self.b(x), (1, 2, 0, 1), mode="reflect"))


def reads_sizes(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    batch, channels, height, _ = y.shape
    return F.interpolate(self.b(y), size=(height * 2, 5)).reshape(batch, channels, -1)


def other_dtypes(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)).to(torch.float32).double()


def stops_gradients(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x).detach())


def of_the_batch(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(self.a(x), None, None, training=True)


def counts(self: Any, x: Tensor) -> Tensor:
    self.n.add_(1)
    return self.b(self.a(x)) * self.n


def sets_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.n = self.n + 1
    return self.b(self.a(x)) * self.n


def moves_its_statistics(self: Any, x: Tensor) -> Tensor:
    self.b.running_mean.add_(1)
    return self.b(self.a(x))


def trains_its_statistics(self: Any, x: Tensor) -> Tensor:
    y = F.batch_norm(self.a(x), self.b.running_mean, self.b.running_var, training=True)
    return self.b(self.p(x)) + y


def transposed(self: Any, x: Tensor) -> Tensor:
    return self.b(F.conv_transpose2d(x, self.a.weight, self.a.bias, 2, 1, 1))


def same_padding(self: Any, x: Tensor) -> Tensor:
    return self.b(F.conv2d(x, self.a.weight, self.a.bias, padding="same"))


def standardized(self: Any, x: Tensor) -> Tensor:
    weight = F.batch_norm(self.a.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0, eps=1e-6)
    return self.b(F.conv2d(x, weight.reshape_as(self.a.weight), self.a.bias))


def a_loose_tensor(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.b(self.a(x))) * self.loose


def branches_on_a_size(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if x.shape[1] == 4 else x


def loops_over_channels(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.cat([self.p(x)[:, i : i + 1] * i for i in range(x.shape[1])], 1))


def is_called_twice(self: Any, x: Tensor) -> Tensor:
    return self.a(self.b(self.a(x)))


# how many layers are fused
FORWARDS: dict[Forward, int] = {
    plain: 1,
    relu_in_place: 1,
    sum_in_place: 1,
    writes_its_input: 1,
    writes_a_slice_of_its_input: 1,
    writes_between: 0,
    writes_through_a_view: 0,
    writes_after: 1,
    returns_views: 1,
    returns_a_dict: 1,
    returns_an_ordered_dict: 1,
    returns_a_pair: 1,
    returns_no_tensors_too: 1,
    functional: 1,
    without_weight: 1,
    constants_of_its_own: 1,
    a_constant_it_writes: 1,
    a_weight_it_computes_and_writes: 1,
    pieces: 1,
    splits: 1,
    slices: 1,
    selections: 1,
    arithmetic: 1,
    rounds: 1,
    drops_out: 1,
    pads: 2,
    reads_sizes: 1,
    other_dtypes: 1,
    stops_gradients: 0,
    of_the_batch: 0,
    counts: 1,
    sets_a_buffer: 1,
    moves_its_statistics: 0,
    trains_its_statistics: 0,
    transposed: 1,
    same_padding: 1,
    standardized: 1,
    a_loose_tensor: 1,
    branches_on_a_size: 1,
    loops_over_channels: 1,
    is_called_twice: 1,
}


def with_state(forward: Forward) -> nn.Module:
    model = usual(forward, n=torch.zeros((), dtype=torch.float64))
    model.loose = torch.randn(4, 1, 1, dtype=torch.float64)
    return model


def keeps_its_promises(forward: Forward, capture: str | None) -> fxfuse.Report:
    """`agrees`, and what was pickled does the same again, draws and counts included."""
    without = MISSED if forward is a_constant_it_writes else None
    fused = agrees(with_state(forward), examples=EXAMPLES, capture=capture, without=without)
    again, reference = pickled(fused), copied(fused)
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 9, dtype=torch.float64)
        torch.manual_seed(0)
        want = reference(x.clone())
        torch.manual_seed(0)
        got = again(x.clone())
        assert type(got) is type(want)
        assert relative_error(got, want) == 0
    ours, theirs = dict(reference.named_buffers()), dict(again.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return fxfuse.report(fused)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forward(forward: Forward) -> None:
    report = keeps_its_promises(forward, "export")
    assert len(report.fired) == FORWARDS[forward], report


@pytest.mark.parametrize(
    "forward",
    [
        *(counts, moves_its_statistics, trains_its_statistics, a_weight_it_computes_and_writes, a_loose_tensor),
        *(drops_out, constants_of_its_own, writes_through_a_view, returns_a_pair),
    ],
    ids=lambda f: f.__name__,
)
def test_the_same_forward_traced(forward: Forward) -> None:
    report = keeps_its_promises(forward, None)
    assert report.capture == "symbolic" and len(report.fired) <= FORWARDS[forward]


@pytest.mark.parametrize("capture", [None, "export"])
def test_loose_tensors_are_refreshed(capture: str | None) -> None:
    model, other = with_state(a_loose_tensor), with_state(a_loose_tensor)
    randomize(other, seed=7)
    fused = fxfuse.optimize(model, EXAMPLES, capture=capture)
    assert relative_error(fxfuse.refresh(fused, other)(EXAMPLES), other(EXAMPLES)) < 1e-12


@pytest.mark.parametrize("capture", [None, "export"])
@pytest.mark.parametrize("last", ["same", "other", "computed"])
def test_a_border_is_filled_with_one_value_or_not_at_all(capture: str | None, last: str) -> None:
    """1x1, batch norm, a border of what the batch norm gives for zeros, 3x3: one convolution, if all of it is that."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scale = self.n.weight / torch.sqrt(self.n.running_var + self.n.eps)
        value = (self.n.bias - self.n.running_mean * scale).view(1, -1, 1, 1)
        y = F.pad(self.n(F.conv2d(x, self.p.weight)), (1, 1, 1, 1))
        y[:, :, :1] = y[:, :, -1:] = value
        y[:, :, :, :1] = value
        y[:, :, :, -1:] = {"same": value, "other": value * 2, "computed": x.mean()}[last]
        return F.conv2d(y, self.a.weight)

    fused = agrees(usual(forward), examples=EXAMPLES, capture=capture)
    assert count(fused, EXAMPLES)["conv"] == (1 if last == "same" else 2)
