"""What a model executes in one call, seen by PyTorch's dispatcher: nothing here asks fxfuse or reads a graph.

Counted are convolutions, linear layers, batch norms in eval mode and multiply-accumulates. Each such batch norm
is listed by the module that owns its statistics, with the convolution or linear layer that its input comes straight
from, through nothing but views and copies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution, aten._convolution, aten.convolution_overrideable}
LINEARS = {aten.linear, aten.addmm, aten.mm}
# running_mean's and training's place among the arguments; None where the operator has no training
NORMS: dict[Any, tuple[int, int | None]] = {
    aten.batch_norm: (3, 5),
    aten.native_batch_norm: (3, 5),
    aten._native_batch_norm_legit: (3, 5),
    aten._native_batch_norm_legit_no_training: (3, None),
    aten.cudnn_batch_norm: (3, 5),
    aten.miopen_batch_norm: (3, 5),
    aten._batch_norm_no_update: (3, None),
}
MOVES = {
    getattr(aten, name)
    for name in (
        "view _unsafe_view reshape _reshape_alias permute transpose t squeeze unsqueeze flatten clone contiguous "
        "_to_copy alias detach"
    ).split()
}


class Layer(NamedTuple):
    """One executed layer: what it is, and the path of the module that owns its weight ("" if computed)."""

    kind: str
    path: str


class Executed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered.

    Attributes:
        convs, linears, macs: totals. A matrix product is linear where its second factor is a parameter.
        left: (layer or None, norm) for each batch norm and the convolution or linear layer it directly follows.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self.owners = {_address(t): name.rpartition(".")[0] or name for name, t in tensors}
        self.convs = self.linears = self.macs = 0
        self.left: list[tuple[Layer | None, Layer]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in flop_registry:
            self.macs += flop_registry[operator](*args, **(kwargs or {}), out_val=out) // 2
        made = self._layer(operator, args)
        if operator in NORMS:
            made = self._norm(*NORMS[operator], args)
        elif operator in MOVES:
            made = getattr(args[0], "made_by", None)
        result = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(result, Tensor):
            result.made_by = made  # type: ignore[attr-defined]
        return out

    def _layer(self, operator: Any, args: tuple[Any, ...]) -> Layer | None:
        if operator in CONVOLUTIONS:
            self.convs += 1
            return Layer("conv", self.owners.get(_address(args[1]), ""))
        if operator in LINEARS and len(args) > 1:
            owner = self.owners.get(_address(args[2 if operator is aten.addmm else 1]))
            if owner is not None:
                self.linears += 1
                return Layer("linear", owner)
        return None

    def _norm(self, mean: int, training: int | None, args: tuple[Any, ...]) -> Layer | None:
        if args[mean] is None or (training is not None and args[training]):
            return None
        norm = Layer("batch_norm", self.owners.get(_address(args[mean]), ""))
        before = getattr(args[0], "made_by", None)
        self.left.append((None if before is None or before.kind == "batch_norm" else before, norm))
        return norm

    def sizes(self) -> dict[str, int]:
        return {"convs": self.convs, "linears": self.linears, "norms": len(self.left), "macs": self.macs}


def _address(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's elements lie: the same for every view of all of it."""
    return tensor.data_ptr(), tensor.numel()


def called(model: nn.Module, args: Any, mode: Executed | None = None) -> Any:
    """What a model gives, without gradients and with the same random numbers every time; `mode` watches."""
    torch.manual_seed(0)
    with torch.no_grad():
        if mode is None:
            return model(*args)
        with mode:
            return model(*args)
