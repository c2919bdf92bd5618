"""A weight that is still a sum of terms, each as the model stores it, and how it becomes one tensor.

A convolution with its batch norms is one term with a pending factor for each row; parallel branches
are several terms at their places in one kernel. Only a run of rows at a time is ever widened to
double precision, so that a fold costs one pass over the weight and next to no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fxfuse.refusal import Refusal

# Numbers in double precision at a time. So few stay in the cache, and torch does not start its own threads for
# them, which wait for each other at every run: on a machine that is busy that took a hundred times as long.
RUN = 32_000
# float32 and bfloat16 hold all that a model does: below 1e-38 no pass need look.
TINY = 1e-30


def double(tensor: Tensor | float | complex) -> Tensor:
    """In double precision; of a number a tensor without dims."""
    tensor = tensor if isinstance(tensor, Tensor) else torch.tensor(tensor, dtype=torch.float64)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def added(*tensors: Tensor | None) -> Tensor | None:
    """The sum of those that there are, None if there are none."""
    there = [t for t in tensors if t is not None]
    return sum(there[1:], there[0]) if there else None


class Term(NamedTuple):
    """A weight [N, C/g, *K], each row to be multiplied by `scale` [N], at `place` in the kernel."""

    weight: Tensor
    scale: Tensor | None = None
    place: tuple[slice, ...] = ()

    def rows(self, run: slice, scratch: Tensor) -> Tensor:
        """Some rows in double precision, written to `scratch`."""
        part = scratch[: run.stop - run.start].copy_(self.weight[run])
        return part if self.scale is None else part.mul_(self.scale[run].reshape(-1, *[1] * (part.dim() - 1)))

    def scaled(self, factor: Tensor) -> Term:
        return self._replace(scale=factor if self.scale is None else self.scale * factor)


class Numbers(NamedTuple):
    """Terms whose sum is a weight [N, C/g, *K] of shape `shape`; bias [N] and frame [N, 1, *K] in double precision."""

    terms: tuple[Term, ...]
    bias: Tensor | None
    shape: tuple[int, ...]
    frame: Tensor | None = None

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, frame: Tensor | None = None
    ) -> Numbers:
        return cls((Term(weight, scale),), bias, tuple(weight.shape), frame)

    def runs(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in double precision, a run of rows at a time, each valid until the next."""
        count, width = self.shape[0], max(1, torch.Size(self.shape[1:]).numel())
        step = max(1, RUN // width) if self.terms[0].weight.device.type == "cpu" else max(1, count)
        alone = len(self.terms) == 1 and not self.terms[0].place
        scratch = [torch.empty_like(t.weight[:step], dtype=double(t.weight[:0]).dtype) for t in self.terms]
        shape = (min(step, count), *self.shape[1:])
        total = scratch[0] if alone else scratch[0].new_empty(shape)
        for first in range(0, count, step):
            run = slice(first, min(first + step, count))
            if alone:
                yield run, self.terms[0].rows(run, scratch[0])
                continue
            here = total[: run.stop - run.start].zero_()
            for term, buffer in zip(self.terms, scratch, strict=True):
                where = (slice(None), slice(None), *term.place)
                here[where] += term.rows(run, buffer)
            yield run, here

    def weight(self) -> Tensor:
        """The whole weight in double precision."""
        if len(self.terms) == 1 and self.terms[0].scale is None and not self.terms[0].place:
            return double(self.terms[0].weight)
        first = self.terms[0].weight
        whole = torch.empty(self.shape, dtype=double(first[:0]).dtype, device=first.device)
        for run, rows in self.runs():
            whole[run] = rows
        return whole

    def rounded(self, dtype: torch.dtype, groups: int = 1) -> Tensor | Refusal:
        """The weight in `dtype`, rounded once; refused where `dtype` cannot hold it."""
        first = self.terms[0].weight
        out = torch.empty(self.shape, dtype=dtype, device=first.device)
        narrow = torch.finfo(dtype).tiny > TINY
        peaks = torch.zeros(self.shape[:2], dtype=torch.float64, device=first.device) if narrow else None
        for run, rows in self.runs() if first.device.type != "meta" else ():
            here = out[run].copy_(rows)
            low, high = torch.aminmax(torch.view_as_real(here) if here.is_complex() else here)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return overflow(rows, dtype)
            if peaks is not None:
                peaks[run] = rows.abs().reshape(*rows.shape[:2], -1).amax(2)
        return out if peaks is None or not peaks.numel() else _vanishing(peaks, dtype, groups) or out


def overflow(numbers: Tensor, dtype: torch.dtype) -> Refusal:
    """The refusal of numbers that are not finite in `dtype`."""
    largest, limit = float(numbers.abs().max()), torch.finfo(dtype).max
    there = not math.isfinite(largest)
    return Refusal(
        f"the merged weight has numbers that are not finite in {dtype}",
        detail="the model has such already" if there else f"the largest is {largest:.3g}, the limit {limit:.3g}",
        remedy="" if there else "fuse in a wider dtype and convert afterwards",
    )


def _vanishing(peaks: Tensor, dtype: torch.dtype, groups: int) -> Refusal | None:
    """A channel, of the output or the input, all of whose weights become subnormal or 0.

    `peaks` [N, C/g] are the largest numbers over the taps. What is small beside others of its channel does
    not count: what it loses is less than what they lose to rounding.
    """
    columns = peaks.reshape(groups, -1, peaks.shape[1]).amax(1).flatten()
    for name, channels in (("output", peaks.amax(1)), ("input", columns)):
        lost = (channels > 0) & (channels < torch.finfo(dtype).tiny)
        if lost.any():
            worst = int(torch.where(lost, channels, math.inf).argmin())
            return Refusal(
                f"the merged weight has numbers too small for {dtype}",
                detail=f"{int(lost.sum())} of {len(channels)} {name} channels; the weights of channel {worst} reach "
                f"{float(channels[worst]):.3g}, the smallest normal number is {torch.finfo(dtype).tiny:.3g}",
                remedy="fuse in a wider dtype and convert afterwards",
            )
    return None
