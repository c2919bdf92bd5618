"""Capture by torch.export: one graph of ATen operators that begins with checks of what it was made for.

A module and example inputs come in, a `Captured` over the module's own tensors goes out. It must never import facts
or reading.
"""
