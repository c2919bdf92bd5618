"""Small models in the forms that people write: a convolution and a batch norm inside each, in somebody's idiom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .entry import Entry, images
from .wrappers import D2FrozenNorm, MMConvModule, d2


def unit(inputs: int = 3, outputs: int = 6, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Chain(nn.Module):
    """Two convolutions with batch norms; `of` wraps each convolution."""

    def __init__(self, of: Callable[[nn.Module], nn.Module] = lambda conv: conv) -> None:
        super().__init__()
        self.first, self.bn1 = of(nn.Conv2d(3, 6, 3, padding=1)), nn.BatchNorm2d(6)
        self.second, self.bn2 = of(nn.Conv2d(6, 4, 1)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.second(F.relu(self.bn1(self.first(x)))))


class FirstOfSelf(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self[3](self[2](F.relu(self[1](self[0](x)))))


class LoopOverList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.ends = unit(), unit(6, 6), {"a": "b"}

    def forward(self, x: Tensor) -> Tensor:
        for m in [self.a, self.b]:
            x = m(x)
        return x


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.parts = nn.ModuleList(unit(2, 2) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        done = []
        for k in self.stem(x).chunk(4, 1):
            done.append(self.parts[len(done)](k))
        return torch.cat(done, 1)


class ReshapeToShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(), unit(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        flat = y.flatten(2).softmax(-1)
        return self.b(flat.reshape(*y.shape))


class ForwardInConstructor(nn.Module):
    def __init__(self, split: bool = False) -> None:
        super().__init__()
        self.a, self.b = unit(), unit(6, 6)
        self.forward = self.forward_split if split else self.forward_x

    def forward_x(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def forward_split(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(half) for half in x.chunk(2, 2)], 2)


class PlainProperties(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = unit(), unit(6, 6)
        self._scales = {"out": 0.5, "names": ("a", "b")}

    @property
    def names(self) -> tuple[str, ...]:
        return self._scales["names"]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def factor(self) -> float:
        return float(self._scales["out"])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.device)
        for name in self.names:
            x = getattr(self, name)(x) * self.factor
        return x


class ConvRNNCell(nn.Module):
    """A convolutional GRU cell whose state may be left out."""

    def __init__(self, inputs: int = 3, hidden: int = 6) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Sequential(nn.Conv2d(inputs + hidden, 2 * hidden, 3, padding=1), nn.BatchNorm2d(2 * hidden))
        self.new = nn.Sequential(nn.Conv2d(inputs + hidden, hidden, 3, padding=1), nn.BatchNorm2d(hidden))

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if h is None:
            h = torch.zeros(x.shape[0], self.hidden, *x.shape[2:], dtype=x.dtype, device=x.device)
        reset, update = self.gates(torch.cat((x, h), 1)).sigmoid().chunk(2, 1)
        new = self.new(torch.cat((x, reset * h), 1)).tanh()
        h = (1 - update) * h + update * new
        return h, h


class ConvRNN(nn.Module):
    """The cell over the frames of a clip [B, T, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = unit(3, 3), ConvRNNCell()

    def forward(self, clip: Tensor) -> Tensor:
        h, outputs = None, []
        for t in range(clip.shape[1]):
            y, h = self.cell(self.stem(clip[:, t]), h)
            outputs.append(y)
        return torch.stack(outputs, 1)


def einops_layers() -> nn.Module:
    from einops.layers.torch import Rearrange, Reduce

    shuffle = Rearrange("b (c two) h w -> b (two c) h w", two=2)
    return nn.Sequential(*unit(3, 8), shuffle, *unit(8, 8), Reduce("b c h w -> b c", "mean"), nn.Linear(8, 3))


class EinopsFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.out = unit(3, 8), unit(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange, reduce, repeat

        y = self.stem(x)
        h, w = y.shape[2:]
        tokens = rearrange(y, "b c h w -> b (h w) c") + repeat(y.mean((2, 3)), "b c -> b n c", n=h * w)
        y = self.mix(rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w))
        return self.out(reduce(y, "b c h w -> b c", "mean"))


def data_parallel() -> nn.Module:
    return nn.DataParallel(Chain())


def distributed() -> nn.Module:
    """DistributedDataParallel in a group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(Chain())


def _small(build: Callable[[], nn.Module], convs: int = 2, needs: str = "", inputs: Any = None) -> Entry:
    return Entry(build, inputs or images(), needs, convs=convs, norms=0)


MODELS: dict[str, Entry] = {
    "parametrizations.weight_norm": _small(lambda: Chain(parametrizations.weight_norm)),
    "parametrizations.spectral_norm": _small(lambda: Chain(parametrizations.spectral_norm)),
    "nn.utils.weight_norm": _small(lambda: Chain(nn.utils.weight_norm)),
    "mmcv's ConvModule": _small(lambda: nn.Sequential(MMConvModule(3, 6), MMConvModule(6, 4))),
    "detectron2's Conv2d": _small(lambda: d2(nn.BatchNorm2d)),
    "detectron2's FrozenBatchNorm2d": _small(lambda: d2(D2FrozenNorm)),
    "einops layers": _small(einops_layers, needs="einops"),
    "einops functions": _small(EinopsFunctions, needs="einops"),
    "self[0](x)": _small(FirstOfSelf),
    "for m in [self.a, self.b]": _small(LoopOverList),
    "for k in x.chunk(4, 1)": _small(Chunks, 5),
    "reshape(*x.shape)": _small(ReshapeToShape),
    "self.forward = self.forward_x": _small(ForwardInConstructor),
    "properties of plain data": _small(PlainProperties),
    "convolutional GRU cell, h=None": _small(ConvRNNCell),
    "convolutional GRU over frames": _small(ConvRNN, 9, inputs=images((2, 3, 3, 10, 12), (1, 3, 3, 9, 7))),
    "DataParallel": _small(data_parallel),
    "DistributedDataParallel": _small(distributed),
}
