"""Layers read into operator records: convolution, linear, batch norm, average pool, padding, dropout."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from fxfuse.algebra.constants import Apply, Attr, leaves
from fxfuse.algebra.operator import IDENTITY, Operator, pointwise
from fxfuse.facts.fact import Facts
from fxfuse.ops.call import Call, pad_pairs
from fxfuse.reading.affine import PASS_EXAMPLES, Affine, Unknown, data, ints, layout, one_dtype, optional, tensor, unary
from fxfuse.refusal import Refusal


def _conv(call: Call, facts: Facts, node: Node) -> Affine | Refusal:
    spatial = call.spatial or 0
    if isinstance(call.args["weight"], Node):
        return _computed_weight(call)
    weight, bias = tensor(call, "weight", spatial + 2), optional(call, "bias")
    groups, transposed = call.args["groups"], call.op == "conv_transpose"
    if not isinstance(groups, int) or 0 in weight.shape:
        raise Unknown
    kernel = weight.shape[2:]
    stride, dilation = ints(call.args["stride"], spatial), ints(call.args["dilation"], spatial)
    mode = call.args.get("padding_mode", "zeros")
    if isinstance(call.args["padding"], str):
        total = [d * (k - 1) if call.args["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    elif "sides" in call.args:
        padding = call.args["sides"]
    else:
        padding = tuple((p, p) for p in ints(call.args["padding"], spatial))
    frame = (("frame", tensor(call, "frame", spatial + 2)),) if "frame" in call.args else ()
    if mode == "circular" and not any(map(any, padding)):
        return Refusal(
            "circular padding, even of no width, copies its input, whose order in memory shows in the result",
            remedy='use padding_mode="zeros", which is the same where nothing is padded',
        )
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
        framed=bool(frame),
        transposed=transposed,
        output_padding=ints(call.args["output_padding"], spatial) if transposed else (0,) * spatial,
        dtype=one_dtype(weight, bias),
        path=call.path or _owner(weight, node),
        consts=(("weight", weight), ("bias", bias), *frame),
    )
    return unary(data(call), op)


def _owner(weight: Attr | Apply, node: Node) -> str:
    """The module that holds the weight of a functional call, or all it is computed from; else the node's name."""
    owners = {a.path.rpartition(".")[0] for a in leaves(weight)}
    return (owners.pop() if len(owners) == 1 else "") or node.name


def _computed_weight(call: Call) -> Refusal:
    return Refusal(
        "its weight is computed from data, or from what the forward writes, at every call",
        detail=f"by {call.args['weight'].name}",
    )


def _linear(call: Call, facts: Facts, node: Node) -> Affine | Refusal:
    """A linear layer on the last axis; so is a product with a constant matrix [C, N] on the right."""
    product = call.op == "mm"
    if not product and isinstance(call.args["weight"], Node):
        return _computed_weight(call)
    weight = tensor(call, "other" if product else "weight", 2)
    bias = None if product else optional(call, "bias")
    if 0 in weight.shape:
        raise Unknown
    op = Operator(
        kind="conv",
        law="product" if product else "conv",
        spatial=0,
        in_channels=weight.shape[0 if product else 1],
        out_channels=weight.shape[1 if product else 0],
        bias=bias is not None,
        dtype=one_dtype(weight, bias),
        path=call.path or _owner(weight, node),
        consts=(("weight", weight),) if product else (("weight", weight), ("bias", bias)),
    )
    return unary(data(call), op)


def _batch_norm(call: Call, facts: Facts, node: Node) -> Affine | Refusal:
    x = facts[data(call)]
    if call.args["training"] or call.args["running_mean"] is None or call.args["running_var"] is None:
        return Refusal(
            "batch_norm normalizes with the statistics of the batch, not with running ones",
            where=call.path,
            remedy="call model.eval(), and keep track_running_stats=True",
        )
    mean, var = tensor(call, "running_mean", 1), tensor(call, "running_var", 1)
    weight, bias = optional(call, "weight"), optional(call, "bias")
    spatial, assumes = layout(x)
    if spatial is None:
        return Refusal(
            "the rank of batch_norm's input is not certain, so its channel axis is not",
            where=call.path or _owner(mean, node),
            remedy=PASS_EXAMPLES,
        )
    if not isinstance(call.args["eps"], (int, float)):
        raise Unknown
    op = pointwise(
        "scale",
        "batch_norm",
        spatial,
        mean.shape[0],
        bias=True,
        dtype=one_dtype(mean, var, weight, bias),
        path=call.path or _owner(mean, node),
        consts=(("mean", mean), ("var", var), ("weight", weight), ("bias", bias), ("eps", call.args["eps"])),
    )
    return unary(data(call), op, assumes)


def _avg_pool(call: Call, facts: Facts, node: Node) -> Affine | Refusal:
    spatial = call.spatial or 0
    kernel = ints(call.args["kernel_size"], spatial)
    stride = ints(call.args["stride"] or kernel, spatial)
    padding = ints(call.args["padding"], spatial)
    for bad, why in (
        (call.args["ceil_mode"], "ceil_mode lets windows leave the input"),
        (call.args.get("divisor_override"), "divisor_override changes the divisor"),
        (any(padding) and not call.args["count_include_pad"], "count_include_pad=False divides by less at the border"),
    ):
        if bad:
            return Refusal(f"this average pool is no convolution: {why}")
    channels = facts[data(call)].channels(spatial)
    if channels is None:
        raise Unknown
    op = pointwise("pool", "pool", spatial, channels, path=call.path or node.name)
    return unary(data(call), replace(op, kernel=kernel, stride=stride, padding=tuple((p, p) for p in padding)))


def _pad(call: Call, facts: Facts, node: Node) -> Affine | None:
    pairs, value = pad_pairs(call.args["pad"]), call.args["value"]
    fact = facts[data(call)]
    spatial, assumes = layout(fact)
    if pairs is None or spatial is None or len(pairs) > spatial or not isinstance(value or 0, (int, float)):
        return None
    channels = fact.channels(spatial)
    if channels is None:
        return None
    padding = ((0, 0),) * (spatial - len(pairs)) + tuple(pairs)
    mode = {"constant": "zeros"}.get(call.args["mode"], call.args["mode"])
    op = pointwise("pad", "pad", spatial, channels, path=call.path or node.name)
    return unary(data(call), replace(op, padding=padding, padding_mode=mode, pad_value=value or 0), assumes)


def _identity(call: Call, facts: Facts, node: Node) -> Affine | None:
    """What gives its input; a dropout that may train is none."""
    if call.args.get("training", False) is not False:
        return None
    return unary(data(call), replace(IDENTITY, path=call.path or node.name))


def _deformable(call: Call, facts: Facts, node: Node) -> Affine | Refusal:
    """A convolution of values that lie between positions; its groups follow from the channels it reads."""
    width = tensor(call, "weight", 4).shape[1]
    channels = facts[data(call)].channels(2) or width
    groups = max(channels // max(width, 1), 1)
    conv = _conv(replace(call, args=call.args | {"groups": groups}), facts, node)
    return replace(conv, op=replace(conv.op, kind="warp", in_channels=channels)) if isinstance(conv, Affine) else conv


LAYERS = {
    **dict.fromkeys(("conv", "conv_transpose"), _conv),
    **dict.fromkeys(("linear", "mm"), _linear),
    "deform": _deformable,
    "batch_norm": _batch_norm,
    "avg_pool": _avg_pool,
    "pad": _pad,
    **dict.fromkeys(("dropout", "identity"), _identity),
}
