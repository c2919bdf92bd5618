"""Captures by torch.export: what they refuse, what becomes of names, state and modes, and other spellings in ATen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_untouched, count, fingerprint, randomize, relative_error
from safety import Careless, pickled, usual
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

import fxfuse
from fxfuse.capture.copying import copied
from fxfuse.capture.export.graph import rebuild
from fxfuse.capture.export.program import _program
from fxfuse.ops import schema
from fxfuse.refusal import CaptureError

Forward = Callable[..., Any]
HERE = r"test_exported_state\.py:\d+"
EXAMPLES = torch.randn(2, 4, 8, 7, dtype=torch.float64)


def branches_on_data(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) if x.sum() > 0 else self.p(x)


def switches_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.b(self.a(x))
    return y * 2


def enters_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.b(self.a(x))
    return y.double()


def conditional(self: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y + 1, (self.b(self.a(x)),))


def asks_a_number(self: Any, x: Tensor) -> Tensor:
    y = self.b(self.a(x))
    return y * int((y > 0).sum())


def sets_an_attribute(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return self.b(self.a(x)) * self.calls


def sets_a_tensor(self: Any, x: Tensor) -> Tensor:
    self.last = self.b(self.a(x))
    return self.last


def collects(self: Any, x: Tensor) -> Tensor:
    self.seen.append(1)
    return self.b(self.a(x)) * len(self.seen)


def draws_in_python(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) * random.random()


def gives_an_object(self: Any, x: Tensor) -> Any:
    return LOCAL(self.b(self.a(x)))


def local_class() -> Any:
    class Local:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    pytree.register_pytree_node(Local, lambda v: ([v.tensor], None), lambda parts, _: Local(*parts))
    return Local


LOCAL = local_class()
REFUSED: dict[Forward, str] = {
    branches_on_data: rf"cannot be exported at .*{HERE}: `return self\.b.*optimize the submodules",
    switches_gradients: "switches gradients off or on",
    enters_autocast: r"enters torch\.autocast",
    conditional: "uses cond",
    asks_a_number: rf"{HERE}.*data-dependent",
    sets_an_attribute: rf"{HERE}.*sets self\.calls",
    sets_a_tensor: rf"{HERE}.*sets self\.last",
    collects: r"changes self\.seen",
    draws_in_python: "changes the state of a random number generator",
    gives_an_object: "returns a Local, which cannot be made again by name",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_a_graph_cannot_hold_is_refused(forward: Forward, capfd: pytest.CaptureFixture[str]) -> None:
    model = usual(forward)
    model.seen = []
    before, state, drawn = fingerprint(model), torch.get_rng_state(), random.getstate()
    with pytest.raises(CaptureError, match=REFUSED[forward]):
        fxfuse.optimize(model, EXAMPLES, capture="export")
    assert_untouched(model, before)
    assert capfd.readouterr() == ("", "")
    assert model.seen == [] and random.getstate() == drawn and torch.equal(torch.get_rng_state(), state)


def test_inputs_that_do_not_fit_are_the_callers_mistake() -> None:
    model = usual(lambda self, x: self.b(self.a(x)))
    for wrong in ((EXAMPLES, EXAMPLES), torch.randn(2, 3, 4, 4).double(), ()):
        with pytest.raises(ValueError, match="does not run on example_inputs"):
            fxfuse.optimize(model, wrong, capture="export")


def test_hooks() -> None:
    """Those of the model stay around the graph; those inside of it would run once, and are refused."""
    model = usual(lambda self, x: self.b(self.a(x)))
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, out: out * 2)
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = fingerprint(model)
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    assert_untouched(model, before)
    assert calls == []
    assert relative_error(fused(EXAMPLES), model(EXAMPLES)) < 1e-12
    assert calls == [1, 1]
    model.a.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(CaptureError, match="a has hooks"):
        fxfuse.optimize(model, EXAMPLES, capture="export")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.ModuleDict({"one": nn.Conv2d(6, 6, 1, bias=False), "norm": nn.BatchNorm2d(6)})
        self.twice = self.block["one"]
        self.head = nn.Linear(6, 3)
        self.head.weight.requires_grad_(False)
        self.register_buffer("scale", torch.rand(6, 1, 1), persistent=False)
        self.offset = torch.rand(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.block["norm"](self.block["one"](self.stem(x))))
        return self.head((F.gelu(self.twice(x)) * self.scale + self.offset).tanh().mean((2, 3)))


def test_names_state_and_provenance() -> None:
    model = randomize(Tied())
    before = fingerprint(model)
    example = torch.randn(1, 4, 5, 6)
    fused = fxfuse.optimize(model, example, capture="export")
    assert_untouched(model, before)
    report = fxfuse.report(fused)
    assert report.capture == "export"
    assert [f.path for f in report.fired] == ["stem.0", "block.one_1"]  # block.one itself is still in use
    assert isinstance(fused.stem.get_submodule("0"), nn.Conv2d)
    assert set(fused.state_dict()) == {
        *("stem.0.weight", "stem.0.bias", "block.one_1.weight", "block.one_1.bias"),
        *("block.one.weight", "head.weight", "head.bias", "offset"),
    }
    assert {n: p.requires_grad for n, p in fused.named_parameters()}["head.weight"] is False
    assert all(p.data_ptr() != q.data_ptr() for p in fused.parameters() for q in model.parameters())
    node = next(n for n in fused.graph.nodes if n.target == "stem.0")
    assert "stem" in str(node.meta["nn_module_stack"]) and node.meta["fxfuse"] and "stack_trace" in node.meta
    assert not any(k in n.meta for n in fused.graph.nodes for k in ("val", "tensor_meta", "from_node"))
    fused.train()
    assert fused.training
    fused.eval()
    assert not any(m.training for m in fused.modules())
    copied(fused).load_state_dict(fused.state_dict())
    for candidate in (fused, copied(fused), pickled(fused)):
        assert fxfuse.report(candidate) == report
        for batch in (1, 4):
            x = torch.randn(batch, 4, 7, 3)
            assert relative_error(candidate(x), model(x)) < 1e-5
    assert fxfuse.report(fxfuse.optimize(fused, example)).fired == ()
    assert fxfuse.report(fxfuse.optimize(fused, example, capture="export")).fired == ()


def test_refresh_and_plan() -> None:
    model, other = randomize(Tied()), randomize(Tied(), seed=5)
    example, x = torch.randn(2, 4, 5, 6), torch.randn(1, 4, 8, 8)
    fused = fxfuse.optimize(model, example, capture="export", verify=True)
    assert fxfuse.report(fused).max_error is not None
    dry = fxfuse.plan(model, example, capture="export")
    assert (dry.fired, dry.after) == (fxfuse.report(fused).fired, fxfuse.report(fused).after)
    assert relative_error(fxfuse.refresh(fused, other)(x), other(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = usual(lambda self, x: self.p(self.a(x)) * 2 + 1).to(dtype)
    x = torch.randn(2, 4, 5, 5).to(dtype)
    fused = fxfuse.optimize(model, x, patterns="conv_chain!", capture="export")
    assert {p.dtype for p in fused.parameters()} == {dtype} and fused(x).dtype == dtype


def test_modes_outside_do_not_matter() -> None:
    model = usual(lambda self, x: self.b(self.a(x)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    with torch.inference_mode():
        also = fxfuse.optimize(model, EXAMPLES, capture="export")
    assert [n.target for n in fused.graph.nodes] == [n.target for n in also.graph.nodes]
    assert fxfuse.report(fused).fired and fused(EXAMPLES).requires_grad and also(EXAMPLES).requires_grad
    assert not torch.is_autocast_enabled("cpu")


def test_the_meta_device() -> None:
    model = randomize(Tied()).to("meta")
    model.offset = model.offset.to("meta")
    report = fxfuse.plan(model, torch.randn(2, 4, 5, 6, device="meta"), capture="export")
    assert [f.path for f in report.fired] == ["stem.0", "block.one_1"]


def test_a_computed_weight_is_folded_under_its_layer() -> None:
    model = usual(lambda self, x: self.b(self.a(x)))
    nn.utils.parametrizations.weight_norm(model.a)
    fused = fxfuse.optimize(model, EXAMPLES, capture="export")
    (fired,) = fxfuse.report(fused).fired
    assert fired.path == "a" and count(fused, EXAMPLES) == {"conv": 1}
    assert relative_error(fused(EXAMPLES), model(EXAMPLES)) < 1e-12
    with torch.no_grad():
        model.a.parametrizations.weight.original0.mul_(2)
    assert relative_error(fxfuse.refresh(fused, model)(EXAMPLES), model(EXAMPLES)) < 1e-12


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).repeat(1, 2, 1, 1)


def test_verification_names_the_first_difference() -> None:
    model = usual(lambda self, x: self.a(self.a(torch.relu(self.i(self.b(self.p(x)))))), i=Inner())
    fused = fxfuse.optimize(model, EXAMPLES, verify=1e-12, capture="export")
    assert fxfuse.report(fused).fired and pickled(fused) is not None
    fxfuse.register(Careless)
    try:
        with pytest.raises(fxfuse.VerificationError, match=r"outputs differ by .* first site that differs is a "):
            fxfuse.optimize(model, EXAMPLES, verify=True, patterns=["conv_bn", Careless.name], capture="export")
    finally:
        fxfuse.unregister(Careless.name)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("examples", [False, True])
def test_a_graph_of_aten_operators_is_read_like_any_other(decomposed: bool, examples: bool) -> None:
    """Such as another program gives: no shape is noted in it, and decomposed it spells layers another way."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu_(self.n(self.p(self.b(self.a(F.pad(x, (1, 1, 1, 1)))))))
        y = torch.cat([y, self.t(y)[:, :, : y.shape[2], : y.shape[3]]], 1)
        return self.l2(self.l1(F.avg_pool2d(y, 2).mean((2, 3))))

    more = {"t": nn.ConvTranspose2d(4, 4, 2, 2), "l1": nn.Linear(8, 16), "l2": nn.Linear(16, 3)}
    model = usual(forward, **more).eval()
    program = _program(model, (EXAMPLES,), None)
    captured = rebuild(model, (EXAMPLES,), program.run_decompositions() if decomposed else program, {})
    other = GraphModule(model, captured.graph).eval()
    fused = fxfuse.optimize(other, EXAMPLES if examples else None)
    report = fxfuse.report(fused)
    assert report.before.ops["batch_norm"] == 2 and "batch_norm" not in report.after.ops
    assert report.before.ops["linear"] == 2 and report.after.ops["linear"] == 1
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 9).double()
        assert relative_error(fused(x), model(x)) < 1e-12


OPS = torch.ops.aten


@pytest.mark.parametrize(
    ("op", "arguments", "written", "shared"),
    [
        (OPS.conv2d.default, "x w", "", ""),
        (OPS.add_.Tensor, "x w", "x", "x"),
        (OPS.copy_.default, "x w", "x", "x"),
        (OPS.slice.Tensor, "x", "", "x"),
        (OPS.chunk.default, "x 2", "", "x"),
        (OPS.reshape.default, "x 2", "", "x"),
        (OPS.dropout.default, "x 0.5 False", "", "x"),
        (OPS.type_as.default, "x w", "", "x w"),
        (OPS.channel_shuffle.default, "x 1", "", "x"),
        (OPS.cat.default, "[x,w]", "", ""),
        (OPS.add.out, "x w out=y", "y", "y"),
        (OPS.batch_norm.default, "x w w m v True 0.1 1e-5 False", "m v", ""),
        (OPS.batch_norm.default, "x w w m v False 0.1 1e-5 False", "", ""),
        (OPS.instance_norm.default, "x w w m v True 0.1 1e-5 False", "m v", ""),
        (OPS.sym_size.int, "x 0", "", ""),
    ],
)
def test_the_schema_says_what_is_written_and_what_is_shared(op: Any, arguments: str, written: str, shared: str) -> None:
    graph = Graph()
    names = {name: graph.placeholder(name) for name in "x w m v y".split()}
    args, kwargs = [], {}
    for text in arguments.split():
        name, _, value = text.rpartition("=")
        given = eval(value, {}, names)
        kwargs |= {name: given} if name else {}
        args += [] if name else [given]
    node = graph.call_function(op, tuple([a] if op is OPS.reshape.default and a == 2 else a for a in args), kwargs)
    assert schema.written(node) == [names[n] for n in written.split()]
    assert schema.shared(node) == [names[n] for n in shared.split()]


TIMM = {
    "crossvit_tiny_240": (240, 0),  # branches on sizes everywhere
    "efficientvit_m0": (224, 113),
    "mobilevit_xxs": (64, 32),
}


@pytest.mark.parametrize("name", TIMM)
def test_models_that_torch_fx_traces_in_part_at_most(name: str) -> None:
    size, norms = TIMM[name]
    model = randomize(timm.create_model(name)).double()
    before = fingerprint(model)
    example = torch.randn(1, 3, size, size, dtype=torch.float64)
    fused = fxfuse.optimize(model, example, capture="export")
    assert_untouched(model, before)
    assert (count(model, example)["bn"], count(fused, example)["bn"]) == (norms, 0)
    with torch.no_grad():
        for batch in (1, 2):
            x = torch.randn(batch, 3, size, size, dtype=torch.float64)
            assert relative_error(fused(x), model(x)) < 1e-9
