"""In-place writes, aliases, shared values and written weights: nothing is moved across them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactly import MISSED
from safety import agrees, pickled, usual
from torch import Tensor, nn
from torch.fx import Graph

import fxfuse
from fxfuse.ops.memory import INPLACE, written

OVERWRITTEN = "overwritten in place"
READ_ELSEWHERE = "read elsewhere"
Forward = Callable[..., Any]


def written_after(view: Callable[[Tensor], Tensor], write: Callable[[Tensor], Any] = lambda v: v.mul_(2)) -> Forward:
    """A view of x is taken, x convolved, the view written, and only then the batch norm runs."""

    def forward(self: Any, x: Tensor) -> Tensor:
        v = view(x)
        y = self.a(x)
        write(v)
        return self.b(y) + x.sum()

    return forward


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[:, :2],
    "chunk": lambda x: x.narrow(1, 0, 2),
    "view": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(1),
    "transpose": lambda x: x.transpose(1, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(x.dtype),
    "double": lambda x: x.double(),
    "expand": lambda x: x.expand(-1, -1, -1, -1),
    "einsum": lambda x: torch.einsum("bchw->bhwc", x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "identity": nn.Identity(),
    "select": lambda x: x[0],
    "unfold": lambda x: x.unfold(2, 2, 2),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_input_written_through_a_view_between_the_layers(view: str) -> None:
    agrees(usual(written_after(VIEWS[view])), fires=False)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda v: v.add_(1),
    "relu_": lambda v: v.relu_(),
    "F.relu": lambda v: F.relu(v, inplace=True),
    "F.leaky_relu": lambda v: F.leaky_relu(v, 0.1, True),
    "torch.relu_": torch.relu_,
    "F.threshold_": lambda v: F.threshold_(v, 0.1, 0.0),
    "out=": lambda v: torch.add(v, 1, out=v),
    "copy_": lambda v: v.copy_(v * 2),
    "zero_": lambda v: v.zero_(),
    "masked_fill_": lambda v: v.masked_fill_(v > 0, 1.0),
    "data": lambda v: v.data.mul_(2),
    "init": lambda v: nn.init.constant_(v, 1.0),
    "clamp_": lambda v: torch.clamp_(v, 0, 1),
    "module": nn.ReLU(inplace=True),
    "hardtanh": nn.Hardtanh(inplace=True),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_spelling_of_a_write_is_seen(write: str) -> None:
    parts = {"w": WRITES[write]} if isinstance(WRITES[write], nn.Module) else {}
    forward = written_after(lambda x: x, WRITES[write])
    agrees(usual(forward, **parts), fires=False, refused=OVERWRITTEN)


def setitem_between(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y[:, 0] = 1
    return self.b(y)


def setitem_on_input(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    x[:, 0] = 1
    return self.b(y)


def setitem_after(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    y[:, 0] += 1
    y[..., :2] = 0
    return y


def relu_between(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y.relu_()
    return self.b(y)


def written_before(self: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return self.b(self.a(x))


def written_behind(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    x.add_(1)
    return y


def view_of_the_middle(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    v = y.view(-1)
    v.mul_(2)
    return self.b(y)


def middle_written_later(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.a(x)
    v = y[:, :2]
    z = self.b(y)
    v.zero_()
    return z, v


def power(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y **= 2
    return self.b(y)


def foreach(self: Any, x: Tensor) -> Tensor:
    y, z = self.a(x), self.p(x)
    torch._foreach_mul_([y, z], 2.0)
    return y + z


def out_of_a_sum(self: Any, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.add(self.a(x), self.p(x), out=out)
    return out


def onto_the_input(self: Any, x: Tensor) -> Tensor:
    x += self.a(x)
    return x


def onto_the_input_and_back(self: Any, x: Tensor) -> Tensor:
    x += self.a(x)
    y = self.p(x)
    x -= y
    return y + x


def residual(self: Any, x: Tensor) -> Tensor:
    res = x
    x = self.b(self.a(x))
    x += res
    return F.relu(x, inplace=True)


def residual_of_an_activation(self: Any, x: Tensor) -> Tensor:
    x = F.relu(x)
    res = x
    x = self.b(self.a(x))
    x += res
    return F.relu(x, inplace=True)


def alias_of_the_sum(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.relu(x)
    res = x
    x += self.a(x)
    return x, res


def alias_of_the_product(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    z = y
    y *= 2
    return z + self.p(x)


def alias_emptied(self: Any, x: Tensor) -> Tensor:
    a = self.a(x)
    b = a
    a = a + self.p(x)
    b.mul_(0)
    return a


def arithmetic_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    y *= 2
    y += self.p(x)
    y -= 1
    y /= 3
    return y


def sizes_in_place(self: Any, x: Tensor) -> tuple[Any, ...]:
    height = x.shape[2]
    more = height
    more += 1
    shape = x.shape
    shape += (1,)
    return self.b(self.a(x)), height, more, shape


def pieces_in_place(self: Any, x: Tensor) -> Tensor:
    u, v = self.a(x).chunk(2, 1)
    u = u + 1
    v = v * 2
    v += 2
    return self.p(torch.cat([u, v], 1)) + x


def dropout_alias(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    F.dropout(y, training=False).mul_(2)
    return self.b(y)


def cloned(self: Any, x: Tensor) -> Tensor:
    w = torch.cat([x])
    y = self.a(x)
    w.mul_(2)
    x.clone().zero_()
    return self.b(y) + w


PLACES: dict[str, tuple[Forward, bool | None, str]] = {
    "setitem between": (setitem_between, False, READ_ELSEWHERE),
    "setitem on the input": (setitem_on_input, False, OVERWRITTEN),
    "setitem behind": (setitem_after, True, ""),
    "relu_ between": (relu_between, False, READ_ELSEWHERE),
    "written before": (written_before, True, ""),
    "written behind": (written_behind, True, ""),
    "view of the middle": (view_of_the_middle, False, READ_ELSEWHERE),
    "middle written later": (middle_written_later, False, READ_ELSEWHERE),
    "power": (power, False, ""),
    "foreach": (foreach, False, ""),
    "out= of a sum": (out_of_a_sum, None, ""),
    "x += conv(x)": (onto_the_input, False, "writes a tensor in place that is read elsewhere"),
    "x += conv(x), x -= y": (onto_the_input_and_back, False, "writes a tensor in place that is read elsewhere"),
    "residual": (residual, True, ""),
    "residual of an activation": (residual_of_an_activation, True, ""),
    "alias of the sum": (alias_of_the_sum, False, "writes a tensor in place that is read elsewhere"),
    "alias of the product": (alias_of_the_product, False, "writes a tensor in place that is read elsewhere"),
    "alias emptied": (alias_emptied, False, ""),
    "arithmetic in place": (arithmetic_in_place, True, ""),
    "sizes in place": (sizes_in_place, True, ""),
    "pieces in place": (pieces_in_place, True, ""),
    "dropout alias": (dropout_alias, False, READ_ELSEWHERE),
    "copies written": (cloned, True, ""),
}


@pytest.mark.parametrize("place", PLACES)
def test_writes(place: str) -> None:
    forward, fires, refused = PLACES[place]
    agrees(usual(forward), fires=fires, refused=refused, without=MISSED if "alias of the" in place else None)


def test_the_callers_tensor_is_written_as_eager_writes_it() -> None:
    fused = fxfuse.optimize(usual(onto_the_input))
    for candidate in (fused, pickled_result(onto_the_input)):
        x = torch.ones(1, 4, 3, 3, dtype=torch.float64)
        with torch.no_grad():
            assert candidate(x) is x and not torch.equal(x, torch.ones_like(x))


class Onto(nn.Module):
    """Of this module, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)

    forward = onto_the_input


def pickled_result(forward: Forward) -> Any:
    assert Onto.forward is forward
    return pickled(fxfuse.optimize(Onto().double().eval()))


def bn_and_output(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.a(x)
    return y, self.b(y)


READERS: dict[str, tuple[Forward, bool | None]] = {
    "returned as well": (bn_and_output, False),
    "normalized twice": (lambda s, x: (lambda y: s.b(y) * s.n(y))(s.a(x)), False),
    "conv at two sites": (lambda s, x: s.b(s.a(x)) * s.n(s.a(x).relu()), True),
    "bn at two sites": (lambda s, x: s.b(s.a(x)) * s.b(s.p(x)), True),
    "conv of a conv": (lambda s, x: s.a(s.a(x)), False),
    "y + y": (lambda s, x: (lambda y: y + y)(s.a(x)), True),
    "y - y": (lambda s, x: (lambda y: y - y)(s.a(x)), True),
    "conv - conv": (lambda s, x: s.a(x) - s.a(x), True),
    "x + x and x - x": (lambda s, x: (x + x, x - x), False),
    "cat of one tensor twice": (lambda s, x: torch.cat([s.a(x)] * 2, 1), None),
    "cat of one tensor": (lambda s, x: torch.cat([x], 1), False),
    "conv of a cat of one": (lambda s, x: s.b(s.a(torch.cat([x], 1))), True),
    "nothing read": (lambda s, x: (s.b(s.a(x)), x)[1], False),
}


@pytest.mark.parametrize("reader", READERS)
def test_values_with_several_readers(reader: str) -> None:
    forward, fires = READERS[reader]
    agrees(usual(forward), fires=fires)


@pytest.mark.parametrize("name", INPLACE)
def test_every_in_place_operator_of_python_writes_its_first_argument(name: str) -> None:
    graph = Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    assert written(graph.call_function(INPLACE[name], (left, right)), None, {}) == [left]


def masked(change: Callable[[Tensor, Tensor], Tensor], view: Callable[[Tensor], Tensor]) -> Forward:
    """A view of a mask is taken, and the mask changed before the view is read."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        mask = y > 0
        seen = view(mask)
        changed = change(mask, x.flip(1) > 0)
        return y * seen + changed

    return forward


@pytest.mark.parametrize(
    "view", [lambda m: m, lambda m: m.view_as(m), lambda m: m[:, :1], lambda m: m.flatten(1)[0, 0]]
)
@pytest.mark.parametrize("change", [operator.iand, operator.ior, operator.ixor])
def test_masks_changed_in_place(change: Any, view: Any) -> None:
    agrees(usual(masked(change, view)))
