"""ATen operators, as torch.export and decompositions spell them, read into canonical calls.

Arguments are bound by each operator's own schema, so a table of names is all that most need. A
slice that is written to (`x[:, :, 0:1] = v` is `slice`, `slice`, `copy_`) reads as the assignment
it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.fx import Node

from fxfuse.names import is_aten, plain
from fxfuse.ops.call import FUNCTIONS, Call
from fxfuse.ops.index_lists import fixed
from fxfuse.ops.modules import TYPES
from fxfuse.ops.schema import bound

END = 2**63 - 1  # how a slice without an end is written

# operator: canonical name and, where the name fixes them, the spatial dims; most are called as the function is
OPERATORS: dict[str, tuple[str, int | None]] = {
    **{function.__name__: (known.op, known.spatial) for function, known in FUNCTIONS.items()},
    **dict.fromkeys(("feature_dropout", "alpha_dropout", "feature_alpha_dropout"), ("dropout", None)),
    "split_with_sizes": ("split", None),
    "alias": ("identity", None),
    "_native_batch_norm_legit_no_training": ("batch_norm_outputs", None),
}
# Of all operators, before `_SPECIAL` sees them; what the keywords of functions are called besides stands in `call`.
_RENAMED = {"self": "input", "mat2": "other", "train": "training", "split_sizes": "split_size"}


def read(node: Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """The canonical call behind an ATen operator, or None for what fxfuse has no name for."""
    values = bound(node)
    if values is None:
        return None
    name, args = plain(node.target), {_RENAMED.get(k, k): v for k, v in values.items()}
    if name in ("copy_", "fill_"):
        return _assignment(node, args)
    inplace = name.endswith("_") and not name.endswith("__")
    path, name = layer_path(node, modules), name.rstrip("_") if inplace else name
    if name in OPERATORS:
        op, spatial = OPERATORS[name]
        return Call(op, args, spatial, path, inplace)
    special = _SPECIAL.get(name)
    call = special(args) if special else None
    return None if call is None else Call(call.op, call.args, call.spatial, path, inplace)


def read_output(node: Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """`getitem(batch_norm_outputs, 0)`: the batch norm itself."""
    source, index = node.args[:2]
    if isinstance(source, Node) and is_aten(source) and index == 0:
        outputs = read(source, modules)
        if outputs is not None and outputs.op == "batch_norm_outputs":
            return Call("batch_norm", outputs.args | {"training": False}, path=outputs.path)
    return None


def layer_path(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """The layer of torch.nn whose forward made this node, as its `nn_module_stack` tells; "" if none did."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path if isinstance(modules.get(path), TYPES) else ""


def views(node: Any) -> list[Node]:
    """The slices between what an assignment writes to and the whole tensor, the last one first."""
    found = []
    while isinstance(node, Node) and is_aten(node) and plain(node.target) in ("slice", "alias"):
        found.append(node)
        node = _read(node)
    return found


def _read(node: Node) -> Any:
    """The tensor that an operator reads first."""
    return (bound(node) or {}).get("self")


def whole_slice(node: Node) -> bool:
    """Whether an ATen operator is a slice of everything, which is the tensor itself."""
    return plain(node.target) == "slice" and _cut(bound(node)) == slice(None)


def _assignment(node: Node, args: dict[str, Any]) -> Call | None:
    """`copy_` or `fill_` of slices of a tensor as `tensor[index] = value`."""
    cuts: dict[int, slice] = {}
    chain = views(args["input"])
    for view in chain:
        values = bound(view) if plain(view.target) == "slice" else None
        cut = _cut(values)
        if values is None or cut == slice(None):
            continue
        if cut is None or not isinstance(values["dim"], int) or values["dim"] < 0 or values["dim"] in cuts:
            return None
        cuts[values["dim"]] = cut
    if not cuts or node.users:
        return None
    index = tuple(cuts.get(d, slice(None)) for d in range(max(cuts) + 1))
    value = args.get("value", args.get("src"))
    while isinstance(value, Node) and is_aten(value) and plain(value.target) in ("expand", "expand_as"):
        value = _read(value)  # a copy broadcasts by itself
    return Call("setitem", {"input": _read(chain[-1]), "index": index, "value": value}, inplace=True)


def _cut(args: Mapping[str, Any] | None) -> slice | None:
    """The Python slice of an `aten.slice`; None where a bound is only known when the model runs."""
    if args is None or not fixed(slice(args["start"], args["end"], args["step"])):
        return None
    end, step = args["end"], args["step"]
    return slice(args["start"] or None, None if end == END else end, None if step == 1 else step)


def _slice(args: dict[str, Any]) -> Call | None:
    """A slice of everything is the tensor; one of the channels selects them."""
    cut = _cut(args)
    if cut == slice(None):
        return Call("identity", {"input": args["input"]})
    if cut is None or args["dim"] != 1:
        return None
    return Call("getitem", {"input": args["input"], "index": (slice(None), cut)})


def _convolution(args: dict[str, Any]) -> Call | None:
    spatial = max(len(args[n]) for n in ("stride", "padding", "dilation"))
    op = {False: "conv", True: "conv_transpose"}.get(args["transposed"])
    return None if op is None else Call(op, args, spatial)


def _reversed_sub(args: dict[str, Any]) -> Call:
    return Call("sub", args | {"input": args["other"], "other": args["input"]})


def _pad(args: dict[str, Any], mode: str) -> Call:
    amounts = args["pad" if mode == "constant" else "padding"]
    return Call("pad", {"input": args["input"], "pad": amounts, "mode": mode, "value": args.get("value")})


def _addmm(args: dict[str, Any]) -> Call | None:
    """bias + x @ W.t(), which is what a linear layer is decomposed to; readers of layers ask if W is a constant."""
    if (args["beta"], args["alpha"]) != (1, 1):
        return None
    weight = _untransposed(args["other"])
    found = {"input": args["mat1"], "weight": weight, "bias": args["input"]}
    return None if weight is None else Call("linear", found, 0)


def _untransposed(value: Any) -> Node | None:
    """`w` for `w.t()`, `w.transpose(0, 1)` and `w.permute(1, 0)`; a linear layer takes no `w` but of two dims."""
    args = bound(value) if isinstance(value, Node) and is_aten(value) else None
    if args is None or not isinstance(args.get("self"), Node):
        return None
    name = plain(value.target)
    swaps = name == "t" or (name == "permute" and list(args["dims"]) == [1, 0])
    swaps |= name == "transpose" and {args["dim0"], args["dim1"]} in ({0, 1}, {-2, -1})
    return args["self"] if swaps else None


_SPECIAL: dict[str, Callable[[dict[str, Any]], Call | None]] = {
    "slice": _slice,
    "convolution": _convolution,
    "_convolution": _convolution,
    "rsub": _reversed_sub,
    "constant_pad_nd": partial(_pad, mode="constant"),
    **{f"reflection_pad{d}d": partial(_pad, mode="reflect") for d in (1, 2, 3)},
    **{f"replication_pad{d}d": partial(_pad, mode="replicate") for d in (1, 2, 3)},
    "addmm": _addmm,
}
