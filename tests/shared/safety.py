"""What the safety tests share: models given by their forward alone, and the comparison with eager."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from exactly import SEED, Step, as_call, holds, reported
from helpers import randomize
from torch import Tensor, nn

import fxfuse
from fxfuse.algebra.chain import product

SHAPES = ((2, 4, 8, 7), (3, 4, 6, 9))
Draw = Callable[[tuple[int, ...], torch.Generator], Any]


class Careless(fxfuse.Pattern):
    """Wrong on purpose: it forgets the padding between."""

    name = "careless"
    law = "conv -> conv => conv, borders forgotten"
    always = True

    def matches(self, relation: str, f: fxfuse.Operator, g: fxfuse.Operator) -> bool:
        return f.weighted and g.weighted

    def rewrite(self, relation: str, f: fxfuse.Operator, g: fxfuse.Operator) -> fxfuse.Operator:
        return product(f, g)


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
    reseed: Callable[[int], Any] = SEED,
    capture: str | None = None,
    without: Mapping[str, str] | None = None,
) -> Any:
    """`exactly` on inputs drawn anew for every call, of each shape twice: without gradients, then with them.

    Errors are outcomes too, and so are the random numbers drawn; `reseed` runs before every call.
    """
    model.eval()
    drawn = [draw(shape, torch.Generator().manual_seed(i)) for i, shape in enumerate((*shapes, *shapes))]
    steps = [Step(as_call(x), i >= len(shapes)) for i, x in enumerate(drawn)]
    options: dict[str, Any] = {"reseed": reseed, "errors": True, "capture": capture, "without": without}
    fused = holds(model, steps, examples, tolerance=tolerance, **options)
    reported(fxfuse.report(fused), fires, refused or ())
    return fused


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))
