"""Verification on example inputs: outputs compared, and the first site that differs named."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfuse.capture.copying import copied
from fxfuse.capture.example_inputs import run_copy
from fxfuse.capture.export.program import export
from fxfuse.capture.symbolic import capture
from fxfuse.rearranging.tidy import tidy
from fxfuse.refusal import VerificationError

# Relative to the largest output: far above the rounding of one fold, far below a wrong border.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}

_WIDE = 1e-5  # float32 weights rounded once keep their error when run in float64; another function is far above


def verify(
    model: nn.Module, fused: nn.Module, inputs: tuple[Any, ...], tolerance: float | None, how: str | None = None
) -> float:
    """Largest error of `fused` relative to the largest output of `model`.

    Raises:
        VerificationError: it is beyond the tolerance; the message names the first site that differs.
    """
    expected = run_copy(model, inputs)
    actual = run_copy(fused, inputs)
    left, right = tree_leaves(expected), tree_leaves(actual)
    if len(left) != len(right):
        raise VerificationError(f"{len(right)} outputs instead of {len(left)}")
    worst = 0.0
    for want, got in zip(left, right, strict=True):
        if not isinstance(want, Tensor):
            continue
        if want.shape != got.shape or want.dtype != got.dtype:
            raise VerificationError(
                f"an output is {tuple(got.shape)} {got.dtype} instead of {tuple(want.shape)} {want.dtype}"
            )
        if want.is_meta:
            continue  # it has no numbers
        error = relative_error(got, want)
        allowed = TOLERANCE.get(want.dtype, 1e-3) if tolerance is None else tolerance
        if not error <= allowed:
            if tolerance is None and _agree_in_float64(model, fused, inputs):
                return Rounding(error)
            place = first_difference(model, fused, inputs, allowed, how)
            raise VerificationError(f"outputs differ by {error:.1e} (allowed {allowed:.1e}); {place}")
        worst = max(worst, error)
    return worst


ROUNDING = (
    "The outputs differ by more than rounding alone would, but agree in float64: the model amplifies rounding (top-k, "
    "non-maximum suppression, saturated scores), and another order of the same sums gives another choice."
)


class Rounding(float):
    """An error of the outputs that comes of rounding alone: in float64 they agree."""


def _agree_in_float64(model: nn.Module, fused: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether it is rounding that differs, amplified: by top-k, non-maximum suppression, saturated scores."""
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        expected, actual = run_copy(copied(model).double(), wide), run_copy(copied(fused).double(), wide)
    except ValueError:  # it has types of its own
        return False
    pairs = [(a, b) for a, b in zip(tree_leaves(expected), tree_leaves(actual), strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and relative_error(b, a) <= _WIDE for a, b in pairs)


def relative_error(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|, infinite where only one of them is not finite."""
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.detach().to(wide), want.detach().to(wide)
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


class _Recorder(Interpreter):
    """Keeps the tensors of the named nodes."""

    def __init__(self, root: nn.Module, graph: Graph, names: Sequence[str]) -> None:
        super().__init__(root, graph=graph)
        self.names, self.seen = set(names), dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names and isinstance(result, Tensor):
            self.seen[n.name] = result.detach().clone()
        return result


def first_difference(
    model: nn.Module, fused: nn.Module, inputs: tuple[Any, ...], allowed: float, how: str | None = None
) -> str:
    """The first fused layer whose output differs from the value it stands for."""
    nodes = fused.graph.nodes if isinstance(fused, GraphModule) else ()
    pairs = [(n.meta["fxfuse_exit"], n) for n in nodes if "fxfuse_exit" in n.meta]
    if not isinstance(fused, GraphModule) or not pairs:
        return "the model is no single graph in which to look for the place"
    twin = copy.deepcopy(model)
    captured = export(twin, inputs) if how == "export" else capture(twin, inputs)
    tidy(captured)
    vars(captured.root).update(captured.constants)
    before = _Recorder(captured.root, captured.graph, [name for name, _ in pairs])
    after = _Recorder(fused, fused.graph, [n.name for _, n in pairs])
    with torch.no_grad():
        before.run(*copy.deepcopy(inputs))
        after.run(*copy.deepcopy(inputs))
    for name, node in pairs:
        if name in before.seen and node.name in after.seen:
            error = relative_error(after.seen[node.name], before.seen[name])
            if not error <= allowed:
                return f"the first site that differs is {node.target} ({error:.1e})"
    return "no single site differs that much: the graph is another function than the model's forward"
