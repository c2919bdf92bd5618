"""Convolutions whose kernels are mixed anew for every sample, and the factors after them.

A dynamic convolution multiplies attention [B, K] by a bank [K, N*M] into one kernel of M numbers for each output
channel of each sample, and runs all samples as one convolution of B times the groups (Chen et al. 2020,
CondConv by Yang et al. 2019). Its output is linear in the bank, so a factor a channel goes to the columns of
that channel in the bank, and with the shift to the bias, which is mixed alike.

What is proved here, from sizes that are equal for every input: output channel n of the tensor that the factor
reads is row n of every sample's kernels. In row-major order that row is columns n*M to (n+1)*M of the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch.fx import Node

from fxfuse.algebra.operator import Operator
from fxfuse.facts.sizes import ONE, Size, order_of, product
from fxfuse.ops.call import Call
from fxfuse.ops.movement import RESHAPES
from fxfuse.reading.affine import Affine
from fxfuse.reading.movable.factors_at_joins import SplitFactors, factors_of
from fxfuse.reading.nodes import Nodes, Run


@dataclass(frozen=True)
class Dynamic:
    """One such convolution: its last node, the products that give its kernels and its bias, and what it gives.

    Its output is `out`, of `channels` channels for each sample, of which every one has `each` numbers in its kernels.
    """

    conv: Node
    out: Node
    channels: int
    each: int
    kernels: Node
    bias: Node | None


def find_dynamic(nodes: Nodes, steps: Mapping[Node, Affine]) -> tuple[list[SplitFactors], list[Dynamic]]:
    """Factors after a dynamic convolution, as shares of its bank and of its bias.

    Besides those without a bias, where what follows has a shift. `steps` are the unary nodes, those that commute with
    factors included.
    """
    split, unbiased = list[SplitFactors](), list[Dynamic]()
    convs = [_read(node, call, nodes, steps) for node, call in nodes.calls.items() if call.op == "conv"]
    for conv in (c for c in convs if c is not None):
        if ops := _factors(conv, nodes):
            shares = {conv.kernels: tuple(repeated(o, conv.channels, conv.each) for o in ops.values())}
            if conv.bias is not None:
                shares[conv.bias] = tuple(repeated(o, conv.channels, 1, o.bias) for o in ops.values())
            split.append(SplitFactors(tuple(ops), shares))
        elif conv.bias is None and _factors(conv, nodes, shifts=True):
            unbiased.append(conv)
    return split, unbiased


def _read(conv: Node, call: Call, nodes: Nodes, steps: Mapping[Node, Affine]) -> Dynamic | None:
    """The dynamic convolution that runs in `conv`; None where any of it is something else."""
    weight, bias, dims = call.args["weight"], call.args["bias"], nodes.dims
    kernels, shape, rows = _mixed(weight, conv, nodes, steps), dims.of(conv), dims.of(weight)
    if kernels is None or rows is None or shape is None:
        return None
    out, channels = _by_sample(nodes.after(conv, steps), nodes, (shape[0], rows[0], *shape[2:]))
    if out is None or not channels:
        return None
    each, rest = divmod(nodes.affine[kernels].op.out_channels, channels)
    if rest or product(rows[1:]) != Size(each):
        return None
    if bias is not None:
        bias = _mixed(bias, conv, nodes, steps)
        if bias is None or nodes.affine[bias].op.out_channels != channels:
            return None
    return Dynamic(conv, out, channels, each, kernels, bias)


def _mixed(node: Any, reader: Node, nodes: Nodes, steps: Mapping[Node, Affine]) -> Node | None:
    """The product with a constant bank behind reshapes that nobody else reads; None for a constant too."""
    for here, step in nodes.before(node, reader, steps):
        if step.op.weighted and step.op.spatial == 0:
            return here
        call = nodes.shapings.get(here)
        if call is None or call.op not in RESHAPES:
            break
    return None


def _by_sample(run: Run, nodes: Nodes, shape: tuple[Size, ...]) -> tuple[Node | None, int]:
    """The reshape in the run after a convolution in which the channels of each sample are axis 1, and their number."""
    swapped = False
    for node, _ in run:
        call, found = nodes.shapings.get(node), nodes.dims.of(node)
        if call is not None and call.op in ("permute", "transpose") and not swapped and shape[0] == ONE:
            swapped = order_of(call, len(shape)) == (1, 0, *range(2, len(shape)))
            if swapped:
                continue
        if call is None or call.op not in RESHAPES or found is None or len(found) < 3:
            break
        if found[2:] != shape[2:] and product(found[:2]) != product(shape[:2]):  # either, as the whole is equal
            break
        return node, 0 if found[1].unknowns else found[1].factor
    return None, 0


def _factors(dynamic: Dynamic, nodes: Nodes, shifts: bool = False) -> dict[Node, Operator]:
    """The factors after a dynamic convolution, each read by the next alone, that it could take with `shifts`."""
    takes = shifts or dynamic.bias is not None

    def fits(factor: tuple[Node, Affine]) -> bool:
        op = factor[1].op
        return (takes or not op.bias) and (op.spatial is None or op.out_channels == dynamic.channels)

    factors = factors_of(nodes.after(dynamic.out))
    return {node: factor.op for node, factor in takewhile(fits, factors.items())}


def repeated(op: Operator, channels: int, each: int, shift: bool = False) -> Operator:
    """A factor a channel as one for each of the `each` numbers in a row that make a channel, with or without shift."""
    spatial, times = (None, 1) if op.spatial is None else (0, each)
    consts = (("start", 0), ("each", times))
    return op.on_layout(spatial, channels * each, law="repeated", operands=(op,), consts=consts, bias=shift)
