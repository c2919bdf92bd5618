"""Where a graph switches gradients or autocast: between the first switch and the last nothing is fused."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from fxfuse.names import plain

_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


def inside_regions(graph: Graph) -> Iterator[Node]:
    """Nodes between the first and the last switch of gradients or autocast: nothing is fused there."""
    nodes = list(graph.nodes)
    switches = [i for i, n in enumerate(nodes) if plain(n.target) in _SWITCHES]
    yield from nodes[switches[0] : switches[-1]] if switches else ()
