"""What random models are written with: integer weights, layers that are more than their class, hooks.

`from fuzz_parts import *` makes the code that the fuzz prints run as it stands.
"""

from __future__ import annotations

import copy
import operator
from collections import namedtuple
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

__all__ = [
    "Behind", "Centred", "F", "MethodType", "Pair", "Stacked", "Tensor", "Tripled", "TripledLinear", "TripledNorm",
    "const", "doubled", "fill", "hooked", "in_replaced", "in_written", "looks", "masked", "nn", "normed", "operator",
    "out_doubled", "out_written", "own_forward", "power", "tied", "torch",
]  # fmt: skip

Pair = namedtuple("Pair", "first second")


def const(seed: int, *shape: int) -> Tensor:
    """Integers from -2 to 2, none of them 0, in float64."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 3, shape, generator=random) * (torch.randint(0, 2, shape, generator=random) * 2 - 1)
    return values.double()


def power(seed: int, *shape: int) -> Tensor:
    """Powers of two of both signs in float64: to divide by them is exact."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=random) * 2 - 1
    return signs * 2.0 ** torch.randint(-1, 2, shape, generator=random).double()


def fill(module: Any, seed: int) -> Any:
    """The module in float64 with small integers as weights and batch norms that divide by powers of two."""
    module.double()
    with torch.no_grad():
        for part in module.modules():
            seed += 101
            for index, parameter in enumerate(part.parameters(recurse=False)):
                parameter.copy_(const(seed + index, *parameter.shape))
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eps = 1.0
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.copy_(const(seed + 5, *part.running_mean.shape))
                    part.running_var.copy_((power(seed + 6, *part.running_var.shape) * 2) ** 2 - 1)
                if part.affine:
                    part.weight.copy_(power(seed + 7, *part.weight.shape))
    return module


class Tripled(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Centred(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.sum((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class TripledNorm(nn.BatchNorm2d):
    """A batch norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class TripledLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class Behind(nn.Module):
    """Gives back its input, after it has written it if asked to."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.writes else x


class Stacked(nn.Module):
    """The layers one after the other, and the value after each of them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def doubled(module: Any) -> Any:
    """The weight parametrized as twice another."""
    parametrize.register_parametrization(module, "weight", _Twice())
    return module


def masked(module: Any, seed: int) -> Any:
    """The weight pruned."""
    prune.custom_from_mask(module, "weight", const(seed, *module.weight.shape) > 0)
    return module


def normed(module: Any) -> Any:
    """The weight normalized."""
    return parametrizations.weight_norm(module)


def tied(module: Any) -> Any:
    """Another module with the same weight."""
    other = copy.deepcopy(module)
    other.weight = module.weight
    return other


def out_doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def out_written(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data.mul_(2)


def looks(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that changes nothing."""


def in_replaced(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


def in_written(module: nn.Module, args: Any) -> None:
    args[0].data.add_(1)


def hooked(module: Any, hook: Callable[..., Any]) -> Any:
    """The module with a hook: before its forward for `in_...`, else after it."""
    if hook.__name__.startswith("in_"):
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    return module


def own_forward(module: Any) -> Any:
    """The module with another forward on the instance."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return type(self).forward(self, x) * 3

    module.forward = MethodType(forward, module)
    return module
