"""What is done to every graph before it is read: tensors put where the signature has them, identities taken out.

So is what nobody reads, which would keep weights alive and count as one more reader of what it reads.

`pool(input=y)` becomes `pool(y)`. So whoever reads a call finds its tensors by their position, as most of PyTorch is
called, and the signature of each function and module is asked in one place. Numbers stay keywords: those are read by
their names.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch._jit_internal import boolean_dispatched
from torch.fx import Node
from torch.fx.operator_schemas import get_signature_for_torch_op

from fxfuse.capture.captured import Captured
from fxfuse.graph_edits import Editor
from fxfuse.ops.layer_call import layer_call
from fxfuse.ops.memory import written
from fxfuse.ops.modules import has_hooks, runs
from fxfuse.ops.purity import superfluous
from fxfuse.ops.spellings import read


def tidy(captured: Captured) -> None:
    """Give tensors by position, and take out what nobody reads, and each `nn.Identity` that does nothing else."""
    editor = Editor(captured)
    _unread(editor)
    _by_position(editor)
    for node in list(editor.graph.nodes):
        alone = node.op == "call_module" and len(node.args) == 1
        if alone and runs(captured.modules[str(node.target)]) is nn.Identity:
            editor.replace(node, node.args[0])


def _unread(editor: Editor) -> None:
    """Erase every call whose result nobody reads, if it does nothing but give one."""
    modules = editor.captured.modules
    for node in reversed(editor.graph.nodes):
        if not node.users and (node.op == "get_attr" or _only_gives(node, modules)):
            editor.erase(node)


def _only_gives(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        plain = layer_call(modules[str(node.target)]) is not None
    else:
        plain = node.op in ("call_function", "call_method") and superfluous(node) and not _piece(node)
    return plain and not written(node, read(node, modules, lambda path: None), modules)


def _piece(node: Node) -> bool:
    """One of several pieces of a tensor: without the others, what is left would be no view of the whole any more."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and not isinstance(node.args[1], (slice, tuple)) and len(source.users) > 1


def _by_position(editor: Editor) -> None:
    """Rewrite every call of a function or module that takes a tensor by keyword, where its signature is known."""
    for node in editor.graph.nodes:
        if not node.kwargs or node.op not in ("call_function", "call_module"):
            continue
        for names in _names(node, editor.captured.modules):
            args, rest = list(node.args), dict(node.kwargs)
            while len(args) < len(names) and isinstance(rest.get(names[len(args)]), Node):
                args.append(rest.pop(names[len(args)]))
            if len(args) > len(node.args):
                editor.set_arguments(node, args, rest)
                break


def _names(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """The names of the parameters that may be given by position, of each signature that there is."""
    target: Any = node.target
    if node.op == "call_module":
        if has_hooks(modules[target]):  # which may be told of keywords
            return
        target = modules[target].forward
    elif target in boolean_dispatched:
        target = boolean_dispatched[target]["if_false"]
    try:
        found = [inspect.signature(target)]
    except (TypeError, ValueError):  # a function in C
        found = get_signature_for_torch_op(target) or []
    for signature in found:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        yield [p.name for p in signature.parameters.values() if p.kind in kinds]
