"""Models whose forward stays Python, for the tests of what is taken out of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from helpers import randomize
from safety import model_of
from torch import Tensor, nn


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


def count_norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
