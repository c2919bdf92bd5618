"""Write a pattern of your own: always merge a blueprint-separable pair, 1x1 -> depthwise kxk, into one convolution.

fxfuse knows how to merge the pair but keeps it, for the product costs more multiply-accumulates. Where
a device runs one dense convolution faster than two thin ones, a pattern with `always` overrules that.
"""

from __future__ import annotations

import _checkout  # noqa: F401
import torch
from blocks import BSConvU
from torch import nn

import fxfuse


@fxfuse.register
class Blueprint(fxfuse.Pattern):
    """conv 1x1 -> depthwise conv kxk  =>  conv kxk      W'[n, c] = W2[n] * W1[n, c]

    Exact where the 1x1 has no bias: the depthwise layer then pads what the 1x1 makes of padding, zeros.
    """

    name = "blueprint"  # the first pattern by name that is about a pair decides, and b comes before conv_chain
    law = "conv1x1 -> depthwise conv => conv"
    relations = ("chain",)
    always = True

    def matches(self, relation: str, f: fxfuse.Operator, g: fxfuse.Operator) -> bool:
        return f.kind == g.kind == "conv" and f.pointwise and f.groups == 1 and g.depthwise


torch.manual_seed(0)
model = nn.Sequential(BSConvU(8, 16), nn.ReLU(), BSConvU(16, 16, 5, stride=2), nn.ReLU()).eval()
image = torch.randn(2, 8, 20, 28)

merged = fxfuse.optimize(model, image, verify=True)
report = fxfuse.report(merged)
assert report.by_pattern == {"blueprint": 2}
assert sum(isinstance(m, nn.Conv2d) for m in merged.modules()) == 2
for site in report.fired:
    print(f"{site.path}: {site.summary} -> {site.after}")
print(f"with the pattern: {report.after.ops['conv']} conv, error {report.max_error:.0e}")

fxfuse.unregister("blueprint")
kept = fxfuse.report(fxfuse.optimize(model, image))
assert kept.by_pattern == {} and kept.after.ops["conv"] == 4
print(f"without: {kept.after.ops['conv']} conv; {kept.refused[0]}")
