"""Example inputs by position, by name and by keyword alone; models that are no plain module; what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

import fxfuse


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


class ByKeyword(Base):
    def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.one(pixel_values) * scale


class Mixed(Base):
    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor) -> Tensor:
        return self.one(x) * mask if y is None else self.one(x + y) * mask


class Branching(Base):
    def forward(self, *, x: Tensor, mask: Tensor) -> Tensor:
        y = self.one(x)
        return y * mask if y.sum() > 0 else y - mask


class OfADict(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.one(batch["image"]) + batch["shift"]


X, MASK = torch.randn(2, 3, 6, 7).double(), torch.ones(2, 1, 1, 1).double() * 3


@pytest.mark.parametrize(
    ("cls", "examples"),
    [
        (ByKeyword, {"pixel_values": X}),
        (ByKeyword, X),
        (Mixed, {"mask": MASK, "x": X}),
        (Mixed, {"mask": MASK, "y": X * 2, "x": X}),
        (Branching, {"mask": MASK, "x": X}),
    ],
)
@pytest.mark.parametrize("capture", [None, "hierarchical", "export"])
def test_arguments_by_name(cls: Any, examples: Any, capture: str | None) -> None:
    model = randomize(cls()).double().eval()
    named = examples if isinstance(examples, dict) else {"pixel_values": examples}
    if capture == "export" and cls is not ByKeyword:
        text = "cannot be exported at .*test_example_inputs" if cls is Branching else "mask is given by keyword alone"
        with pytest.raises(fxfuse.CaptureError, match=text):
            fxfuse.optimize(model, examples, capture=capture)
        return
    fused = fxfuse.optimize(model, examples, verify=True, capture=capture)
    assert fxfuse.report(fused).fired and fxfuse.report(fused).before.macs
    for scale in (1, -2):
        given = {name: value * scale for name, value in named.items()}
        torch.testing.assert_close(fused(**given), model(**given), rtol=1e-9, atol=1e-9)


def test_a_dict_of_other_names_is_one_argument() -> None:
    model, batch = randomize(OfADict()).double().eval(), {"image": X, "shift": X.new_ones(4, 1, 1)}
    for examples in (batch, (batch,), {"batch": batch}):
        fused = fxfuse.optimize(model, examples, verify=True)
        assert fxfuse.report(fused).before.macs
        torch.testing.assert_close(fused(batch), model(batch), rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_named() -> None:
    for cls, examples, text in (
        (Mixed, {"x": X}, "have no mask"),
        (Mixed, (X,), "missing a required .*'mask'"),
        (Mixed, (X, X, MASK, X), "too many positional"),
        (ByKeyword, {"pixels": X}, "pixel_values|does not run"),
        (OfADict, (), "missing a required .*'batch'"),
    ):
        with pytest.raises(ValueError, match=f"{cls.__name__} does not run on example_inputs: .*{text}"):
            fxfuse.optimize(cls().eval(), examples, verify=True)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        return y, y.mean((2, 3))


@pytest.mark.parametrize("model", [Norms(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))], ids=["two", "one"])
@pytest.mark.parametrize("check", [True, False])
def test_an_exported_program_s_module(model: nn.Module, check: bool) -> None:
    model = randomize(model).double().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    exported = program.module(check_guards=check)
    for examples in (X, None):
        fused = fxfuse.optimize(exported, examples, verify=examples is not None)
        assert fxfuse.report(fused).fired
        for x in (X, X[:1], X * -2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError, match=r"not ExportedProgram; pass program.module\(\)"):
        fxfuse.optimize(program, X)  # type: ignore[arg-type]


def test_models_that_wrap_and_models_without_python() -> None:
    model = randomize(Norms()).eval()
    x = torch.randn(1, 3, 5, 5)
    wrapped = nn.DataParallel(model)
    with pytest.raises(ValueError, match=r"DataParallel is in training mode: pass what it wraps, model\.module"):
        fxfuse.optimize(wrapped, x)
    for given, text in (
        (wrapped.eval(), "DataParallel hands its inputs on to the model that it wraps; optimize that, model.module"),
        (
            torch.jit.trace(model, x),
            "is traced and has no forward in Python; optimize the model before torch.jit.trace",
        ),
        (
            torch.jit.script(model),
            "is scripted and has no forward in Python; optimize the model before torch.jit.script",
        ),
    ):
        for examples in (None, x):
            left = fxfuse.optimize(given, examples)
            assert any(text in r.detail for r in fxfuse.report(left).refused)
            torch.testing.assert_close(left(x)[0], model(x)[0])
        with pytest.raises(fxfuse.CaptureError, match=text):
            fxfuse.optimize(given, x, capture="symbolic")
    with pytest.raises(fxfuse.CaptureError, match=r"optimize it before torch\.compile"):
        fxfuse.optimize(torch.compile(model), x)
