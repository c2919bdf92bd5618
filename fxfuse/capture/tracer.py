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
from collections import Counter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxfuse.capture.guards import WITHOUT_KEYS, contents, put_back
from fxfuse.capture.proxies import FuseProxy
from fxfuse.ops.modules import has_hooks, layer_type
from fxfuse.ops.value_kinds import extremes_recorded
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
    """

    def __init__(self, proxy_buffers: bool = True, fix_defaults: int | None = None) -> None:
        super().__init__()
        self.proxy_buffer_attributes = proxy_buffers
        self.fix_defaults = fix_defaults
        self.whole: dict[str, Exception] = {}
        self._parameter_proxies: dict[str, Proxy] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        self._modes = _modes()
        self.numbers: dict[Node, bool] = {}  # which nodes give one, as far as that was asked
        forward = type(root).forward if isinstance(root, nn.Module) else root
        if isinstance(root, nn.Module):
            _refuse_catching(forward)
        with extremes_recorded(forward):
            return super().trace(root, concrete_args)

    def proxy(self, node: Node) -> Proxy:
        return FuseProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self._parameter_proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

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
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.fix_defaults is not None:
            first = self.fix_defaults + is_module
            args = [self._default(a) if i >= first else a for i, a in enumerate(args)]
        return fn, args

    def _default(self, arg: Any) -> Any:
        """The default of a parameter, checked at run time to be what was given."""
        node = getattr(arg, "node", None)
        if node is None or not node.args or isinstance(node.args[0], Tensor):
            return arg
        value, name = node.args[0], str(node.target)
        same = self.create_proxy("call_function", operator.eq, (arg, value), {})
        text = f"the graph was made for {name}={value!r}, its default; optimize with example_inputs that set it"
        check = self.create_proxy("call_function", torch._assert, (same, text), {})
        for proxy in (arg, same, check):
            proxy.node.meta[CHECKED] = True
        return value

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.submodule_paths is not None and m not in self.submodule_paths:
            return forward(*args, **kwargs)  # a layer made in the forward itself
        path = self.path_of_module(m)
        attempts = (True, False) if self.proxy_buffer_attributes else (False,)
        for proxied in attempts:
            if self.is_leaf_module(m, path):
                break
            last, stack = next(reversed(self.graph.nodes), None), list(self.module_stack)
            lists = contents(m, WITHOUT_KEYS)
            self.proxy_buffer_attributes = proxied
            try:
                _refuse_catching(type(m).forward)
                result = super().call_module(m, forward, args, kwargs)
                if put_back(lists):
                    raise CaptureError(f"the forward changes a list or set that {type(m).__name__} keeps")
                return result
            except Exception as error:  # what a forward raises on proxies can be anything
                put_back(lists)
                self._undo(last, stack)
                if proxied is attempts[-1]:
                    self.whole[path] = error
            finally:
                self.proxy_buffer_attributes = attempts[0]
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

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        with _Recording(self):
            return super().trace(root, concrete_args)


class _Recording(TorchFunctionMode):
    def __init__(self, tracer: Reader) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device or any(isinstance(v, Proxy) for v in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # which the proxy records
        return self.tracer.create_proxy("call_function", func, args, kwargs)


@functools.cache
def _catches(code: CodeType) -> bool:
    """Whether a function has an `except`: which line raises is only known when it runs."""
    names = Counter(instruction.opname for instruction in dis.get_instructions(code))
    bare = names["PUSH_EXC_INFO"] > names["WITH_EXCEPT_START"]  # not so named before Python 3.11
    return bare or names["CHECK_EXC_MATCH"] + names["JUMP_IF_NOT_EXC_MATCH"] > 0


def _refuse_catching(forward: Any) -> None:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is not None and _catches(code):
        raise CaptureError("the forward catches errors, which a graph cannot")


def _modes() -> tuple[Any, ...]:
    autocast = [torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")]
    return (torch.is_grad_enabled(), *autocast)
