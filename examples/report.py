"""Read a report: what fused, what did not, why, and what can be done about it, as text, data and Markdown."""

from __future__ import annotations

import _checkout  # noqa: F401
import torch
from torch import Tensor, nn

import fxfuse


class Model(nn.Module):
    """One site that fuses and three that do not, each for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.bordered = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.separable = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.Conv2d(16, 32, 1), nn.ReLU())
        self.batch = nn.Sequential(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.batch(self.separable(self.bordered(self.stem(x))))
        return out


torch.manual_seed(0)
fused = fxfuse.optimize(Model().eval(), torch.randn(2, 3, 16, 24))
report = fxfuse.report(fused)

print(report)

data = report.to_dict()
print("\nas data:", {key: data[key] for key in ("sites", "patterns", "before")})
assert data["patterns"] == {"conv_bn": 1}

print("\nrefused sites as data:")
for group in data["refused"]:
    print(f"- at {', '.join(site['where'] for site in group['sites'])}: {group['remedy']}")
reasons = " ".join(group["reason"] for group in data["refused"])
for why in ("border would differ", "would cost more", "statistics of the batch"):
    assert why in reasons, why

print("\nas Markdown:")
print("\n".join(report.to_markdown().splitlines()[:6]))
assert report.to_markdown().startswith("## fxfuse: Model: fused 1 sites")
