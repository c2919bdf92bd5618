"""Everything that the result of `optimize` must hold, checked in one place: `exactly(model, *inputs)`.

One function compares values (`alike`), one compares calls (`same_outcome`); the other harnesses are made of these two.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from helpers import assert_untouched, count, fingerprint, relative_error
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import fxfuse
from fxfuse.capture.copying import copied

SEED = torch.default_generator.manual_seed  # torch.manual_seed looks for every accelerator, at each call
# What can be switched off, with the reason: `without={"views": "a slice becomes a layer of its own"}`.
SWITCHES = ("views", "plan", "copy", "pickle", "again", "refresh")

# Not so yet: the first run leaves what a second one merges.
MISSED = {"again": "the first run misses a merge"}


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Step(NamedTuple):
    """A call with gradients or without."""

    call: Call
    grad: bool = False


class Outcome(NamedTuple):
    """What a call gave, or the error that it raised, and what became of its arguments."""

    value: Any
    given: Any


def exactly(
    model: nn.Module,
    *inputs: Any,
    examples: Any = None,
    fires: bool | Mapping[str, int] | None = None,
    refused: str | Sequence[str] = (),
    counts: Mapping[str, int] | None = None,
    of: Collection[str] = (),
    tolerance: float = 0.0,
    without: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """Optimize a model and check the result against eager, in everything that a caller can see.

    Every input is given twice, without gradients and with them, to the result, a deep copy of it, one that was
    pickled, one that was optimized again (nothing may fire) and one that got new weights by `refresh` and then the
    old ones. Outputs must be equal to the bit, with their shapes, dtypes, strides, requires_grad, containers, and
    memory shared with the inputs and each other; so must be what is written to the inputs and to the state. The
    model stays bit for bit as it was and shares no tensor, random numbers are not drawn, every graph passes `lint`,
    and `plan` says the same as the report.

    Args:
        model: in eval mode, and so made that its arithmetic is exact where `tolerance` is 0.
        inputs: two or more, of different sizes: tensors, tuples of arguments, or calls with keywords.
        examples: `example_inputs` of `optimize`, which also gets `options` (`patterns`, `cost`, `capture`).
        fires: whether anything is fused, or how often each of some patterns fires.
        refused: parts of the reasons that the report must give.
        counts: how often operators run afterwards, as `helpers.count` names them.
        of: operators that do not run unless `counts` says so.
        tolerance: the largest relative error, where arithmetic is not exact.
        without: the checks to leave out, each with the reason; see `SWITCHES`.

    Returns:
        The optimized model.
    """
    assert len(inputs) >= 2, "one input shows too little: give two or more, of different sizes"
    calls = [as_call(x) for x in inputs]
    steps = [Step(call, grad) for grad in (False, True) for call in calls]
    fused = holds(model, steps, examples, tolerance=tolerance, without=without, **options)
    reported(report := fxfuse.report(fused), fires, refused)
    if counts is not None:
        for args, kwargs in copy.deepcopy(calls):
            ran = count(fused, *args, **kwargs)
            assert {n: ran[n] for n in {*counts, *of} if ran[n] or n in counts} == dict(counts), report
    return fused


def reported(report: Any, fires: bool | Mapping[str, int] | None, refused: str | Sequence[str] = ()) -> None:
    """What the report says fired, and why the rest did not."""
    if isinstance(fires, bool):
        assert bool(report.fired) == fires, report
    elif fires is not None:
        assert {name: report.by_pattern.get(name, 0) for name in fires} == dict(fires), report
    for reason in [refused] if isinstance(refused, str) else refused:
        assert any(reason in r.reason for r in report.refused), report


def holds(
    model: nn.Module,
    steps: Sequence[Step],
    examples: Any = None,
    *,
    tolerance: float = 0.0,
    without: Mapping[str, str] | None = None,
    reseed: Callable[[int], Any] = SEED,
    errors: bool = False,
    **options: Any,
) -> Any:
    """The optimized model, which does in every step what eager does; see `exactly`.

    `reseed` runs before every call. Eager must run, unless `errors` says that an error is an outcome too.
    """
    without = without or {}
    assert set(without) <= set(SWITCHES) and all(without.values()), without
    before, state = fingerprint(model), torch.get_rng_state()
    fused = fxfuse.optimize(model, examples, **options)
    assert torch.equal(state, torch.get_rng_state()), "random numbers were drawn"
    assert_untouched(model, before)
    _well_formed(model, fused)
    report = fxfuse.report(fused)
    if "plan" not in without and not any("not finite" in r.reason or "too small" in r.reason for r in report.refused):
        planned = fxfuse.plan(model, examples, **options)  # which reads no weight
        for what in ("fired", "refused", "after"):
            assert getattr(planned, what) == getattr(report, what), f"{what} {getattr(planned, what)} was planned"
    truth = copied(model)
    wanted = outcomes(truth, steps, reseed)
    for want in () if errors else wanted:
        if isinstance(want.value, Exception):
            raise want.value

    def check(candidate: nn.Module, expected: list[Outcome] = wanted) -> None:
        for got, want in zip(outcomes(candidate, steps, reseed), expected, strict=True):
            same_outcome(got, want, tolerance, views="views" not in without)

    candidates = [copied(fused)] if "copy" not in without else []
    twins = [copied(fused) for _ in range(2)] if "refresh" not in without else []
    if "pickle" not in without and (_pickles(model) or _parts_pickle(fused)):
        candidates.append(pickle.loads(pickle.dumps(fused)))
        assert str(fxfuse.report(candidates[-1])) == str(fxfuse.report(fused))
    if "again" not in without:
        again = fxfuse.optimize(fused, examples, **_unforced(options))
        fired = fxfuse.report(again).fired
        assert not fired, f"optimized again: {[f'{f.before} -> {f.after}' for f in fired]}"
        candidates.append(again)
    for candidate in (*candidates, fused):
        check(candidate)
        same_state(candidate, truth, model, tolerance)
    if "refresh" not in without:
        other = new_weights(copied(model))
        for twin in twins:
            assert fxfuse.refresh(twin, other) is twin
        check(twins[0], outcomes(copied(other), steps, reseed))
        check(fxfuse.refresh(twins[1], model))
    assert_untouched(model, before)
    return fused


def outcomes(model: nn.Module, steps: Sequence[Step], reseed: Callable[[int], Any]) -> list[Outcome]:
    """What the model gives in each step; an error is an outcome too."""
    return [outcome(model, *step, reseed) for step in steps]


def outcome(model: Any, call: Call, grad: bool, reseed: Callable[[int], Any] = SEED) -> Outcome:
    """What the model gives for a copy of these arguments."""
    given = copy.deepcopy(call)
    SEED(0)
    reseed(0)
    with torch.set_grad_enabled(grad):
        try:
            value = model(*given.args, **given.kwargs)
        except Exception as error:
            return Outcome(error, given)
    return Outcome(value, given)


def shared(one: Any, other: Any) -> list[list[bool]]:
    """For each tensor of one value, which tensors of the other it shares memory with."""
    ours, theirs = ([v for v in tree_leaves(x) if isinstance(v, Tensor)] for x in (one, other))
    return [[_shares(a, b) for b in theirs] for a in ours]


def same_outcome(got: Outcome, want: Outcome, tolerance: float = 0.0, **options: bool) -> None:
    """The same call gave the same, wrote the same, or failed in both; for the options see `alike`."""
    if isinstance(want.value, Exception) or isinstance(got.value, Exception):
        assert isinstance(want.value, Exception) and isinstance(got.value, Exception), (got.value, want.value)
        return
    alike(got.value, want.value, tolerance, **options)
    alike(got.given, want.given, tolerance, where="input afterwards")
    assert shared(got.value, got.given) == shared(want.value, want.given), "output and input share memory"
    if options.get("views", True):
        assert shared(got.value, got.value) == shared(want.value, want.value), "outputs share memory"


def alike(
    got: Any,
    want: Any,
    tolerance: float = 0.0,
    *,
    views: bool = True,
    strides: bool = True,
    grads: bool = True,
    where: str = "output",
) -> None:
    """The same containers of the same classes, with tensors that agree.

    `views=False` lets a tensor be one of its own, contiguous, where eager's is a part or a permutation of another;
    `strides=False` and `grads=False` do not compare strides and requires_grad.
    """
    options = {"views": views, "strides": strides, "grads": grads}
    assert type(got) is type(want), f"{where}: {type(got)} instead of {type(want)}"
    if isinstance(want, Tensor):
        for what in ("shape", "dtype", "device", *["requires_grad"] * grads):
            assert getattr(got, what) == getattr(want, what), f"{where}: {what} {getattr(got, what)}"
        if strides and want.layout == torch.strided and not (not views and got.is_contiguous()):
            assert got.stride() == want.stride(), f"{where}: strides {got.stride()} instead of {want.stride()}"
        close(got, want, tolerance, where)
    elif isinstance(want, Mapping):
        assert list(got) == list(want), where
        for key in want:
            alike(got[key], want[key], tolerance, **options, where=f"{where}[{key!r}]")
    elif dataclasses.is_dataclass(want):
        alike(vars(got), vars(want), tolerance, **options, where=where)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            alike(a, b, tolerance, **options, where=f"{where}[{i}]")
    else:
        assert got == want or (got != got and want != want), f"{where}: {got} instead of {want}"


def close(got: Tensor, want: Tensor, tolerance: float, where: str) -> None:
    """Equal values, or within a relative error; NaN is where NaN is."""
    if tolerance == 0 and torch.equal(got, want):
        return
    error = relative_error(got, want)
    equal = tolerance > 0 or bool(((got == want) | (got.isnan() & want.isnan())).all())
    assert equal and error <= tolerance, f"{where} differs by {error:.1e}"


def same_state(fused: nn.Module, truth: nn.Module, fresh: nn.Module, tolerance: float) -> None:
    """Buffers and parameters that the calls changed, changed alike in the result."""
    start, kept = fresh.state_dict(), fused.state_dict()
    for name, tensor in truth.state_dict().items():
        if name in kept and isinstance(tensor, Tensor) and not torch.equal(tensor, start[name]):
            close(kept[name], tensor, tolerance, f"{name} afterwards")


def new_weights(model: nn.Module) -> nn.Module:
    """Other weights, in place, with which exact arithmetic stays exact: moved along, times powers of two, negated."""
    with torch.no_grad():
        for p in model.parameters():
            if _writable(p):
                p.copy_(p.flatten().roll(1).reshape(p.shape) * -2)
        variances = {id(m.running_var) for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)}
        for b in model.buffers():
            if _writable(b):
                b.copy_(b.roll(1) * 4 if id(b) in variances else b * 2)
    return model


def _writable(tensor: Tensor) -> bool:
    spread = tensor.layout == torch.strided and 0 in tensor.stride() and tensor.numel() > 1
    return (tensor.is_floating_point() or tensor.is_complex()) and not spread and tensor.layout == torch.strided


def _well_formed(model: nn.Module, fused: nn.Module) -> None:
    """Graphs pass `lint`, no tensor is shared with the model, and the report can be read."""
    for module in fused.modules():
        if isinstance(module, GraphModule):
            module.graph.lint()
    ours = dict((*fused.named_parameters(), *fused.named_buffers()))
    theirs = [*model.parameters(), *model.buffers()]
    own = [name for name, tensor in ours.items() if any(_shares(tensor, other) for other in theirs)]
    assert not own, f"the model's own: {own}"
    assert str(fxfuse.report(fused))


def _unforced(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without the way of capture, and without patterns that must fire where nothing is won."""
    kept = {name: value for name, value in options.items() if name != "capture"}
    if isinstance(kept.get("patterns"), (list, tuple)):
        kept["patterns"] = [p.removesuffix("!") if isinstance(p, str) else p for p in kept["patterns"]]
    return kept


def as_call(given: Any) -> Call:
    return given if isinstance(given, Call) else Call(given if isinstance(given, tuple) else (given,), {})


def _pickles(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def _parts_pickle(fused: nn.Module) -> bool:
    """Whether a graph is made of modules and functions that can be pickled, which those local to a test cannot."""
    inside = [m for m in fused.modules() if not isinstance(m, GraphModule)]
    nodes = [n for m in fused.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]
    called = [n.target for n in nodes if n.op == "call_function"]
    return isinstance(fused, GraphModule) and all(map(_pickles, (*inside, *called)))


def _shares(a: Tensor, b: Tensor) -> bool:
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() != 0
    except (NotImplementedError, RuntimeError):  # a tensor of another layout has no storage
        return False
