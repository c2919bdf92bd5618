"""What a call of a module does: the classes that fxfuse can read, and whether one of them is all that runs.

A hook, a forward or method put on the module or on its class, a compiled call: with any of them a module is not what
its class says, and nobody may believe it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxfuse.framed import FRAMED
from fxfuse.ops.deformable import is_deformable

Modules = Mapping[str, nn.Module]  # by their paths
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONVS: dict[type[nn.Module], int] = {
    **{layer: spatial for spatial, layer in FRAMED.items()},
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MODES = {"Constant": "constant", "Zero": "constant", "Reflection": "reflect", "Replication": "replicate"}
_MODES |= {"Circular": "circular"}
PADS = {getattr(nn, f"{name}Pad{d}d"): mode for name, mode in _MODES.items() for d in (1, 2, 3)}
TYPES = (*CONVS, *NORMS, *POOLS, *DROPOUTS, *PADS, nn.Linear, nn.Identity, nn.ChannelShuffle)
# What a subclass may define and still compute what its base does.
_HARMLESS = set(
    "__init__ __module__ __doc__ __annotations__ __dict__ __weakref__ __repr__ __constants__ __parameters__ "
    "__static_attributes__ __firstlineno__ __annotate__ __annotate_func__ __hash__ __abstractmethods__ _abc_impl "
    "extra_repr reset_parameters reset_running_stats _get_name".split()
)
_STATE = set("weight bias running_mean running_var".split())


def _methods(cls: type[nn.Module]) -> dict[str, Any]:
    """What a class of torch.nn defines, with its bases below `nn.Module`, as far as a call may run it."""
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    kinds = (property, staticmethod, classmethod)
    found = {n: v for base in reversed(bases) for n, v in vars(base).items() if callable(v) or isinstance(v, kinds)}
    return {n: v for n, v in found.items() if n not in _HARMLESS}


_CLASSES = [c for c in vars(nn).values() if inspect.isclass(c) and c.__module__.startswith("torch.nn.modules.")]
_METHODS = {c: _methods(c) for c in (*_CLASSES, *FRAMED.values()) if issubclass(c, nn.Module)}  # as PyTorch has them


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The layer that `module` is: its own class, or one it extends by nothing that counts."""
    if is_deformable(module):
        return type(module)
    own = set[str]()
    for cls in type(module).__mro__:
        if cls in TYPES:
            counts = (set(dir(cls)) | _STATE | set(module.__dict__)) - _HARMLESS
            return None if own & counts else cls
        own |= set(vars(cls))
    return None


def changed(module: nn.Module, cls: type[nn.Module]) -> str:
    """What a call of `module` runs beside the forward of `cls`, in words; "" for nothing."""
    if has_hooks(module):
        return "the module has hooks"
    methods = _METHODS.get(cls, {})
    own = any(module.__dict__.get(n) is not None for n in ("forward", "_call_impl", "_compiled_call_impl", *methods))
    return "the module's forward was replaced" if own or (methods and _methods(cls) != methods) else ""


def runs(module: nn.Module) -> type[nn.Module] | None:
    """The class, of torch.nn or a layer like one, whose forward is all that a call of `module` runs, or None."""
    cls = type(module) if type(module) in _METHODS else layer_type(module)
    return None if cls is None or changed(module, cls) else cls
