"""The view: each node read once into an affine step, a constant, or something opaque.

After it no code asks whether a node was `nn.Conv2d` or `F.conv2d`. An affine node is one operator
of one tensor ("unary"), a sum of tensors with coefficients ("sum") or a concatenation ("concat").
Axes are decided by rank, never by sizes that happen to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from .border_fill import border_fills
from .capture import Captured
from .constants import Apply, Attr, leaves
from .dialect import Call, read
from .effects import Effects, shape_reader
from .facts import Fact, infer
from .fold import find_constants, tensor_at
from .record import IDENTITY, Operator, pointwise
from .refusal import Refusal

PASS_EXAMPLES = "pass example_inputs to optimize, they settle the rank"


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine node: `inputs` are (tensor, coefficient); `op` is the operator of a unary one.

    `spatial` is the layout a concatenation fixes. `assumes` is a rank taken for granted (a batch
    dim before the channels), to be guarded where the node is fused. `extra` are nodes that go
    with it: the slice assignments of a border fill.
    """

    kind: str
    inputs: tuple[tuple[Node, float], ...]
    op: Operator = IDENTITY
    spatial: int | None = None
    assumes: int | None = None
    extra: tuple[Node, ...] = ()


@dataclass(frozen=True)
class View:
    """All that later stages know of the graph."""

    captured: Captured
    affine: dict[Node, Affine]
    refused: dict[Node, Refusal]
    constants: dict[Node, Any]
    effects: Effects
    facts: dict[Node, Fact]
    shapes: Mapping[Node, torch.Size]
    calls: dict[Node, Call] = field(default_factory=dict)

    def data_users(self, node: Node) -> list[Node]:
        """Users that read the data, or a size that a rewrite could change."""
        hidden = self.affine[node].extra if node in self.affine else ()
        return [u for u in node.users if u not in hidden and shape_reader(u) not in ("rank", "dtype")]


class _Unknown(Exception):
    """An argument is not known before the model runs: the node stays opaque."""


def look(captured: Captured, shapes: Mapping[Node, torch.Size]) -> View:
    """Read every node of the graph; `shapes` holds output shapes where example inputs gave them."""
    graph, root = captured.graph, captured.root
    modules = dict(root.named_modules(remove_duplicate=False))

    def attr(path: str) -> Attr | None:
        tensor = tensor_at(root, path)
        return None if tensor is None else Attr(path, tuple(tensor.shape), tensor.dtype)

    calls = {n: c for n in graph.nodes if (c := read(n, modules, attr)) is not None}
    effects = Effects(graph, calls, modules)
    constants = find_constants(graph, root, captured.constants, effects)
    calls = {n: replace(c, args=_resolved(c.args, constants)) for n, c in calls.items() if n not in constants}
    facts = infer(graph, calls, modules, shapes)
    fills = border_fills(calls, facts, effects.position)
    effects.forget(n for fill in fills.values() for n in fill.writes)
    written = effects.written_attributes() if effects.writes else set()
    affine: dict[Node, Affine] = {}
    refused: dict[Node, Refusal] = {}
    for node, call in calls.items():
        try:
            result = _READERS[call.op](call, facts, node) if call.op in _READERS else call.refusal
        except _Unknown:
            continue
        if isinstance(result, Affine) and node in fills:
            fill = fills[node]
            result = replace(result, op=replace(result.op, pad_value=fill.value), extra=fill.writes)
        if isinstance(result, Affine) and not effects.private_write(node):
            result = Refusal(
                "it writes a tensor in place that is read elsewhere", remedy="use the out-of-place form"
            )
        if isinstance(result, Affine) and written and _reads_any(result.op, written):
            result = Refusal("the forward itself writes its weights")
        if isinstance(result, Refusal):
            refused[node] = result.at(call.path or node.name)
        elif result is not None:
            affine[node] = result
    return View(captured, affine, refused, constants, effects, facts, shapes, calls)


def _resolved(args: dict[str, Any], constants: Mapping[Node, Any]) -> dict[str, Any]:
    return {k: constants.get(v, v) if isinstance(v, Node) else v for k, v in args.items()}


def _reads_any(op: Operator, paths: set[str]) -> bool:
    return any(a.path in paths for _, c in op.consts for a in leaves(c))


def _data(call: Call, name: str = "input") -> Node:
    value = call.args[name]
    if not isinstance(value, Node):
        raise _Unknown
    return value


def _tensor(call: Call, name: str, dims: int | None = None) -> Attr | Apply:
    value = call.args[name]
    if not isinstance(value, (Attr, Apply)) or (dims is not None and len(value.shape) != dims):
        raise _Unknown
    return value


def _optional(call: Call, name: str) -> Attr | Apply | None:
    return None if call.args[name] is None else _tensor(call, name, 1)


def _ints(value: Any, count: int) -> tuple[int, ...]:
    items = (value,) * count if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    items = items * count if len(items) == 1 else items
    if len(items) != count or not all(isinstance(i, int) for i in items):
        raise _Unknown
    return items


def _one_dtype(*consts: Attr | Apply | None) -> torch.dtype:
    dtypes = {c.dtype for c in consts if c is not None}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point and not dtype.is_complex:
        raise _Unknown
    return dtype


def _unary(call: Call, op: Operator, assumes: int | None = None) -> Affine:
    return Affine("unary", ((_data(call), 1.0),), op, assumes=assumes)


def _conv(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    spatial = call.spatial or 0
    weight, bias = _tensor(call, "weight", spatial + 2), _optional(call, "bias")
    groups, transposed = call.args["groups"], call.op == "conv_transpose"
    if not isinstance(groups, int):
        raise _Unknown
    kernel = weight.shape[2:]
    stride, dilation = _ints(call.args["stride"], spatial), _ints(call.args["dilation"], spatial)
    mode = call.args.get("padding_mode", "zeros")
    if isinstance(call.args["padding"], str):
        total = [d * (k - 1) if call.args["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in _ints(call.args["padding"], spatial))
    op = Operator(
        kind="conv",
        law="conv",
        spatial=spatial,
        in_channels=weight.shape[0] if transposed else weight.shape[1] * groups,
        out_channels=weight.shape[1] * groups if transposed else weight.shape[0],
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        groups=groups,
        bias=bias is not None,
        padding_mode=mode if any(p != (0, 0) for p in padding) else "zeros",
        transposed=transposed,
        output_padding=_ints(call.args["output_padding"], spatial) if transposed else (0,) * spatial,
        dtype=_one_dtype(weight, bias),
        path=call.path or _owner(weight, node),
        consts=(("weight", weight), ("bias", bias)),
    )
    return _unary(call, op)


def _owner(weight: Attr | Apply, node: Node) -> str:
    """The module that holds the weight of a functional call; the node's name when none does."""
    if isinstance(weight, Attr) and "." in weight.path:
        return weight.path.rpartition(".")[0]
    return node.name


def _linear(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    weight, bias = _tensor(call, "weight", 2), _optional(call, "bias")
    op = Operator(
        kind="conv",
        law="conv",
        spatial=0,
        in_channels=weight.shape[1],
        out_channels=weight.shape[0],
        bias=bias is not None,
        dtype=_one_dtype(weight, bias),
        path=call.path or _owner(weight, node),
        consts=(("weight", weight), ("bias", bias)),
    )
    return _unary(call, op)


def _layout(fact: Fact, spatial: int | None = None) -> tuple[int | None, int | None]:
    """(spatial dims, assumed rank) of a tensor whose channels are axis 1 of a batch.

    Between two and three or more trailing dims a conv has left no doubt but the batch dim itself,
    which is then assumed and guarded; with fewer the alternatives are all common, so no guess.
    """
    if fact.rank is not None:
        return (fact.rank - 2, None) if fact.rank >= 2 else (None, None)
    if fact.high == fact.low + 1 and fact.high >= 4:
        return fact.high - 2, fact.high
    return None, None


def _batch_norm(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | Refusal:
    x = facts[_data(call)]
    if call.args["training"] or call.args["running_mean"] is None or call.args["running_var"] is None:
        return Refusal(
            "batch_norm normalizes with the statistics of the batch, not with running ones",
            remedy="call model.eval(), and keep track_running_stats=True",
        )
    mean, var = _tensor(call, "running_mean", 1), _tensor(call, "running_var", 1)
    weight, bias = _optional(call, "weight"), _optional(call, "bias")
    spatial, assumes = _layout(x)
    if spatial is None:
        return Refusal("the rank of batch_norm's input is not certain, so its channel axis is not", remedy=PASS_EXAMPLES)
    if not isinstance(call.args["eps"], (int, float)):
        raise _Unknown
    op = pointwise(
        "scale",
        "batch_norm",
        spatial,
        mean.shape[0],
        bias=True,
        dtype=_one_dtype(mean, var, weight, bias),
        path=call.path or _owner(mean, node),
        consts=(("mean", mean), ("var", var), ("weight", weight), ("bias", bias), ("eps", call.args["eps"])),
    )
    return _unary(call, op, assumes)


def _avg_pool(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | Refusal:
    spatial = call.spatial or 0
    kernel = _ints(call.args["kernel_size"], spatial)
    stride = _ints(call.args["stride"] or kernel, spatial)
    padding = _ints(call.args["padding"], spatial)
    for bad, why in (
        (call.args["ceil_mode"], "ceil_mode lets windows leave the input"),
        (call.args.get("divisor_override"), "divisor_override changes the divisor"),
        (any(padding) and not call.args["count_include_pad"], "count_include_pad=False divides by less at the border"),
    ):
        if bad:
            return Refusal(f"this average pool is no convolution: {why}")
    channels = facts[_data(call)].axes.get(-spatial - 1)
    if channels is None:
        raise _Unknown
    op = pointwise("pool", "pool", spatial, channels, path=call.path or node.name)
    return _unary(call, replace(op, kernel=kernel, stride=stride, padding=tuple((p, p) for p in padding)))


def _arithmetic(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | Refusal | None:
    left, right = call.args["input"], call.args["other"]
    alpha = call.args.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or call.args.get("rounding_mode") is not None:
        return None
    sign = -alpha if call.op == "sub" else alpha
    if isinstance(left, Node) and isinstance(right, Node):
        if call.op not in ("add", "sub"):
            return None
        return Affine("sum", ((left, 1.0), (right, float(sign))))
    if isinstance(left, Node):
        number = {"mul": (right, 0), "div": (right, 0)}.get(call.op, (1, right))
        return _scaled(left, number, sign, call.op == "div", facts, node)
    if isinstance(right, Node) and call.op in ("add", "sub", "mul"):
        number = (left, 0) if call.op == "mul" else (sign, left)
        return _scaled(right, number, 1, False, facts, node)
    return None


def _scaled(
    source: Node, numbers: tuple[Any, Any], alpha: float, inverse: bool, facts: Mapping[Node, Fact], node: Node
) -> Affine | Refusal | None:
    """x * factor + alpha * shift, one of the two a number and the other a number or a tensor."""
    factor, shift = numbers
    tensor = factor if isinstance(factor, (Attr, Apply)) else shift
    consts = (("factor", factor), ("inverse", inverse), ("shift", shift), ("alpha", alpha))
    fields: dict[str, Any] = {"consts": consts, "bias": not (isinstance(shift, (int, float)) and shift == 0)}
    if not isinstance(tensor, (Attr, Apply)):
        if not all(isinstance(n, (int, float)) for n in numbers):
            return None
        return Affine("unary", ((source, 1.0),), replace(IDENTITY, kind="scale", law="scale", path=node.name, **fields))
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        return None
    fact, dims = facts[source], len(tensor.shape)
    path = tensor.path if isinstance(tensor, Attr) else node.name
    wide = [i - dims for i, n in enumerate(tensor.shape) if n != 1]
    assumes = None
    if dims > fact.low:
        _, assumes = _layout(fact)
        if assumes is None or dims > assumes:
            return Refusal("a constant may have more dims than the tensor it meets", remedy=PASS_EXAMPLES)
    dtype = tensor.dtype if dims and tensor.dtype.is_floating_point else None
    if not wide:
        op = replace(IDENTITY, kind="scale", law="scale", path=path, dtype=dtype, **fields)
        return Affine("unary", ((source, 1.0),), op, assumes=assumes)
    if len(wide) > 1:
        return Refusal("a constant that varies along more than the channel axis is no per-channel factor")
    op = pointwise("scale", "scale", -wide[0] - 1, tensor.shape[wide[0]], path=path, dtype=dtype, **fields)
    return Affine("unary", ((source, 1.0),), op, assumes=assumes)


def _neg(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | Refusal | None:
    return _scaled(_data(call), (-1, 0), 1, False, facts, node)


def _axis_layout(fact: Fact, dim: Any) -> tuple[int, int | None]:
    """(spatial dims, assumed rank) if `dim` is to be the channel axis."""
    axis, assumes = fact.axis(dim), None
    if axis is None and dim == 1:
        spatial, assumes = _layout(fact)
        axis = None if spatial is None else -spatial - 1
    if axis is None:
        raise _Unknown
    return -axis - 1, assumes


def _cat(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    tensors = call.args["tensors"]
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Node) for t in tensors):
        raise _Unknown
    spatial, assumes = _axis_layout(facts[node], call.args["dim"])
    return Affine("concat", tuple((t, 1.0) for t in tensors), spatial=spatial, assumes=assumes)


def _pad(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | None:
    pad, value = call.args["pad"], call.args["value"]
    fact = facts[_data(call)]
    spatial, assumes = _layout(fact)
    if not isinstance(pad, (tuple, list)) or spatial is None or not all(isinstance(p, int) and p >= 0 for p in pad):
        return None
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    channels = fact.axes.get(-spatial - 1)
    if len(pairs) > spatial or channels is None or not isinstance(value or 0, (int, float)):
        return None
    padding = ((0, 0),) * (spatial - len(pairs)) + tuple(pairs)
    mode = {"constant": "zeros"}.get(call.args["mode"], call.args["mode"])
    op = pointwise("pad", "pad", spatial, channels, path=call.path or node.name)
    return _unary(call, replace(op, padding=padding, padding_mode=mode, pad_value=value or 0), assumes)


def _selected(source: Node, reads: tuple[int, ...], spatial: int, fact: Fact, node: Node, assumes: int | None) -> Affine:
    channels = fact.axes.get(-spatial - 1)
    if channels is None or spatial < 0 or not reads:
        raise _Unknown
    op = pointwise("select", "select", spatial, len(reads), path=node.name)
    return Affine("unary", ((source, 1.0),), replace(op, in_channels=channels, reads=reads), assumes=assumes)


def _getitem(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    source, index = _data(call), call.args["index"]
    name = getattr(source.target, "__name__", source.target)
    if source.op in ("call_function", "call_method") and name in ("chunk", "split") and isinstance(index, int):
        return _piece(source, index, facts, node)
    if not isinstance(index, tuple) or len(index) < 2 or not all(isinstance(i, slice) for i in index):
        raise _Unknown
    full = slice(None)
    if index[0] != full or any(i != full for i in index[2:]):
        raise _Unknown
    spatial, assumes = _axis_layout(facts[source], 1)
    channels = facts[source].axes.get(-spatial - 1)
    if channels is None or not all(b is None or isinstance(b, int) for b in (index[1].start, index[1].stop, index[1].step)):
        raise _Unknown
    return _selected(source, tuple(range(channels)[index[1]]), spatial, facts[source], node, assumes)


def _piece(chunks: Node, index: int, facts: Mapping[Node, Fact], node: Node) -> Affine:
    """One output of chunk or split along the channels."""
    names = ("input", "sizes", "dim")
    bound = {"dim": 0, **dict(zip(names, chunks.args, strict=False)), **chunks.kwargs}
    source, sizes = bound["input"], bound.get("sizes", bound.get("chunks", bound.get("split_size")))
    if not isinstance(source, Node):
        raise _Unknown
    spatial, assumes = _axis_layout(facts[source], bound["dim"])
    channels = facts[source].axes.get(-spatial - 1)
    if channels is None:
        raise _Unknown
    if isinstance(sizes, int):
        chunk = getattr(chunks.target, "__name__", chunks.target) == "chunk"
        size = -(-channels // sizes) if chunk else sizes
        sizes = [min(size, channels - i) for i in range(0, channels, size)]
    if not isinstance(sizes, (list, tuple)) or not all(isinstance(s, int) for s in sizes) or sum(sizes) != channels:
        raise _Unknown
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if not -len(sizes) <= index < len(sizes):
        raise _Unknown
    reads = tuple(range(starts[index], starts[index] + sizes[index]))
    return _selected(source, reads, spatial, facts[source], node, assumes)


def _narrow(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    source, start, length = _data(call), call.args["start"], call.args["length"]
    spatial, assumes = _axis_layout(facts[source], call.args["dim"])
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        raise _Unknown
    return _selected(source, tuple(range(start, start + length)), spatial, facts[source], node, assumes)


def _flip(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    source, dims = _data(call), call.args["dims"]
    if not isinstance(dims, (tuple, list)) or len(dims) != 1:
        raise _Unknown
    spatial, assumes = _axis_layout(facts[source], dims[0])
    channels = facts[source].axes.get(-spatial - 1) or 0
    return _selected(source, tuple(range(channels))[::-1], spatial, facts[source], node, assumes)


def _channel_shuffle(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine:
    source, groups = _data(call), call.args["groups"]
    spatial, assumes = _axis_layout(facts[source], 1)
    channels = facts[source].axes.get(-spatial - 1)
    if channels is None or not isinstance(groups, int):
        raise _Unknown
    size = channels // groups
    reads = tuple((j % groups) * size + j // groups for j in range(channels))
    return _selected(source, reads, spatial, facts[source], node, assumes)


def _dropout(call: Call, facts: Mapping[Node, Fact], node: Node) -> Affine | None:
    return _unary(call, replace(IDENTITY, path=call.path or node.name)) if call.args["training"] is False else None


_READERS = {
    "conv": _conv,
    "conv_transpose": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "avg_pool": _avg_pool,
    "add": _arithmetic,
    "sub": _arithmetic,
    "mul": _arithmetic,
    "div": _arithmetic,
    "neg": _neg,
    "cat": _cat,
    "pad": _pad,
    "getitem": _getitem,
    "narrow": _narrow,
    "flip": _flip,
    "channel_shuffle": _channel_shuffle,
    "dropout": _dropout,
}
