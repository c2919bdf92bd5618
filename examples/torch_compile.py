"""torch.compile with backend "fxfuse": compiled once, and right whatever happens to the weights."""

from __future__ import annotations

import sys
import time

import _checkout  # noqa: F401
import torch
from blocks import RepVGG
from torch import nn

import fxfuse
from fxfuse.compiling.backend import fxfuse as backend  # installed, the bare name backend="fxfuse" is enough

inner = sys.argv[1] if len(sys.argv) > 1 else "inductor"
torch.manual_seed(0)
model = RepVGG((1, 1, 1, 1), (16, 24, 32, 64), stem=16, num_classes=10).eval()
images = torch.randn(4, 3, 32, 32)
compiled = torch.compile(model, backend=backend, options={"inner": inner})


def call(what: str) -> None:
    """One call, timed, and compared with the model itself."""
    with torch.no_grad():
        start = time.perf_counter()
        got = compiled(images)
        seconds = time.perf_counter() - start
        want = model(images)
    difference = float((got - want).abs().max() / want.abs().max())
    assert difference < 1e-4, what
    print(f"{what:32} {1e3 * seconds:9.1f} ms   difference {difference:.0e}")


call("first call, compiles")
call("second call")
with torch.no_grad():
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight.mul_(1.5)
call("after a weight changed")
call("and again")
model.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()})
call("after load_state_dict")
print(fxfuse.report(compiled)[0].headline)
