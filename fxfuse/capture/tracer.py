"""The tracer: torch.fx's, made faithful.

What torch.fx would drop without a word is recorded, or raises (another gradient mode, autocast). A module
whose forward raises under tracing, or is more than its graph, is kept whole: it stays one call in the graph.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import operator
import threading
from collections import Counter
from contextlib import ExitStack
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer

from fxfuse.algebra.constants import Attr
from fxfuse.capture import questions
from fxfuse.capture.example_inputs import refuse_required
from fxfuse.capture.failures import located
from fxfuse.capture.held import give_back
from fxfuse.capture.known_values import KnownValues
from fxfuse.capture.patches import Recorded, Unseen, patched
from fxfuse.capture.proxies import FuseProxy
from fxfuse.ops.modules import has_hooks, layer_type
from fxfuse.ops.value_kinds import extremes_recorded
from fxfuse.process import LOCK
from fxfuse.refusal import CaptureError

CHECKED = "fxfuse_default"
_RESHAPES = set(
    "squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_ resize_ resize_as_ as_strided_ set_ rename_".split()
)


class FuseTracer(Tracer):
    """Keeps every module whole whose call is more than its forward or cannot be traced.

    Args:
        proxy_buffers: whether a buffer read in a forward becomes a node; a forward that branches on a
            buffer's value traces only with False.
        fix_defaults: number of leading parameters that stay open; those after it that have a default
            are traced with it. None leaves all open.
        none: parameters that are traced as None.
    """

    reading = False  # code of a graph, in which every question is a node

    def __init__(
        self, proxy_buffers: bool = True, fix_defaults: int | None = None, none: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = proxy_buffers
        self.fix_defaults = fix_defaults
        self.none = none
        self.whole: dict[str, str] = {}  # the submodules that stay one call, with what kept them from being traced
        self._parameter_proxies: dict[str, Proxy] = {}
        self._tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        self._modes = _modes()
        self.numbers: dict[Node, bool] = {}  # which nodes give one, as far as that was asked
        self.known = KnownValues(self._tensor)
        forward = type(root).forward if isinstance(root, nn.Module) else root
        if isinstance(root, nn.Module):
            _refuse_what_no_graph_holds(forward)
            self._tensors = dict([*root.named_parameters(), *root.named_buffers()])
            self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._thread = threading.get_ident()
        with LOCK, extremes_recorded(forward), ExitStack() as stack:
            if not self.reading:
                stack.enter_context(patched(self))
                stack.enter_context(Recorded(self))
            return super().trace(root, concrete_args)

    def in_its_thread(self) -> bool:
        """Whether it is the trace that asks: what is patched meanwhile, other threads call too."""
        return threading.get_ident() == self._thread

    def proxy(self, node: Node) -> Proxy:
        return FuseProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer is a node, found by what it is: torch.fx walks all of them for every read."""
        if not self.in_its_thread():
            return attr_val
        self._parameter_proxies = parameter_proxy_cache
        kinds = (Tensor,) if self.proxy_buffer_attributes else (nn.Parameter,)
        name = self._names.get(id(attr_val)) if isinstance(attr_val, kinds) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def decided_by(self, tensor: Tensor) -> None:
        """Note that the forward decides by what a tensor of the model holds."""
        own = {id(t): name for t, name in self.tensor_attrs.items()}
        path = self._names.get(id(tensor), own.get(id(tensor)))
        if path is None:
            raise CaptureError("the forward decides by a tensor of no module, which may be another at the next call")
        self.known.decided[Attr(path, tuple(tensor.shape), tensor.dtype)] = tuple(tensor.flatten().tolist())

    def _tensor(self, path: str) -> Tensor:
        """The tensor that a node reads, of the model or made by the trace itself."""
        if path not in self._tensors:  # a plain attribute: torch.fx answers for parameters alone while it traces
            self._tensors |= {n: t for t, n in self.tensor_attrs.items() if isinstance(t, Tensor)}
            self._tensors |= {n: v for n, v in vars(self.root).items() if isinstance(v, Tensor)}
        return self._tensors[path]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        more = has_hooks(m) or "forward" in m.__dict__ or isinstance(m, torch.jit.ScriptModule)
        return (
            more
            or layer_type(m) is not None
            or module_qualified_name in self.whole
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        name = args[1] if isinstance(args[1], str) else getattr(args[1], "__name__", "")
        if name in _RESHAPES and args[0] in ("call_method", "call_function"):
            raise CaptureError(f"the forward calls {name}, after which the same tensor has another shape")
        node = super().create_node(*args, **kwargs)
        now = _modes()
        if now[1:] != self._modes[1:]:
            raise CaptureError("the forward enters torch.autocast, which a graph cannot hold")
        if now != self._modes:
            raise CaptureError("the forward switches gradients off or on, which a graph cannot hold")
        self.known.recorded(node)
        return node

    def create_arg(self, a: Any) -> Any:
        kept = isinstance(a, dict) and type(a) is not dict and not type(a).__module__.startswith("torch.fx")
        return self._dict(a) if kept else super().create_arg(a)

    def _dict(self, value: Any) -> Node:
        """A dict of another class, which torch.fx would make a plain one: a graph calls the class."""
        cls: Any = type(value)
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            return self.create_node("call_function", cls, (), {n: self.create_arg(v) for n, v in fields.items()})
        try:
            again = cls(dict(value))
        except Exception as error:
            raise CaptureError(f"the forward makes a {cls.__name__}, which a graph cannot") from error
        if type(again) is not cls or list(again) != list(value) or any(again[k] is not v for k, v in value.items()):
            raise CaptureError(f"the forward makes a {cls.__name__}, which is more than its items")
        return self.create_node("call_function", cls, (self.create_arg(dict(value)),), {})

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        code = inspect.unwrap(root_fn).__code__
        if code.co_flags & inspect.CO_VARARGS and code.co_kwonlyargcount:
            raise CaptureError("the forward has keyword-only parameters behind *args, which a graph cannot have")
        refuse_required(root_fn)
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        first = len(args) if self.fix_defaults is None else self.fix_defaults + is_module
        return fn, [self._none(a) if i < first else self._default(a) for i, a in enumerate(args)]

    def _none(self, arg: Any) -> Any:
        node = getattr(arg, "node", None)
        return arg if node is None or str(node.target) not in self.none else self._fixed(arg, None)

    def _default(self, arg: Any) -> Any:
        """The default of a parameter, checked at run time to be what was given."""
        node = getattr(arg, "node", None)
        if node is None or not node.args or isinstance(node.args[0], Tensor):
            return arg
        return self._fixed(arg, node.args[0])

    def _fixed(self, arg: Any, value: Any) -> Any:
        name = str(arg.node.target)
        same = self.create_proxy("call_function", operator.eq, (arg, value), {})
        text = f"the graph was made for {name}={value!r}; optimize with example_inputs that set it"
        check = self.create_proxy("call_function", torch._assert, (same, text), {})
        for proxy in (arg, same, check):
            proxy.node.meta[CHECKED] = value
        return value

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self.submodule_paths is not None and m not in self.submodule_paths  # in the forward itself
        if made or not self.in_its_thread():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        attempts = (True, False) if self.proxy_buffer_attributes else (False,)
        for proxied in attempts:
            if self.is_leaf_module(m, path):
                break
            last, stack = next(reversed(self.graph.nodes), None), list(self.module_stack)
            lists = _lists((args, tuple(kwargs.values())))
            self.proxy_buffer_attributes = proxied
            try:
                _refuse_what_no_graph_holds(type(m).forward)
                return super().call_module(m, forward, args, kwargs)
            except Exception as error:  # it stays one call, which shows the same error when it runs
                for value, before in lists:
                    give_back(value, before)
                self._undo(last, stack)
                if proxied is attempts[-1]:
                    self.whole[path] = located(error)  # the error itself would keep values of the trace alive
            finally:
                self.proxy_buffer_attributes = attempts[0]
        own = type(m).__module__.startswith("torch.nn.") or not self.is_leaf_module(m, path)
        if not own and (_lists(args) or _lists(tuple(kwargs.values()))):
            raise CaptureError(f"a list or dict is handed to {path}, which stays one call and may change it")
        return super().call_module(m, forward, args, kwargs)

    def _undo(self, last: Node | None, stack: list[str]) -> None:
        """Forget what was recorded after node `last`."""
        for key in list(self.module_stack)[len(stack) :]:
            del self.module_stack[key]
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        kept = set(self.graph.nodes)
        for name, proxy in list(self._parameter_proxies.items()):
            if proxy.node not in kept:
                del self._parameter_proxies[name]


class Reader(FuseTracer):
    """Code back into its graph: what torch.fx does when a GraphModule is unpickled, made faithful.

    torch.fx traces the code again, but runs at once what no input goes into: noise would become a constant. Here
    every call in the code is recorded, those of nothing but numbers too.
    """

    reading = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        with _Recording(self):
            return super().trace(root, concrete_args)


class _Recording(Unseen):
    def unseen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.device:
            return func(*args, **kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


@functools.cache
def _catches(code: CodeType) -> bool:
    """Whether a function has an `except`: which line raises is only known when it runs."""
    names = Counter(instruction.opname for instruction in dis.get_instructions(code))
    bare = names["PUSH_EXC_INFO"] > names["WITH_EXCEPT_START"]  # not so named before Python 3.11
    return bare or names["CHECK_EXC_MATCH"] + names["JUMP_IF_NOT_EXC_MATCH"] > 0


def _refuse_what_no_graph_holds(forward: Any) -> None:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is not None and _catches(code):
        raise CaptureError("the forward catches errors, which a graph cannot")
    if code is not None and questions.matches(code):
        raise CaptureError("the forward asks for the type of a value, which is only known when it runs")


def _lists(value: Any) -> list[tuple[Any, Any]]:
    """The lists and dicts among the arguments of a call, each with a copy."""
    if isinstance(value, tuple):
        return [pair for v in value for pair in _lists(v)]
    if type(value) in (list, dict):
        inner = value.values() if isinstance(value, dict) else value
        return [(value, value.copy())] + [pair for v in inner for pair in _lists(v)]
    return []


def _modes() -> tuple[Any, ...]:
    autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), *autocast)
