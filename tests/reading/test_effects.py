"""What random models found: effects that a rewrite, a trace or the look at shapes once got wrong."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from safety import agrees, usual
from torch import Tensor, nn
from torch.nn.utils import prune

import fxfuse

EXAMPLES = torch.ones(2, 4, 5, 5, dtype=torch.float64)


def counted(self: Any, x: Tensor) -> Tensor:
    self.total += 1
    self.vector.mul_(2)
    return self.b(self.a(x)) * self.total + self.vector


def weight_written(self: Any, x: Tensor) -> Tensor:
    self.p.weight.data.mul_(2)
    return self.b(self.a(self.p(x)))


@pytest.mark.parametrize("forward", [counted, weight_written])
def test_examples_write_to_no_buffer_and_no_weight(forward: Any) -> None:
    """Operations on nothing but real tensors used to run for real while shapes were found."""
    parts = {"total": torch.zeros(()), "vector": torch.ones(4, 1, 1)}
    agrees(usual(forward, **{n: t.double() for n, t in parts.items()}), examples=EXAMPLES)


def pruned() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


def normed() -> nn.Module:
    return cast(nn.Module, torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)))


@pytest.mark.parametrize("layer", [pruned, normed])
def test_a_weight_that_a_hook_computes_is_read_after_the_hook_has_run(layer: Any) -> None:
    """It is a plain attribute, and until the first call not what the calls see."""
    agrees(usual(lambda s, x: s.b(F.conv2d(s.h(x), s.h.weight)), h=layer()), fires=False)
    agrees(usual(lambda s, x: s.b(s.a(x)) + F.conv2d(s.h(x), s.h.weight, padding=1), h=layer()), fires=True)


class Twice(nn.Module):
    """Computes with the weight of a layer whose hook has just computed it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Any:
        return F.conv2d(self.layer(x), self.layer.weight * 2)


@pytest.mark.parametrize("layer", [pruned, normed])
def test_arithmetic_on_a_weight_that_a_hook_computes_stays_whole(layer: Any) -> None:
    agrees(usual(lambda s, x: s.b(s.a(s.t(x))), t=Twice(layer())), fires=True, refused="stays Python")


def data_before(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    shape, data = y.shape, y.data
    y = y[:, :2]
    return (data * 2).view(shape) + y.sum()


def written_in_a_module(self: Any, x: Tensor) -> Tensor:
    y = self.a(x).data
    return self.b(self.writer(y))


class Writer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] += 1
        return x


def test_attributes_are_read_where_the_forward_reads_them() -> None:
    agrees(usual(data_before), fires=True)
    agrees(usual(written_in_a_module, writer=Writer()), fires=False)
    inner = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    agrees(usual(lambda s, x: s.inner(s.writer(x.data)), writer=Writer(), inner=inner), fires=True)


def list_written(self: Any, x: Tensor) -> Tensor:
    y = self.p(x)
    torch._foreach_mul_([x, y], 2.0)
    return self.b(y) + self.b(self.a(x + x))


def list_written_between(self: Any, x: Tensor) -> Tensor:
    y = self.p(x)
    z = y * 2
    torch._foreach_mul_([x, y], 2.0)
    return self.a(z) + y


def test_every_tensor_of_a_list_is_written() -> None:
    agrees(usual(list_written), refused="read elsewhere")
    agrees(usual(list_written_between), fires=False)


def unknown(x: Tensor) -> Tensor:
    """Four channels, which only a run can tell."""
    return torch.cat([x[:, :2], x.repeat(1, 2, 1, 1)[:, :2]], 1)


def test_a_constant_that_broadcasts_the_channels_is_no_factor_of_a_channel() -> None:
    """One channel times (4, 1, 1) gives four; folded into the next layer, that would read one."""
    parts: dict[str, Any] = {"one": nn.Conv2d(4, 1, 1), "k": torch.arange(1, 5).double().view(4, 1, 1)}
    across: dict[str, Any] = {"row": torch.arange(5.0).double(), "wide": nn.Linear(5, 3)}  # of a map that may be 1 wide
    differ, may = "the channel counts differ and broadcast", "may broadcast the channels"
    agrees(usual(lambda s, x: s.b(s.a(s.one(x) * s.k)), **parts), fires=True, refused=differ)
    agrees(usual(lambda s, x: s.b(s.a(s.one(x).relu() + s.k)), **parts), fires=True, refused=differ)
    agrees(usual(lambda s, x: s.b(s.a(unknown(s.a(x)) * s.k)), **parts), fires=True, refused=may)
    examples = torch.ones(2, 4, 5, 5, dtype=torch.float64)
    agrees(usual(lambda s, x: s.p(x.sum(1, True) * s.k), **parts), examples=examples, fires=False, refused=differ)
    agrees(usual(lambda s, x: s.p(x.cumsum(1) * s.k), **parts), examples=examples, fires=True)
    model = usual(lambda s, x: s.wide(s.a(x) * s.row), **across)
    fused = agrees(model, ((2, 4, 5, 5), (3, 4, 6, 5)), examples=examples, fires=True)
    narrow = examples[..., :1]
    assert model(narrow).shape == (2, 4, 5, 3)  # which the merged layer cannot read, and says so
    with pytest.raises(AssertionError, match="for a batch of 5 channels"):
        fused(narrow)


def test_channels_of_the_examples_are_checked_where_the_layer_reads() -> None:
    """The factor meets one half of a tensor of unknown channels: it is the whole that the merged layer reads."""
    four, two = torch.arange(1.0, 5).double().view(4, 1), torch.arange(1.0, 3).double().view(2, 1)

    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = (x * self.four).chunk(2, 1)
        return cast(Tensor, self.some(b * self.two) + a.sum())

    model = usual(forward, some=nn.Conv1d(2, 3, 1), four=nn.Buffer(four), two=nn.Buffer(two))
    x = torch.ones(2, 4, 4).double()
    fused = fxfuse.optimize(model, x)
    torch.testing.assert_close(fused(x), model(x))
    assert "for a batch of 4 channels" in fused.code


def test_a_branch_that_writes_what_another_one_reads() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.t(y)
        y += 1
        return cast(Tensor, self.b(z) + y)

    agrees(usual(forward, t=nn.ConvTranspose2d(4, 4, 3, padding=1)))


class Total(nn.Module):
    """Cannot be traced, and changes what others may read."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Buffer(torch.ones(4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            self.factor.mul_(2)
            self.conv.weight.data.mul_(2)
        return x


STATISTICS = (
    lambda s, x: s.b(s.a(F.batch_norm(s.p(x), s.b.running_mean, s.b.running_var, training=True))),
    lambda s, x: s.b(s.a(F.batch_norm(s.p(x), s.same.running_mean, s.same.running_var, training=True))),
    lambda s, x: s.b(s.a(F.instance_norm(s.p(x), s.same.running_mean, s.same.running_var))),
)


@pytest.mark.parametrize("forward", STATISTICS)
def test_statistics_updated_under_any_name_are_not_folded(forward: Any) -> None:
    model = usual(forward)
    model.same = model.b
    agrees(model, fires=False, refused="the forward itself writes its weights")


RESHAPES = {
    "squeeze_": lambda x: x.squeeze_(),
    "unsqueeze_": lambda x: x.unsqueeze_(0).squeeze_(0),
    "t_": lambda x: x[0, 0].t_(),
    "transpose_": lambda x: x.transpose_(2, 3),
    "resize_": lambda x: x.resize_(1, 4, 5, 5),
    "set_": lambda x: x.set_(torch.zeros_like(x)),
    "function": lambda x: torch.resize_as_(x, x[:1]),
}


class Reshaping(nn.Module):
    def __init__(self, write: Any) -> None:
        super().__init__()
        self.write, self.conv = write, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = x + 0
        self.write(x)
        return -self.conv(x).flip(1)


@pytest.mark.parametrize("case", RESHAPES)
def test_a_tensor_that_changes_its_shape_keeps_its_module_whole(case: str) -> None:
    """Afterwards the same value has another rank: what is a channel before it is a row behind it."""
    model = usual(lambda s, x: (s.b(s.a(x)), s.r(x)), r=Reshaping(RESHAPES[case]))
    agrees(model, ((1, 4, 5, 6), (2, 4, 6, 6)), fires=True, refused="stays Python")


def test_some_branches_of_a_concatenation_along_another_axis() -> None:
    """Two of three can be merged on the channels, which is not where they are concatenated."""
    model = usual(lambda s, x: torch.cat([F.avg_pool2d(x, 3, 1, 1), s.a(x).relu(), s.a(x), s.o(x)], -1))
    model.o = nn.Conv2d(4, 4, 3, padding=1).double()
    agrees(model, fires=False)
    forced = fxfuse.optimize(model.eval(), patterns=["concat!"])
    torch.testing.assert_close(forced(EXAMPLES), model(EXAMPLES))


def test_what_a_module_kept_whole_may_write_is_not_folded() -> None:
    reason = "the forward itself writes its weights"
    agrees(usual(lambda s, x: s.b(s.a(s.t(x))) + s.p(x) * s.t.factor, t=Total()), fires=True)
    agrees(usual(lambda s, x: s.b(s.t.conv(s.t(x))), t=Total()), fires=False, refused=reason)
    model = usual(lambda s, x: s.b(s.p(s.t(x))), t=Total())
    model.p.weight = model.t.conv.weight
    agrees(model, fires=False, refused=reason)


def test_a_weight_written_under_another_name_is_not_folded() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.p.weight.data.mul_(2)
        return cast(Tensor, self.b(self.other(x)))

    model = usual(forward, other=nn.Conv2d(4, 4, 1))
    model.other.weight = model.p.weight
    agrees(model, fires=False, refused="the forward itself writes its weights")


def test_a_slice_written_with_a_view_of_itself_keeps_its_strides() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.line(x).split(1, 1)[-1]
        z = y[:, ::2]
        z += y  # which PyTorch allows for some strides and not for others
        return z

    model = usual(forward, line=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
    with torch.no_grad():
        fused = fxfuse.optimize(model, torch.randn(3, 4).double())
        for batch in (3, 2):
            x = torch.randn(batch, 4).double()
            torch.testing.assert_close(fused(x), model(x))
    assert any("reads the same memory by another name" in r.reason for r in fxfuse.report(fused).refused)


BY_STRIDES: dict[str, tuple[Any, bool]] = {
    "flattened": (lambda y: y.flatten(), True),
    "reshaped": (lambda y: y.reshape(y.shape[0], -1), True),
    "a module": (nn.Flatten(), True),
    "a view of it": (lambda y: y.reshape(y.shape[0], -1)[:, 1:], True),
    "read before alone": (lambda y: y.flatten(), False),
}


@pytest.mark.parametrize("name", BY_STRIDES)
def test_a_write_to_what_may_be_a_view_or_a_copy(name: str) -> None:
    """A channels-last tensor of one sample whose batch stride is odd: added to itself, it has usual strides again."""
    shape, again = BY_STRIDES[name]

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.p(self.b(x + x))
        z = y.sigmoid() if not again else None
        w = self.shape(y) if isinstance(shape, nn.Module) else shape(y)
        w.mul_(2)
        return y if z is None else z.flatten() + w.flatten()

    extra = {"shape": shape} if isinstance(shape, nn.Module) else {}
    model = usual(forward, **extra)
    tensors = [torch.randn(1, 8, 3, 5)[:, :4], torch.randn(2, 4, 3, 5)]
    tensors.append(torch.randn(1, 3, 5, 4).permute(0, 3, 1, 2).as_strided((1, 4, 3, 5), (2, 1, 20, 4)))
    with torch.no_grad():
        fused = fxfuse.optimize(model)
        for x in (t.double() if t.is_contiguous() else t.to(torch.float64) for t in tensors):
            torch.testing.assert_close(fused(x.clone()), model(x.clone()))
            torch.testing.assert_close(fused(x), model(x))
    report = fxfuse.report(fused)
    assert any("depends on strides" in r.reason for r in report.refused) == again and bool(report.fired) != again
