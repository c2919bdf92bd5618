"""Lets torchvision and timm import beside a torch that torchvision's compiled library rejects.

A torchvision built for a GPU cannot load its operators beside a CPU-only torch, and then not even
its import succeeds. Models that use none of those operators need only their names; deformable
convolution, non-maximum suppression and RoIAlign get an implementation, so that blocks made of them and
detection models run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys

import torch
from torch import Tensor

# The operators vanish with this object.
_library: torch.library.Library | None = None


def declare_missing_ops() -> None:
    """Declares torchvision's operators where the real ones do not load; harmless to call twice.

    Call it before the first import of torchvision or of anything that imports it. Without an
    installed torchvision it does nothing.
    """
    global _library
    if _library is not None or not _lacks_ops():
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.impl(name, _nms, "CompositeExplicitAutograd")
    _library.define(
        "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
        "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
        "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
    )
    _library.impl("deform_conv2d", _deform_conv2d, "CompositeExplicitAutograd")
    _library.impl("deform_conv2d", _deform_conv2d_shape, "Meta")
    _library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    )
    _library.impl("roi_align", _roi_align, "CompositeExplicitAutograd")

    import torchvision.extension

    # Asked by each operator's Python wrapper; at import it had to stay false, for the remaining
    # operators have no declaration to attach anything to.
    torchvision.extension._has_ops = lambda: True
    # this one has a copy of the question, and would answer "no" by compiling a function for minutes
    sys.modules["torchvision.ops.roi_align"]._has_ops = torchvision.extension._has_ops  # type: ignore[attr-defined]


def _lacks_ops() -> bool:
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return False
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    finder = importlib.machinery.FileFinder(package.submodule_search_locations[0], loader)
    library = finder.find_spec("_C")
    if library is None or library.origin is None:
        return True
    try:
        torch.ops.load_library(library.origin)
    except (ImportError, OSError):
        return True
    return False


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [x1, y1, x2, y2] that no better kept box overlaps by more than that."""
    low, high = dets[:, :2], dets[:, 2:]
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    common = sides.clamp(min=0).prod(dim=2)
    area = (high - low).prod(dim=1)
    overlap = common / (area[:, None] + area - common)
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not kept or not bool((overlap[i, kept] > iou_threshold).any()):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=dets.device)


def _roi_align(
    input: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """The mean of samples x samples bilinear reads in every cell of each box [image, x1, y1, x2, y2]."""
    pooled = [input.new_zeros(0, input.shape[1], height, width)]
    for image, *box in rois.tolist():
        x1, y1, x2, y2 = (edge * scale - aligned / 2 for edge in box)
        y, rows = _cells(y1, y2, height, sampling_ratio, aligned, input)
        x, columns = _cells(x1, x2, width, sampling_ratio, aligned, input)
        inside = ((y >= -1) & (y <= input.shape[2]))[:, None] & ((x >= -1) & (x <= input.shape[3]))
        y, x = y.clamp(0, input.shape[2] - 1), x.clamp(0, input.shape[3] - 1)
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        read = _bilinear(input[int(image)][None, None], grid_y[None, None, None], grid_x[None, None, None])
        read = (read * inside).reshape(1, input.shape[1], height, rows, width, columns)
        pooled.append(read.mean((3, 5)))
    return torch.cat(pooled)


def _cells(start: float, stop: float, cells: int, samples: int, aligned: bool, like: Tensor) -> tuple[Tensor, int]:
    """Sample positions along one side of a box, and how many lie in each cell."""
    size = stop - start if aligned else max(stop - start, 1.0)
    samples = samples if samples > 0 else max(math.ceil(size / cells), 1)
    steps = torch.arange(cells * samples, dtype=like.dtype, device=like.device)
    return start + (steps + 0.5) * (size / cells / samples), samples


def _deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """Samples every tap of every output position bilinearly, then multiplies by the weight.

    Offsets are [B, offset_groups * taps * (y, x), H', W'], masks the same without (y, x).
    """
    batch, channels = input.shape[:2]
    outputs, _, kernel_h, kernel_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = kernel_h * kernel_w

    def steps(count: int, step: int) -> Tensor:
        return torch.arange(count, dtype=offset.dtype, device=offset.device) * step

    shift = offset.reshape(batch, offset_groups, taps, 2, out_h, out_w)
    tap_y = steps(kernel_h, dilation_h).repeat_interleave(kernel_w)[:, None, None]
    tap_x = steps(kernel_w, dilation_w).repeat(kernel_h)[:, None, None]
    y = shift[:, :, :, 0] + tap_y + (steps(out_h, stride_h) - pad_h)[:, None]
    x = shift[:, :, :, 1] + tap_x + (steps(out_w, stride_w) - pad_w)

    planes = input.reshape(batch, offset_groups, channels // offset_groups, *input.shape[2:])
    columns = _bilinear(planes, y, x)
    if use_mask:
        columns = columns * mask.reshape(batch, offset_groups, 1, taps, out_h, out_w)
    columns = columns.reshape(batch, groups, channels // groups * taps, out_h * out_w)
    kernels = weight.reshape(groups, outputs // groups, -1)
    out = torch.matmul(kernels, columns).reshape(batch, outputs, out_h, out_w)
    return out + bias.reshape(-1, 1, 1)


def _bilinear(planes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[B, G, C, H, W] read at positions [B, G, *P], zero outside -> [B, G, C, *P]."""
    height, width = planes.shape[3:]
    flat = planes.flatten(3)
    top, left = y.floor(), x.floor()
    total = flat.new_zeros(*flat.shape[:3], *y.shape[2:])
    for row, row_share in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_share in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = index.long().flatten(2).unsqueeze(2).expand(-1, -1, flat.shape[2], -1)
            share = torch.where(inside, row_share * column_share, 0)
            total = total + flat.gather(3, index).reshape(total.shape) * share.unsqueeze(2)
    return total


def _deform_conv2d_shape(input: Tensor, weight: Tensor, offset: Tensor, *_: object) -> Tensor:
    return input.new_empty((input.shape[0], weight.shape[0], *offset.shape[2:]))
