"""What every random source begins and ends with, and the language that its idioms are written in.

An idiom is a few lines of a forward that make another `x` of `x`, a batch of images of four channels, and keep its
size. Lines after `@init`, `@methods`, `@class` and `@top` go to the constructor, beside the forward, into the class
and before it; `@forward` goes back. `$` is a number of its own, so that no two idioms share a name; `<<a||b>>` is a
choice, also over several lines; `P1` is an attribute that holds a layer or a whole block, `L1` one that holds
`conv_bn(4, 4)`, `M1` the call that makes a layer or block, `CLS` the class. `@arg name=default ; value ; value` is an
argument of the forward, `@out` a tensor that may be returned. `# in float32` beside a line says that it rounds.
"""

PRELUDE = """\
import collections
import functools
import itertools
import math
import types
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

DTYPE = torch.float32


def data(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def given(*args, **kwargs):
    return args, kwargs


def conv_bn(i, o, k=3):
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2), nn.BatchNorm2d(o))


class ConvBN(nn.Module):
    def __init__(self, i, o, act=None):
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.act = act or nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Branches(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dense, self.point, self.skip = conv_bn(c, c), conv_bn(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.skip(x))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor
"""

LAYERS = (
    *("conv_bn(4, 4)",) * 3,
    "conv_bn(4, 4, 1)",
    "ConvBN(4, 4)",
    "ConvBN(4, 4, nn.ReLU())",
    "nn.Sequential(conv_bn(4, 8, 1), nn.ReLU(), conv_bn(8, 4))",
    "nn.Sequential(*conv_bn(4, 6), nn.Conv2d(6, 4, 1))",
    "nn.Sequential(*conv_bn(4, 4), nn.ReLU())",
    "Branches(4)",
)

RESULTS = (
    *("x",) * 5,
    "(x, OUT)",
    "[x, OUT]",
    "Pair(x, OUT)",
    '{"out": x, "aux": OUT}',
    "(x, None)",
    "(x, x)",
    '(x, (OUT, None, 2), [{"x": x}])',
    "collections.OrderedDict(a=x, b=[OUT])",
    "(x, x.shape[-1])",
    "(inp, x)",
)
