"""The compiler below: an optimized graph is handed to inductor or to any other Dynamo backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

Runner = Callable[..., Any]


def compiled(gm: GraphModule, inputs: Sequence[Any], inner: Any, options: dict[str, Any], baked: bool) -> Runner:
    """`gm` compiled for `inputs`; `baked` says that its attributes never change, so that they may be packed."""
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = {"freezing": baked and not _crashes(gm), **options}
        run: Any = compile_fx(gm, list(inputs), config_patches=patches)
        return run  # type: ignore[no-any-return]
    backend: Any = torch._dynamo.lookup_backend(inner)
    return backend(gm, list(inputs), **({"options": options} if options else {}))  # type: ignore[no-any-return]


def _crashes(gm: GraphModule) -> bool:
    """Whether inductor's freezing would crash: on the CPU it packs convolutions of float64, which oneDNN lacks."""
    tensors: list[Tensor] = [*gm.parameters(), *gm.buffers()]
    return any(t.device.type == "cpu" and t.dtype is torch.float64 and t.dim() > 2 for t in tensors)


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for one of torch.compile's modes.

    Raises:
        ValueError: an unknown mode; the message lists the known ones.
    """
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(known)}")
    return dict(known[mode])
