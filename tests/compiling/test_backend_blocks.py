"""Every block of the registry under torch.compile: as much is fused as by `optimize`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from compiled_models import fresh  # noqa: F401 - a fixture of every test
from helpers import count, randomize, relative_error

import fxfuse
from examples.blocks import BLOCKS
from fxfuse.compiling.backend import fxfuse as backend

OPERATIONS = ("conv", "bn", "add", "cat", "pool", "linear")


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_blocks_run_what_optimized_ones_do(name: str) -> None:
    block = BLOCKS[name]
    model, counted = randomize(block.build()).double(), Counter[str]()

    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            counted.update(count(gm, *args))
            return gm(*args)

        return run

    x = torch.randn(block.shapes[0], dtype=torch.float64)
    fused = fxfuse.optimize(model, x)
    run = torch.compile(model, backend=backend, options={"inner": counting, "strict": True})
    with torch.no_grad():
        assert relative_error(run(x), model(x)) < 1e-9
    wanted = count(fused, x)
    assert {o: counted[o] for o in OPERATIONS} == {o: wanted[o] for o in OPERATIONS}, fxfuse.report(run)
