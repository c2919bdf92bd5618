"""The call of a plain layer of torch.nn as a function of its tensors, which holds none of them.

So `self.gate(self.table)` is a constant like `torch.sigmoid(self.table)`: it can be hashed, pickled, and run on others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxfuse.algebra.constants import freeze, thaw
from fxfuse.ops.modules import DROPOUTS, runs

_OWN = {*nn.Module().__dict__} - {"training"}  # what every module has, and none of torch.nn's forwards reads
_DRAWS = (nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)  # in eval mode too


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A layer of class `cls` with plain attributes `config` and tensors by the names in `state`, called."""

    cls: type[nn.Module]
    config: tuple[tuple[str, Any], ...]
    state: tuple[str, ...]

    @property
    def __name__(self) -> str:
        return self.cls.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output for some inputs; the tensors of the layer come first, in the order of `state`."""
        layer: Any = self.cls.__new__(self.cls)
        nn.Module.__init__(layer)
        layer.__dict__.update({name: thaw(value, lambda known: known) for name, value in self.config})
        count = len(self.state)
        layer._buffers.update(zip(self.state, args[:count], strict=True))
        return layer.forward(*args[count:], **kwargs)


def layer_call(module: nn.Module) -> LayerCall | None:
    """What a call of `module` does; None where that is more than a function of its tensors and inputs.

    Random layers are none, nor is one in training, whose statistics a call may change, or draw.
    """
    cls = runs(module)
    plain = cls is not None and cls.__module__.startswith("torch.nn.modules.")
    if cls is None or not plain or issubclass(cls, _DRAWS) or any(module.children()):
        return None
    if getattr(module, "max_norm", None) is not None:
        return None  # an embedding that renormalizes its rows
    if module.training and (issubclass(cls, (*DROPOUTS, nn.RReLU)) or any(True for _ in module.buffers())):
        return None
    tables: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    state = tuple(name for name, tensor in tables.items() if tensor is not None)
    rest: dict[str, Any] = {name: None for name, tensor in tables.items() if tensor is None}
    rest |= {name: value for name, value in vars(module).items() if name not in _OWN}
    if any(isinstance(value, Tensor) for value in tree_leaves(rest)):
        return None  # beside its parameters and buffers
    return LayerCall(cls, tuple((name, freeze(value)) for name, value in rest.items()), state)
