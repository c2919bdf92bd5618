"""What the safety tests share: models given by their forward alone, and the comparison with eager."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import assert_untouched, fingerprint, randomize, relative_error
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxfuse
from fxfuse.capture.copying import copied

SHAPES = ((2, 4, 8, 7), (3, 4, 6, 9))
Draw = Callable[[tuple[int, ...], torch.Generator], Any]


def model_of(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with this forward; tensors among the parts become buffers."""
    cls = type("Model", (nn.Module,), {"forward": forward})
    model: nn.Module = cls()
    for name, value in parts.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            model.register_buffer(name, value)
        else:
            setattr(model, name, value)
    return model


def usual(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """A module with a 3x3 convolution `a`, a 1x1 convolution `p` and batch norms `b` and `n`, in float64."""
    layers = {"a": nn.Conv2d(4, 4, 3, padding=1), "p": nn.Conv2d(4, 4, 1), "b": nn.BatchNorm2d(4)}
    layers["n"] = nn.BatchNorm2d(4)
    return randomize(model_of(forward, **(layers | parts))).double()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def agrees(
    model: nn.Module,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    draw: Draw = normal,
    tolerance: float = 1e-12,
    examples: Any = None,
    fires: bool | None = None,
    refused: str = "",
    reseed: Callable[[int], Any] = torch.manual_seed,
    capture: str | None = None,
) -> Any:
    """The optimized model does what eager does, call after call, and the model stays as it was.

    Outputs (values, shapes, dtypes, strides, requires_grad, sharing of memory with the inputs), what is
    written to the inputs, errors, and the random numbers drawn are compared, with and without gradients,
    for the result itself and for a deep copy of it. `reseed` runs before every call.
    """
    model.eval()
    before, state = fingerprint(model), torch.get_rng_state()
    fused = fxfuse.optimize(model, examples, capture=capture)
    assert torch.equal(state, torch.get_rng_state())
    report = fxfuse.report(fused)
    if fires is not None:
        assert bool(report.fired) == fires, report
    if refused:
        assert any(refused in r.reason for r in report.refused), report
    for candidate in (copied(fused), fused):
        truth = copied(model)
        for number, shape in enumerate((*shapes, *shapes)):
            inputs = draw(shape, torch.Generator().manual_seed(number))
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            with torch.set_grad_enabled(number >= len(shapes)):
                _same_call(truth, candidate, inputs, tolerance, reseed)
        assert_untouched(model, before)
    return fused


def _same_call(truth: nn.Module, candidate: nn.Module, inputs: tuple[Any, ...], tolerance: float, reseed: Any) -> None:
    ours, theirs = copy.deepcopy(inputs), copy.deepcopy(inputs)
    want, got = _call(truth, theirs, reseed), _call(candidate, ours, reseed)
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert isinstance(want, Exception) and isinstance(got, Exception), (want, got)
        return
    assert type(got) is type(want)
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), b.requires_grad)
        assert relative_error(a, b) <= tolerance
        assert [_shares(a, x) for x in tree_leaves(ours)] == [_shares(b, x) for x in tree_leaves(theirs)]
    assert relative_error(ours, theirs) <= tolerance  # what the model wrote to its inputs


def _call(model: nn.Module, inputs: tuple[Any, ...], reseed: Any) -> Any:
    torch.manual_seed(0)
    reseed(0)
    try:
        return model(*inputs)
    except Exception as error:
        return error


def _shares(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))
