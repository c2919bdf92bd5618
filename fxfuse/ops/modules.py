"""The layer classes of torch.nn that fxfuse can read, and which of them a module behaves as."""

from __future__ import annotations

from torch import nn

from fxfuse.framed import FRAMED

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
CONVS: dict[type[nn.Module], int] = {
    **{layer: spatial for spatial, layer in FRAMED.items()},
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PADS = {
    getattr(nn, f"{name}Pad{d}d"): mode
    for d in (1, 2, 3)
    for name, mode in (
        ("Constant", "constant"),
        ("Zero", "constant"),
        ("Reflection", "reflect"),
        ("Replication", "replicate"),
        ("Circular", "circular"),
    )
}
TYPES = (*CONVS, *NORMS, *POOLS, *DROPOUTS, *PADS, nn.Linear, nn.Identity, nn.ChannelShuffle)
_FORWARDS = {t: t.forward for t in TYPES}
# What a subclass may define and still compute what its base does.
_HARMLESS = set(
    "__init__ __module__ __doc__ __annotations__ __dict__ __weakref__ __repr__ __constants__ __parameters__ "
    "__static_attributes__ __firstlineno__ __annotate__ __annotate_func__ __hash__ __abstractmethods__ _abc_impl "
    "extra_repr reset_parameters reset_running_stats _get_name".split()
)
_STATE = set("weight bias running_mean running_var".split())


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose computation `module` does: its own, or one it extends by nothing that counts."""
    own = set[str]()
    for cls in type(module).__mro__:
        if cls in _FORWARDS:
            counts = (set(dir(cls)) | _STATE | set(module.__dict__)) - _HARMLESS
            return None if own & counts else cls
        own |= set(vars(cls))
    return None


def replaced_forward(cls: type[nn.Module]) -> bool:
    """Whether somebody put another forward on a class of torch.nn itself."""
    return cls.forward is not _FORWARDS[cls]
