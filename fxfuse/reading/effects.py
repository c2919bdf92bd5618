"""Who writes what in place, and who may share memory with whom.

Two values that may share storage are in one class. A write is harmless when every later reader
of its class goes through the writer's own result (`x = relu_(x)`); the class of any other write
is pinned: its members are read at the very place where the model reads them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxfuse.capture.guards import storage
from fxfuse.capture.tracer import has_hooks
from fxfuse.facts.sizes import asks
from fxfuse.names import is_aten, plain
from fxfuse.ops import schema
from fxfuse.ops.call import Call
from fxfuse.ops.deformable import is_deformable
from fxfuse.ops.modules import layer_type

_INPLACE_OPERATORS = {getattr(operator, n) for n in dir(operator) if n.startswith("i") and n[1:] in dir(operator)}
_INPLACE_OPERATORS |= {operator.setitem, operator.delitem}
_INPLACE_OPERATORS -= {operator.index, operator.inv, operator.invert}

_BY_STRIDES = ("flatten", "reshape", "reshape_as", "contiguous")  # a view or a copy, as the strides allow
_OVERLAPPING = ("unfold", "as_strided")  # views that hold one number at several places
_FRESH_CALLS = {"conv", "conv_transpose", "linear", "batch_norm", "avg_pool", "add", "sub", "mul", "div", "neg"}
_FRESH_CALLS |= {"cat", "pad", "flip", "index_select", "mm", "deform"}
_FRESH_NAMES = set(
    "relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid softmax log_softmax leaky_relu elu mish "
    "softplus matmul bmm mm max_pool1d max_pool2d max_pool3d adaptive_avg_pool2d adaptive_max_pool2d layer_norm "
    "group_norm mean sum amax amin exp sqrt rsqrt pow abs clone clamp interpolate stack max min eq ne lt gt "
    "scaled_dot_product_attention float_power round floor ceil size dim getattr _assert".split()
)
_FRESH_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softmax,
    nn.LeakyReLU, nn.ELU, nn.Mish, nn.PReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LayerNorm, nn.GroupNorm,
    nn.AdaptiveAvgPool2d, nn.Embedding, nn.Upsample,
)  # fmt: skip


_ASKED = {f"sym_{n}": "shape" for n in ("size", "numel", "stride", "storage_offset")}
_ASKED |= {"size": "shape", "numel": "shape", "dim": "rank", "is_floating_point": "dtype", "is_complex": "dtype"}


class Effects:
    """Alias classes and writes of one graph. Positions count nodes in execution order."""

    def __init__(self, graph: Graph, calls: Mapping[Node, Call], modules: Mapping[str, nn.Module]) -> None:
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.last_use = {n: max((self.position[u] for u in n.users), default=-1) for n in graph.nodes}
        self.classes: UnionFind[Node] = UnionFind()
        self.writes: dict[Node, list[Node]] = {}
        self._modules = modules
        self._own_writes: list[Tensor] = []
        for node in graph.nodes:
            if node.op == "call_module":
                self._own_writes += _own_writes(modules[str(node.target)])
            targets = _written(node, calls.get(node), modules)
            if targets:
                self.writes[node] = targets
            for source in (*targets, *_shared(node, targets, calls.get(node), modules)):
                self.classes.union(node, source)
        self._members: dict[Node, list[Node]] = {}
        if self.writes:
            for node in graph.nodes:
                self._members.setdefault(self.classes[node], []).append(node)

    def forget(self, nodes: Iterable[Node]) -> None:
        """Leave these writers out: the view has read them as something that is no write."""
        for node in nodes:
            self.writes.pop(node, None)

    def written_attributes(self) -> set[str]:
        """Paths of parameters and buffers that the forward itself may change, each by all its names."""
        if not self.writes and not self._own_writes:
            return set()
        paths = {
            str(n.target)
            for targets in self.writes.values()
            for t in targets
            for n in self._members[self.classes[t]]
            if n.op == "get_attr"
        }
        root = self._modules[""]
        state = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        written = {storage(t) for p, t in state if p in paths} | {storage(t) for t in self._own_writes}
        return paths | {p for p, t in state if storage(t) in written}

    def written(self) -> set[Node]:
        """Every value that the forward may change in place, or through a view of it."""
        roots = {self.classes[t] for targets in self.writes.values() for t in targets}
        return {m for root in roots for m in self._members[root]}

    def private_write(self, writer: Node) -> bool:
        """Whether nothing but the writer's result can see that `writer` wrote."""
        return all(self.private(target, writer) for target in self.writes.get(writer, ()))

    def private(self, value: Node, writer: Node) -> bool:
        """Whether nothing but the writer's result could see that `writer` wrote the memory of `value`."""
        at, members = self.position[writer], self._members[self.classes[value]]
        if any(plain(m.target) in _OVERLAPPING or m.op in ("placeholder", "get_attr") for m in members):
            return False  # what is written to one place may be read at another
        return not any(self.position[m] < at and self.last_use[m] > at for m in members)

    def by_strides(self) -> Node | None:
        """An operator that writes, of which it depends on the strides of a computed tensor what is read after it."""
        for writer, targets in self.writes.items():
            if writer.op == "call_module" and not getattr(self._modules[str(writer.target)], "inplace", False):
                continue  # it may write, for all that is known
            at = self.position[writer]
            for target in targets:
                members = self._members[self.classes[target]]
                for member in (m for m in members if self.position[m] < at and self._by_strides(m)):
                    behind = {member}  # what may lie in a memory of its own
                    for other in members:
                        behind |= {other} if not behind.isdisjoint(other.all_input_nodes) else set()
                    apart = [m for m in members if (m in behind) != (target in behind) and m is not writer]
                    if any(self.position[u] > at and not asks(u) for m in apart for u in m.users):
                        return writer
        return None

    def _by_strides(self, node: Node) -> bool:
        if node.all_input_nodes[:1] and node.all_input_nodes[0].op == "placeholder":
            return False  # its strides are the caller's
        if node.op == "call_module":
            return isinstance(self._modules[str(node.target)], (nn.Flatten, nn.Unflatten))
        return plain(node.target) in _BY_STRIDES

    def writers(self, value: Node) -> list[Node]:
        """The nodes that may write `value` or something that shares its memory: all are in its class."""
        return [m for m in self._members[self.classes[value]] if m in self.writes] if self.writes else []

    def writes_itself(self, value: Node) -> Node | None:
        """A node that writes `value`, or a view of it, and reads the same memory by another name."""
        root = self.classes[value]
        for writer, targets in self.writes.items():
            readings = sum(self.classes[n] == root for n in writer.all_input_nodes)
            if readings > 1 and any(self.classes[t] == root for t in targets):
                return writer
        return None

    def written_between(self, value: Node, start: int, stop: int, inside: Iterable[Node]) -> Node | None:
        """A node after `start` and before `stop`, not in `inside`, that may write `value`."""
        own = set(inside)
        between = (w for w in self.writers(value) if w not in own and start < self.position[w] < stop)
        return next(between, None)


def _written(node: Node, call: Call | None, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The tensors that `node` may write."""
    if isinstance(node.target, OpOverload):
        return schema.written(node)
    if call is not None and call.op == "batch_norm" and call.args["training"] is not False:
        return [v for n in ("running_mean", "running_var") if isinstance(v := call.args[n], Node)]
    out = node.kwargs.get("out")
    if out is not None:
        return [n for n in node.all_input_nodes if n is out or (isinstance(out, (tuple, list)) and n in out)]
    if (call is not None and call.inplace) or _writes_first(node, modules):
        first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        several = first if isinstance(first, (list, tuple)) else [first]  # torch._foreach_add_ writes a list
        return [n for n in several if isinstance(n, Node)]
    if node.op == "call_module" and not _known(modules[str(node.target)]):
        return node.all_input_nodes
    return _statistics(node, call)


def _statistics(node: Node, call: Call | None) -> list[Node]:
    """The running statistics that a function updates."""
    if call is not None and call.op == "batch_norm":
        found = [call.args[n] for n in ("running_mean", "running_var") if call.args["training"]]
        return [n for n in found if isinstance(n, Node)]
    known = getattr(node.target, "__name__", "") in ("batch_norm", "instance_norm", "native_batch_norm")
    return node.all_input_nodes[1:] if known and call is None else []


def _known(module: nn.Module) -> bool:
    """Whether a call is a layer of torch.nn, or torchvision's deformable one, and nothing more."""
    own = type(module).__module__.startswith("torch.nn.modules") and not any(module.children())
    own = own or layer_type(module) is not None or is_deformable(module)
    return own and not has_hooks(module) and "forward" not in module.__dict__


def _own_writes(module: nn.Module) -> list[Tensor]:
    """The tensors of its own that a call of the module may write."""
    if not _known(module):
        return [*module.parameters(), *module.buffers()]
    if getattr(module, "max_norm", None) is not None:  # an embedding that renormalizes its rows
        return list(module.parameters())
    return list(module.buffers()) if module.training else []  # running statistics


def _writes_first(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if node.op != "call_function":
        return False
    if node.target in _INPLACE_OPERATORS:
        return True
    name = plain(node.target)
    if name.endswith("_") and not name.endswith("__"):
        return True
    return bool(_inplace_argument(node))


def _inplace_argument(node: Node) -> Any:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"]
    if getattr(node.target, "__module__", "") != "torch.nn.functional" or len(node.args) < 2:
        return False
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins without a signature have no inplace argument
        return False
    index = names.index("inplace") if "inplace" in names else len(node.args)
    return node.args[index] if index < len(node.args) else False


def _shared(node: Node, targets: list[Node], call: Call | None, modules: Mapping[str, nn.Module]) -> list[Node]:
    """The arguments whose memory the result may share, beside those it writes."""
    if isinstance(node.target, OpOverload):
        return schema.shared(node)
    return [] if targets or fresh(node, call, modules) else node.all_input_nodes


def fresh(node: Node, call: Call | None, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result certainly shares no memory with any argument."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if call is not None and call.op in _FRESH_CALLS:
        return True
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in _FRESH_MODULES and not has_hooks(module)
    name = plain(node.target)
    if name == "getattr":
        return len(node.args) > 1 and node.args[1] in ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
    return name in _FRESH_NAMES


def shape_reader(node: Node) -> str | None:
    """What a node asks of its input when it reads no data: "rank", "dtype", "shape" or None."""
    if isinstance(node.target, OpOverload):
        return _ASKED.get(plain(node.target))
    if node.op == "call_function" and node.target is getattr:
        asked = {"ndim": "rank", "dtype": "dtype", "device": "dtype", "is_cuda": "dtype", "shape": "shape"}
        return asked.get(str(node.args[1]))
    if node.op == "call_method":
        asked = {"dim": "rank", "ndimension": "rank", "size": "shape", "is_floating_point": "dtype", "numel": "shape"}
        return asked.get(str(node.target))
    if node.op == "call_function" and node.target in (torch.is_floating_point, torch.numel):
        return "shape" if node.target is torch.numel else "dtype"
    return None


def asks_size(user: Node, node: Node) -> bool:
    """Whether `user` reads nothing but the size of `node`."""
    if shape_reader(user) == "shape":
        return True
    method = user.op == "call_method" or is_aten(user)
    like = method and plain(user.target) in ("reshape_as", "view_as", "expand_as")
    return like and len(user.args) == 2 and user.args[1] is node and user.args[0] is not node


def rank_check(node: Node) -> tuple[Node, int] | None:
    """(tensor, rank) of `assert x.ndim == rank`, also spelled `x.dim() == rank`; None for any other node."""
    if node.op != "call_function" or plain(node.target) != "_assert":
        return None
    condition = node.args[0]
    if not isinstance(condition, Node) or condition.target is not operator.eq:
        return None
    asked, rank = condition.args[:2]
    tensor = asked.args[0] if isinstance(asked, Node) and shape_reader(asked) == "rank" else None
    return (tensor, rank) if isinstance(tensor, Node) and isinstance(rank, int) else None
