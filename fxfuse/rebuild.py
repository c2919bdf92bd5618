"""The graph of an ExportedProgram, written anew over the model's own parameters and buffers.

Its inputs are the parameters of the model's forward and its output has the structure of the forward's,
so it is an ordinary graph: it can be pickled, traced and exported again. It begins with checks of all
that torch.export decided on the way, and each node notes what is thereby certain of its shape.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import Captured
from .fact import KNOWN
from .fold import tensor_at
from .input_checks import InputChecks, readable
from .names import plain
from .refusal import CaptureError

_KEPT = ("nn_module_stack", "stack_trace")
_MODES = {
    "wrap_with_set_grad_enabled": "switches gradients off or on",
    "_set_grad_enabled": "switches gradients off or on",
    "wrap_with_autocast": "enters torch.autocast",
    "_enter_autocast": "enters torch.autocast",
}
_PLAIN = (bool, int, float, str, type(None))
_TORCH = os.path.dirname(torch.__file__) + os.sep


def rebuild(model: nn.Module, inputs: tuple[Any, ...], program: Any) -> Captured:
    """The graph of `program`, which was exported from `model` with `inputs`.

    Raises:
        CaptureError: it holds what a graph of tensors cannot: another gradient mode, autocast, control
            flow operators, objects that are no tensors.
    """
    new = _Rebuilder(model, program)
    new.arguments(inspect.signature(model.forward), inputs)
    new.checks()
    for node in new.source.graph.nodes:
        if node.op == "output":
            new.output(node)
        elif node.op == "call_function":
            new.copy(node)
    return Captured(new.graph, model, new.constants, how="export", general=new.general())


class _Rebuilder:
    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model, self.program = model, program
        self.source: GraphModule = program.module(check_guards=False)
        self.graph = Graph()
        self.nodes: dict[Node, Any] = {}  # by node of the program
        self.state: dict[str, Node] = {}
        self.constants: dict[str, Tensor] = {}
        self.inputs: dict[str, Node] = {}  # by expression (`xs[0]`), containers included
        self.values: dict[str, Any] = {}  # the tensors and numbers among them, in the order of the program
        self.notes: dict[str, str] = {}  # how the program's conditions name those
        self.containers: dict[str, int] = {}
        self.left_out: dict[str, Any] = {}
        self.paths: dict[int, str] = {}
        named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for path, tensor in (pair for pairs in named for pair in pairs):
            self.paths.setdefault(id(tensor), path)

    def arguments(self, signature: inspect.Signature, inputs: tuple[Any, ...]) -> None:
        """One placeholder a parameter of the forward; those that `inputs` leave out are held to their default."""
        given = signature.bind(*inputs).arguments
        for name, parameter in signature.parameters.items():
            plain_default = isinstance(parameter.default, _PLAIN)
            default = parameter.default if plain_default else inspect.Parameter.empty
            if name in given:
                star = "*" if parameter.kind is inspect.Parameter.VAR_POSITIONAL else ""
                self.inputs[name] = self.graph.placeholder(star + name, default_value=default)
            elif plain_default:
                self.inputs[name] = self.graph.placeholder(name, default_value=default)
                self.left_out[name] = default
        for name, value in given.items():
            self._below(name, f"L['{name}']", value)

    def _below(self, name: str, note: str, value: Any) -> None:
        """Take every tensor and number below an argument out of its container."""
        parts, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)
        if len(parts) == 1 and parts[0][1] is value:
            self.values[name], self.notes[note] = value, name
            return
        self.containers[name] = len(value)
        for (key,), part in parts:
            take, index = (getattr, key.name) if isinstance(key, pytree.GetAttrKey) else (operator.getitem, _index(key))
            self.inputs[f"{name}{key}"] = self.graph.call_function(take, (self.inputs[name], index))
            self._below(f"{name}{key}", f"{note}{key}", part)

    def checks(self) -> None:
        """Checks of rank, dtype and sizes of every input, and of what the forward decided by them."""
        check = InputChecks(self.graph, self.inputs)
        for name, count in self.containers.items():
            check.length(name, count)
        placeholders = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        for (name, example), node in zip(self.values.items(), placeholders, strict=True):
            self.nodes[node] = self.inputs[name]
            self._know(self.inputs[name], node)
            check.value(name, example)
        for name, default in self.left_out.items():
            check.value(name, default)
        first: dict[str, str] = {}
        for (name, example), node in zip(self.values.items(), placeholders, strict=True):
            for dim, size in enumerate(node.meta["val"].shape if isinstance(example, Tensor) else ()):
                for condition in self._bounds(f"{name}.size({dim})", size, first):
                    check.condition(condition)
        for guard, place in zip(self.program._guards_code, self._places(), strict=True):
            check.condition(readable(guard, self.notes), place)

    def general(self) -> bool:
        """Whether the graph holds for every batch and size: nothing was decided by them, channels aside."""
        tensors = [n for n in self.source.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]
        fixed = [d for n in tensors for d, s in enumerate(n.meta["val"].shape) if _number(s) is not None]
        return not self.program._guards_code and set(fixed) <= {1} and not self.left_out

    def _bounds(self, text: str, size: Any, first: dict[str, str]) -> Iterator[str]:
        """What the program takes for granted of one size beside its conditions; `first` are sizes seen before."""
        number = _number(size)
        if number is not None:
            yield f"{text} == {number}"
            return
        expression = size.node.expr
        if str(expression) in first:
            yield f"{text} == {first[str(expression)]}"
        first.setdefault(str(expression), text)
        bounds = self.program.range_constraints.get(expression)
        if bounds is not None and bounds.lower > 0:
            yield f"{text} >= {bounds.lower}"
        if bounds is not None and bounds.upper < 2**62:
            yield f"{text} <= {bounds.upper}"

    def _places(self) -> list[str]:
        """The line of the model that each condition comes from; "" for those of torch itself."""
        sizes = [s for n in self.source.graph.nodes for s in _sizes(n.meta.get("val")) if _number(s) is None]
        guards = sizes[0].node.shape_env.guards if sizes else []
        codes = self.program._guards_code
        if len(guards) != len(codes):
            return [""] * len(codes)
        frames = [g.sloc.framework_loc for g in guards]
        ours = [not isinstance(f, str) and f is not None and not f.filename.startswith(_TORCH) for f in frames]
        return [f"{f.filename}:{f.lineno}" if own else "" for f, own in zip(frames, ours, strict=True)]

    def copy(self, node: Node) -> None:
        """One operation, on the values of the new graph."""
        name = plain(node.target)
        if isinstance(node.target, HigherOrderOperator) or name in _MODES:
            does = _MODES.get(name, f"uses {name}")
            raise CaptureError(f"the forward {does}, which a graph cannot hold{_line(node)}")
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
        if spec.type in (tuple, list):
            return spec.type(parts)
        if spec.type is dict:
            return dict(zip(spec.context, parts, strict=True))
        if spec.type is namedtuple:
            return spec.context(*parts)
        if spec.type is OrderedDict:
            pairs = list(zip(spec.context, parts, strict=True))
            made = self.graph.call_function(OrderedDict, (pairs,))
            made.meta["is_wrapped"] = True  # so that torch.fx can trace it again, when the graph is unpickled
            return made
        kind = getattr(spec.type, "__name__", spec.type)
        raise CaptureError(f"the forward returns a {kind}; return tensors, or a tuple, list or dict of them")

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
        tensor: Any = self.source
        for name in target.split("."):
            tensor = getattr(tensor, name)
        if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
            raise CaptureError(f"the forward uses {target}, a {type(tensor).__name__} that a graph cannot hold")
        if id(tensor) in self.paths:
            return self.paths[id(tensor)]
        if tensor_at(self.model, target) is not tensor:
            while tensor_at(self.model, target) is not None or self.constants.get(target, tensor) is not tensor:
                target += "_"
            self.constants[target] = tensor
        return target

    def _know(self, new: Node, node: Node) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            new.meta[KNOWN] = (tuple(_number(s) for s in value.shape), value.dtype)


def _index(key: Any) -> Any:
    return key.idx if isinstance(key, pytree.SequenceKey) else key.key


def _sizes(value: Any) -> list[Any]:
    return list(value.shape) if isinstance(value, Tensor) else []


def _number(size: Any) -> int | None:
    """A size that is the same for all inputs."""
    number = size if isinstance(size, int) else size.node.maybe_as_int()
    return None if number is None else int(number)


def _line(node: Node) -> str:
    trace = str(node.meta.get("stack_trace", "")).strip().splitlines()
    place = [line.strip() for line in trace if line.strip().startswith("File ")]
    return f" ({place[-1]})" if place else ""
