"""Axes, broadcasting, paddings, slices and dtypes: decided by rank and rules, never by sizes that agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from safety import SHAPES, agrees, model_of, normal, usual
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.symbolic import capture
from fxfuse.reading.view import look

SQUARE = ((2, 4, 4, 4), (4, 4, 4, 4))
BATCH = torch.ones(2, 4, 4, 4, dtype=torch.float64)


def constant(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CONSTANTS: dict[tuple[int, ...], bool] = {
    (): True,
    (1,): True,
    (4,): False,
    (1, 4): False,
    (4, 1): False,
    (4, 4): False,
    (4, 1, 1): True,
    (4, 4, 1): False,
    (1, 4, 1, 1): True,
    (1, 1, 4, 1): False,
    (4, 1, 1, 1): False,
    (2, 4, 1, 1): False,
    (1, 1, 1, 1, 1): False,
}


@pytest.mark.parametrize("examples", [None, BATCH], ids=["", "examples"])
@pytest.mark.parametrize("shape", CONSTANTS)
def test_constants_go_by_their_axis(shape: tuple[int, ...], examples: Any) -> None:
    given = examples
    if examples is not None and len(shape) == 4:
        given = torch.ones(shape[0], 4, 4, 4, dtype=torch.float64)
    agrees(usual(lambda s, x: s.p(x) * s.k, k=constant(*shape)), SQUARE, examples=given, fires=CONSTANTS[shape])


def test_constant_after_a_linear_layer_goes_by_the_last_axis() -> None:
    model = randomize(model_of(lambda s, x: s.l(x) * s.k + s.c, l=nn.Linear(4, 4), k=constant(4), c=constant(1)))
    agrees(model.double(), ((2, 3, 5, 4), (4, 4), (4,)), fires=True)
    model = randomize(model_of(lambda s, x: s.l(x) * s.k, l=nn.Linear(4, 4), k=constant(4, 1)))
    agrees(model.double(), ((2, 4, 4), (4, 4)), fires=False)


RANKS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "bn1d on (N, C, L) after linear": (
        lambda s, x: s.o(s.l(x)), {"l": nn.Linear(4, 4), "o": nn.BatchNorm1d(4)}, ((3, 4), (2, 4, 4))
    ),
    "bn1d after an unbatched conv1d": (
        lambda s, x: s.o(s.l(x)), {"l": nn.Conv1d(4, 4, 1), "o": nn.BatchNorm1d(4)}, ((2, 4, 9), (4, 4))
    ),
    "bn1d after an unbatched conv2d": (
        lambda s, x: s.o(s.l(x)), {"l": nn.Conv2d(4, 5, 1), "o": nn.BatchNorm1d(4)}, ((4, 4, 6), (4, 4, 5))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RANKS)
def test_channel_axis_is_not_guessed(case: str) -> None:
    forward, parts, shapes = RANKS[case]
    model = randomize(model_of(forward, **parts)).double()
    agrees(model, shapes, fires=False)
    for shape in shapes:
        fused = fxfuse.optimize(model, torch.ones(shape, dtype=torch.float64))
        for other in shapes:
            x = normal(other, torch.Generator().manual_seed(0))
            try:
                got = fused(x)
            except AssertionError as error:  # a rank other than that of the examples may be refused, not mistaken
                assert other != shape and "rank" in str(error)
            else:
                torch.testing.assert_close(got, model(x), rtol=1e-12, atol=1e-12)


GUARDED: dict[str, Callable[..., Any]] = {
    "cat": lambda s, x: torch.cat([s.p(x), s.a(x)], 1),
    "cat 0": lambda s, x: torch.cat([s.p(x), s.a(x)], 0),
    "constant": lambda s, x: s.p(x) * s.k,
    "F.batch_norm": lambda s, x: F.batch_norm(s.p(x), s.b.running_mean, s.b.running_var),
    "slice": lambda s, x: s.p(x)[:, :2] * 2,
    "flip": lambda s, x: s.p(x).flip(1),
}


@pytest.mark.parametrize("examples", [None, (2, 4, 4, 4), (4, 4, 4)], ids=["", "batched", "unbatched"])
@pytest.mark.parametrize("case", GUARDED)
def test_an_unbatched_input_is_computed_or_refused(case: str, examples: tuple[int, ...] | None) -> None:
    model = usual(GUARDED[case], k=constant(1, 4, 1, 1))
    given = None if examples is None else torch.ones(examples, dtype=torch.float64)
    fused = fxfuse.optimize(model, given)
    for shape in ((2, 4, 4, 4), (4, 4, 4)):
        x = normal(shape, torch.Generator().manual_seed(0))
        try:
            got = fused(x)
        except AssertionError as error:
            assert shape != examples and "rank" in str(error)
        else:
            torch.testing.assert_close(got, model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("examples", [None, BATCH], ids=["", "examples"])
def test_cat_along_every_axis(dim: int, examples: Any) -> None:
    agrees(usual(lambda s, x: torch.cat([s.p(x), s.a(x)], dim)), examples=examples)


ARITHMETIC: dict[str, tuple[Callable[..., Any], bool | None]] = {
    "alpha": (lambda s, x: torch.add(s.a(x), s.p(x), alpha=3) - torch.sub(s.p(x), x, alpha=2), True),
    "alpha of a constant": (lambda s, x: torch.sub(s.a(x), s.k, alpha=2), True),
    "rsub": (lambda s, x: torch.rsub(s.a(x), 3, alpha=2), None),
    "1 - conv": (lambda s, x: 1 - s.a(x), True),
    "constant - conv": (lambda s, x: s.k - s.a(x), True),
    "2 / conv": (lambda s, x: 2 / s.a(x), False),
    "constant / conv": (lambda s, x: s.k / s.a(x), False),
    "rounded division": (lambda s, x: torch.div(s.a(x), 2, rounding_mode="floor"), False),
    "* inf": (lambda s, x: s.a(x) * float("inf"), False),
    "/ 0": (lambda s, x: s.a(x) / 0, False),
    "bool": (lambda s, x: s.a(x) * True + False, None),
    "bool constant": (lambda s, x: s.a(x) + s.m, None),
    "int constant": (lambda s, x: s.a(x) * s.i + 2, True),
    "complex": (lambda s, x: torch.view_as_real(s.a(x) * 1j), False),
    "broadcast mean": (lambda s, x: s.a(x) + x.mean((2, 3), keepdim=True), None),
    "broadcast size": (lambda s, x: s.a(x) + s.wide(x[:, :, :, :5]), None),
    "broadcast sum": (lambda s, x: s.p(x[:, :, :, :5]) + s.wide(x[:, :, :, :5]), None),
    "broadcast channels": (lambda s, x: s.p(x) + s.one(x), None),
    "shape": (lambda s, x: s.b(s.a(x)) * x.shape[2] / x.size(-1) + x.ndim, True),
    "view": (lambda s, x: s.b(s.a(x)).view(x.shape[0], -1).view(x.size(0), 4, -1), True),
    "new_ones": (lambda s, x: s.a(x) * x.new_ones(1, 4, 1, 1), None),
}  # fmt: skip


@pytest.mark.parametrize("case", ARITHMETIC)
def test_arithmetic(case: str) -> None:
    forward, fires = ARITHMETIC[case]
    parts: dict[str, Any] = {"wide": nn.Conv2d(4, 4, (1, 5)), "one": nn.Conv2d(4, 1, 1), "k": constant(4, 1, 1)}
    parts["m"] = torch.tensor([True, False, True, True]).view(4, 1, 1)
    model = usual(forward, **parts)
    model.register_buffer("i", torch.arange(4).view(4, 1, 1))
    agrees(model, fires=fires)


CUTS = [slice(None, None, 2), slice(-3, None), slice(1, 3), slice(None, -1), slice(-100, 100), slice(3, 1)]
PIECES: dict[str, Callable[..., Any]] = {
    **{str(cut): (lambda s, x, cut=cut: s.a(x)[:, cut]) for cut in CUTS},
    "one channel": lambda s, x: s.a(x)[:, 1],
    "batch": lambda s, x: s.a(x)[1:],
    "new axis": lambda s, x: s.a(x)[:, None, :2],
    "ellipsis": lambda s, x: s.a(x)[..., :2],
    "ellipsis before channels": lambda s, x: s.a(x)[..., :2, :, :],
    "list": lambda s, x: s.a(x)[:, [0, 2]],
    "tensor": lambda s, x: s.a(x)[:, s.i],
    "chunk of 3": lambda s, x: torch.cat([s.two(v) for v in (lambda p: (p[0], p[1]))(x.chunk(3, 1))], 1),
    "split by list": lambda s, x: (lambda p: s.one(p[0]) + s.three(p[1]))(s.b(x).split([1, 3], 1)),
    "split by size": lambda s, x: (lambda p: s.one(p[-1]) + s.three(p[0]))(s.b(x).split(3, dim=1)),
    "split of the batch": lambda s, x: (lambda p: s.a(p[0]) + s.p(p[1]))(s.b(x).split(1)),
    "flip": lambda s, x: s.b(s.a(x).flip(1)),
    "flip of a row": lambda s, x: s.b(s.a(x).flip(2)),
    "narrow": lambda s, x: s.b(torch.cat([s.a(x).narrow(1, 1, 2), s.a(x).narrow(1, -2, 2)], 1)),
    "shuffle": lambda s, x: s.p(F.channel_shuffle(s.a(x), 2)),
}


@pytest.mark.parametrize("examples", [None, BATCH[:, :, :, :3]], ids=["", "examples"])
@pytest.mark.parametrize("case", PIECES)
def test_pieces(case: str, examples: Any) -> None:
    parts = {"one": nn.Conv2d(1, 2, 1), "two": nn.Conv2d(2, 2, 1), "three": nn.Conv2d(3, 2, 1)}
    model = usual(PIECES[case], **parts)
    model.register_buffer("i", torch.tensor([1, 0]))
    agrees(model, examples=examples)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "transposed, C == N": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2, 1, 1), nn.BatchNorm2d(4)),
    "transposed, groups": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "same, even": lambda: nn.Sequential(nn.Conv2d(4, 4, 4, padding="same"), nn.BatchNorm2d(4)),
    "valid": lambda: nn.Sequential(nn.Conv2d(4, 4, 4, padding="valid"), nn.BatchNorm2d(4)),
    **{
        f"{mode} {kind}": (lambda mode=mode, build=build: build(mode))
        for mode in ("circular", "reflect", "replicate")
        for kind, build in {
            "wide": lambda m: nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, padding_mode=m), nn.BatchNorm2d(4)),
            "same": lambda m: nn.Sequential(nn.Conv2d(4, 4, 4, padding="same", padding_mode=m), nn.BatchNorm2d(4)),
            "1x1 first": lambda m: nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 3, padding=1, padding_mode=m)),
        }.items()
    },
    "reflection before padding": lambda: nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(4, 4, 3, padding=1)),
    **{
        f"pool {options}": (lambda o=options: nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, **o)))
        for options in (
            {"ceil_mode": True}, {"padding": 1}, {"padding": 1, "count_include_pad": False},
            {"divisor_override": 3}, {"stride": 2, "padding": 1, "ceil_mode": True},
        )
    },
    "no statistics": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "momentum None, not affine": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None, affine=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_layers(case: str) -> None:
    agrees(randomize(LAYERS[case]()).double())


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("amounts", [(1, 1, 1, 1), (-1, -1, 0, 0), (1, -1, 2, 0), (1, 2), (0, 0, 0, 0, 1, 1)])
def test_pads(amounts: tuple[int, ...], value: float) -> None:
    for padding in (0, 1):
        conv = nn.Conv2d(6 if len(amounts) == 6 else 4, 4, 3, padding=padding)
        given = torch.ones(2, 4, 8, 8, dtype=torch.float64)
        agrees(usual(lambda s, x: s.c(F.pad(s.b(x), amounts, value=value)), c=conv), examples=given)


def test_empty_batches_and_channels() -> None:
    agrees(usual(lambda s, x: s.b(s.a(x)) + x), ((0, 4, 5, 5), (1, 4, 6, 6)), fires=True)
    model = usual(lambda s, x: s.b(s.z(x[:, :0])), z=nn.Conv2d(0, 4, 1))
    agrees(model, fires=False)


def bytes_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)


PROMOTED: dict[str, Callable[..., Any]] = {
    "divided": lambda s, x: s.v(x / 255),
    "scaled": lambda s, x: s.v(x * 0.1),
    "negated": lambda s, x: s.v(-x / 2.0),
    "subtracted": lambda s, x: s.v(1.0 - x),
    "normalized": lambda s, x: s.v((x - s.k) / (s.k + 9)),
}


@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("case", PROMOTED)
def test_integer_inputs_are_still_promoted(case: str, examples: bool) -> None:
    model = usual(PROMOTED[case], v=nn.Conv2d(4, 4, 3), k=constant(4, 1, 1)).float()
    draws: list[Any] = [bytes_of]
    if case == "normalized":  # the others leave half precision as it is, which the convolution does not take
        draws.append(lambda shape, g: bytes_of(shape, g).half())
    for draw in draws:
        given = draw((1, 4, 5, 5), torch.Generator()) if examples else None
        agrees(model, draw=draw, tolerance=1e-5, examples=given)


def test_dtypes_are_not_mixed() -> None:
    single: Any = lambda shape, g: torch.randn(shape, generator=g)  # noqa: E731
    for wide, fires in ((constant(), True), (constant(1), False), (constant(4, 1, 1), False)):
        model = randomize(model_of(lambda s, x: s.c(x) * s.k, c=nn.Conv2d(4, 4, 3), k=wide))
        agrees(model, draw=single, tolerance=1e-6, fires=fires)
    model = usual(lambda s, x: s.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, -1, 1, 1))
    agrees(model, fires=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    draw: Any = lambda shape, g: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    agrees(model, draw=draw, tolerance=0.1, fires=True)
    mixed = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    mixed[0].to(dtype)
    agrees(mixed, draw=draw, tolerance=0.1, fires=False, refused="different dtypes")


def test_overflow_is_refused() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight.fill_(1e3)
        model[1].running_var.fill_(1e-6)
    model[1].eps = 1e-7
    draw: Any = lambda shape, g: torch.randn(shape, generator=g).half()  # noqa: E731
    agrees(model.half(), draw=draw, fires=False, refused="not finite")


def test_channels_last_inputs_keep_their_strides() -> None:
    def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return normal(shape, generator).contiguous(memory_format=torch.channels_last)

    agrees(usual(lambda s, x: s.b(s.a(x)) + x), draw=draw, fires=True)
    agrees(usual(lambda s, x: torch.cat([s.p(x), s.a(x)], 1)), draw=draw)
    agrees(usual(lambda s, x: s.p(x.permute(0, 3, 1, 2) * 2) + 1), tuple((n, h, w, 4) for n, _, h, w in SHAPES))


@pytest.mark.parametrize("indices", [(0, -2), (1, -1), (-1, 1), (-2, 0)])
def test_pieces_named_from_the_end_are_counted_once(indices: tuple[int, int]) -> None:
    """Two names of one piece of five channels, three or two, are not two pieces."""
    width = 3 if indices[0] in (0, -2) else 2

    def forward(self: Any, x: Tensor) -> Tensor:
        pieces = x.chunk(2, 1)
        return self.p(pieces[indices[0]]) + self.q(pieces[indices[1]])  # type: ignore[no-any-return]

    view = look(capture(model_of(forward, p=nn.Conv2d(width, 4, 1), q=nn.Conv2d(width, 4, 1)).eval()))
    assert not [step for step in view.affine.values() if step.op.in_channels == 2 * width]


@pytest.mark.parametrize(
    "pieces",
    [lambda y: y.chunk(2, 1), lambda y: y.split(2, 1), lambda y: torch.chunk(y, 3, 1), lambda y: y.split([0, 0], 1)],
)
def test_pieces_of_no_channels(pieces: Any) -> None:
    agrees(usual(lambda s, x: torch.cat([(y := s.b(s.a(x))), pieces(y[:, :0])[0]], 1)))
