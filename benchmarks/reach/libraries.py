"""The models that libraries of others build. Nothing is downloaded: all come from configs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import zoo_models

from .entry import Entry, Inputs, images

IMAGES = images((2, 3, 64, 96), (1, 3, 96, 128))
ANCHORED = images((2, 3, 128, 160), (1, 3, 160, 96))  # more anchors than the boxes a head keeps
PYRAMID = images((2, 3, 128, 160), (1, 3, 160, 128))  # PAN halves what is left of its encoder three times
SMALL: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}

# Short for all that yolov7's package builds: ELAN, pools, RepConv and IDetect (it comes without configs).
YOLOV7: dict[str, Any] = {
    "nc": 4,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "Conv", [16, 1, 1]],
        [-2, 1, "Conv", [16, 1, 1]],
        [-1, 1, "Conv", [16, 3, 1]],
        [-1, 1, "Conv", [16, 3, 1]],
        [[-1, -2, -3, -4], 1, "Concat", [1]],
        [-1, 1, "Conv", [32, 1, 1]],
        [-1, 1, "MP", []],
        [-1, 1, "Conv", [32, 3, 1]],
    ],
    "head": [
        [-1, 1, "SPPCSPC", [32]],
        [-1, 1, "Conv", [16, 1, 1]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [7, 1, "Conv", [16, 1, 1]],
        [[-1, -2], 1, "Concat", [1]],
        [-1, 1, "RepConv", [32, 3, 1]],
        [10, 1, "RepConv", [48, 3, 1]],
        [[15, 16], 1, "IDetect", ["nc", "anchors"]],
    ],
}


def ultralytics(config: str) -> nn.Module:
    """A model of the package's own YAML files."""
    from ultralytics.nn import tasks

    kind = tasks.ClassificationModel if config.endswith("-cls") else tasks.DetectionModel
    return kind(f"{config}.yaml", verbose=False)


def yolov5() -> nn.Module:
    import yolov5
    from yolov5.models.yolo import DetectionModel

    return DetectionModel(str(Path(yolov5.__file__).parent / "models" / "yolov5n.yaml"))


def yolov7() -> nn.Module:
    import sys
    from types import ModuleType

    sys.modules.setdefault("wget", ModuleType("wget"))  # imported to download weights, of which there are none here
    from yolov7_package.models.yolo import Model

    return Model(YOLOV7)


def segmentation(architecture: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, architecture)("resnet34", encoder_weights=None, classes=4)


def torchvision(name: str) -> Entry:
    """As the zoo builds and calls it: with few boxes on small images."""
    full = f"torchvision:{name}"

    def inputs(number: int) -> tuple[Any, ...]:
        return list(zoo_models.inputs(full, nn.Identity()))[number][-1]

    def build() -> nn.Module:
        model = zoo_models.build(full)
        if hasattr(model, "roi_heads"):  # few boxes do: the heads on them cost the most
            model.roi_heads.detections_per_img = 4
        return model

    return Entry(build, inputs)


def transformers(model: str, config: str, **options: Any) -> nn.Module:
    """Where a config holds another one, `options` holds its class and options under the same name."""
    import transformers

    for key, value in options.items():
        if isinstance(value, tuple):
            options[key] = getattr(transformers, value[0])(**value[1])
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def lora() -> nn.Module:
    """A convolutional network with low-rank updates, random ones, on all of its convolutions."""
    from peft import LoraConfig, get_peft_model

    from .idioms import Chain

    return get_peft_model(Chain(), LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))


def _hugging(model: str, inputs: Inputs = IMAGES, config: str = "", **options: Any) -> Entry:
    return Entry(partial(transformers, model, config or model.partition("For")[0] + "Config", **options), inputs,
                 "transformers")  # fmt: skip


RESNET = ("ResNetConfig", {**SMALL, "embedding_size": 16, "layer_type": "basic", "out_features": ["stage4"]})
SMALL_DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 7,
}  # fmt: skip
SMALL_RT: dict[str, Any] = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 48, "decoder_layers": 2, "num_queries": 20,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_denoising": 0,
    "encoder_in_channels": [24, 32, 48], "decoder_in_channels": [32, 32, 32], "anchor_image_size": None,
}  # fmt: skip
RT_RESNET = ("RTDetrResNetConfig", {**SMALL, "embedding_size": 16, "layer_type": "basic",
                                    "out_features": ["stage2", "stage3", "stage4"]})  # fmt: skip

MODELS: dict[str, Entry] = {
    **{f"ultralytics:{n}": Entry(partial(ultralytics, n), ANCHORED, "yolo")
       for n in ("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo11n-cls")},
    "yolov5:yolov5n": Entry(yolov5, ANCHORED, "yolo"),
    "yolov7:elan": Entry(yolov7, ANCHORED, "yolo"),
    **{f"segmentation_models_pytorch:{n}": Entry(partial(segmentation, n), PYRAMID if n == "PAN" else IMAGES,
                                                 "segmentation")
       for n in "Unet UnetPlusPlus FPN Linknet PSPNet DeepLabV3Plus UPerNet PAN MAnet".split()},
    **{f"torchvision:{n}": torchvision(n)
       for n in ("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
                 "fasterrcnn_mobilenet_v3_large_320_fpn", "maskrcnn_resnet50_fpn_v2")},
    "transformers:ResNet": _hugging("ResNetForImageClassification", embedding_size=16, **SMALL),
    "transformers:MobileNetV2": _hugging("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    "transformers:RegNet": _hugging("RegNetForImageClassification", embedding_size=16, groups_width=8, **SMALL),
    "transformers:SegFormer": _hugging("SegformerForSemanticSegmentation", decoder_hidden_size=32,
                                       num_attention_heads=[1, 2, 2, 4], **SMALL),
    "transformers:MobileViT": _hugging("MobileViTForImageClassification", hidden_sizes=[32, 48, 64],
                                       neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64]),
    "transformers:LeViT": _hugging("LevitForImageClassification", images((2, 3, 64, 64), (1, 3, 64, 64)),
                                   image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4],
                                   key_dim=[8, 8, 8], depths=[1, 1, 1]),
    "transformers:DETR": _hugging("DetrForObjectDetection", use_timm_backbone=False, backbone_config=RESNET,
                                  use_pretrained_backbone=False, backbone=None, **SMALL_DETR),
    "transformers:RT-DETR": _hugging("RTDetrForObjectDetection", ANCHORED, config="RTDetrConfig",
                                     backbone_config=RT_RESNET, **SMALL_RT),
    "peft:lora": Entry(lora, images(), "peft", convs=2, norms=0),
}  # fmt: skip
