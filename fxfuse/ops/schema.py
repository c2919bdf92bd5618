"""What the schema of an operator (`aten.conv2d.default`) says of a call: arguments, writes, shared memory, purity."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxfuse.names import operator_name, plain
from fxfuse.ops.elementwise import ELEMENTWISE

# Without a kernel of its own (CompositeImplicitAutograd) an operator may return an argument and not say so
# (`dropout`, `type_as`); these never do. Of those with kernels, only these may.
_FRESH = set(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm matmul layer_norm "
    "group_norm instance_norm rms_norm pad max_pool1d max_pool2d max_pool3d avg_pool1d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d softmax log_softmax scaled_dot_product_attention embedding stack cat "
    "concat concatenate hstack vstack tile where multiply subtract divide true_divide size sym_size sym_numel".split()
)
_SHARES = {"channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}


def bound(node: Node) -> dict[str, Any] | None:
    """Arguments of a call by their names in the schema, defaults included; None where they do not fit it."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    names = [a.name for a in arguments]
    positional = [a.name for a in arguments if not a.kwarg_only]
    if len(node.args) > len(positional) or any(k not in names for k in node.kwargs):
        return None
    values = {a.name: a.default_value for a in arguments if a.has_default_value()}
    values |= dict(zip(positional, node.args, strict=False)) | node.kwargs
    return values if len(values) == len(names) else None


def written(node: Node) -> list[Node]:
    """The tensors a call writes: those its schema marks, and the running statistics of a norm in training."""
    assert isinstance(node.target, OpOverload)
    values = bound(node)
    if values is None:
        return node.all_input_nodes if node.target._schema.is_mutable else []
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if values.get("training", values.get("use_input_stats", False)) is not False:
        names += ["running_mean", "running_var"]
    return nodes(values.get(n) for n in names)


def shared(node: Node) -> list[Node]:
    """The arguments whose memory the result may share."""
    assert isinstance(node.target, OpOverload)
    schema, values = node.target._schema, bound(node)
    if not any("Tensor" in str(r.type) for r in schema.returns):
        return []
    names = [a.name for a in schema.arguments if a.alias_info is not None]
    if values is not None and names:
        return nodes(values[n] for n in names)
    name = plain(node.target)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(operator_name(node.target), "CompositeImplicitAutograd")
    return node.all_input_nodes if name in _SHARES or (composite and not _fresh(name)) else []


def _fresh(name: str) -> bool:
    return name in _FRESH or name in ELEMENTWISE or name == "log_sigmoid" or name.startswith("upsample_")


def pure(node: Node) -> bool:
    """Whether a call is a function of its arguments alone, with a result whose shape follows from theirs."""
    op = node.target
    assert isinstance(op, OpOverload)
    impure = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return op.namespace == "aten" and not op._schema.is_mutable and impure.isdisjoint(op.tags)


def nodes(values: Iterable[Any]) -> list[Node]:
    """The nodes among values and in the lists among them."""
    return [n for n in tree_leaves(list(values)) if isinstance(n, Node)]
