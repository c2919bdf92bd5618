"""Random models made of affine layers, whose arithmetic in float64 is exact on integer inputs.

A model is drawn for a target geometry: on a length L it gives floor((L + grow - 1) / stride) + 1
positions, so that branches drawn for one target can be added for every input size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = Callable[[st.SearchStrategy[Any]], Any]
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUTS = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


class Sum(nn.Module):
    """The sum of branches with coefficients; a branch may be None, the input itself."""

    def __init__(self, branches: list[nn.Module | None], signs: list[int]) -> None:
        super().__init__()
        self.branches, self.signs = nn.ModuleList(b or nn.Identity() for b in branches), signs

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch, sign in zip(list(self.branches)[1:], self.signs, strict=True):
            total = total - branch(x) if sign == -1 else torch.add(total, branch(x), alpha=sign)
        return total


class Concat(nn.Module):
    """Branches side by side on the channels, of the whole input or of one piece of it each."""

    def __init__(self, branches: list[nn.Module], sizes: list[int] | None = None) -> None:
        super().__init__()
        self.branches, self.sizes = nn.ModuleList(branches), sizes

    def forward(self, x: Tensor) -> Tensor:
        pieces = [x] * len(self.branches) if self.sizes is None else x.split(self.sizes, dim=1)
        return torch.cat([branch(pieces[i]) for i, branch in enumerate(self.branches)], 1)


class Affine(nn.Module):
    """x * factor + shift, each a number or a value a channel."""

    def __init__(self, factor: Tensor | float, shift: Tensor | float, spatial: int) -> None:
        super().__init__()
        ones = (1,) * spatial
        for name, value in (("factor", factor), ("shift", shift)):
            if isinstance(value, Tensor):
                self.register_buffer(name, value.reshape(-1, *ones))
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class Function(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[..., Tensor], *args: Any) -> None:
        super().__init__()
        self.function, self.args = function, args

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.args)


class Select(nn.Module):
    """A run of channels, or every second one."""

    def __init__(self, start: int, stop: int, step: int = 1) -> None:
        super().__init__()
        self.cut = slice(start, stop, step)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.cut]


@dataclass(frozen=True)
class Target:
    """What a module is to do to channels and size."""

    into: int
    out: int
    stride: int = 1
    grow: int = 0

    @property
    def keeps(self) -> bool:
        return (self.stride, self.grow) == (1, 0)


class Builder:
    """Draws modules for targets; counts the bits that an exact result needs."""

    def __init__(self, draw: Draw, spatial: int, nonlinear: bool, slices: bool) -> None:
        self.draw, self.spatial, self.nonlinear, self.slices = draw, spatial, nonlinear, slices
        self.entered = False  # a tree of depth 1 and more is no bare leaf
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def integers(self, *shape: int, low: int = -2, high: int = 2) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.random).double()

    def powers(self, *shape: int) -> Tensor:
        signs = torch.randint(0, 2, shape, generator=self.random) * 2 - 1
        return signs * 2.0 ** torch.randint(-1, 2, shape, generator=self.random).double()

    def tree(self, target: Target, depth: int) -> nn.Module:
        kinds = ["leaf"]
        if depth > 0:
            kinds = ["chain", "chain", "sum", "sum", *kinds[: self.entered]]
            self.entered = True
            kinds += ["concat"] if target.out > 1 else []
            kinds += ["split"] if self.slices and target.out > 1 and target.into > 1 else []
        return getattr(self, "_" + self.pick(*kinds))(target, depth - 1)

    def _chain(self, t: Target, depth: int) -> nn.Module:
        first = self.pick(*(s for s in range(1, t.stride + 1) if t.stride % s == 0))
        grow = self.pick(0, 0, 0, -1, 1, 2, -2)
        middle = self.pick(t.into, t.out, 2, 4)
        one = self.tree(Target(t.into, middle, first, t.grow - first * grow), depth)
        return nn.Sequential(one, self.tree(Target(middle, t.out, t.stride // first, grow), depth))

    def _sum(self, t: Target, depth: int) -> nn.Module:
        count = self.pick(2, 2, 3)
        branches = [self.tree(t, depth) for _ in range(count)]
        if t.keeps and t.into == t.out and self.pick(True, False):
            for index in self.pick([0], [1], [0, 1]):
                branches[index] = nn.Identity()
        return Sum(list(branches), [self.pick(1, 1, -1, 2) for _ in branches[1:]])

    def _concat(self, t: Target, depth: int) -> nn.Module:
        cut = self.pick(*range(1, t.out))
        return Concat([self.tree(Target(t.into, n, t.stride, t.grow), depth) for n in (cut, t.out - cut)])

    def _split(self, t: Target, depth: int) -> nn.Module:
        inner, outer = (self.pick(n // 2, *range(1, n)) for n in (t.into, t.out))
        pairs = ((inner, outer), (t.into - inner, t.out - outer))
        branches = [self.tree(Target(a, b, t.stride, t.grow), depth) for a, b in pairs]
        return Concat(branches, [a for a, _ in pairs])

    def _leaf(self, t: Target, depth: int) -> nn.Module:
        kinds = ["conv", "conv", "conv"]
        if t.keeps and t.into == t.out:
            kinds += ["norm", "norm", "scale", "identity", "flip", "shuffle"]
            kinds += ["relu"] if self.nonlinear else []
        if t.keeps and t.out < t.into and self.slices:
            kinds += ["slice", "slice"]
        if t.into == t.out:
            kinds.append("pool")
            kinds += ["pad"] if t.stride == 1 and t.grow > 0 else []
        if t.stride == 1:
            kinds.append("transposed")
        return getattr(self, "_" + self.pick(*kinds))(t)

    def _norm(self, t: Target) -> nn.Module:
        norm = NORMS[self.spatial](t.out, eps=0.0, affine=self.pick(True, True, False)).double()
        with torch.no_grad():
            norm.running_mean.copy_(self.integers(t.out))
            norm.running_var.copy_(self.powers(t.out) ** 2)
            if norm.affine:
                norm.weight.copy_(self.powers(t.out))
                norm.bias.copy_(self.integers(t.out))
        return norm

    def _scale(self, t: Target) -> nn.Module:
        factor = self.pick(1, 2, -1, 0.5, self.powers(t.out))
        return Affine(factor, self.pick(0, 0, 3, self.integers(t.out)), self.spatial)

    def _identity(self, t: Target) -> nn.Module:
        return self.pick(nn.Identity(), DROPOUTS[self.spatial]())

    def _relu(self, t: Target) -> nn.Module:
        return nn.ReLU()

    def _flip(self, t: Target) -> nn.Module:
        return Function(torch.flip, [1])

    def _shuffle(self, t: Target) -> nn.Module:
        return nn.ChannelShuffle(self.pick(*(g for g in range(1, t.into + 1) if t.into % g == 0)))

    def _slice(self, t: Target) -> nn.Module:
        if t.into >= 2 * t.out and self.pick(True, False):
            return Select(0, 2 * t.out, 2)
        start = self.pick(*range(t.into - t.out + 1))
        return Select(start, start + t.out)

    def _pad(self, t: Target) -> nn.Module:
        return self._padding([self._sides(t.grow) for _ in range(self.spatial)])

    def _sides(self, total: int) -> tuple[int, int]:
        low = self.pick(total // 2, *range(total + 1))
        return low, total - low

    def _padding(self, sides: list[tuple[int, int]], values: bool = True) -> nn.Module:
        value = self.pick(0, 0, 2) if values else 0
        return Function(F.pad, [a for pair in sides[::-1] for a in pair], "constant", float(value))

    def _groups(self, t: Target) -> int:
        common = math.gcd(t.into, t.out)
        return int(self.pick(1, *(g for g in range(1, common + 1) if common % g == 0)))

    def _filled(self, layer: nn.Module) -> nn.Module:
        layer.double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(self.integers(*parameter.shape, low=-1, high=2))
        return layer

    def _conv(self, t: Target) -> nn.Module:
        kernel, dilation, sides = [], [], []
        for _ in range(self.spatial):
            fits = [(k, d) for k, d in ((1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (2, 3)) if t.grow + d * (k - 1) >= 0]
            k, d = self.pick(*(fits or [(1 - t.grow, 1)]))
            kernel.append(k)
            dilation.append(d)
            sides.append(self._sides(t.grow + d * (k - 1)))
        fields: dict[str, Any] = {"groups": self._groups(t), "bias": self.pick(True, False)}
        fields |= {"stride": t.stride, "dilation": tuple(dilation)}
        if all(low == high for low, high in sides):
            mode = self.pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
            fields |= {"padding": tuple(low for low, _ in sides), "padding_mode": mode}
            return self._filled(CONVS[self.spatial](t.into, t.out, tuple(kernel), **fields))
        conv = self._filled(CONVS[self.spatial](t.into, t.out, tuple(kernel), **fields))
        return nn.Sequential(self._padding(sides), conv)

    def _transposed(self, t: Target) -> nn.Module:
        fits = [(k, p) for k in range(1, 5) for p in range(3) if k - 1 - 2 * p == t.grow]
        if not fits:
            return self._conv(t)
        k, p = self.pick(*fits)
        fields = {"padding": p, "groups": self._groups(t), "bias": self.pick(True, False)}
        return self._filled(TRANSPOSED[self.spatial](t.into, t.out, k, **fields))

    def _pool(self, t: Target) -> nn.Module:
        sizes = [k for k in (2, 4) if t.grow + k - 1 >= 0]
        if not sizes:
            return self._conv(t)
        size = self.pick(*sizes)
        total = t.grow + size - 1
        pool = POOLS[self.spatial](size, t.stride, total // 2 if total <= size and total % 2 == 0 else 0)
        if pool.padding in (0, (0,)) and total:
            return nn.Sequential(self._padding([self._sides(total)] * self.spatial), pool)
        return pool


def exact_bits(layer: nn.Module) -> float:
    """How many bits a layer may add to what its input needs to be exact, largest number to smallest."""
    if isinstance(layer, nn.Sequential):
        return sum(map(exact_bits, layer))
    if isinstance(layer, (Sum, Concat)):
        return max(map(exact_bits, layer.branches)) + 1.0 + len(layer.branches)
    weight = getattr(layer, "weight", None)
    if isinstance(layer, (*CONVS.values(), *TRANSPOSED.values())):
        rows = weight.detach().abs().flatten(1) if not layer.transposed else weight.detach().abs().reshape(1, -1)
        return math.log2(1.0 + float(rows.sum(1).max())) + 0.5
    return 4.0 if isinstance(layer, (*POOLS.values(), *NORMS.values())) else 2.0 if isinstance(layer, Affine) else 0.0


@st.composite
def models(
    draw: Draw, depth: int = 4, nonlinear: bool = False, slices: bool = True
) -> tuple[nn.Module, tuple[int, int]]:
    """A model in eval mode, and the (channels, spatial dims) of its input."""
    spatial = draw(st.sampled_from((2, 2, 2, 1)))
    builder = Builder(draw, spatial, nonlinear, slices)
    into, out = draw(st.sampled_from((2, 4, 3))), draw(st.sampled_from((4, 2, 6)))
    target = Target(into, out, draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((0, 0, -1, -2, 1))))
    return builder.tree(target, depth).eval(), (into, spatial)
