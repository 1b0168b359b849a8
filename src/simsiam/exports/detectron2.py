"""A ResNet for detectron2: the weights under its names, and the settings with which it computes the same features.

RGB stays RGB: the settings say so, for detectron2 reads images as BGR unless told otherwise (its weights are Caffe's).
"""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.transform import Transform
from simsiam.errors import WorkFailed
from simsiam.model.backbones import RESNETS

RESNET_DEPTHS = (18, 34, 50, 101, 152)  # that detectron2 has
BATCH_NORM_EPS = 1e-5  # of batch norm, there as here


def detectron2_name(name: str) -> str:
    """A tensor's name there: layer1.0.bn2.weight is res2.0.conv2.norm.weight, conv1.weight is stem.conv1.weight."""
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    stage = re.match(r"layer(\d)", name)
    return f"res{int(stage[1]) + 1}{name[stage.end() :]}" if stage else f"stem.{name}"


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Every tensor but batch norm's counter of steps, which detectron2 does not keep."""
    kept = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    return {detectron2_name(name): tensor.detach().cpu().numpy() for name, tensor in kept.items()}


def config_overrides(depth: int, transform: Transform) -> dict[str, Any]:
    """What a config must say of this backbone. detectron2 normalizes pixels of 0 to 255.

    Everything is trained, batch norm too and synchronized, as in the paper's transfer (MoCo's protocol).
    """
    resnets = {
        "DEPTH": depth,
        "STRIDE_IN_1X1": False,
        "NORM": "SyncBN",
    }  # torchvision strides in the 3x3
    narrow = {"RES2_OUT_CHANNELS": 64} if depth < 50 else {}
    return {
        "VERSION": 2,  # of detectron2's settings
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {
            "BACKBONE": {"FREEZE_AT": 0},
            "PIXEL_MEAN": [round(255 * v, 6) for v in transform.mean],
            "PIXEL_STD": [round(255 * v, 6) for v in transform.std],
            "RESNETS": resnets | narrow,
        },
    }


def pickle_checkpoint(state: Mapping[str, Tensor]) -> bytes:
    """As its checkpointer reads it: names are matched by their endings, so any model around the backbone takes them."""
    return pickle.dumps(
        {"model": convert_weights(state), "__author__": "simsiam", "matching_heuristics": True}
    )


def normalize_pixels(pixels: Tensor, config: Mapping[str, Any]) -> Tensor:
    """What its models do first to RGB pixels (N, 3, H, W) of 0 to 255."""
    mean, std = (
        torch.tensor(config["MODEL"][name]).view(-1, 1, 1) for name in ("PIXEL_MEAN", "PIXEL_STD")
    )
    return (pixels - mean) / std


def compute_features(
    weights: Mapping[str, np.ndarray], config: Mapping[str, Any], x: Tensor
) -> Tensor:
    """h (N, d) as detectron2 computes res5 from prepared images (N, 3, H, W), averaged over positions.

    Written from its names and its settings alone, so that what agrees here is right there. Raises WorkFailed for a
    tensor that it looks for and does not find, or finds and has no place for.
    """
    resnets, left = config["MODEL"]["RESNETS"], set(weights)

    def tensor(name: str) -> Tensor:
        if name not in weights:
            raise WorkFailed(f"not kept: detectron2 looks for a tensor {name}, and there is none")
        left.discard(name)
        return torch.from_numpy(weights[name])

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = tensor(f"{name}.weight")
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var, scale, shift = (
            tensor(f"{name}.norm.{v}") for v in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, shift, eps=BATCH_NORM_EPS)

    x = F.max_pool2d(F.relu(conv(x, "stem.conv1", stride=2)), kernel_size=3, stride=2, padding=1)
    depth = resnets["DEPTH"]
    _, stages = RESNETS[f"resnet{depth}"]
    for stage, count in enumerate(stages, 2):
        for block in range(count):
            name, stride = f"res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            wider = block == 0 and (stage > 2 or depth >= 50)
            shortcut = conv(x, f"{name}.shortcut", stride) if wider else x
            if depth < 50:
                y = conv(F.relu(conv(x, f"{name}.conv1", stride)), f"{name}.conv2")
            else:
                first, second = (stride, 1) if resnets["STRIDE_IN_1X1"] else (1, stride)
                y = F.relu(conv(x, f"{name}.conv1", first))
                y = conv(F.relu(conv(y, f"{name}.conv2", second)), f"{name}.conv3")
            x = F.relu(y + shortcut)
    if left:
        raise WorkFailed(f"not kept: detectron2 has no place for a tensor {min(left)}")
    return x.mean((2, 3))


def load_with_detectron2(weights_path: Path, config_path: Path) -> Callable[[Tensor], Tensor]:
    """The same by detectron2 itself, from the two files."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg = get_cfg()
    cfg.merge_from_file(str(config_path))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    network = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(network).load(str(weights_path))
    return lambda x: network(x)["res5"].mean((2, 3))
