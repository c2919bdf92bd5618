"""The wrappers of mmcv and detectron2 around convolutions and batch norms, as their code has them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MMConv(nn.Conv2d):
    """mmcv.cnn.bricks.wrappers.Conv2d: empty batches were an error in old versions of torch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0 and tuple(map(int, torch.__version__.split(".")[:2])) <= (1, 4):
            return x.new_empty(x.shape[0], self.out_channels, 1, 1)
        return super().forward(x)


class MMConvModule(nn.Module):
    """mmcv.cnn.ConvModule: the norm is found by its name, the order of the three is a tuple of words."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.conv = MMConv(inputs, outputs, 3, padding=1, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(outputs))
        self.with_norm = self.with_activation = True
        self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self) -> nn.Module | None:
        return getattr(self, self.norm_name) if self.norm_name else None

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class D2Conv(nn.Conv2d):
    """detectron2.layers.Conv2d."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        norm, activation = kwargs.pop("norm", None), kwargs.pop("activation", None)
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training:
                    assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class D2FrozenNorm(nn.Module):
    """detectron2.layers.FrozenBatchNorm2d."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def d2(norm: Callable[[int], nn.Module]) -> nn.Module:
    conv = D2Conv(3, 6, 3, padding=1, bias=False, norm=norm(6), activation=F.relu)
    return nn.Sequential(conv, D2Conv(6, 4, 1, norm=norm(4)))
