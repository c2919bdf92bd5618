"""The compiler below: an optimized graph is handed to inductor or to any other Dynamo backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from fxfuse.compiling.options import CompileOptions

Runner = Callable[..., Any]


def compiled(
    gm: GraphModule, inputs: Sequence[Any], options: CompileOptions, mode: FakeTensorMode | None, baked: bool = False
) -> Runner:
    """`gm` compiled for `inputs`; `baked` says that its attributes never change, so that they may be packed.

    While Dynamo compiles, its own context stands. Later on `mode` is that of the fake tensors among `inputs`, and
    there is a new context about them.
    """
    with contextlib.nullcontext() if mode is None else tracing(TracingContext(mode)):
        if options.inner == "inductor":
            from torch._inductor.compile_fx import compile_fx

            patches = {"freezing": baked and not _crashes(gm), **(options.inner_options or {})}
            run: Any = compile_fx(gm, list(inputs), config_patches=patches)
            return run  # type: ignore[no-any-return]
        backend: Any = torch._dynamo.lookup_backend(options.inner)
        more = {"options": options.inner_options} if options.inner_options else {}
        return backend(gm, list(inputs), **more)  # type: ignore[no-any-return]


def _crashes(gm: GraphModule) -> bool:
    """Whether inductor's freezing would crash: on the CPU it packs convolutions of float64, which oneDNN lacks."""
    tensors: list[Tensor] = [*gm.parameters(), *gm.buffers()]
    return any(t.device.type == "cpu" and t.dtype is torch.float64 and t.dim() > 2 for t in tensors)
