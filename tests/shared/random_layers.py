"""Layers for random models, as expressions that fit a tensor of a given shape."""

from __future__ import annotations

from random_body import Body, Reader, Rejected, table

MODES = ("zeros",) * 6 + ("reflect", "replicate", "circular")
ACTIVATIONS = table("""
    nn.ReLU() ; nn.ReLU() ; nn.ReLU(inplace=True) ; nn.Hardtanh(-4, 4) ; nn.Hardtanh(-4, 4, inplace=True) ;
    nn.LeakyReLU(0.5) ; nn.LeakyReLU(0.5, inplace=True) ; nn.Sigmoid() ; nn.Threshold(1, 1)
""")
SHAPED = table("""
    nn.Identity() ; nn.Dropout(0.5) ; nn.Dropout(0.5, inplace=True) ; nn.Flatten() ; nn.Flatten(0, 1) ; Behind() ;
    Behind(True) ; nn.Softmax(1) ; nn.LayerNorm({w}).double() ; nn.PReLU().double() ; nn.Unflatten(1, (-1, 2)) ;
    nn.Upsample(scale_factor=2) ; nn.ChannelShuffle(2) ; nn.GroupNorm(1, {c}).double()
""")
POOLS = table("""
    nn.AvgPool{d}d(2) ; nn.AvgPool{d}d(2, 1) ; nn.AvgPool{d}d(2, 1, 1) ; nn.AvgPool{d}d(3, 1, 1) ;
    nn.AvgPool{d}d(2, 2, 1, count_include_pad=False) ; nn.AvgPool{d}d(2, ceil_mode=True) ; nn.MaxPool{d}d(2, 1) ;
    nn.MaxPool{d}d(3, 1, 1) ; nn.AdaptiveAvgPool{d}d(1) ; nn.AdaptiveMaxPool{d}d(2) ; nn.AdaptiveAvgPool{d}d(2)
""")
PADS = table("""
    nn.ZeroPad{d}d(1) ; nn.ConstantPad{d}d(1, 2.0) ; nn.ReflectionPad{d}d(1) ; nn.ReplicationPad{d}d(1) ;
    nn.CircularPad{d}d(1) ; nn.ConstantPad{d}d((1, 0), 0.0) ; nn.ZeroPad{d}d(-1)
""")
WRAPPERS = table("""
    doubled({0}) ; masked({0}, {1}) ; normed({0}) ; hooked({0}, out_doubled) ; hooked({0}, out_written) ;
    hooked({0}, in_replaced) ; hooked({0}, in_written) ; hooked({0}, looks) ; own_forward({0})
""")


def spatial(g: Reader, shape: tuple[int, ...]) -> int:
    """Dims of the layer for a tensor of this shape: with a batch dim, or now and then without one."""
    dims = len(shape) - 2
    if dims < 1 or dims > 3:
        dims = len(shape) - 1 if 2 <= len(shape) <= 4 else 0
    elif dims < 3 and g.chance(24):
        dims += 1
    if not dims:
        raise Rejected
    return dims


def wrapped(body: Body, g: Reader, expression: str) -> str:
    """A layer with weights, and now and then with a hook, a parametrization or a forward of its own."""
    expression = f"fill({expression}, {body.scope.seed()})"
    if g.chance(16):
        return str(g.pick(*WRAPPERS)).format(expression, body.scope.seed())
    return expression


def conv(body: Body, g: Reader, shape: tuple[int, ...], out: int = 0, kernel: int = 0, stride: int = 0) -> str:
    """A convolution; the kernel gives as many positions as it reads unless the choices say otherwise."""
    dims = spatial(g, shape)
    into = shape[-dims - 1]
    out = out or g.pick(into, 4, 2, 6, 3, 1)
    fields = []
    if not kernel:
        kernel = g.pick(3, 1, 2, 3, 1, 5)
        padding = g.pick(kernel // 2, 0, 1, "'same'")
        stride = g.pick(1, 1, 1, 1, 2)
        dilation = g.pick(1, 1, 1, 1, 2)
        fields += [f"dilation={dilation}"] if dilation > 1 else []
    else:
        padding = kernel // 2
    fields += [f"padding={padding}"] if padding else []
    fields += [f"stride={stride}"] if stride > 1 else []
    groups = g.pick(*_groups(into, out))
    fields += [f"groups={groups}"] if groups > 1 else []
    mode = g.pick(*MODES)
    fields += [f"padding_mode='{mode}'"] if mode != "zeros" else []
    fields += ["bias=False"] if g.pick(False, True) else []
    own = ("Tripled", "Centred") if dims == 2 else ()
    kind = g.pick(*["nn.Conv{d}d"] * 14, *own).format(d=dims)
    return f"{kind}({', '.join(map(str, (into, out, kernel, *fields)))})"


def transposed(body: Body, g: Reader, shape: tuple[int, ...]) -> str:
    dims = spatial(g, shape)
    into = shape[-dims - 1]
    rest = g.pick("2, stride=2", "3, padding=1", "1", "3, stride=2, padding=1, output_padding=1")
    out = g.pick(into, 4, 2)
    groups = g.pick(*_groups(into, out))
    rest += f", groups={groups}" if groups > 1 else ""
    rest += ", bias=False" if g.pick(False, True) else ""
    return f"nn.ConvTranspose{dims}d({into}, {out}, {rest})"


def _groups(into: int, out: int) -> list[int]:
    """1 most of the time, else a depthwise or a grouped form that fits."""
    return [1, 1, 1, *(n for n in (into, 2) if into % n == out % n == 0)]


def linear(body: Body, g: Reader, shape: tuple[int, ...]) -> str:
    if not shape:
        raise Rejected
    kind = g.pick(*["nn.Linear"] * 10, "TripledLinear")
    bias = ", bias=False" if g.pick(False, True) else ""
    return f"{kind}({shape[-1]}, {g.pick(shape[-1], 4, 2, 6)}{bias})"


def norm(body: Body, g: Reader, shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        raise Rejected
    dims = {5: 3, 4: 2}.get(len(shape), 1)
    rest = g.pick(*[""] * 8, ", affine=False", ", track_running_stats=False", ", momentum=None")
    own = ("TripledNorm",) if dims == 2 else ()
    kind = g.pick(*["nn.BatchNorm{d}d"] * 14, "nn.SyncBatchNorm", *own).format(d=dims)
    return f"{kind}({shape[1]}{rest})"


def plain(body: Body, g: Reader, shape: tuple[int, ...]) -> str:
    """A layer without weights to fill."""
    table = g.pick(ACTIVATIONS, ACTIVATIONS, POOLS, PADS, SHAPED)
    dims = spatial(g, shape) if table in (POOLS, PADS) else 0
    if len(shape) < 2:
        raise Rejected
    text = str(g.pick(*table)).format(d=dims, c=shape[1], w=shape[-1])
    if text.startswith(("nn.LayerNorm", "nn.GroupNorm", "nn.PReLU")):
        body.scope.exact = False
    return text


def layer(body: Body, g: Reader, shape: tuple[int, ...]) -> str:
    """Any layer."""
    kind = g.pick(conv, conv, norm, plain, plain, linear, transposed, norm, conv)
    expression = kind(body, g, shape)
    return expression if kind is plain else wrapped(body, g, expression)
