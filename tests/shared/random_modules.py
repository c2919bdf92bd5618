"""Statements about modules: nested and shared ones, hooks, control flow and state; and the whole menu."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import random_layers as layers
import random_menu as menu
from random_body import Body, Reader, Rejected, table

Statement = Callable[[Body, Reader], None]


def again(body: Body, g: Reader) -> None:
    """A layer called at one more site."""
    if not body.layers:
        raise Rejected
    body.assign(f"{body.layers[-1 - g.next(8) % len(body.layers)].name}({body.var(g)})")


def spare(body: Body, g: Reader) -> None:
    """A layer that shares a weight with another, is left in training mode, or is never called."""
    if not body.layers or g.chance(4):
        body.declare("u", layers.wrapped(body, g, "nn.Conv2d(2, 2, 1)"))
        return
    one = body.layers[-1 - g.next(8) % len(body.layers)]
    if hasattr(one.module, "running_mean"):
        one.module.train()
        body.scope.exact = False
        body.after.append(f"{one.name.removeprefix('self.')}.train()")
    elif "weight" not in one.module._parameters:
        raise Rejected
    else:
        body.assign(f"{body.declare('t', f'tied({one.name})')}({body.var(g)})")


def block(body: Body, g: Reader) -> None:
    """A module with a forward of its own, called once or twice."""
    if body.depth > 1:
        raise Rejected
    given = [body.var(g)] + ([body.var(g)] if g.chance(3) else [])
    inputs = {n: [v.clone() for v in body.values(o)] for n, o in zip("xy", given, strict=False)}
    inner = Body(body.scope, inputs, body.depth + 1)
    write_down(inner, g.rest, g.pick(2, 1, 3, 4))
    name = f"Block{len(body.scope.classes)}"
    several = g.chance(6)
    result = f"{inner.names[-1]}, {inner.names[0]}" if several else inner.names[-1]
    source = inner.source(name, result)
    exec(source, body.scope.names)
    body.scope.names[name].sharp = inner.sharp
    body.scope.classes.append(source)
    m = body.declare("m", f"{name}()")
    body.after.extend(f"{m.removeprefix('self.')}.{line}" for line in inner.after)
    arguments = ", ".join(given)
    if several:
        body.count += 2
        names = [f"v{body.count - 1}", f"v{body.count}"]
        body.run(f"{', '.join(names)} = {m}({arguments})", names)
        return
    y = body.assign(f"{m}({arguments})")
    if len(given) == 1 and g.chance(4):
        body.assign(f"{m}({y})")


FLOWS = table("""
    {l}({x}) if {x}.shape[0] > 2 else {x} ; {l}({x}) if {x}.shape[-1] > 5 else -{x} ;
    {l}({x}) if {x}.sum() > 0 else {x} ; torch.cat([{l}(p) for p in {x}.split(1)]) ; sum({l}(p[None]) for p in {x}) ;
    {l}({x}) * len({x}) ; {l}({x}) if isinstance({x}, Tensor) else 0 ; {l}({x}) if {x}.dim() == {r} else 0 ;
    {x} * float({x}.max())
""")
LOOPS = table("""
    {v} = {x}\nfor _ in range(2):\n    {v} = {l}({v}) ; with torch.no_grad():\n    {v} = {l}({x}) ;
    assert {x}.dim() == {r}\n{v} = {l}({x}) ; assert {x}.shape[1] == {c}\n{v} = {l}({x}) ;
    self.calls = getattr(self, 'calls', 0) + 1\n{v} = {l}({x}) * self.calls ;
    self.last = {l}({x})\n{v} = self.last + 1 ; b, c = {x}.shape[:2]\n{v} = {l}({x}).reshape(b, c, -1) ;
    {v} = {l}({x})\n{v} = {v} if self.training else {v} * 2 ;
    if {x}.shape[0] > 2:\n    {v} = {l}({x})\nelse:\n    {v} = {x}.mul_(2) ;
    {v} = {l}({x})\nif {v}.max() > 3:\n    {v} += 1 ; {v} = list({l}.children())[0]({x}) ;
    {v} = {x}\nfor m in {l}.children():\n    {v} = m({v}) ; with torch.set_grad_enabled(True):\n    {v} = {l}({x}) ;
    {v} = torch.empty_like({x})\n{v}.copy_({l}({x})) ; {v} = torch.zeros_like({x})\n{v}[:, 1:] = {l}({x})[:, 1:] ;
    {v} = {l}({x})\n{v}[0, 0] = {x}[0, 0]
""")
TRACEABLE = (0, 2, 3, 6, 7, 10, 11, 13, 14, 15)


def flow(body: Body, g: Reader) -> None:
    """Python's control flow, and statements that a graph cannot hold: mostly inside of modules."""
    if not body.layers:
        raise Rejected
    x, name = body.var(g), body.layers[-1 - g.next(8) % len(body.layers)].name
    fields = {"x": x, "l": name, "r": len(body.shape(x)), "c": (*body.shape(x), 0, 0)[1]}
    anything = body.depth > 0 or g.chance(8)
    if anything and g.pick(False, True):
        body.assign(g.pick(*FLOWS).format(**fields), sharp=True)
        return
    text = LOOPS[g.next(len(LOOPS))] if anything else LOOPS[g.pick(*TRACEABLE)]
    body.count += 1
    v = f"v{body.count}"
    body.run(text.format(v=v, **fields), [v], sharp=True)


def state(body: Body, g: Reader) -> None:
    """Buffers and weights that the forward changes."""
    x = body.var(g)
    if g.chance(3) and body.layers:
        one = body.layers[-1 - g.next(8) % len(body.layers)]
        if not getattr(one.module, "weight", None) is not None:
            raise Rejected
        body.run(f"{one.name}.weight.data.{g.pick('neg_()', 'mul_(2)', 'add_(1)')}", [])
        return
    k = body.declare("s", f"nn.Buffer({g.pick('torch.tensor(2.0).double()', 'torch.ones(1).double()')})")
    before = g.pick(True, False)
    if before:
        body.run(g.pick("{0} += 1", "{0}.add_(1)", "{0}.copy_({0} + 1)").format(k), [])
    body.assign(g.pick("{0} * {1}", "{0} + {1}").format(x, k))
    if not before:
        body.run(f"{k}.add_(1)", [])


NESTED = table("""
    nn.Sequential({0}) ; nn.Sequential({0}) ; Stacked({0}) ; nn.ModuleList([{0}]) ; nn.ModuleDict(dict(a={1}))
""")


def nested(body: Body, g: Reader) -> None:
    """Layers in a Sequential or a list."""
    x = body.var(g)
    kind = g.pick(*NESTED)
    probe: Any = body.values(x)[0].detach().clone()
    texts: list[str] = []
    for _ in range(g.pick(2, 3, 1)):
        text = layers.layer(body, g, tuple(probe.shape))
        try:
            probe = eval(text, body.scope.names)(probe)
        except Exception as error:
            raise Rejected from error
        texts.append(text)
        if not probe.numel():
            raise Rejected
    m = body.declare("n", kind.format(", ".join(texts), texts[0]))
    if kind.startswith("Stacked"):
        body.assign(f"sum(v.sum() for v in {m}({x})) + {x}" if g.chance(3) else f"{m}({x})[-1]")
    elif kind.startswith("nn.ModuleList"):
        body.count += 1
        body.run(f"v{body.count} = {x}\nfor m in {m}:\n    v{body.count} = m(v{body.count})", [f"v{body.count}"])
    else:
        body.assign(f"{m}['a']({x})" if kind.startswith("nn.ModuleDict") else f"{m}({x})")


MENU: tuple[tuple[int, Statement], ...] = (
    (20, menu.conv_norm), (14, menu.branches), (10, menu.call), (8, block), (8, menu.scaled), (8, menu.view),
    (8, menu.write), (6, menu.alone), (6, menu.pair), (5, menu.number), (4, again), (4, menu.functional),
    (4, nested), (3, menu.residual), (3, menu.pieces), (3, flow), (2, state), (2, spare), (8, menu.read_again),
)  # fmt: skip


def write_down(body: Body, genes: deque[bytes], count: int) -> None:
    """Write the next `count` genes down as statements of the body."""
    for _ in range(min(count, len(genes))):
        if genes:  # a module takes some of them
            gene = genes.popleft()
            body.add(_statement(gene[0] if gene else 0), Reader(gene, genes))


def _statement(kind: int) -> Statement:
    """The statement of the menu that a number stands for."""
    at = kind % sum(weight for weight, _ in MENU)
    for weight, found in MENU:
        if at < weight:
            return found
        at -= weight
    raise AssertionError("the weights cover every kind")
