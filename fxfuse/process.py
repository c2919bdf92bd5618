"""What a process has only one of: the lock around patches of torch, and the modes of the caller, set aside for a while.

Tracing exchanges methods of nn.Module and functions of builtins for everybody, and a graph grows faster without
garbage collection. Two threads that did so at once would each put back what the other had put there.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

LOCK = threading.RLock()  # held by whoever patches torch or builtins, or relies on nobody doing so


@contextmanager
def undisturbed(model: object) -> Iterator[None]:
    """Nobody else's patches, and nothing of the caller's that would change what `model` is seen to do.

    Set aside, and there again afterwards: inference mode (parameters made in it could never be trained), autocast,
    function and dispatch modes, a default device that is none of the model's (as `meta`, on which a tensor that the
    forward makes would be empty), and garbage collection: graphs are all cycles, and walking them while they grow takes
    longer than making them. What stays is what says how the model itself computes: a default device that it is on, the
    default dtype, and fake tensors.
    """
    with LOCK, ExitStack() as stack:
        stack.enter_context(_uncollected())
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        fakes = [mode for mode in stack.enter_context(_disable_current_modes()) if isinstance(mode, FakeTensorMode)]
        devices = [mode for mode in stack.enter_context(_no_function_modes()) if isinstance(mode, DeviceContext)]
        for mode in reversed(fakes):
            stack.enter_context(mode)
        if devices and devices[-1].device.type in _device_types(model):
            stack.enter_context(torch.device(devices[-1].device))
        yield


def _device_types(model: object) -> set[str]:
    if not isinstance(model, nn.Module):
        return set()
    return {tensor.device.type for tensors in (model.parameters(), model.buffers()) for tensor in tensors}


@contextmanager
def _uncollected() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_function_modes() -> Iterator[list[object]]:
    """Without the modes of this thread that see every torch function; yields them, innermost first."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]
    try:
        yield modes
    finally:
        for mode in reversed(modes):
            _push_mode(mode)  # type: ignore[no-untyped-call]
