"""Operators and their laws: what several affine layers are as one, and its numbers, proved for every set of weights.

Operators come in; an operator, its weight and bias, or a Refusal goes out. No fx graph: it imports root words alone.
"""
