"""What is left of a model to merge, seen while it runs, and what its report says about it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.executed import Executed, Layer
from fxfuse import Report

aten = torch.ops.aten
NORM_NODES = ("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update")


class Watched(Executed):
    """Sees also convolutions whose weight is computed in the call, and batch norms written as a factor a channel.

    Attributes:
        computed: convolutions with such a weight.
        frozen: products of a layer's output with constants [1, C, 1, 1], as frozen batch norms are written. The
            first call's batch must be more than one image: then nothing else has this shape.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.computed: list[Layer] = []
        self.frozen: list[Layer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mul, aten.mul_) and all(isinstance(a, Tensor) for a in args):
            x, factor = args
            layer = getattr(x, "made_by", None)
            if layer and layer.kind != "batch_norm" and x.dim() == 4 and factor.shape == (1, x.shape[1], 1, 1):
                self.frozen.append(layer)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _layer(self, operator: Any, args: tuple[Any, ...]) -> Layer | None:
        layer = super()._layer(operator, args)
        if layer and not layer.path:
            self.computed.append(layer)
        return layer

    def sizes(self) -> dict[str, int]:
        behind = sum(layer is not None for layer, _ in self.left)
        more = {"behind": behind, "frozen": len(self.frozen), "computed": len(self.computed)}
        return super().sizes() | more

    def places(self) -> list[tuple[str, ...]]:
        """Paths of what is left: batch norms behind a layer with that layer, factors, other batch norms.

        A computed weight is nobody's: it has no path.
        """
        behind = [(norm.path, layer.path) for layer, norm in self.left if layer]
        rest = [(norm.path,) for layer, norm in self.left if not layer]
        return [*behind, *((layer.path,) for layer in self.frozen), *rest]


def standing(model: nn.Module) -> dict[str, int]:
    """Convolutions and batch norms that are there, as modules or as nodes of graphs, executed or not."""
    counts = Counter[str]()
    for module in model.modules():
        counts["convs"] += isinstance(module, nn.modules.conv._ConvNd)
        counts["norms"] += isinstance(getattr(module, "running_mean", None), Tensor)
        if isinstance(module, fx.GraphModule):
            called = (n for n in module.graph.nodes if n.op == "call_function")
            names = [getattr(n.target, "__name__", "").partition(".")[0] for n in called]
            counts["norms"] += sum(name in NORM_NODES for name in names)
            counts["convs"] += sum(name.startswith(("conv", "_conv")) for name in names)
    return dict(counts)


def why(report: Report, mode: Watched) -> list[str]:
    """What the report says of the places that are left, the most frequent first: `reason: the first place (n)`."""
    told = [(path, reason, "") for path, how, reason in report.parts if reason and how not in ("symbolic", "export")]
    told += [(r.where, r.reason, r.detail) for r in report.refused]
    counts, details = Counter[str](), dict[str, str]()
    for paths in mode.places():
        named = [(len(t[0]), -i) for i, t in enumerate(told) if any(_within(path, t[0]) for path in paths if path)]
        _, reason, detail = told[-max(named)[1]] if named else ("", "the report does not say", ", ".join(paths))
        counts[reason] += 1
        details.setdefault(reason, detail)
    return [
        without_folders(f"{reason}{details[reason] and ': '}{details[reason]} ({n})")
        for reason, n in counts.most_common()
    ]


def _within(path: str, where: str) -> bool:
    return not where or path == where or path.startswith(where + ".")


def without_folders(text: str) -> str:
    """Without the folders of the machine it ran on."""
    return re.sub(r"/\S*?/(?:(?:python3\.\d+/)?site-packages/|benchmarks/|python3\.\d+/)", "", " ".join(text.split()))
