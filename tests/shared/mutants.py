"""Known mistakes put into the library one at a time, for tests that must notice them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fxfuse.patterns.border
import pytest

import fxfuse.algebra.chain
import fxfuse.algebra.chain_numbers
import fxfuse.algebra.combine
import fxfuse.algebra.numbers
import fxfuse.capture.guards
import fxfuse.capture.tracer
import fxfuse.ops.memory
import fxfuse.ops.modules
import fxfuse.ops.spellings
import fxfuse.planning.planner
import fxfuse.reading.arithmetic
import fxfuse.reading.effects
import fxfuse.reading.folding
import fxfuse.reading.view

Patch = pytest.MonkeyPatch


def reader_with(patch: Patch, op: str, **changes: Any) -> None:
    """Read calls of `op` as if some arguments had other values."""
    original = fxfuse.reading.view.READERS[op]

    def read(call: Any, facts: Any, node: Any) -> Any:
        changed = {name: value for name, value in changes.items() if name in call.args}
        return original(replace(call, args=call.args | changed), facts, node)

    patch.setitem(fxfuse.reading.view.READERS, op, read)


def everywhere(patch: Patch, name: str, value: Any) -> None:
    """Replace a function in every module that imported it."""
    for module in (
        fxfuse.capture.tracer,
        fxfuse.ops.spellings,
        fxfuse.ops.memory,
        fxfuse.ops.modules,
        fxfuse.reading.folding,
        fxfuse.capture.guards,
    ):
        if hasattr(module, name):
            patch.setattr(module, name, value)


def no_write(patch: Patch) -> None:
    patch.setattr(fxfuse.ops.memory, "written", lambda node, call, modules: [])


def no_alpha(patch: Patch) -> None:
    for op in ("add", "sub"):
        reader_with(patch, op, alpha=1)


def one_reader(patch: Patch) -> None:
    original = fxfuse.reading.view.View.data_users
    patch.setattr(fxfuse.reading.view.View, "data_users", lambda self, node: original(self, node)[:1])


def norm_of_the_batch(patch: Patch) -> None:
    """Statistics of the batch taken for running ones; that these are updated must not be noticed either."""
    reader_with(patch, "batch_norm", training=False)
    written_weights(patch)


def no_hooks(patch: Patch) -> None:
    everywhere(patch, "has_hooks", lambda module: False)


def no_border(patch: Patch) -> None:
    patch.setattr(fxfuse.algebra.chain, "_at_border", lambda f, g: None)
    patch.setattr(fxfuse.patterns.border, "needs_frame", lambda f, g: False)


def no_frame(patch: Patch) -> None:
    """The border of a merged convolution forgotten: its frame is 0."""
    original = fxfuse.algebra.chain_numbers._frame
    patch.setattr(fxfuse.algebra.chain_numbers, "_frame", lambda *args: 0 * original(*args))


def transposed_axis(patch: Patch) -> None:
    """The weight of a transposed convolution taken for [N, C], where the two are the same."""
    original = fxfuse.algebra.numbers.LAWS["conv"]

    def law(op: Any, parts: Any, source: Any) -> Any:
        square = op.in_channels == op.out_channels and op.groups == 1
        return original(replace(op, transposed=op.transposed and not square), parts, source)

    patch.setitem(fxfuse.algebra.numbers.LAWS, "conv", law)


def across_a_write(patch: Patch) -> None:
    patch.setattr(fxfuse.planning.planner, "chain_overwritten", lambda view, chain: None)


def every_write_private(patch: Patch) -> None:
    patch.setattr(fxfuse.reading.effects.Effects, "private_write", lambda self, writer: True)


def last_axis_is_channels(patch: Patch) -> None:
    """A (C,) or (1, W) constant taken for a factor per channel."""
    original = fxfuse.reading.arithmetic.pointwise

    def pointwise(kind: str, law: str, spatial: int, channels: int, **fields: Any) -> Any:
        return original(kind, law, 2 if law == "scale" and spatial == 0 else spatial, channels, **fields)

    patch.setattr(fxfuse.reading.arithmetic, "pointwise", pointwise)


def written_weights(patch: Patch) -> None:
    patch.setattr(fxfuse.reading.effects.Effects, "written_attributes", lambda self: set())


def subclass_is_its_base(patch: Patch) -> None:
    def layer_type(module: Any) -> Any:
        return next((t for t in type(module).__mro__ if t in fxfuse.ops.modules.TYPES), None)

    everywhere(patch, "layer_type", layer_type)


def groups_ignored(patch: Patch) -> None:
    """The channels of a grouped convolution's output selected as if it were one group."""
    patch.setattr(fxfuse.algebra.combine, "dense", lambda f, weight, groups, full=False: weight)


def concat_axis(patch: Patch) -> None:
    reader_with(patch, "cat", dim=1)


MUTANTS: dict[str, Callable[[Patch], None]] = {
    function.__name__: function
    for function in (
        no_write, no_alpha, one_reader, norm_of_the_batch, no_hooks, no_border, no_frame, transposed_axis,
        across_a_write, every_write_private, last_axis_is_channels, written_weights, subclass_is_its_base,
        groups_ignored, concat_axis,
    )
}  # fmt: skip
