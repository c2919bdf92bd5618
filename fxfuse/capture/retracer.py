"""Code back into its graph: what torch.fx does when a GraphModule is unpickled, made faithful.

torch.fx traces the code again, but runs at once what no input goes into: noise would become a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Proxy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxfuse.capture.tracer import FuseTracer


class Reader(FuseTracer):
    """Records every call in the code of a graph, those of nothing but numbers too."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        with _Recording(self):
            return super().trace(root, concrete_args)


class _Recording(TorchFunctionMode):
    def __init__(self, tracer: Reader) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device or any(isinstance(v, Proxy) for v in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # which the proxy records
        return self.tracer.create_proxy("call_function", func, args, kwargs)
