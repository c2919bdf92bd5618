"""Layers of real models, by the rewrite that is about them, for `rewrites.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.blocks.acnet import ACBlock
from examples.blocks.dbb import DBB
from examples.blocks.dynamic_conv import DynamicConvBNReLU
from examples.blocks.repvgg import RepVGGBlock

FOLD = ("conv_bn", "constant_weight")
MERGE = (*FOLD, "parallel_conv!", "identity", "conv_chain", "avg_pool")


@dataclass(frozen=True)
class Case:
    """A model, its input's shape, the pattern in question, and the patterns without and with it; else all others."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    pattern: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = field(default=())

    @property
    def patterns(self) -> tuple[list[str], list[str]]:
        before = list(self.before) or [f"-{self.pattern}", "-avg_pool"]
        after = list(self.after) or [f"{self.pattern}!", *(["-avg_pool"] if not self.before else self.before)]
        return before, after


class Net(nn.Module):
    """Layers by name, and what runs them."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Branches(nn.Module):
    """Convolutions of one input, an activation after each, and a layer that reads each."""

    def __init__(self, width: int, outputs: tuple[int, ...], kernel: int = 1, stride: int = 1, after: int = 1) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(width, n, kernel, stride, kernel // 2) for n in outputs)
        self.after = nn.ModuleList(nn.Conv2d(n, 32, after, padding=after // 2) for n in outputs)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.first, self.after, strict=True)
        return torch.cat([after(F.relu(first(x), inplace=True)) for first, after in pairs], 1)


class Attention(nn.Module):
    """Linear layers for query, key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return out


class Branched(nn.Module):
    """`branches` conv-BN of one kernel, one of another, and a BN, summed: MobileOne's and RepLKNet's layers."""

    def __init__(self, width: int, kernel: int, branches: int, small: int, identity: bool = True) -> None:
        super().__init__()
        sizes = [kernel] * branches + [small]
        self.layers = nn.ModuleList(_conv_bn(width, width, k, groups=width) for k in sizes)
        self.identity = nn.BatchNorm2d(width) if identity else None

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x) for layer in self.layers] + ([] if self.identity is None else [self.identity(x)])
        return F.relu(sum(parts[1:], parts[0]))


def _conv_bn(width: int, outputs: int, kernel: int, **kwargs: Any) -> nn.Sequential:
    conv = nn.Conv2d(width, outputs, kernel, padding=kernel // 2, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *layers, nn.ReLU())


def _build(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(make(*args, **kwargs))


def parallel_conv() -> Iterator[Case]:
    """Branches that are summed, as one layer."""
    for width, size in ((48, 56), (192, 14)):
        shape = (1, width, size, size)
        for name, block in (("RepVGG", RepVGGBlock), ("ACNet", ACBlock), ("DBB", DBB)):
            model = _build(block, width, width)
            yield Case(f"{name} {width} at {size}x{size}", model, shape, "parallel_conv", FOLD, MERGE)
        for count in (1, 4):
            model = _build(Branched, width, 3, count, 1)
            name = f"MobileOne depthwise, {count} + 1 + BN, {width} at {size}x{size}"
            yield Case(name, model, shape, "parallel_conv", FOLD, MERGE)
    model = _build(Branched, 128, 13, 1, 5, identity=False)
    yield Case("depthwise 13x13 + 5x5, 128 at 28x28", model, (1, 128, 28, 28), "parallel_conv", FOLD, MERGE)


def identity() -> Iterator[Case]:
    """The input added to a layer of it: W + I."""
    for width, size in ((48, 56), (192, 14)):
        model = _build(Net, lambda s, x: F.relu(x + s.conv(x)), conv=nn.Conv2d(width, width, 3, padding=1))
        yield Case(f"x + 3x3, {width} at {size}x{size}", model, (1, width, size, size), "identity", FOLD)


def conv_chain() -> Iterator[Case]:
    """Two layers in a row as one."""
    for part in (1.0, 0.75, 0.5):
        for width, size in ((64, 56), (256, 14)):
            middle = round(part * width)
            layers = nn.Conv2d(width, middle, 1, bias=False), nn.Conv2d(middle, width, 3, padding=1)
            name = f"1x1 -> 3x3, middle {part:.2f}, {width} at {size}x{size}"
            yield Case(name, _build(_pooled, *layers), (1, width, size, size), "conv_chain", FOLD)
    layers = nn.Conv2d(64, 64, 1, bias=False), nn.Conv2d(64, 64, 3, padding=1, groups=64)
    yield Case(
        "blueprint: 1x1 -> depthwise, 64 at 28x28", _build(_pooled, *layers), (1, 64, 28, 28), "conv_chain", FOLD
    )
    layers = nn.Conv2d(64, 64, (3, 1), padding=(1, 0)), nn.Conv2d(64, 64, (1, 3))
    yield Case("3x1 -> 1x3, 64 at 28x28", _build(_pooled, *layers), (1, 64, 28, 28), "conv_chain", FOLD)


def concat() -> Iterator[Case]:
    """Layers side by side as one."""

    def run(s: Any, x: Tensor) -> Tensor:
        return F.relu(torch.cat([s.a(x), s.b(x)], 1))

    for first, second in ((3, 3), (1, 1), (1, 3)):
        for width, size in ((64, 56), (256, 14)):
            a, b = (nn.Conv2d(width, width // 2, k, padding=k // 2) for k in (first, second))
            name = f"{first}x{first}, {second}x{second} -> cat, {width} at {size}x{size}"
            yield Case(name, _build(Net, run, a=a, b=b), (1, width, size, size), "concat", FOLD)


def avg_pool() -> Iterator[Case]:
    """A layer and a pool as one layer with the pool's stride."""
    for width, size in ((64, 56), (256, 14)):
        model = _build(_pooled, nn.Conv2d(width, width, 3, padding=1), nn.AvgPool2d(2))
        yield Case(f"3x3 -> pool 2, {width} at {size}x{size}", model, (1, width, size, size), "avg_pool", FOLD)


def border() -> Iterator[Case]:
    """A biased 1x1 before a padded 3x3, as one layer and a frame."""
    for width, size in ((64, 56), (128, 28), (256, 14)):
        layers = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        after = (*FOLD, "conv_chain", "border!")
        model, shape = _build(_pooled, *layers), (1, width, size, size)
        yield Case(f"biased 1x1 -> 3x3, {width} at {size}x{size}", model, shape, "border", (*FOLD, "conv_chain"), after)
    model = _build(_pooled, nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, padding=1))
    after = (*FOLD, "conv_chain", "border!")
    yield Case("BN -> padded 3x3, 64 at 56x56", model, (1, 64, 56, 56), "border", (*FOLD, "conv_chain"), after)


def conv_bn() -> Iterator[Case]:
    """Batch norms and layer scales into the layer before them."""
    model = _build(_pooled, *_conv_bn(64, 64, 3))
    yield Case("3x3 -> BN, 64 at 56x56", model, (1, 64, 56, 56), "conv_bn", ("-conv_bn",), ("conv_bn",))
    scaled = Net(lambda s, x: x + s.scale * s.conv(x), conv=nn.Conv2d(96, 96, 1))
    scaled.register_parameter("scale", nn.Parameter(torch.ones(96, 1, 1)))
    yield Case(
        "1x1 -> LayerScale, 96 at 56x56", lambda: scaled, (1, 96, 56, 56), "conv_bn", ("-conv_bn",), ("conv_bn",)
    )


def runtime_weight() -> Iterator[Case]:
    """A batch norm after a dynamic convolution, into its kernels."""
    for width, size in ((64, 56), (256, 14)):
        model, shape = _build(DynamicConvBNReLU, width, width, bias=True), (1, width, size, size)
        yield Case(f"dynamic 3x3 -> BN, {width} at {size}x{size}", model, shape, "runtime_weight", FOLD)


def siblings() -> Iterator[Case]:
    """Layers of one tensor as one wide layer."""
    inception = {"Inception 35x35": (192, (64, 48, 64), 35), "Inception 17x17": (768, (192, 128, 128), 17)}
    inception |= {"Inception 8x8": (2048, (320, 384, 448), 8), "GoogLeNet 28x28": (192, (64, 96, 16), 28)}
    for name, (width, outputs, size) in inception.items():
        for batch in (1, 8):
            model = _build(Branches, width, outputs, after=3 if size == 35 else 1)
            yield Case(f"{name}, 1x1, batch {batch}", model, (batch, width, size, size), "siblings")
    yield Case("ResNet stage 1, 1x1", _build(Branches, 64, (64, 256)), (1, 64, 56, 56), "siblings")
    yield Case("ResNet stage 2, 1x1, stride 2", _build(Branches, 256, (128, 512), 1, 2), (1, 256, 56, 56), "siblings")
    yield Case("two 1x1 at 112x112", _build(Branches, 64, (16, 16)), (1, 64, 112, 112), "siblings")
    yield Case("two 3x3 at 56x56", _build(Branches, 64, (64, 64), 3), (1, 64, 56, 56), "siblings")
    yield Case("two 3x3 at 14x14", _build(Branches, 256, (256, 256), 3), (1, 256, 14, 14), "siblings")
    yield Case("q, k, v of 192", _build(Attention, 192), (1, 196, 192), "siblings")
    yield Case("q, k, v of 768", _build(Attention, 768), (1, 197, 768), "siblings")


def pool_swap() -> Iterator[Case]:
    """A pool and a pointwise layer in the other order."""
    for width, outputs, size in ((192, 32, 35), (768, 192, 17), (2048, 192, 8)):
        model = _build(_pooled, nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, outputs, 1))
        yield Case(f"Inception {size}x{size}", model, (1, width, size, size), "pool_swap")
    model = _build(_pooled, nn.Conv2d(256, 128, 1), nn.AvgPool2d(2))
    yield Case("DenseNet transition 56x56", model, (1, 256, 56, 56), "pool_swap")


_ALL = (conv_bn, parallel_conv, identity, conv_chain, concat, avg_pool, border, runtime_weight, siblings, pool_swap)
REWRITES: dict[str, Callable[[], Iterator[Case]]] = {f.__name__: f for f in _ALL}
