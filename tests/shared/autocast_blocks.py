"""Blocks of which torch.autocast lowers one branch or step alone: what they give is float32 in eager, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers import randomize
from safety import model_of
from torch import Tensor, nn

WIDE = 8


def conv(kernel: int = 3, **options: Any) -> nn.Module:
    return nn.Conv2d(WIDE, WIDE, kernel, padding=kernel // 2, **options)


def scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 2, WIDE).view(WIDE, *shape))


def gathered(s: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[torch.arange(x.shape[0])] = s.a(x) * s.g
    return out


def stored(s: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out.index_put_((torch.tensor([1]),), (s.n(s.a(x)) + s.i(x))[:1])
    return out


def norm() -> nn.Module:
    return nn.BatchNorm2d(WIDE)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "identity branch": lambda: model_of(lambda s, x: torch.relu(s.n(s.a(x)) + s.i(x)), a=conv(), n=norm(), i=norm()),
    "two of them": lambda: model_of(
        lambda s, x: s.m(s.b(y := torch.relu(s.n(s.a(x)) + s.i(x)))) + y,
        a=conv(),
        n=norm(),
        i=norm(),
        b=conv(1),
        m=norm(),
    ),
    "learned scale": lambda: model_of(lambda s, x: s.a(x) * s.g, a=conv(1), g=scale(1, 1)),
    "learned shift": lambda: model_of(lambda s, x: torch.tanh(s.a(x) + s.g), a=conv(), g=scale(1, 1)),
    "large shift": lambda: model_of(lambda s, x: s.a(x) + s.g, a=conv(), g=nn.Parameter(100 * scale(1, 1).detach())),
    "scaled, beside x": lambda: model_of(lambda s, x: x + s.a(x) * s.g, a=conv(1), g=scale(1, 1)),
    "scale before a layer": lambda: model_of(lambda s, x: s.a(x * s.g), a=conv(1), g=scale(1, 1)),
    "scale past a shuffle": lambda: model_of(
        lambda s, x: s.h(s.a(x)) * s.g, a=conv(), h=nn.ChannelShuffle(2), g=scale(1, 1)
    ),
    "scale past a pool": lambda: model_of(
        lambda s, x: nn.functional.adaptive_avg_pool2d(s.a(x), 3) * s.g, a=conv(), g=scale(1, 1)
    ),
    "conv, norm": lambda: nn.Sequential(conv(), norm(), nn.ReLU()),
    "concatenated": lambda: model_of(
        lambda s, x: s.b(torch.cat([s.n(x), s.a(x)], 1)), a=conv(1), n=norm(), b=nn.Conv2d(2 * WIDE, 3, 1)
    ),
    "concatenation given": lambda: model_of(
        lambda s, x: torch.cat([s.n(s.a(x)), s.m(s.b(x)) + x], 1), a=conv(1), n=norm(), b=conv(1), m=norm()
    ),
    "plus and minus": lambda: model_of(lambda s, x: s.a(x) - 0.5 * x, a=conv()),
    "gathered by setitem": lambda: model_of(gathered, a=conv(1), g=scale(1, 1)),
    "stored by index_put": lambda: model_of(stored, a=conv(), n=norm(), i=norm()),
    "linear": lambda: model_of(lambda s, x: s.l(x.permute(0, 2, 3, 1)) * s.g, l=nn.Linear(WIDE, WIDE), g=scale()),
    "transposed": lambda: model_of(lambda s, x: s.a(x) * s.g, a=nn.ConvTranspose2d(WIDE, WIDE, 3), g=scale(1, 1)),
    "frame": lambda: model_of(
        lambda s, x: s.b(s.a(x)) * s.g, a=conv(1), b=nn.Conv2d(WIDE, WIDE, 3, padding=1), g=scale(1, 1)
    ),
    "in double": lambda: model_of(lambda s, x: s.a(x.double()) * s.g, a=conv(), g=scale(1, 1)).double(),
}


def block(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return randomize(BLOCKS[name]())


def draws(count: int = 3) -> Iterator[Tensor]:
    for seed in range(count):
        yield torch.randn(2, WIDE, 7 + 2 * seed, 5, generator=torch.Generator().manual_seed(seed))
