"""What the report says of a graph and a plan: sizes, operation counts, and one line a fused site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Size, nn
from torch.fx import Graph, Node

from fxfuse.algebra.operator import Operator
from fxfuse.names import plain
from fxfuse.ops.modules import CONVS, NORMS
from fxfuse.planning.regions import Join, Step, exit_of
from fxfuse.planning.sites import Fuse, Plan, Siblings, fuses
from fxfuse.reading.view import View
from fxfuse.rearranging.pool_first import Swapped
from fxfuse.reporting.report import Fired, Totals

_ALIASES = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div", "addmm": "linear"}


def params(model: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(p.numel() for p in model.parameters())


def totals(graph: Graph, modules: Mapping[str, nn.Module], params: int, macs: int | None) -> Totals:
    """Nodes and executed operations by kind, with the parameters and MACs the caller counted."""
    calls = ("call_function", "call_method", "call_module")
    ops = Counter(_kind(n, modules) for n in graph.nodes if n.op in calls)
    return Totals(len(graph.nodes), params, macs, dict(sorted(ops.items())))


def layer_totals(modules: Iterable[nn.Module]) -> Totals:
    """Totals of modules that no graph calls: layers are counted once each, as nobody knows how often they run."""
    layers = [m for m in modules if isinstance(m, (*CONVS, nn.Linear, *NORMS))]
    weighted = any(getattr(m, "weight", None) is not None and not isinstance(m, tuple(NORMS)) for m in layers)
    return Totals(0, 0, None if weighted else 0, dict(Counter(_plain(type(m).__name__) for m in layers)))


def _kind(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """One name for all spellings: conv for nn.Conv2d, F.conv2d and torch.conv1d alike."""
    module = node.op == "call_module"
    return _plain(type(modules[str(node.target)]).__name__ if module else plain(node.target) or str(node.target))


def _plain(name: str) -> str:
    flat = name.strip("_").lower()
    if flat.startswith(("batchnorm", "batch_norm", "native_batch_norm")):
        return "batch_norm"
    return "conv" if flat.startswith(("conv", "framedconv")) else _ALIASES.get(flat, flat)


def macs(view: View) -> int | None:
    """Multiply-accumulates of all convolutions and linear layers; None where shapes are not known."""
    if not view.shapes:
        return None
    read = sum(_macs(a.op, n, view) for n, a in view.affine.items() if a.op.weighted and n in view.shapes)
    return read + sum(_unread(n, view) for n in view.captured.graph.nodes if n not in view.affine)


def _unread(node: Node, view: View) -> int:
    """Of a layer that stays as it is whatever the plan, such as one with hooks."""
    layer: Any = view.captured.modules.get(str(node.target)) if node.op == "call_module" else None
    if type(layer) not in (*CONVS, nn.Linear):
        return 0
    at = node.args[0] if getattr(layer, "transposed", False) and node.args else node
    shape, spatial = view.shapes.get(at) if isinstance(at, Node) else None, layer.weight.dim() - 2
    if shape is None:
        return 0
    positions = shape[: len(shape) - spatial - 1].numel() * shape[len(shape) - spatial :].numel()
    return positions * int(layer.weight.numel())


def _macs(op: Operator, node: Node, view: View) -> int:
    """Of `op` where its result is at `node`, or becomes some of the channels there."""
    shape, spatial = view.shapes[node], op.spatial or 0
    batch, sizes = shape[: len(shape) - spatial - 1].numel(), shape[len(shape) - spatial :]
    frame = op.frame_conv.macs * sizes.numel() if op.framed else 0
    if op.transposed:  # the weight meets every position of the input
        dims = zip(sizes, op.kernel, op.stride, op.dilation, op.padding, op.output_padding, strict=True)
        sizes = Size((size - 1 - more - d * (k - 1) + low + high) // s + 1 for size, k, s, d, (low, high), more in dims)
    return batch * sizes.numel() * op.macs + frame


def swapped(swap: Swapped) -> Fired:
    """The entry of a layer that changed places with a pool before the plan."""
    layer, pool, width = swap.layer, swap.pool, swap.layer.in_channels
    first = replace(pool, in_channels=width, out_channels=width, groups=width)
    macs = [p * layer.macs for p in swap.positions] if len(swap.positions) == 2 else [None, None]
    return Fired(
        path=layer.path,
        patterns=("pool_swap",),
        before=(layer.describe(), pool.describe()),
        after=f"{first.describe()}, {layer.describe()}",
        macs_before=macs[0],
        macs_after=macs[1],
    )


def fired(plan: Plan, view: View, names: Mapping[Operator, str]) -> tuple[Fired, ...]:
    """One entry for every fused layer, in execution order."""
    group_of = {f.exit: g for g in plan.siblings for f in g.members}
    found: dict[Node, Fired] = {}
    for fuse in (f for site in plan.sites for f in fuses(site.segments)):
        group = group_of.get(fuse.exit)
        if group is None:
            found[fuse.exit] = _describe(fuse, view, names)
        elif group.members[0].exit not in found:
            found[group.members[0].exit] = _gathered(group, view, names)
    return tuple(found.values())


def _gathered(group: Siblings, view: View, names: Mapping[Operator, str]) -> Fired:
    """One entry for siblings."""
    each = [_describe(f, view, names) for f in group.members]
    before, after = ([getattr(e, side) for e in each] for side in ("macs_before", "macs_after"))
    pools = sum(f.pool is not None for f in group.members)
    return Fired(
        path=names.get(group.op, group.op.path),
        patterns=tuple(dict.fromkeys((*group.op.applied, *(p for e in each for p in e.patterns)))),
        before=tuple(b for e in each for b in e.before),
        after=f"{group.op.describe()}, {len(each)} slices" + ", pool" * pools,
        macs_before=None if None in before else sum(before),
        macs_after=None if None in after else sum(after),
    )


def _steps(parts: Iterable[Step | Join]) -> Iterator[Step | None]:
    """Every step below the parts; None for a branch that is the identity."""
    for part in parts:
        if isinstance(part, Step):
            yield part
        else:
            for branch in part.branches:
                yield from _steps(branch.parts) if branch.parts else [None]


def _describe(fuse: Fuse, view: View, names: Mapping[Operator, str]) -> Fired:
    before, work = [], 0
    for step in _steps(fuse.parts):
        if step is None:
            before.append("identity")
        elif step.node is not None:
            text = step.op.describe()
            before.append(text.replace("scale", "batch_norm", 1) if step.op.law == "batch_norm" else text)
            if step.op.weighted and step.node in view.shapes:
                work += _macs(step.op, step.node, view)
    last = exit_of(fuse.parts)
    after = _macs(fuse.op, last, view) if last in view.shapes else None
    return Fired(
        path=names.get(fuse.op, fuse.op.path),
        patterns=tuple(dict.fromkeys(fuse.op.applied)),
        before=tuple(before),
        after=fuse.op.describe() + ", pool" * (fuse.pool is not None),
        macs_before=None if after is None else work,
        macs_after=after,
    )
