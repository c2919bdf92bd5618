"""Models that are no single graph: their parts are optimized, and nothing else can tell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_untouched, count, fingerprint, randomize
from safety import agrees, model_of, pickled
from torch import Tensor, nn

import fxfuse


class Block(nn.Module):
    """A convolution and its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.bn(self.conv(x))
        if scale != 1.0:
            x = x * scale
        return x


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def python(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module that looks at its size and then does `forward`, with two blocks, a list and a sequence of blocks."""

    def looks(self: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        if x.shape[0] > 100:
            return x
        return self.body(x, *rest, **named)

    usual: dict[str, Any] = {"a": Plain(), "b": Plain(), "list": nn.ModuleList([Plain(), Plain()])}
    usual |= {"seq": nn.Sequential(Plain(), nn.ReLU(), Plain()), "named": nn.ModuleDict({"x": Plain(), "y": Plain()})}
    model = model_of(looks, **(usual | parts))
    type(model).body = forward  # type: ignore[attr-defined]
    return randomize(model).double()


def both(self: Any, x: Tensor) -> Tensor:
    return self.b(F.relu(self.a(x)))


def loops(self: Any, x: Tensor) -> Tensor:
    for block in self.list:
        x = block(x)
    return x


def collects(self: Any, x: Tensor) -> list[Tensor]:
    out = []
    for i, block in enumerate(self.list):
        x = block(x)
        if i > 0:
            out.append(x)
    return out


def zips(self: Any, x: Tensor) -> Tensor:
    return sum(m(x) + n(x) for m, n in zip(self.list, reversed(self.list), strict=True))


def indexes(self: Any, x: Tensor) -> Tensor:
    return self.list[0](x) + self.seq[2](x) + self.named["y"](x)


def items(self: Any, x: Tensor) -> dict[str, Tensor]:
    return {name: block(x) for name, block in self.named.items()}


def asks_parameters(self: Any, x: Tensor) -> Tensor:
    return self.a(x.to(next(self.parameters()).dtype)) if self.b is not None and self.a else x


def asks_plain(self: Any, x: Tensor) -> Tensor:
    return self.a(x)[..., : self.a.size[0]] * self.a.factor


def whole(self: Any, x: Tensor) -> Tensor:
    return self.seq(x)


def flag(self: Any, x: Tensor) -> Tensor:
    if self.checkpointing and not torch.jit.is_scripting():
        return torch.utils.checkpoint.checkpoint(self.a, x)
    return self.a(x)


TAKEN: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "calls": (both, {"a", "b"}),
    "sequence": (whole, {"seq"}),
    "loop": (loops, {"list.0", "list.1"}),
    "collected": (collects, {"list.0", "list.1"}),
    "zip": (zips, {"list.0", "list.1"}),
    "index": (indexes, {"list.0", "list.1", "seq.0", "seq.2", "named.x", "named.y"}),
    "items": (items, {"named.x", "named.y"}),
    "dtype asked": (asks_parameters, {"a"}),
    "flag off": (flag, {"a"}),
    "plain values": (asks_plain, {"a"}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_only_called_is_optimized(case: str) -> None:
    forward, parts = TAKEN[case]
    model = python(forward)
    model.checkpointing, model.a.size, model.a.factor = False, (3, 4), 2.5
    fused = agrees(model, fires=True)
    report = fxfuse.report(fused)
    assert report.capture == "hierarchical" and type(fused) is type(model)
    taken = {path for path, how, _ in report.parts if how == "symbolic"}
    assert taken == parts
    assert {p for p in parts if any(f.path.startswith(p) for f in report.fired)} == parts
    assert all(not count_norms(fused.get_submodule(p)) for p in parts)


def count_norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def reads_weight(self: Any, x: Tensor) -> Tensor:
    return self.a(x) * self.a.conv.weight.mean()


def calls_inside(self: Any, x: Tensor) -> Tensor:
    return self.a.bn(self.a.conv(x)) + self.a.conv(x)


def iterates(self: Any, x: Tensor) -> list[Tensor]:
    out = []
    for part in self.a.children():
        x = part(x)
        out.append(x)
    return out


def hands_over(self: Any, x: Tensor) -> Tensor:
    return run(self.a, x)


def run(module: Any, x: Tensor) -> Tensor:
    return module.conv(x)


def gets(self: Any, x: Tensor) -> Tensor:
    return sum(getattr(self, f"{n}").conv(x) for n in ("a", "b"))


def asks_kind(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if isinstance(self.a, Plain) else x


def aliases(self: Any, x: Tensor) -> Tensor:
    block = self.a
    return block.conv(x)


def walks(self: Any, x: Tensor) -> Tensor:
    return self.a(x) * sum(p.sum() for p in self.parameters())


def sums_modules(self: Any, x: Tensor) -> Tensor:
    return self.a(x) * len([m for m in self.modules() if isinstance(m, nn.BatchNorm2d)])


def loop_inside(self: Any, x: Tensor) -> Tensor:
    return sum(block.conv(x) for block in self.list)


def slices(self: Any, x: Tensor) -> Tensor:
    for block in self.list[1:]:
        x = block.conv(x)
    return x


def through_a_list(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.kept[0].conv(x)


def through_a_partial(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.function(x)


USED: dict[str, Callable[..., Any]] = {
    "weight read": reads_weight,
    "parts called": calls_inside,
    "children iterated": iterates,
    "handed over": hands_over,
    "getattr": gets,
    "isinstance": asks_kind,
    "alias": aliases,
    "parameters summed": walks,
    "modules counted": sums_modules,
    "loop inside": loop_inside,
    "slice": slices,
}


@pytest.mark.parametrize("case", USED)
def test_what_is_used_otherwise_stays_and_says_where(case: str) -> None:
    fused = agrees(python(USED[case]), fires=False)
    refused = [r for r in fxfuse.report(fused).refused if "uses more of it than its call" in r.reason]
    where = "list" if "loop" in case or case == "slice" else "a"
    assert any(r.where == where and "line" in r.detail for r in refused), refused


@pytest.mark.parametrize("forward", [through_a_list, through_a_partial])
def test_what_an_attribute_holds_as_well_stays(forward: Callable[..., Any]) -> None:
    model = python(forward)
    model.kept = [model.a]
    model.function = functools.partial(run, model.a)
    fused = agrees(model, fires=False)
    assert any("an attribute that is no submodule" in r.detail for r in fxfuse.report(fused).refused)


def test_a_part_that_holds_a_module_elsewhere_stays() -> None:
    class Looks(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.above[0].scale

    def changes(self: Any, x: Tensor) -> Tensor:
        self.scale = float(x.sum())
        return self.a(x)

    model = python(changes, a=Looks())
    model.scale, model.a.above = 1.0, [model]
    agrees(model, fires=False, refused="what is inside stays as it is")


def two_ranks(self: Any, x: Tensor) -> Tensor:
    return self.c(x.mean((2, 3))) + self.c(x[:, :, 0, :4]).mean(1)


def test_a_part_called_with_several_ranks() -> None:
    """BatchNorm1d acts on the last axis of two and on the middle one of three: both four wide here."""
    model = python(two_ranks, c=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    agrees(model, examples=torch.randn(2, 4, 6, 5, dtype=torch.float64), refused="rank of batch_norm's input")


def two_names(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.c.conv(x)


def test_a_module_at_two_places_stays_one() -> None:
    shared = Plain()
    fused = agrees(python(two_names, a=shared, c=shared), fires=False)
    assert fused.a is fused.c


def test_methods_and_bases_are_followed() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = Plain(), Plain(), Plain()

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            return self.features(x) + self.weights

        def features(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

        @property
        def weights(self) -> Tensor:
            return self.c.conv.weight.sum()

    class Model(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    fused = agrees(randomize(Model()).double(), fires=True)
    assert (count_norms(fused.a), count_norms(fused.b), count_norms(fused.c)) == (0, 0, 1)


def default(self: Any, x: Tensor) -> Tensor:
    return self.a(x)


def other(self: Any, x: Tensor) -> Tensor:
    return self.a(x, 2.0)


def keyword(self: Any, x: Tensor) -> Tensor:
    return self.a(x, scale=3.0)


def mixed(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.a(x, 2.0)


def starred(self: Any, x: Tensor) -> Tensor:
    return self.a(*(x, 2.0))


def test_optional_arguments_of_a_part() -> None:
    """A graph made for the default may only stand where the call is seen to leave it alone."""
    fused = agrees(python(default, a=Block()), fires=True)
    assert count_norms(fused.a) == 0
    for forward in (other, keyword, mixed, starred):
        agrees(python(forward, a=Block()))


def inner(self: Any, x: Tensor) -> Tensor:
    if x.shape[-1] % 2:
        x = x[..., 1:]
    return self.a(x) if len(x) > 2 else self.b(x)


def test_parts_below_a_module_in_a_graph() -> None:
    child = model_of(inner, a=Plain(), b=Plain())
    model = randomize(nn.Sequential(Plain(), child, Plain())).double()
    fused = agrees(model, fires=True)
    report = fxfuse.report(fused)
    assert report.capture == "symbolic" and count_norms(fused) == 0
    assert {p: how for p, how, _ in report.parts} == {
        "1.a": "symbolic",
        "1.b": "symbolic",
        "1": "python",
        "": "symbolic",
    }
    assert {f.path for f in report.fired} == {"0.conv", "1.a.conv", "1.b.conv", "2.conv"}
    assert "1: " in str(report) or "1  " in str(report)


def test_a_graph_that_reads_inside_a_kept_module_leaves_it_alone() -> None:
    child = model_of(inner, a=Plain(), b=Plain())
    model = randomize(model_of(lambda s, x: s.c(x) * s.c.a.conv.bias.sum(), c=child)).double()
    fused = agrees(model)
    assert count_norms(fused) == 2


def test_hooks_on_what_is_taken_and_on_what_stays() -> None:
    model: Any = python(both)
    model.a.register_forward_hook(lambda m, args, out: out * 2)
    fused = agrees(model, fires=True)
    assert count_norms(fused.a) == count_norms(fused.b) == 0
    model = python(both)
    model.register_forward_pre_hook(lambda m, args: (args[0] * m.a.conv.weight.mean(),))
    fused = agrees(model, fires=False)
    assert any("has hooks" in r.detail for r in fxfuse.report(fused).refused)


def test_the_result_is_a_module_like_any_other() -> None:
    model = python(both)
    before = fingerprint(model)
    fused = fxfuse.optimize(model)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    want = model(x)
    for candidate in (pickled_class(fused), fxfuse.optimize(fused)):
        torch.testing.assert_close(candidate(x), want)
        assert fxfuse.report(candidate).capture == "hierarchical"
    assert not fxfuse.report(fxfuse.optimize(fused)).fired
    with torch.no_grad():
        for p in fused.parameters():
            p.add_(1)
    assert_untouched(model, before)
    other = randomize(python(both), seed=3)
    fxfuse.refresh(fused, other)
    torch.testing.assert_close(fused(x), other(x))
    with pytest.raises(ValueError, match=r"no such tensor as|is not the model that was optimized"):
        fxfuse.refresh(fused, nn.Conv2d(3, 3, 1))


def pickled_class(module: nn.Module) -> Any:
    """Through pickle where the class can be found again; the class here is local, so its parts alone."""
    copied = fxfuse.optimize(module)
    copied.a, copied.b = pickled(module.a), pickled(module.b)
    return copied


def test_a_dry_run_says_the_same() -> None:
    model = python(both)
    planned, done = fxfuse.plan(model), fxfuse.report(fxfuse.optimize(model))
    assert planned.parts == done.parts and planned.refused == done.refused
    assert [f.path for f in planned.fired] == [f.path for f in done.fired]
    assert planned.after.params == done.after.params and planned.before == done.before
    assert done.before.ops["batch_norm"] - done.after.ops["batch_norm"] == 2


def test_example_inputs_reach_the_parts() -> None:
    """The rank of what a part is given is known from running the whole, on stand-ins."""

    def body(self: Any, x: Tensor) -> Tensor:
        return self.c(x.mean((2, 3))) if x.dim() == 4 else x

    mixed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = randomize(model_of(body, c=mixed)).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    fused = fxfuse.optimize(model, x, verify=True)
    assert count(fused, x)["batch_norm"] == 0
    torch.testing.assert_close(fused(x), model(x))


def test_the_way_can_be_forced() -> None:
    model = randomize(nn.Sequential(Plain(), nn.ReLU(), Plain())).double()
    for how, kind in (("symbolic", torch.fx.GraphModule), ("hierarchical", nn.Sequential)):
        fused = agrees(model, capture=how, fires=True)
        assert fxfuse.report(fused).capture == how and isinstance(fused, kind)
        assert count_norms(fused) == 0
    with pytest.raises(ValueError, match="unknown capture 'trace'; known: symbolic, export, hierarchical"):
        fxfuse.optimize(model, capture="trace")
    with pytest.raises(ValueError, match='capture="export" needs example_inputs'):
        fxfuse.optimize(model, capture="export")
    with pytest.raises(fxfuse.CaptureError, match="control flow"):
        fxfuse.optimize(python(both), capture="symbolic")


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Padding whose amount depends on the input's size, as TensorFlow does it."""
    amounts: list[Any] = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        amounts += [total // 2, total - total // 2]
    return F.pad(x, amounts)


class ConvSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def test_padding_that_depends_on_the_size_is_one_graph() -> None:
    model = randomize(nn.Sequential(ConvSame(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())).double()
    fused = agrees(model, fires=True, shapes=((2, 4, 8, 7), (1, 4, 5, 11), (1, 4, 1, 2)))
    assert fxfuse.report(fused).capture == "symbolic" and count_norms(fused) == 0


def test_max_and_min_of_numbers_and_tensors_stay_what_they_are() -> None:
    model = model_of(lambda s, x: x * max(x.shape[-1], 3, 7) - min(2, x.dim()) + max([1, 2]) + min(3, 4))
    agrees(model, fires=False)
    assert max(3, 4) == 4 and max.__name__ == "max"
