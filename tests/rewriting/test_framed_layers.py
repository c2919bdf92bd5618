"""Framed layers as modules: kept, moved, scripted, exported, compiled and trained as convolutions are."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from affine_trees import CONVS, NORMS
from compiled_models import Counting, compiled, draw, fresh  # noqa: F401 - a fixture of every test
from helpers import assert_untouched, count, fingerprint, randomize, relative_error
from law_cases import EVERY, inputs
from torch import Tensor, nn

import fxfuse
from examples.blocks import BLOCKS
from fxfuse.cli import main
from fxfuse.framed import FRAMED, FramedConv2d


def model_of_rank(rank: int = 2, uneven: bool = False, seed: int = 0) -> nn.Module:
    """Batch norm before a padded, strided convolution, and one after it."""
    conv: nn.Module = CONVS[rank](4, 6, 3, 2, 1)
    if uneven:
        conv = nn.Sequential(nn.ConstantPad2d((2, 0, 1, 3), 0.0), nn.Conv2d(4, 6, 3, 2, dilation=2))
    return randomize(nn.Sequential(NORMS[rank](4), conv, NORMS[rank](6)).double(), seed, integer=True)


def pair(rank: int = 2, uneven: bool = False) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A model, its one framed layer, and inputs of two sizes."""
    model = model_of_rank(rank, uneven)
    fused = fxfuse.optimize(model, inputs(4, rank)[0], patterns=EVERY)
    assert [type(m) for m in fused.modules() if isinstance(m, nn.modules.conv._ConvNd)] == [FRAMED[rank]]
    return model, fused, inputs(4, rank)


def agree(f: Any, model: nn.Module, tensors: list[Tensor]) -> None:
    for x in tensors:
        assert torch.equal(f(x), model(x))


KINDS = [(1, False), (2, False), (3, False), (2, True)]


@pytest.mark.parametrize(("rank", "uneven"), KINDS)
def test_copies_and_state(rank: int, uneven: bool) -> None:
    model, fused, tensors = pair(rank, uneven)
    agree(copy.deepcopy(fused), model, tensors)
    loaded = pickle.loads(pickle.dumps(fused))
    agree(loaded, model, tensors)
    assert str(fxfuse.report(loaded)) == str(fxfuse.report(fused))
    names = sorted(n.rpartition(".")[2] for n in fused.state_dict())
    assert names == ["bias", "frame", "weight"]
    twin = copy.deepcopy(fused)
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(fused.state_dict())
    agree(twin, model, tensors)


@pytest.mark.parametrize(("rank", "uneven"), KINDS)
def test_scripted_and_traced(rank: int, uneven: bool) -> None:
    model, fused, tensors = pair(rank, uneven)
    scripted = torch.jit.script(fused)
    agree(scripted, model, tensors)
    saved = io.BytesIO()
    torch.jit.save(scripted, saved)
    saved.seek(0)
    agree(torch.jit.load(saved), model, tensors)
    agree(torch.jit.trace(fused, tensors[0]), model, tensors)
    agree(torch.fx.symbolic_trace(fused), model, tensors)


@pytest.mark.parametrize(("rank", "uneven"), KINDS)
def test_exported_for_every_size(rank: int, uneven: bool) -> None:
    model, fused, tensors = pair(rank, uneven)
    least = 4 + uneven  # below it a result has one row, for which torch.export makes a graph of its own
    sizes = {d + 2: torch.export.Dim(f"s{d}", min=least, max=64) for d in range(rank)}
    shapes = {0: torch.export.Dim("b", max=64), **sizes}
    example = torch.cat([tensors[0]] * 2)
    program = torch.export.export(fused, (example,), dynamic_shapes=(shapes,))
    agree(program.module(), model, [example, *(t for t in tensors if min(t.shape[2:]) >= least)])
    agree(program.run_decompositions().module(), model, [example])


@pytest.mark.parametrize(("rank", "uneven"), KINDS)
def test_compiled_in_one_graph(rank: int, uneven: bool, fresh: None) -> None:  # noqa: F811
    model, fused, tensors = pair(rank, uneven)
    f = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        agree(f, model, [*tensors, tensors[0][..., 1:], tensors[0]])


def test_inductor(fresh: None) -> None:  # noqa: F811
    model, fused, tensors = pair()
    f = torch.compile(fused, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (*tensors, tensors[0][:, :, 1:]):
            assert relative_error(f(x), model(x)) < 1e-12


def test_without_a_batch_and_in_other_forms() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 3, padding=1)).double(), integer=True)
    fused = fxfuse.optimize(model, patterns=EVERY)
    x = inputs(4, 2)[0]
    assert isinstance(fused.get_submodule("1"), FramedConv2d)
    agree(fused, model, [x, x[0], x[:0], x[:, :, :1, :1]])
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(fused(last), model(last)) and fused(last).stride() == model(last).stride()
    assert torch.equal(torch.func.vmap(fused)(x[:, None]), model(x)[:, None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.float()(x.float()).dtype == torch.bfloat16
    half = copy.deepcopy(fused).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert relative_error(half(x.bfloat16()), model(x)) < 0.05
    meta = copy.deepcopy(fused).to("meta")
    assert meta(x.float().to("meta")).shape == model(x).shape


def test_complex_layers() -> None:
    layers = (nn.Conv2d(4, 6, 1), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 3, 1))
    model = randomize(nn.Sequential(*layers).to(torch.complex128))
    fused = fxfuse.optimize(model, patterns=EVERY)
    for x in inputs(4, 2):
        x = torch.complex(x, x.flip(1))
        assert relative_error(fused(x), model(x)) < 1e-14
    assert sum(isinstance(m, FramedConv2d) for m in fused.modules()) == 1


def test_nothing_is_kept_from_call_to_call() -> None:
    model, fused, tensors = pair()
    state = fingerprint(fused)
    agree(fused, model, [tensors[0], tensors[1], tensors[0], tensors[1].transpose(2, 3)])
    assert_untouched(fused, state)


def test_it_trains_on_without_harm() -> None:
    """Gradients are those of any parameter; a step keeps the frame where it was: at the border."""
    _, fused, tensors = pair()
    layer = next(m for m in fused.modules() if isinstance(m, FramedConv2d))
    x = tensors[0].requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    torch.autograd.gradcheck(lambda f: torch.func.functional_call(layer, {"frame": f}, (x.detach(),)), layer.frame)
    optimizer = torch.optim.SGD(fused.parameters(), 0.01)
    before = layer.frame.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        fused(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.frame, before)
    with torch.no_grad():
        plain = torch.conv2d(x, layer.weight, layer.bias, 2, 1)
        assert relative_error(fused(x)[..., 1:-1, 1:-1], plain[..., 1:-1, 1:-1]) < 1e-14


def test_parameters_are_frozen_as_their_sources() -> None:
    fused = fxfuse.optimize(model_of_rank().requires_grad_(False), patterns=EVERY)
    assert not any(p.requires_grad for p in fused.parameters())


def test_refresh() -> None:
    model, fused, tensors = pair()
    other = model_of_rank(seed=3)
    assert fxfuse.refresh(fused, other) is fused
    agree(fused, other, tensors)
    assert not torch.equal(fused(tensors[0]), model(tensors[0]))


def test_optimized_again_it_stays_and_what_follows_joins_it() -> None:
    model, fused, tensors = pair()
    again = fxfuse.optimize(fused, tensors[0])
    assert not fxfuse.report(again).fired and not fxfuse.report(again).refused
    agree(again, model, tensors)
    more = randomize(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)).double(), 5, integer=True)
    longer, expected = nn.Sequential(fused, more).eval(), nn.Sequential(model, more)
    before = fingerprint(longer)
    merged = fxfuse.optimize(longer, tensors[0], patterns=EVERY)
    assert_untouched(longer, before)
    agree(merged, expected, tensors)
    assert dict(count(merged, tensors[0])).items() >= {"conv": 2, "add": 1}.items()
    agree(fxfuse.refresh(merged, longer), expected, tensors)


def test_a_hook_on_a_framed_layer_keeps_it() -> None:
    model, fused, tensors = pair()
    seen: list[Any] = []
    layer = next(m for m in fused.modules() if isinstance(m, FramedConv2d))
    layer.register_forward_hook(lambda *a: seen.append(a))
    again = fxfuse.optimize(nn.Sequential(fused, nn.BatchNorm2d(6).double()).eval(), tensors[0])
    assert "hooks" in str(fxfuse.report(again)) and again(tensors[0]).shape == model(tensors[0]).shape and seen


def test_two_sites_of_one_layer_get_frames_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(self.b(self.conv(self.a(x)).relu()))
            return out

    model = randomize(Twice().double(), integer=True)
    fused = fxfuse.optimize(model, patterns=EVERY)
    agree(fused, model, inputs(4, 2))
    assert sum(isinstance(m, FramedConv2d) for m in fused.modules()) == 2


def test_a_frame_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 1, 3, padding=1)).half().eval()
    for p in model.parameters():
        nn.init.constant_(p, 0.0)
    nn.init.constant_(model[0].bias, 3e4)
    nn.init.constant_(model[1].weight, 1.0)
    report = fxfuse.report(fxfuse.optimize(model))
    assert not report.fired and any("not finite in torch.float16" in r.reason for r in report.refused)


@pytest.mark.parametrize("capture", ["symbolic", "export", "hierarchical"])
def test_every_way_of_capture(capture: str) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model_of_rank()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    model, tensors = Body().eval(), inputs(4, 2)
    fused = fxfuse.optimize(model, torch.cat([tensors[0]] * 2), patterns=EVERY, capture=capture)
    agree(fused, model, [torch.cat([tensors[0]] * 2), *(tensors if capture != "export" else [])])
    assert sum(isinstance(m, FramedConv2d) for m in fused.modules()) == 1


@pytest.mark.parametrize("freeze", ["auto", True, False])
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_backend_follows_weights(freeze: Any, dynamic: bool | None, fresh: None) -> None:  # noqa: F811
    model, inner = model_of_rank(), Counting()
    f = compiled(model, inner, freeze=freeze, dynamic=dynamic, patterns=list(EVERY))
    with torch.no_grad():
        for x in (*inputs(4, 2), inputs(4, 2)[0][:, :, 1:]):
            assert torch.equal(f(x), model(x))
        assert inner.calls.count("conv2d") == 2 and "batch_norm" not in inner.calls
        model[0].bias.add_(1)
        model[1].weight.mul_(2)
        model[0].running_mean.sub_(3)
        for x in inputs(4, 2):
            assert torch.equal(f(x), model(x))
    assert "+ border" in str(fxfuse.report(f))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_the_backend_on_blocks(inner: str, fresh: None) -> None:  # noqa: F811
    block = BLOCKS["dbb_naive_stride2"]
    model = randomize(block.build())
    f = compiled(model, inner)
    with torch.no_grad():
        for shape in block.shapes:
            x = torch.randn(shape)
            assert relative_error(f(x), model(x)) < 1e-5
    assert "border" in fxfuse.report(f)[0].by_pattern


def test_the_command_line_shows_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "block.py"
    file.write_text(
        "from torch import nn\ndef pair(): return nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 3, 1, 1))"
    )
    assert main.main(["report", f"{file}:pair", "--input", "2,2,9,9", "--verify"]) == 0
    assert "conv2d 2->2 k3x3 p1 + border" in capsys.readouterr().out
    assert main.main(["explain", "border"]) == 0
    text = capsys.readouterr().out
    assert "+ border" in text and "would cost more" in text and "error" in text
    assert main.main(["patterns"]) == 0 and "border" in capsys.readouterr().out


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        lambda: (nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=(1, 0), stride=2)),
        lambda: (nn.Conv2d(3, 4, 1), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(4, 6, 3, dilation=2)),
    ],
)
def test_graph_quantization_takes_them(layers: Any) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = randomize(nn.Sequential(*layers()))
    fused = fxfuse.optimize(model, patterns=EVERY)
    assert any(isinstance(m, FramedConv2d) for m in fused.modules())
    draws = [x.float() for x in inputs(3, 2)]
    prepared = prepare_fx(fused, get_default_qconfig_mapping("x86"), (draws[0],))
    for x in draws:
        prepared(x)
    quantized = convert_fx(prepared)
    for x in draws:
        assert relative_error(quantized(x), model(x)) < 0.1
