"""dynamic_conv -> shift  =>  dynamic_conv with a bias      of zeros at first, mixed as its kernels are

A dynamic convolution without a bias has no place for the shift of a batch norm after it. So it gets a bias that is a
product of its attention with a bank of zeros, which the planner's shift then goes to.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fxfuse.algebra.operator import Operator
from fxfuse.cost import CostFunction
from fxfuse.graph_edits import Edit, Editor
from fxfuse.pattern import Selection
from fxfuse.reading.movable.dynamic_conv import Dynamic, repeated
from fxfuse.reading.view import View


def give_biases(view: View, patterns: Selection, price: CostFunction) -> Iterator[Edit]:
    """Dynamic convolutions to be given a bias of zeros, mixed as their kernels are, for a shift to go to."""
    for dynamic in view.movable.unbiased:
        mixing, op = dynamic.kernels, view.affine[dynamic.kernels].op
        following = view.affine[view.readers(dynamic.out)[0]].op
        factor = repeated(following, dynamic.channels, dynamic.each)
        if view.calls[mixing].op == "mm" and isinstance(patterns.combine("chain", op, factor), Operator):
            yield Edit(frozenset((dynamic.conv, mixing)), partial(_give_bias, dynamic))


def _give_bias(dynamic: Dynamic, editor: Editor) -> None:
    attention, bank = (*dynamic.kernels.args, *dynamic.kernels.kwargs.values())
    rows = editor.call(dynamic.conv, "narrow", (bank, 1, 0, dynamic.channels))
    none = editor.call(dynamic.conv, torch.zeros_like, (rows,))
    mixed = editor.call(dynamic.conv, torch.matmul, (attention, none))
    editor.set_argument(dynamic.conv, 2, "bias", editor.call(dynamic.conv, "reshape", (mixed, (-1,))))
