"""Capture: any nn.Module becomes one torch.fx graph or several, by a trace, by torch.export, or part by part.

A module and, where there are some, example inputs come in; a `Captured`, or parts that hold them, goes out. Nothing
of the caller's is changed. It must never import facts or reading: what a graph means is not known here.
"""
