"""Format `detectron2`: a ResNet under detectron2's names, and the settings that it needs.

With these settings detectron2 computes the same features. They say that images are RGB, because
detectron2 reads images as BGR by default (its own weights come from Caffe).
"""

import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.transform import Transform
from simsiam.errors import WorkFailed
from simsiam.exports.format import Format, Network, is_standard_backbone, missing_backbone
from simsiam.model.backbones import RESNETS
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run

RESNET_DEPTHS = (18, 34, 50, 101, 152)  # the ones detectron2 has
BATCH_NORM_EPS = 1e-5  # the same in detectron2 and torchvision


class ResNetConfig(TypedDict, total=False):
    """The section MODEL.RESNETS of a config."""

    DEPTH: int
    STRIDE_IN_1X1: bool
    NORM: str
    RES2_OUT_CHANNELS: int


class ModelConfig(TypedDict):
    """The section MODEL of a config."""

    BACKBONE: dict[str, int]
    PIXEL_MEAN: list[float]
    PIXEL_STD: list[float]
    RESNETS: ResNetConfig


class Config(TypedDict):
    """The part of detectron2's config that an export sets."""

    VERSION: int
    INPUT: dict[str, str]
    MODEL: ModelConfig


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.pkl for detectron2's checkpointer, and config.yaml with the settings.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.

    Raises:
        UsageError: detectron2 has no such network.
    """
    recipe = run.recipe
    depth = next((n for n in RESNET_DEPTHS if recipe.backbone == f"resnet{n}"), None)
    if depth is None or not is_standard_backbone(recipe):
        raise missing_backbone("detectron2", recipe)
    (folder / "backbone.pkl").write_bytes(pickle_checkpoint(network.state_dict()))
    config = config_overrides(depth, eval_transform(recipe))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the network with detectron2 if it is installed, otherwise from its names and settings.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.

    Returns:
        A network that takes images in the normalization of this package.
    """
    weights_path, config_path = folder / "backbone.pkl", folder / "config.yaml"
    transform = eval_transform(recipe)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (transform.mean, transform.std))
    config: Config = yaml.safe_load(config_path.read_text("utf-8"))
    if find_spec("detectron2") is not None:
        network = load_with_detectron2(weights_path, config_path)
    else:
        weights = pickle.loads(weights_path.read_bytes())["model"]
        network = partial(compute_features, weights, config)
    return lambda x: network(normalize_pixels(255 * (x * std + mean), config))


def detectron2_name(name: str) -> str:
    """Translate the name of a tensor, for example layer1.0.bn2.weight to res2.0.conv2.norm.weight.

    Args:
        name: The name in torchvision.

    Returns:
        The name in detectron2. What is in no stage is in the stem: conv1.weight becomes
        stem.conv1.weight.
    """
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    stage = re.match(r"layer(\d)", name)
    return f"res{int(stage[1]) + 1}{name[stage.end() :]}" if stage else f"stem.{name}"


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Rename every tensor except batch norm's counter of steps, which detectron2 does not keep.

    Args:
        state: The state dict of a ResNet under torchvision's names.

    Returns:
        Arrays under detectron2's names.
    """
    return {
        detectron2_name(name): tensor.detach().cpu().numpy()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


def config_overrides(depth: int, transform: Transform) -> Config:
    """Make the settings of a config for this backbone.

    All layers are trained, and batch norm is trained and synchronized, as in the paper's transfer
    (MoCo's protocol).

    Args:
        depth: The depth of the ResNet.
        transform: The preprocessing. detectron2 normalizes pixels from 0 to 255.

    Returns:
        What the config must say.
    """
    resnets: ResNetConfig = {"DEPTH": depth, "STRIDE_IN_1X1": False, "NORM": "SyncBN"}
    if depth < 50:
        resnets["RES2_OUT_CHANNELS"] = 64
    return {
        "VERSION": 2,  # of detectron2's settings
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {
            "BACKBONE": {"FREEZE_AT": 0},
            "PIXEL_MEAN": [round(255 * v, 6) for v in transform.mean],
            "PIXEL_STD": [round(255 * v, 6) for v in transform.std],
            "RESNETS": resnets,
        },
    }


def pickle_checkpoint(state: Mapping[str, Tensor]) -> bytes:
    """Make a file as detectron2's checkpointer reads it.

    Args:
        state: The state dict of a ResNet under torchvision's names.

    Returns:
        The file. Names are matched by their endings, so any model that contains the backbone can
        load it.
    """
    return pickle.dumps(
        {"model": convert_weights(state), "__author__": "simsiam", "matching_heuristics": True}
    )


def normalize_pixels(pixels: Tensor, config: Config) -> Tensor:
    """Normalize pixels as detectron2's models do.

    Args:
        pixels: (N, 3, H, W) RGB, from 0 to 255.
        config: The settings.

    Returns:
        (N, 3, H, W).
    """
    model = config["MODEL"]
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (model["PIXEL_MEAN"], model["PIXEL_STD"])
    )
    return (pixels - mean) / std


def compute_features(weights: Mapping[str, np.ndarray], config: Config, x: Tensor) -> Tensor:
    """Compute features as detectron2 computes res5, averaged over positions.

    This is written from detectron2's names and settings alone. So if it agrees with the backbone,
    detectron2 will too.

    Args:
        weights: Arrays under detectron2's names.
        config: The settings.
        x: (N, 3, H, W) normalized images.

    Returns:
        (N, d) features h.

    Raises:
        WorkFailed: A tensor is missing, or there is one too many.
    """
    resnets, unused = config["MODEL"]["RESNETS"], set(weights)

    def tensor(name: str) -> Tensor:
        if name not in weights:
            raise WorkFailed(f"not kept: detectron2 looks for a tensor {name}, which is missing")
        unused.discard(name)
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
    if unused:
        raise WorkFailed(f"not kept: detectron2 has no place for a tensor {min(unused)}")
    return x.mean((2, 3))


def load_with_detectron2(weights_path: Path, config_path: Path) -> Callable[[Tensor], Tensor]:
    """Load the network with detectron2 itself.

    Args:
        weights_path: backbone.pkl.
        config_path: config.yaml.

    Returns:
        A function from normalized images (N, 3, H, W) to features (N, d).
    """
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


FORMAT = Format(
    write,
    reload,
    'cfg.merge_from_file("{path}/config.yaml"); cfg.MODEL.WEIGHTS = "{path}/backbone.pkl"',
    holds="backbone",
)
