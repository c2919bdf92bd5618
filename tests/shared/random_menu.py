"""The statements of random models: what a forward may do to its tensors."""

from __future__ import annotations

import random_layers as layers
from random_body import Body, Reader, Rejected, table


def call(body: Body, g: Reader) -> None:
    """A layer of its own, called once."""
    x = body.var(g)
    body.assign(f"{body.declare('l', layers.layer(body, g, body.shape(x)))}({x})")


def conv_norm(body: Body, g: Reader) -> None:
    """A convolution or linear layer and what folds into it."""
    x = body.var(g)
    first = g.pick(layers.conv, layers.conv, layers.conv, layers.linear, layers.transposed)(body, g, body.shape(x))
    y = body.assign(f"{body.declare('c', layers.wrapped(body, g, first))}({x})")
    then = g.pick("norm", "norm", "norm", "functional norm", "scale", "scale", "number", "relu norm")
    if g.chance(12):
        body.run(g.pick("{0}.mul_(2)", "{0} += 1", "{0}[:, 0] = 1").format(g.pick(x, y)), [x, y])
    if then == "number":
        body.assign(g.pick("{0} * 2", "2 - {0}", "{0} / 4 + 1", "-{0}").format(y))
    elif then == "scale":
        scaled(body, g, y)
    else:
        y = body.assign(f"{y}.relu()") if then == "relu norm" else y
        b = body.declare("b", layers.wrapped(body, g, layers.norm(body, g, body.shape(y))))
        if then == "functional norm":
            training = g.pick("False", "False", "False", "self.training", "True")
            text = f"F.batch_norm({y}, {b}.running_mean, {b}.running_var, {b}.weight, {b}.bias, {training}, eps=1.0)"
            body.assign(text)
        else:
            body.assign(f"{b}({y})")


def branches(body: Body, g: Reader) -> None:
    """Branches of one tensor that a rewrite may merge."""
    x = body.var(g)
    shape = body.shape(x)
    dims = layers.spatial(g, shape)
    into, stride = shape[-dims - 1], g.pick(1, 1, 1, 2)
    out = g.pick(into, 4, 2)
    found = []
    for _ in range(g.pick(2, 2, 3)):
        kind = g.pick("conv", "conv", "conv norm", "identity", "chain", "norm", "pool", "before", "before")
        if kind in ("identity", "norm", "pool") and (into != out or stride > 1):
            kind = "conv"
        if kind == "identity":
            found.append(x)
        elif kind == "norm":
            b = body.declare("b", layers.wrapped(body, g, layers.norm(body, g, shape)))
            found.append(body.assign(f"{b}({x})"))
        elif kind == "pool":
            found.append(body.assign(f"F.avg_pool{dims}d({x}, 3, 1, 1)"))
        elif kind == "before":  # a pointwise layer, whose bias the padding of the next one does not know
            text = layers.norm(body, g, shape) if g.chance(2) else layers.conv(body, g, shape, into, 1, 1)
            y = body.assign(f"{body.declare('c', layers.wrapped(body, g, text))}({x})")
            text = layers.conv(body, g, shape, out, g.pick(3, 5), stride)
            found.append(body.assign(f"{body.declare('c', layers.wrapped(body, g, text))}({y})"))
        else:
            text = layers.conv(body, g, shape, out, g.pick(3, 1, 5, 3, 1), stride)
            y = body.assign(f"{body.declare('c', layers.wrapped(body, g, text))}({x})")
            if kind == "chain":
                text = layers.conv(body, g, body.shape(y), out, 1, 1)
                y = body.assign(f"{body.declare('c', layers.wrapped(body, g, text))}({y})")
            elif kind == "conv norm":
                b = body.declare("b", layers.wrapped(body, g, layers.norm(body, g, body.shape(y))))
                y = body.assign(f"{b}({y})")
            found.append(y)
    how = g.pick("+", "+", "alpha", "cat", "+=", "-", "add_", "stack", "sum", "cat_", "cat -1", "cat -1")
    total = found[0]
    if how in ("cat", "cat_"):
        names = ", ".join(found)
        body.assign(f"torch.cat([{names}], 1)" if how == "cat" else f"torch.cat(({names}), dim={-dims - 1})")
    elif how == "cat -1":
        body.assign(f"torch.cat([{', '.join(found)}], -1)")
    elif how == "stack":
        body.assign(f"torch.stack([{', '.join(found)}]).sum(0)")
    elif how == "sum":
        body.assign(f"sum([{', '.join(found)}])")
    elif how in ("+=", "add_"):
        for one in found[1:]:
            body.run(f"{total} += {one}" if how == "+=" else f"{total}.add_({one}, alpha=2)", [total])
    else:
        for one in found[1:]:
            text = {"+": "{0} + {1}", "-": "{0} - {1}", "alpha": "torch.add({0}, {1}, alpha=3)"}[how]
            total = body.assign(text.format(total, one))


JOINED = table("""
    {s} + {a} + {b} ; {a} + {s} + {b} ; {a} + {b} + {s} ; {a} + ({s} + {b}) ; {s} + ({b} + {a}) ; sum([{a}, {s}, {b}]) ;
    torch.cat([{a}, {b}], 1) ; torch.cat([{s}, {a}], 1) ; {a} + {s} + {b} + {s}
""")
AGAIN = table("""
    {y} + {v} + {v} ; {v} + {y} + {v} ; {v} + {v} + {y} ; {v} + ({y} + {v}) ; {v} + {v} + {v} ; sum([{v}, {y}, {v}]) ;
    sum([{v}, {v}, {v}]) ; {y} + {v} + {v} + {v} ; ({y} + {v}) * ({v} + {w}) ; ({v} + {w}) + ({y} + {v}) ;
    torch.cat([{v}, {v}], 1) + torch.cat([{y}, {v}], 1) ; torch.cat([{v}, {y} + {v}], 1) ; {y} - {v} - {v} ;
    0 + {v} + {v}
""")


def read_again(body: Body, g: Reader) -> None:
    """Branches of one tensor joined with another, and sums and joins that read the result more than once."""
    again, joined, x = g.pick(*AGAIN), g.pick(*JOINED), body.var(g)
    shape = body.shape(x)
    dims = layers.spatial(g, shape)
    names = {"s": body.assign(g.pick("{0}.relu()", "{0}.abs()", "-{0}").format(x))}
    for name, kernel in (("a", 1), ("b", g.pick(3, 1))):
        text = layers.conv(body, g, shape, shape[-dims - 1], kernel, 1)
        names[name] = body.assign(f"{body.declare('c', layers.wrapped(body, g, text))}({x})")
    v = body.assign(joined.format(**names))
    y, w = (body.assign(f"{v}.{how}()") for how in ("clone", "relu"))
    body.assign(again.format(v=v, y=body.other(g, v) if g.chance(3) else y, w=w))


def functional(body: Body, g: Reader) -> None:
    """A layer's function with a weight that is read, or made, in the forward."""
    x = body.var(g)
    dims = len(body.shape(x)) - 2
    held = [one for one in body.layers if getattr(one.module, "weight", None) is not None]
    held = [one for one in held if one.module.weight.dim() in (1, 2, dims + 2)]  # type: ignore[union-attr, operator]
    if not held:
        raise Rejected
    one = held[-1 - g.next(8) % len(held)]
    w, dims = f"{one.name}.weight", one.module.weight.dim() - 2  # type: ignore[union-attr, operator]
    w = g.pick("{0}", "{0} * 2", "{0}.flip(0)", "{0}.abs()", "-{0}", "{0}.clone()").format(w)
    if dims in (1, 2, 3):
        rest = g.pick("", f", {one.name}.bias", ", padding=1", ", None, 1, 1", ", stride=2")
        body.assign(f"F.conv{dims}d({x}, {w}{rest})")
    elif dims == 0:
        body.assign(f"F.linear({x}, {w})")
    else:
        ones = ", ".join(["1"] * (len(body.shape(x)) - 2))
        body.assign(f"{x} {g.pick('*', '+')} {w}.view(-1, {ones})" if ones else f"{x} * {w}")


def residual(body: Body, g: Reader) -> None:
    """A layer's result added to its input, in place, where others may still read the input."""
    x = body.var(g)
    shape = body.shape(x)
    dims = layers.spatial(g, shape)
    text = layers.conv(body, g, shape, shape[-dims - 1], g.pick(3, 1), 1)
    c = body.declare("c", layers.wrapped(body, g, text))
    body.run(g.pick("{0} += {1}({0})", "{0}.add_({1}({0}))", "{0} -= {1}({0})").format(x, c), [x])


SCALED = table("""
    {x} * {k} ; {k} * {x} ; {x} + {k} ; {x} - {k} ; {k} - {x} ; torch.add({x}, {k}, alpha=2) ;
    torch.sub({x}, {k}, alpha=2) ; torch.mul({x}, {k}) ; {x}.sub({k}, alpha=3) ; {x}.add({k}) ; torch.add({k}, {x}) ;
    torch.maximum({x}, {k}) ; {x}.addcmul({x}, {k})
""")

KINDS = table("""
    nn.Buffer({0}) ; nn.Parameter({0}) ; nn.Buffer({0}) ; {0} ; nn.Buffer({0}.long()) ; nn.Buffer({0} > 0) ;
    nn.Buffer({0}.float())
""")


def scaled(body: Body, g: Reader, x: str | None = None) -> None:
    """A constant of a shape that broadcasts onto the channels, or onto another axis of the same size."""
    x = x or body.var(g)
    shape = body.shape(x)
    if not shape:
        raise Rejected
    channels, width = (shape[1] if len(shape) > 1 else 1), shape[-1]
    ones = (1,) * (len(shape) - 2)
    usual, tricky = (
        ((channels, *ones), (1, channels, *ones), ()),
        ((channels,), (1, width), (width, 1), (width,), ones, (1,)),
    )
    sizes = g.pick(*usual, *tricky)
    seed, dims = body.scope.seed(), "".join(f", {n}" for n in sizes)
    if g.chance(6):
        body.assign(f"{x} / {body.declare('k', f'nn.Buffer(power({seed}{dims}))')}")
        return
    k = body.declare("k", g.pick(*KINDS).format(f"const({seed}{dims})"))
    body.assign(g.pick(*SCALED).format(x=x, k=k))


NUMBERS = table("""
    2 ; 1 ; -1 ; 0.5 ; 3 ; 0 ; True ; 0.1 ; {x}.shape[1] ; {x}.size(-1) ; {x}.shape[0] ; {x}.dim() ; k
""")
ARITHMETIC = table("""
    {x} * {n} ; {x} + {n} ; {n} - {x} ; {n} * {x} ; {x} - {n} ; {x} / ({n} + 4) ; torch.mul({x}, {n}) ;
    torch.add({x}, {n}, alpha=2) ; torch.sub({x}, {n}, alpha=2) ; torch.rsub({x}, {n}) ; {x}.mul({n}) ;
    {x} / 2 * {n} ; {x} // 2 ; {x} ** 2 ; {x} % 3
""")


def number(body: Body, g: Reader) -> None:
    """Arithmetic with a number."""
    x = body.var(g)
    text = g.pick(*ARITHMETIC)
    body.assign(text.format(x=x, n=g.pick(*NUMBERS).format(x=x)), sharp="//" in text or "%" in text)


PAIRS = table("""
    {x} + {y} ; {x} - {y} ; torch.add({x}, {y}, alpha=2) ; torch.add({x}, {y}) ; {x} * {y} ; {x}.sub({y}, alpha=3) ;
    torch.sub({x}, {y}) ; sum([{x}, {y}]) ; torch.cat([{x}, {y}], 1) ; torch.cat([{x}, {y}]) ; torch.cat([{x}], 1) ;
    torch.cat(({y}, {x}), dim=-1) ; torch.stack([{x}, {y}], 1) ; torch.maximum({x}, {y}) ; torch.cat([{x}, {x}], 1) ;
    torch.where({x} > 0, {x}, {y}) ; torch.cat([{x}[:, :1], {y}[:, 1:]], 1) ; torch.add({x}, {y}, alpha=-1)
""")


def pair(body: Body, g: Reader) -> None:
    """Two tensors together."""
    x = body.var(g)
    y = body.var(g) if g.chance(4) else body.other(g, x)
    text = g.pick(*PAIRS)
    body.assign(text.format(x=x, y=y), sharp="where" in text)


ALONE = table("""
    {x}.relu() ; F.relu({x}) ; torch.relu({x}) ; {x}.clamp(-4, 4) ; {x}.clone() ; {x}.abs() ; -{x} ; torch.tanh({x}) ;
    F.leaky_relu({x}, 0.5) ; {x}.sigmoid() ; F.dropout({x}, 0.5, self.training) ; F.dropout({x}, training=False) ;
    {x}.softmax(1) ; {x} * {x}.sigmoid() ; {x} - {x}.amax() ; {x}.mean((-1, -2), keepdim=True) ;
    {x}.sum(1, keepdim=True) ; {x}.mean(-1) ; {x} + {x}.mean(0, keepdim=True) ; F.avg_pool2d({x}, 2) ;
    F.avg_pool2d({x}, 2, 1, 1) ; F.avg_pool1d({x}, 2, stride=1) ; F.max_pool2d({x}, 2, 1) ; F.pad({x}, (1, 1)) ;
    F.pad({x}, (1, 1, 1, 1), value=2.0) ; F.pad({x}, (1, 0)) ; F.pad({x}, (-1, 1)) ;
    F.pad({x}, (1, 1, 1, 1), mode='replicate') ; F.pad({x}, (0, 0, 0, 0, 0, 1)) ; F.adaptive_avg_pool2d({x}, 1) ;
    F.interpolate({x}, scale_factor=2) ; {x} @ {x}.transpose(-1, -2) ; F.normalize({x} + 9, dim=1) ;
    F.dropout({x}, 0.5) ; {x}.cumsum(1)
""")


def alone(body: Body, g: Reader) -> None:
    """One tensor to another."""
    body.assign(str(g.pick(*ALONE)).format(x=body.var(g)))


VIEWS = table("""
    {x}[:, :2] ; {x}[:, 1:] ; {x}.narrow(1, 0, 2) ; {x}.chunk(2, 1)[0] ; {x}.chunk(2, dim=1)[1] ;
    {x}.split(1, 1)[-1] ; {x}.split([1, {c} - 1], 1)[1] ; {x}[..., 1:] ; {x}[:, ::2] ; {x}[1:] ; {x}[:, 0] ;
    {x}.select(1, -1) ; {x}[0] ; {x}.transpose(1, 2) ; {x}.transpose(-1, 1) ; {x}.permute(0, 2, 3, 1) ;
    {x}.permute(0, 3, 1, 2) ; {x}.flatten(1) ; {x}.flatten(2) ; {x}.view({x}.shape[0], -1) ;
    {x}.view({x}.size(0), {c}, -1) ; {x}.reshape({x}.shape[0], -1, 2) ;
    {x}.reshape({x}.shape[0], 2, -1, *{x}.shape[2:]) ; {x}.unsqueeze(0) ; {x}.squeeze() ; {x}.squeeze(-1) ;
    {x}[:, None] ; {x}.contiguous() ; {x}.detach() ; {x}.data ; {x}.flip(1) ; {x}.flip(-1) ; torch.flip({x}, [2]) ;
    {x}.expand_as({x}) ; {x}.roll(1, 1) ; F.channel_shuffle({x}, 2) ; {x}.unbind(1)[0] ; torch.chunk({x}, 2, 1)[1] ;
    {x}.view_as({x}) ; torch.narrow({x}, 1, 1, 1) ; {x}[:, [1, 0]] ; {x}[{x}.shape[0] - 1:] ; {x}.to({x}.dtype) ;
    {x}.repeat(1, 2) ; {x}.type_as({x}) ; {x}.view_as({x})[:, :1] ; {x}.mT ; torch.split({x}, 2, dim=1)[0] ;
    {x}.unfold(-1, 2, 1) ; {x}.index_select(1, torch.tensor([1, 0])) ; {x}.swapaxes(0, 1) ; {x}[:, -2:] ; {x}[-1:] ;
    {x}[:, 1:2] ; torch.squeeze({x}, 0) ; {x}.float().double() ; {x}.long().double() ; ({x}.float() * 2).double()
""")


def view(body: Body, g: Reader) -> None:
    """A part of a tensor, or the whole in another shape."""
    x, text = body.var(g), str(g.pick(*VIEWS))
    shape = body.shape(x)
    body.assign(text.format(x=x, c=shape[1] if len(shape) > 1 else 1), sharp="float" in text or "long" in text)


PIECES = table("""
    {x}.chunk(2, 1) ; {x}.split(2, 1) ; torch.chunk({x}, 2, dim=1) ; {x}.split([1, 1], dim=1) ; {x}.chunk(2)
""")


def pieces(body: Body, g: Reader) -> None:
    """All pieces of a tensor, to be used one by one."""
    x = body.var(g)
    names = [f"v{body.count + i}" for i in (1, 2)]
    body.count += 2
    body.run(f"{', '.join(names)} = {g.pick(*PIECES).format(x=x)}", names)


WRITES = table("""
    {x} += {y} ; {x}.add_({y}) ; {x} *= 2 ; {x}.mul_(2) ; {x}.relu_() ; F.relu({x}, inplace=True) ; {x} -= {y} ;
    {x}.add_({y}, alpha=2) ; {x}[:, 0] = 1 ; {x}[:, 0] += 1 ; {x}[..., 0] = 0 ; {x}[:, :1] = {y}[:, 1:2] ; {x} /= 2 ;
    torch.add({x}, {y}, out={x}) ; torch.mul({x}, 2, out={y}) ; {x}.copy_({y}) ; {x}.zero_() ; {x}.data.mul_(2) ;
    {x}.clamp_(-4, 4) ; F.leaky_relu({x}, 0.5, True) ; {x}.sub_({y}) ; {x}.neg_() ; torch.relu_({x}) ;
    {x}.view(-1).add_(1) ; {x}.detach().mul_(2) ; {x}.flatten().mul_(2) ;
    {x}.narrow(1, 0, 1).add_({y}.narrow(1, 0, 1)) ; {x}[{x} > 0] = 1 ; {x}.chunk(2, 1)[0].mul_(2) ;
    nn.init.constant_({x}, 1.0) ; {x}.masked_fill_({x} > 2, 1.0) ; {x}.transpose(0, 1).add_(1) ;
    torch._foreach_mul_([{x}, {y}], 2.0) ; {x}.index_fill_(1, torch.tensor([0]), 1.0) ;
    {x}.permute(0, 2, 3, 1)[..., 0].zero_()
""")
RESHAPES = table("""
    {x}.t_() ; {x}.squeeze_() ; {x}.unsqueeze_(0) ; {x}.resize_as_({y}) ; {x}.set_({y}) ; {x}.data = {y}
""")


def write(body: Body, g: Reader) -> None:
    """A tensor changed in place, seen through whatever else shares its memory."""
    x = body.var(g) if g.pick(True, False) else body.names[g.next(len(body.names))]
    refused = g.chance(6) and (body.depth > 0 or g.chance(8))  # as a whole, so mostly inside of modules
    y, text = body.other(g, x), g.pick(*(RESHAPES if refused else WRITES))
    sharp = ">" in text
    if g.chance(3) and "=" not in text.replace("alpha=", "").replace("inplace=", "").replace("out=", ""):
        body.assign(text.format(x=x, y=y), sharp)
    else:
        body.run(text.format(x=x, y=y), [x, y], sharp)
