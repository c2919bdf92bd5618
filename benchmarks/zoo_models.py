"""The models of the zoo: their names, how each is built with weights that hide no mistake, and what it is run on.

A model is named `timm:NAME`, `torchvision:NAME` or `package.module:factory`. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import randomize
from torch import Tensor, nn
from torchvision_ops import declare_missing_ops

declare_missing_ops()  # before anything imports timm or torchvision

GROUPS = ("segmentation", "detection", "video", "optical_flow")
EXCLUDED = {"quantization": "computes in integers, which no rewrite of fxfuse applies to"}
# A few boxes on a small image: by default a random model finds none, and two empty outputs are always equal.
SMALL = {"min_size": 128, "max_size": 192}
FEW = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20}
FEW_BOXES: dict[str, dict[str, Any]] = {
    "rcnn": SMALL | {
        "box_score_thresh": 0.0, "box_detections_per_img": 20,
        "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20,
    },
    "retinanet": SMALL | FEW,
    "fcos": SMALL | FEW,
    "ssd": FEW,
}  # fmt: skip


def timm_names(wanted: list[str], sizes: Path) -> list[str]:
    """`all` is every architecture, `files` the one with the fewest parameters of each of timm's files."""
    import timm

    names: list[str] = []
    for name in wanted:
        if name == "all":
            names += timm.list_models()
        elif name == "files":
            params = timm_params(sizes)
            names += (min(timm.list_models(module=m), key=params.__getitem__) for m in timm.list_modules())
        elif timm.is_model(name):
            names.append(name)
        else:
            raise ValueError(f"timm has no model {name!r}")
    return [f"timm:{n}" for n in dict.fromkeys(names)]


def timm_params(cache: Path) -> dict[str, int]:
    """The number of parameters of every timm architecture, kept in `cache` for this version of timm.

    They are built on the meta device, without memory for weights; all of them take two minutes.
    """
    import timm
    from tqdm import tqdm

    known: dict[str, Any] = json.loads(cache.read_text()) if cache.exists() else {}
    if known.get("timm") != timm.__version__:
        known = {"timm": timm.__version__, "params": {}}
        for name in tqdm(timm.list_models(), "sizes", disable=not sys.stderr.isatty()):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            known["params"][name] = sum(p.numel() for p in model.parameters())
        cache.write_text(json.dumps(known))
    params: dict[str, int] = known["params"]
    return params


def torchvision_names(wanted: list[str]) -> list[str]:
    """`all` is everything but the groups in EXCLUDED."""
    import torchvision.models as zoo

    left_out = {n for group in EXCLUDED for n in zoo.list_models(module=getattr(zoo, group))}
    everything = [n for n in zoo.list_models() if n not in left_out]
    for name in wanted:
        if name in left_out:
            raise ValueError(f"torchvision's {name!r} {'; '.join(EXCLUDED.values())}")
        if name not in (*everything, "all"):
            raise ValueError(f"torchvision has no model {name!r}")
    names = [n for name in wanted for n in (everything if name == "all" else [name])]
    return [f"torchvision:{n}" for n in dict.fromkeys(names)]


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in eval mode, without constant parameters: each would hide a mistake in what it multiplies.

    Raises whatever the model's own code raises.
    """
    zoo, _, short = name.partition(":")
    torch.manual_seed(seed)
    if zoo == "timm":
        import timm

        model: nn.Module = timm.create_model(short, pretrained=False)
    elif zoo == "torchvision":
        model = _torchvision(short)
    else:
        model = getattr(importlib.import_module(zoo), short)()
    _vary(randomize(model, seed), seed)
    return model


def _torchvision(name: str) -> nn.Module:
    import torchvision.models as zoo

    builder = zoo.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    options: dict[str, Any] = {k: None for k in ("weights", "weights_backbone") if k in taken}
    if group_of(name) == "detection":
        options |= next(few for kind, few in FEW_BOXES.items() if kind in name)
    model: nn.Module = builder(**options)
    return model


def group_of(name: str) -> str:
    """torchvision's folder of a model; "" for image classification and for what is not torchvision's."""
    import torchvision.models as zoo

    return next((g for g in GROUPS if name in zoo.list_models(module=getattr(zoo, g))), "")


def _vary(model: nn.Module, seed: int) -> None:
    """Random numbers for the parameters that are one number throughout, as LayerScale and new biases are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.numel() < 2
                or not parameter.is_floating_point()
                or (parameter != parameter.flatten()[0]).any()
            ):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            constant = float(parameter.flatten()[0])
            if constant == 0:
                parameter.copy_(noise * (0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5))
            elif abs(constant) < 0.01:  # a LayerScale so small that its branch would vanish in rounding
                parameter.copy_(noise)
            else:
                parameter.copy_(constant * (1 + 0.3 * noise))


def calibrate(model: nn.Module, args: Any, seed: int = 0) -> None:
    """Running statistics near what the batch norms see on these inputs, in place; off by up to half a deviation.

    With quite random ones a deep model saturates: its output is the same for every input, its boxes all score alike.
    No variance is far below the mean one, or a nearly constant channel would become one of magnified rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)

    def note(norm: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach().double().transpose(0, 1).flatten(1)
        if x.shape[0] != norm.running_mean.numel() or not x.isfinite().all():
            return  # its channels are elsewhere, as in a layer that permutes first: the random ones stay
        noise = torch.rand(2, x.shape[0], generator=generator, dtype=torch.float64)
        var = x.var(1, correction=0)
        norm.running_mean.copy_(x.mean(1) + (noise[0] - 0.5) * var.sqrt())
        norm.running_var.copy_((var + 0.5 * var.mean() + 1e-6) * (0.5 + noise[1]))

    norms = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
    hooks = [m.register_forward_pre_hook(note) for m in norms]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()


def inputs(name: str, model: nn.Module) -> Iterator[list[Any]]:
    """For each of two calls: inputs to try in turn, the cheapest first. Batches differ, and sizes where they may."""
    group = group_of(name.partition(":")[2]) if name.startswith("torchvision:") else ""
    for number, batch in ((0, 2), (1, 1)):
        generator = torch.Generator().manual_seed(number)

        def make(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        if group == "detection":
            sizes = ((3, 120, 150), (3, 140, 110))[: 2 - number]
            yield [([torch.rand(s, generator=generator) for s in sizes],)]
        elif group == "optical_flow":
            yield [tuple(make(batch, 3, *((128, 136), (136, 144))[number]) for _ in range(2))]
        elif group == "video":
            small, full = ((16, 64, 72), (24, 72, 64))[number], (16, 224, 224)
            yield [(make(batch, 3, *size),) for size in (small, full)]
        else:
            yield [(make(batch, *shape),) for shape in _image_shapes(model, number)]


def _image_shapes(model: nn.Module, number: int) -> list[tuple[int, ...]]:
    """Image sizes: odd and uneven, then even, then the size the model was made for."""
    config = getattr(model, "default_cfg", None) or {}
    full = tuple(config.get("input_size", (3, 224, 224)))
    channels, least = full[0], max(config.get("min_input_size", full)[1:]) if "min_input_size" in config else 0
    small = (((97, 129), (96, 128)), ((129, 81), (128, 96)))[number]
    tried = [] if config.get("fixed_input_size") else [s for s in small if min(s) >= least]
    return [*((channels, *s) for s in tried), full]
