"""What a process has only one of: threads that optimize and run models at once, and the modes of the caller."""

from __future__ import annotations

import builtins
import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse

PATCHED = ("__call__", "__getattr__", "__setattr__")


def state() -> list[Any]:
    own = [getattr(nn.Module, name) for name in PATCHED] + [getattr(builtins, name) for name in ("max", "min", "len")]
    return [*own, torch._debug_has_internal_overlap, gc.isenabled(), torch.get_default_dtype()]


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 1))


class Counts(nn.Module):
    """Plain Python, which sets an attribute, between two parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.calls, self.one, self.two = 0, block(width), block(width)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.two(self.one(x)) if x.shape[0] < max(5, x.dim()) else self.one(x)


class Slices(nn.Module):
    """Decides by a size in a way that only torch.export can follow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one = block(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(part) for part in x.unbind(0)[:1]]) if x.dim() == 3 else self.one(x)


def model_of(number: int) -> nn.Module:
    kind: Any = (block, Counts, Slices)[number % 3]
    return randomize(kind(2 + number % 5), seed=number).double().eval()


def at_once(works: list[Callable[[], None]]) -> list[str]:
    """The errors of works that all begin at one time."""
    errors: list[str] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_twenty_threads_optimize_and_run() -> None:
    before, x = state(), torch.randn(2, 3, 5, 7).double()
    done = threading.Event()
    left = [14]

    models: list[Any] = [model_of(number) for number in range(20)]

    def optimizing(number: int) -> None:
        try:
            model = models[number]
            want = copy.deepcopy(model)(x)
            fused = fxfuse.optimize(model, x if number % 2 else None, verify=number % 2 == 1)
            assert fxfuse.report(fused).fired
            for made in (fused, pickle.loads(pickle.dumps(fused))):
                torch.testing.assert_close(made(x), want, rtol=1e-9, atol=1e-9)
        finally:
            left[0] -= 1
            if not left[0]:
                done.set()

    def running(number: int) -> None:
        model = models[number]
        want, times = copy.deepcopy(model)(x), 0
        while not done.is_set() or times < 3:
            times += 1
            got = model(x)
            assert type(got) is Tensor and torch.equal(got, want)
            model.calls = max(times, number)
            assert model.calls == max(times, number)

    works = [lambda n=n: optimizing(n) for n in range(14)] + [lambda n=n: running(n) for n in range(14, 20)]
    assert at_once(works) == []
    assert state() == before


def test_a_model_that_is_traced_may_be_read_in_other_threads() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = block(4)

        def forward(self, x: Tensor) -> Tensor:
            if threading.get_ident() == tracing[0]:
                entered.set()
                read.wait(20)
            return self.layers(x)

    entered, read, tracing, seen = threading.Event(), threading.Event(), [0], list[Any]()
    model = randomize(Waits()).double().eval()
    x = torch.randn(1, 3, 5, 5).double()
    want = model(x)

    def other() -> None:
        entered.wait(20)
        model.note = 1  # which the forward may not do, and another thread may
        seen.extend((model(x), model.layers[0].weight))
        read.set()

    def optimizing() -> None:
        tracing[0] = threading.get_ident()
        seen.append(fxfuse.optimize(model))

    assert at_once([optimizing, other]) == []
    got, weight, fused = seen
    assert torch.equal(got, want) and type(weight) is nn.Parameter
    torch.testing.assert_close(fused(x), want, rtol=1e-9, atol=1e-9)
    assert [n.op for n in fused.graph.nodes].count("call_module") == 3


class Scaling(nn.Module):
    """Makes a tensor in the forward: its dtype is the caller's default."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = block(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * torch.ones(1)


class Logging(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Rounding(TorchDispatchMode):
    """Computes other numbers than torch does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.round() if isinstance(result, Tensor) and result.is_floating_point() else result


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "set_default_device": lambda: default_device("meta"),
    "with device": lambda: torch.device("meta"),
    "function mode": Logging,
    "dispatch mode": Rounding,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def modes() -> tuple[Any, ...]:
    """What of the caller's is in force, as far as it can be asked for."""
    made = torch.empty(1)
    mode = torch.overrides._get_current_function_mode_stack()
    inner = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    flags = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
    return (*map(id, (*mode, *inner)), made.device, made.dtype, made.is_inference(), *flags)


@pytest.mark.parametrize(
    "names", [(n,) for n in MODES] + [("with device", "dispatch mode", "function mode", "autocast")]
)
@pytest.mark.parametrize("cls", [lambda: block(4), Scaling, lambda: Counts(4)])
def test_the_modes_of_the_caller_are_set_aside(names: tuple[str, ...], cls: Callable[[], nn.Module]) -> None:
    model = randomize(cls()).eval()
    x, other = torch.randn(2, 3, 5, 7), randomize(copy.deepcopy(model), seed=4).eval()
    plain = fxfuse.optimize(model, x, verify=True)
    with ExitStack() as stack:
        logs = [stack.enter_context(MODES[name]()) for name in names]
        before = modes()
        asked = [len(log.seen) for log in logs if isinstance(log, Logging)]
        fused = fxfuse.optimize(model, x, verify=True)
        again = fxfuse.optimize(model)
        fxfuse.refresh(again, other)
        assert [len(log.seen) for log in logs if isinstance(log, Logging)] == asked
        with pytest.raises(ValueError, match="does not run on example_inputs"):
            fxfuse.optimize(model, x[:, :1], verify=True)
        assert modes() == before
    want = plain.state_dict()
    assert all(torch.equal(fused.state_dict()[name], value) for name, value in want.items())
    assert not any(t.is_inference() for t in fused.parameters())
    assert torch.equal(fused(x), plain(x)) and fused(x).dtype == plain(x).dtype
    torch.testing.assert_close(again(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [lambda: block(4), Scaling, lambda: Counts(4)])
def test_the_default_dtype_is_that_of_the_forward_and_not_of_weights(cls: Callable[[], nn.Module]) -> None:
    model, x = randomize(cls()).eval(), torch.randn(2, 3, 5, 7)
    want = fxfuse.optimize(model).state_dict()
    with default_dtype(torch.float64):
        expected = model(x)
        fused = fxfuse.optimize(model, x, verify=1e-4)
        assert torch.get_default_dtype() == torch.float64
        got = fused(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert all(
        torch.equal(fused.state_dict()[n], v) and v.dtype == torch.float32 for n, v in want.items() if ".0." in n
    )


def test_models_of_fake_and_of_meta_tensors_under_their_modes() -> None:
    with torch.device("meta"):
        model = block(4).eval()
        assert fxfuse.report(fxfuse.optimize(model, torch.randn(1, 3, 5, 5))).fired
    with FakeTensorMode():
        model = block(4).eval()
        assert fxfuse.plan(model, torch.randn(1, 3, 5, 5)).before.macs == 25 * (3 * 4 * 9 + 4 * 3)
