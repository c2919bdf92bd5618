"""fxfuse: merges the linear branches and layers of any PyTorch model, by proof, for deployment."""

from ._mount import mount as _mount

_mount()

from .optimize import optimize, plan, report  # noqa: E402
from .pattern import Example, Pattern, register, unregister  # noqa: E402
from .record import Operator  # noqa: E402
from .refresh import refresh  # noqa: E402
from .refusal import CaptureError, Refusal, VerificationError  # noqa: E402
from .report import Report  # noqa: E402

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
    "unregister",
]
