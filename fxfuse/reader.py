"""Code back into its graph: what torch.fx does when a GraphModule is unpickled, made faithful.

torch.fx traces the code again, but runs at once what no input goes into: a buffer that counts calls
would be counted up there and then, and noise become a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Proxy, Tracer
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Reader(Tracer):
    """Records every call in the code of a graph, those of buffers and of nothing too."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        with _Recording(self):
            return super().trace(root, concrete_args)


class _Recording(TorchFunctionMode):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device or any(isinstance(v, Proxy) for v in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # which the proxy records
        return self.tracer.create_proxy("call_function", func, args, kwargs)
