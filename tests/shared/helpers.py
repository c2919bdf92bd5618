"""What the tests of rewrites share: hard weights, an untouched model, executed operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def randomize(model: nn.Module, seed: int = 0, integer: bool = False) -> nn.Module:
    """Weights that hide no mistake, in place; returns the model in eval mode.

    Every batch norm (anything with running statistics) gets a random mean, a variance in [0.5, 2],
    a weight of both signs that is never 0 and a random bias; so does a layer scale. Biases that are
    all 0, as many models start with, become random.

    Args:
        model: the model to change.
        seed: of all random numbers.
        integer: for models in float64. Every other parameter becomes an integer in [-3, 3] and
            every batch norm divides by a power of two and has eps 0, so that on integer inputs
            all but pools, softmax and the like is exact and `torch.equal` can compare.
    """
    random = _Random(seed)
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(getattr(module, "running_mean", None), Tensor)
            if norm:
                _randomize_norm(module, random, integer)
            for name, parameter in module.named_parameters(recurse=False):
                if _is_layer_scale(name, parameter):
                    parameter.copy_(random.scale(parameter, integer))
                elif integer and not norm:
                    parameter.copy_(random.integers(parameter))
                elif name == "bias" and not norm and not parameter.any():
                    parameter.copy_(random.normal(parameter) * 0.1)
    return model.eval()


def _randomize_norm(module: Any, random: _Random, integer: bool) -> None:
    mean, var = module.running_mean, module.running_var
    if integer:
        module.eps = 0.0
        mean.copy_(random.integers(mean))
        var.copy_(random.choice(mean, (0.25, 1.0, 4.0)))
    else:
        mean.copy_(random.normal(mean))
        var.copy_(0.5 + 1.5 * random.uniform(var))
    if module.weight is not None:
        module.weight.copy_(random.scale(module.weight, integer))
    if module.bias is not None:
        bias = module.bias
        bias.copy_(random.integers(bias) if integer else random.normal(bias))


def _is_layer_scale(name: str, parameter: Tensor) -> bool:
    return (name == "gamma" and parameter.dim() == 1) or name == "layer_scale"


class _Random:
    """Random tensors shaped like another, the same on every device and in every dtype."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=torch.float64)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64)

    def integers(self, like: Tensor) -> Tensor:
        return torch.randint(-3, 4, like.shape, generator=self.generator).double()

    def choice(self, like: Tensor, values: tuple[float, ...]) -> Tensor:
        index = torch.randint(len(values), like.shape, generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    def scale(self, like: Tensor, powers_of_two: bool) -> Tensor:
        if powers_of_two:
            size = self.choice(like, (0.5, 1.0, 2.0, 4.0))
        else:
            size = 0.5 + self.uniform(like)
        # Both signs occur as soon as there are two channels.
        order = torch.randperm(like.numel(), generator=self.generator).reshape(like.shape)
        first = torch.randint(2, (1,), generator=self.generator)
        return torch.where((order + first) % 2 == 0, size, -size)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a pass over the model could change, for `assert_untouched`.

    For each parameter and buffer: its values, identity, version, dtype, device, strides and
    requires_grad. For each module: its identity, training flag, hooks, the names of its attributes
    and those attributes that are plain numbers, strings or tuples of them.
    """
    state: dict[str, Any] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        state[f"{name} values"] = tensor.detach().clone()
        state[f"{name} is"] = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device)
        state[f"{name} strides"] = tensor.stride()
        state[f"{name} requires_grad"] = tensor.requires_grad
        state[f"{name} version"] = None if tensor.is_inference() else tensor._version
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name} module"] = (id(module), type(module))
        state[f"{name} attributes"] = tuple(module.__dict__)
        for key, value in module.__dict__.items():
            if key.endswith("_hooks"):
                state[f"{name} {key}"] = tuple(value or ())
            elif _is_plain(value):
                state[f"{name} {key}"] = repr(value)
    return state


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is bit for bit what `fingerprint` saw; NaNs with the same bits are the same."""
    after = fingerprint(model)
    names = list(dict.fromkeys([*before, *after]))
    changed = [name for name in names if not _same(before.get(name), after.get(name))]
    assert not changed, f"the model was changed: {', '.join(changed[:10])}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)


_FAMILIES = {
    "conv": ("convolution", "_convolution", "convolution_overrideable", "conv2d"),
    "bn": (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "batch_norm",
    ),
    "add": ("add", "add_"),
    "cat": ("cat", "concat"),
    "linear": ("linear", "addmm", "mm"),
}
_FAMILY = {name: family for family, names in _FAMILIES.items() for name in names}


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.counts["pool" if "pool" in name else _FAMILY.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def count(model: nn.Module, *inputs: Any, **named: Any) -> Counter[str]:
    """How often each aten operator runs in one call of the model, without gradients.

    Operators of a family share a key: "conv" (also transposed), "bn", "add" (also in place),
    "cat", "linear" (also mm), "pool" (average and maximum; a global average pool runs as "mean").
    Any other is counted under its own name, such as "mul" or "relu". An absent key counts 0.
    """
    mode = _Counting()
    with torch.no_grad(), mode:
        model(*inputs, **named)
    return mode.counts


def relative_error(a: Any, b: Any) -> float:
    """max |a - b| / max |b| in double precision, the largest over nested outputs; b is the truth.

    Where b is all 0 it is max |a|. Equal infinities and two NaNs differ by 0, one NaN by infinity.
    """
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return max((_tensor_error(x, y) for x, y in pairs if isinstance(y, Tensor)), default=0.0)


def _tensor_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    if b.numel() == 0:
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    infinity = float("inf")
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(infinity, infinity)
    size = torch.where(b.isfinite(), b.abs(), 0.0).max()
    error = difference.max() / size if size > 0 else difference.max()
    return float(error)
