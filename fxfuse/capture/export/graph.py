"""The graph of an ExportedProgram, written anew over the model's own parameters and buffers.

Its inputs are the parameters of the model's forward and its output has the structure of the forward's,
so it is an ordinary graph: it can be pickled, traced and exported again. It begins with checks of all
that torch.export decided on the way, and each node notes what is thereby certain of its shape.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict, namedtuple
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from fxfuse.attributes import attribute, tensor_at
from fxfuse.capture.captured import KNOWN, Captured
from fxfuse.capture.example_inputs import Part, parts
from fxfuse.capture.export.conditions import VARIES, Conditions, InputChecks, number
from fxfuse.capture.export.outputs import recipe, remade
from fxfuse.names import plain
from fxfuse.refusal import CaptureError

_KEPT = ("nn_module_stack", "stack_trace")
_MODES = {
    "wrap_with_set_grad_enabled": "switches gradients off or on",
    "_set_grad_enabled": "switches gradients off or on",
    "wrap_with_autocast": "enters torch.autocast",
    "_enter_autocast": "enters torch.autocast",
}
_PLAIN = (bool, int, float, str, type(None))
_ARITHMETIC = ("_operator", "math")


def rebuild(
    model: nn.Module, inputs: tuple[Any, ...], program: Any, holds: Conditions, checks: bool = True
) -> Captured:
    """The graph of `program`, which was exported from `model` for inputs like `inputs` and holds where `holds` does.

    With `checks` it begins with assertions of all that it holds for.

    Raises:
        CaptureError: it holds what a graph of tensors cannot: another gradient mode, autocast, control
            flow operators, objects that are no tensors.
    """
    new = _Rebuilder(model, program)
    general = new.arguments(parts(model, inputs), holds, checks)
    for node in new.source.graph.nodes:
        if node.op == "output":
            new.output(node)
        elif node.op == "call_function":
            new.copy(node)
    return Captured(new.graph, model, new.constants, how="export", general=general)


class _Rebuilder:
    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model, self.program = model, program
        self.source: GraphModule = program.module(check_guards=False)
        self.graph = Graph()
        self.nodes: dict[Node, Any] = {}  # by node of the program
        self.state: dict[str, Node] = {}
        self.constants: dict[str, Tensor] = {}
        named = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
        self.paths = {id(tensor): path for path, tensor in reversed(named)}  # the first of each

    def arguments(self, given: Sequence[Part], holds: Conditions, checks: bool) -> bool:
        """One placeholder a parameter of the forward, and checks, if wanted, of all that is taken for granted of them.

        Numbers, strings and the lengths of containers are held to those of the examples, and parameters that are
        left out to their defaults: with any of these the graph does not hold for every batch and size, as it does
        where nothing but numbers of channels is taken for granted. Whether it does is returned.
        """
        made, left_out = self._placeholders({p.name for p in given})
        check, placeholders = (
            InputChecks(self.graph, made, checks),
            iter(self.source.graph.find_nodes(op="placeholder")),
        )
        for part in given:
            if part.leaf:
                node = next(placeholders)
                self.nodes[node] = check.value(part.name, part.value)
                self._know(self.nodes[node], node)
            else:
                check.length(part.name, len(part.value))
        for name, default in left_out.items():
            check.value(name, default)
        for text, place in holds.items() if checks else ():
            check.condition(text, place)
        channels = all(re.fullmatch(r".*\.size\(1\) == \d+", text) for text in holds)
        return channels and not left_out and all(p.leaf and isinstance(p.value, Tensor) for p in given)

    def _placeholders(self, given: Collection[str]) -> tuple[dict[str, Node], dict[str, Any]]:
        """One a parameter that is given or has a plain default, and the defaults of those that are not given."""
        made, left_out = dict[str, Node](), dict[str, Any]()
        for name, parameter in inspect.signature(self.model.forward).parameters.items():
            default = parameter.default if isinstance(parameter.default, _PLAIN) else inspect.Parameter.empty
            if name not in given and default is inspect.Parameter.empty:
                continue
            star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
            made[name] = self.graph.placeholder(star + name, default_value=default)
            if name not in given:
                left_out[name] = default
        return made, left_out

    def copy(self, node: Node) -> None:
        """One operation, on the values of the new graph."""
        name = plain(node.target)
        if isinstance(node.target, HigherOrderOperator) or name in _MODES:
            does = _MODES.get(name, f"uses {name}")
            raise CaptureError(f"the forward {does}, which a graph cannot hold{_line(node)}")
        if name == "_has_compatible_shallow_copy_type":  # all that torch.export notes of the assignment
            raise CaptureError(f"the forward assigns to .data of a tensor, which a graph cannot hold{_line(node)}")
        if name == "_assert_tensor_metadata":
            return  # dtypes follow from those of the inputs, which are checked
        if name == "detach_" and isinstance(made := node.args[0], Node) and plain(made.target) == "lift_fresh_copy":
            self.nodes[node] = self.nodes[made]  # a number or list made a tensor, which has no gradient yet
            return
        new = self.graph.node_copy(node, self._value)
        new.type, new.meta = None, {k: node.meta[k] for k in _KEPT if k in node.meta}
        self._know(new, node)
        self.nodes[node] = new

    def output(self, node: Node) -> None:
        leaves = iter([self._value(v) if isinstance(v, Node) else v for v in pytree.tree_leaves(node.args[0])])
        self.graph.output(self._nested(self.program.call_spec.out_spec, leaves))

    def _nested(self, spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
        """The structure of `spec` around values of the graph."""
        if spec.is_leaf():
            return next(leaves)
        parts = [self._nested(child, leaves) for child in spec.children()]
        if spec.type in (tuple, list, dict, namedtuple):
            return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(parts, spec.context)
        if spec.type is OrderedDict:
            return self._made(OrderedDict, list(zip(spec.context, parts, strict=True)))
        return self._made(remade, *recipe(spec), parts)

    def _made(self, function: Any, *args: Any) -> Node:
        made = self.graph.call_function(function, args)
        made.meta["is_wrapped"] = True  # so that torch.fx can trace it again, when the graph is unpickled
        return made

    def _value(self, node: Node) -> Any:
        if node.op != "get_attr":
            return self.nodes[node]
        path = self._path(str(node.target))
        if path not in self.state:
            self.state[path] = self.graph.get_attr(path)
            self._know(self.state[path], node)
        return self.state[path]

    def _path(self, target: str) -> str:
        """Where the model holds a tensor of the program; a name of its own for one that only the program has."""
        tensor = attribute(self.source, target)
        if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
            raise CaptureError(f"the forward uses {target}, a {type(tensor).__name__} that a graph cannot hold")
        if id(tensor) in self.paths:
            return self.paths[id(tensor)]
        if tensor_at(self.model, target) is tensor:
            return target
        name = target.replace(".", "_")
        while hasattr(self.model, name) or self.constants.get(name, tensor) is not tensor:
            name += "_"
        self.constants[name] = tensor
        return name

    def _know(self, new: Node, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            varies = node.meta.get(VARIES, ())
            sizes = tuple(None if dim in varies else number(size) for dim, size in enumerate(value.shape))
            new.meta[KNOWN] = (sizes, value.dtype)


def sweep(graph: Graph) -> None:
    """Take out what nobody reads and nobody would miss: sizes, questions, and operations that only compute."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and _only_computes(node):
            graph.erase_node(node)


def _only_computes(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if not isinstance(node.target, OpOverload):
        return node.op == "call_function" and getattr(node.target, "__module__", "") in _ARITHMETIC
    target = node.target
    asserts = not target._schema.returns or "assert" in str(target)
    return not asserts and not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _line(node: Node) -> str:
    trace = str(node.meta.get("stack_trace", "")).strip().splitlines()
    place = [line.strip() for line in trace if line.strip().startswith("File ")]
    return f" ({place[-1]})" if place else ""
