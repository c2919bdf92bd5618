"""What other fusers get silently wrong. Beside each model stands a naive fold of it, shown to be wrong there.

A naive fold does to a copy of the model what its author would have done without the one thought that the
case needs; were it right, the case would prove nothing about fxfuse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize, relative_error
from safety import agrees, model_of, normal
from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]
IMAGES: Shapes = ((2, 4, 6, 4), (3, 4, 5, 4))


@dataclass(frozen=True)
class Case:
    """A model, the naive fold of a copy of it, inputs, and whether fxfuse merges it or says why not."""

    build: Callable[[], Any]
    naive: Callable[[Any], Any]
    fires: bool
    refused: str = ""
    shapes: Shapes = IMAGES
    examples: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12


def constant(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layers(forward: Callable[..., Any], **parts: Any) -> Any:
    return randomize(model_of(forward, **parts)).double()


def fold_norm(conv: Any, norm: Any, axis: int = 0) -> None:
    """Batch norm into the weight along `axis`, the norm emptied: right for an ordinary convolution's axis 0."""
    with torch.no_grad():
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shape = [1] * conv.weight.dim()
        shape[axis] = -1
        conv.weight.mul_(scale.reshape(shape))
        conv.bias.copy_((conv.bias - norm.running_mean) * scale + norm.bias)
    norm.forward = lambda x: x


def scale_rows(conv: Any, factor: Tensor) -> None:
    with torch.no_grad():
        conv.weight.mul_(factor.reshape(-1, *[1] * (conv.weight.dim() - 1)))
        conv.bias.mul_(factor.flatten())


def folded(model: Any) -> Any:
    fold_norm(model.c, model.b)
    return model


def factor_folded(model: Any) -> Any:
    scale_rows(model.c, model.k)
    model.k.fill_(1)
    return model


def constant_folded(model: Any) -> Any:
    """bias + k, whatever alpha says."""
    with torch.no_grad():
        model.c.bias += model.k.flatten()
    model.k.zero_()
    return model


def branches_folded(model: Any) -> Any:
    """The weights of two branches added, whatever alpha says."""
    with torch.no_grad():
        model.c.weight += model.d.weight
        model.c.bias += model.d.bias
        model.d.weight.zero_()
        model.d.bias.zero_()
    return model


def hook_lost(model: Any) -> Any:
    for table in (model.c._forward_hooks, model.c._forward_pre_hooks):
        table.clear()
    return folded(model)


def forward_lost(model: Any) -> Any:
    del model.c.forward
    return folded(model)


def kept_dtype(model: Any) -> Any:
    """The factor in the weight, in the weight's dtype, and no promotion left."""
    scale_rows(model.c, model.k.to(model.c.weight.dtype))
    model.k = torch.ones((), dtype=model.c.weight.dtype)
    return model


def scale_before(model: Any) -> Any:
    """x / 255 in the weight: the division that made bytes into numbers is gone."""
    with torch.no_grad():
        model.c.weight /= 255
    return model_of(lambda s, x: s.c(x), c=model.c)


def hooked() -> Any:
    model = layers(lambda s, x: s.b(s.c(x)), **pair())
    model.c.register_forward_hook(lambda m, i, o: o * 2)
    return model


def pre_hooked() -> Any:
    model = layers(lambda s, x: s.b(s.c(x)), **pair())
    model.c.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    return model


def own_forward() -> Any:
    model = layers(lambda s, x: s.b(s.c(x)), **pair())
    model.c.forward = MethodType(lambda self, x: F.conv2d(x, self.weight, self.bias) * 3, model.c)
    return model


def overflowing() -> Any:
    model = layers(lambda s, x: s.b(s.c(x)), **pair())
    with torch.no_grad():
        model.b.weight.fill_(50)
        model.b.running_var.fill_(1e-6)
        model.c.weight.mul_(0.05)
    model.b.eps = 1e-7
    return model.half()


def chain(first: nn.Module, second: nn.Module) -> Callable[[], Any]:
    return lambda: layers(lambda s, x: s.b(s.c(x)), c=copy.deepcopy(first), b=copy.deepcopy(second))


def scaled(first: nn.Module, k: Tensor) -> Callable[[], Any]:
    return lambda: layers(lambda s, x: s.c(x) * s.k, c=copy.deepcopy(first), k=k.clone())


def pair() -> dict[str, nn.Module]:
    return {"c": nn.Conv2d(4, 4, 3), "b": nn.BatchNorm2d(4)}


def promoting() -> Any:
    model = layers(lambda s, x: s.c(x) * s.k, c=nn.Conv2d(4, 4, 3), k=constant(4, 1, 1))
    model.c.float()
    return model


def tied() -> Any:
    model = layers(lambda s, x: s.b(s.c(x)) * s.d(x), d=nn.Conv2d(4, 4, 3), **pair())
    model.d.weight = model.c.weight
    return model


NORM = nn.BatchNorm2d(4)
NOT_CERTAIN = "rank of batch_norm's input is not certain"
CASES: dict[str, Case] = {
    "bn after a transposed conv, C == N": Case(chain(nn.ConvTranspose2d(4, 4, 3), NORM), folded, True),
    "bn after a transposed conv of one dim": Case(
        chain(nn.ConvTranspose1d(4, 4, 3, 2), nn.BatchNorm1d(4)), folded, True, "", ((2, 4, 5), (3, 4, 6)), (2, 4, 5)
    ),
    "scale after a transposed conv, C == N": Case(
        scaled(nn.ConvTranspose2d(4, 4, 3), constant(4, 1, 1)), factor_folded, True
    ),
    "bn after a grouped transposed conv": Case(chain(nn.ConvTranspose2d(4, 4, 3, groups=2), NORM), folded, True),
    "alpha of a constant": Case(
        lambda: layers(lambda s, x: torch.add(s.c(x), s.k, alpha=3), c=nn.Conv2d(4, 4, 3), k=constant(4, 1, 1)),
        constant_folded, True,
    ),
    "alpha of a branch": Case(
        lambda: layers(lambda s, x: torch.add(s.c(x), s.d(x), alpha=3), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3)),
        branches_folded, True,
    ),
    "alpha of a method": Case(
        lambda: layers(lambda s, x: s.c(x).sub_(s.d(x), alpha=-2), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3)),
        branches_folded, True,
    ),
    "a (1, W) constant, W == C": Case(scaled(nn.Conv2d(4, 4, 3, 1, 1), constant(1, 4)), factor_folded, False),
    "a (W,) constant, W == C": Case(scaled(nn.Conv2d(4, 4, 3, 1, 1), constant(4)), factor_folded, False),
    "bn1d on (N, C, L) after a linear layer, C == L": Case(
        chain(nn.Linear(4, 4), nn.BatchNorm1d(4)), folded, False, NOT_CERTAIN, ((2, 4, 4), (3, 4, 4))
    ),
    "the same with examples": Case(
        chain(nn.Linear(4, 4), nn.BatchNorm1d(4)), folded, False, "", ((2, 4, 4), (3, 4, 4)), (2, 4, 4)
    ),
    "bn1d after an unbatched conv1d, C == L": Case(
        chain(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), folded, False, NOT_CERTAIN, ((4, 4),)
    ),
    "the same conv1d with examples": Case(
        chain(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), folded, False, "", ((4, 4),), (4, 4)
    ),
    "F.batch_norm(training=True)": Case(
        lambda: layers(
            lambda s, x: F.batch_norm(s.c(x), s.b.running_mean, s.b.running_var, s.b.weight, s.b.bias, True),
            **pair(),
        ),
        lambda m: (fold_norm(m.c, m.b), model_of(lambda s, x: s.c(x), c=m.c))[1], False, "statistics of the batch",
    ),
    "a conv at two sites": Case(
        lambda: layers(lambda s, x: s.b(s.c(x)) * s.c(x), **pair()), folded, True
    ),
    "a bn at two sites": Case(
        lambda: layers(lambda s, x: s.b(s.c(x)) * s.b(s.d(x)), d=nn.Conv2d(4, 4, 3), **pair()), folded, True
    ),
    "two readers": Case(
        lambda: layers(lambda s, x: (lambda y: s.b(y) * y)(s.c(x)), **pair()), folded, False
    ),
    "a weight of two convs": Case(tied, folded, True),
    "forward hook": Case(hooked, hook_lost, False, "the module has hooks"),
    "forward pre-hook": Case(pre_hooked, hook_lost, False, "the module has hooks"),
    "the instance's own forward": Case(own_forward, forward_lost, False, "the module's forward was replaced"),
    "a constant of a wider dtype": Case(
        promoting,
        kept_dtype, False, "a wider dtype", dtype=torch.float32, tolerance=1e-5,
    ),
    "bytes divided": Case(
        lambda: layers(lambda s, x: s.c(x / 255), c=nn.Conv2d(4, 4, 3)).float(), scale_before, False,
        dtype=torch.uint8, tolerance=1e-5,
    ),
    "half precision overflows": Case(overflowing, folded, False, "not finite", dtype=torch.float16, tolerance=1e-2),
}  # fmt: skip


def draw(case: Case) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    if case.dtype == torch.uint8:
        return lambda shape, g: torch.randint(0, 255, shape, generator=g, dtype=torch.uint8)
    return lambda shape, g: normal(shape, g).to(case.dtype)


def wrong(model: Any, x: Tensor, want: Tensor) -> bool:
    """Whether a model gives anything but what it should."""
    try:
        got = model(x.clone())
    except Exception:
        return True
    return got.shape != want.shape or got.dtype != want.dtype or not relative_error(got, want) < 1e-2


@pytest.mark.parametrize("name", CASES)
def test_fxfuse_is_right_where_a_naive_fold_is_wrong(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    naive = case.naive(case.build().eval())
    with torch.no_grad():
        inputs = [draw(case)(shape, torch.Generator().manual_seed(i)) for i, shape in enumerate(case.shapes)]
        assert any(wrong(naive, x, case.build().eval()(x.clone())) for x in inputs), "the naive fold is right here"
    examples = None if case.examples is None else draw(case)(case.examples, torch.Generator())
    agrees(model, case.shapes, draw(case), case.tolerance, examples, case.fires, case.refused)
