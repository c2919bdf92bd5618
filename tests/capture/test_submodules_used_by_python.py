"""What the Python code of a module does with its submodules decides which of them are optimized."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import randomize
from python_models import Block, Plain, both, count_norms, python
from safety import agrees
from torch import Tensor, nn

import fxfuse
from fxfuse.guarded import guard_of


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


CALLED_TOO = {"weight read", "isinstance", "parameters summed", "modules counted"}


@pytest.mark.parametrize("case", USED)
def test_what_is_used_otherwise_stays_beside_its_graph(case: str) -> None:
    fused = agrees(python(USED[case]), fires=case in CALLED_TOO)
    assert (guard_of(fused.a) is not None) == (case in CALLED_TOO)
    if case in CALLED_TOO:
        assert fxfuse.report(fused).kept == 148 + 8 and "a: Model." in str(fxfuse.report(fused))
        fxfuse.strip(fused)
        assert not count_norms(fused.a) and list(fused.a.children()) == []


@pytest.mark.parametrize("forward", [through_a_list, through_a_partial])
def test_what_an_attribute_holds_as_well_stays_beside_its_graph(forward: Callable[..., Any]) -> None:
    model = python(forward)
    model.kept = [model.a]
    model.function = functools.partial(run, model.a)
    fused = agrees(model, fires=True)
    assert guard_of(fused.a) is not None and fused.kept[0] is fused.a


def reads_what_is_left_out(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if self.left_out is None else self.left_out.weight * x


def gets_what_is_left_out(self: Any, x: Tensor) -> Tensor:
    return self.a(x) if getattr(self, f"left_{'out'}") is None else x


def hands_itself_on(self: Any, x: Tensor) -> Tensor:
    return applied(self, x)


def applied(model: Any, x: Tensor) -> Tensor:
    return model.a(x)


@pytest.mark.parametrize("forward", [reads_what_is_left_out, gets_what_is_left_out, hands_itself_on])
def test_a_submodule_that_is_left_out_is_no_obstacle(forward: Callable[..., Any]) -> None:
    model = python(forward)
    model.register_module("left_out", None)
    agrees(model, fires=True)


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
    fused = agrees(python(two_names, a=shared, c=shared), fires=True)
    assert fused.a is fused.c and guard_of(fused.a) is not None


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
