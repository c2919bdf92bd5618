"""nn.Identity calls, taken out of the graph."""

from __future__ import annotations

from torch import nn

from fxfuse.graph_edits import Editor
from fxfuse.ops.modules import runs


def drop_identities(editor: Editor) -> None:
    """Let whoever reads an `nn.Identity` that does nothing else read what it reads."""
    modules = editor.captured.modules
    for node in list(editor.graph.nodes):
        if node.op == "call_module" and runs(modules[str(node.target)]) is nn.Identity and len(node.args) == 1:
            editor.replace(node, node.args[0])
