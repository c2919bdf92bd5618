"""What in a graph may act elsewhere than it is written: factors and permutations of channels, dynamic convolutions.

In come the `Nodes` of a graph, out goes what of them may move, and past what. It decides nothing and changes nothing,
and imports neither the view that it becomes a part of nor any stage after it.
"""
