"""fxfuse: merges the linear branches and layers of any PyTorch model, by proof, for deployment.

A model goes through `capture` (graphs), `reading` (nodes as operators of `algebra`, by what `ops` and `facts` tell),
`rearranging`, `planning` (by `patterns` and `cost`), `rewriting` and `reporting`. `pipeline` runs these for one graph,
`whole_model` for all of a model, `compiling` for torch.compile; `optimize`, `refresh` and `cli` are what users call.
"""

from fxfuse._mount import mount as _mount

_mount()

from fxfuse.algebra.operator import Operator  # noqa: E402
from fxfuse.guarded import strip  # noqa: E402
from fxfuse.optimize import optimize, plan, report  # noqa: E402
from fxfuse.pattern import Example, Pattern, register, unregister  # noqa: E402
from fxfuse.refresh import refresh  # noqa: E402
from fxfuse.refusal import CaptureError, Refusal, VerificationError  # noqa: E402
from fxfuse.reporting.report import Report  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "Example",
    "Operator",
    "Pattern",
    "Refusal",
    "Report",
    "VerificationError",
    "optimize",
    "plan",
    "refresh",
    "register",
    "report",
    "strip",
    "unregister",
]
