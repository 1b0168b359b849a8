"""Checkpoint files: the published ones known by name, their download, and reading one without running what it holds."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision import models

from simsiam.errors import UsageError, WorkFailed, unknown_name
from simsiam.runs.weight_files import file_sha256

HUB_PREFIX = "hf-hub:"  # as timm writes it


IMAGENET_PREPROCESSING: dict[str, Any] = {
    "image_size": 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


class Release(NamedTuple):
    """Published weights."""

    url: str
    sha256_prefix: str  # its first digits; "" where none are published
    settings: dict[str, Any]  # what is known of the recipe
    note: str


_URL = "https://dl.fbaipublicfiles.com/simsiam/models"


_NOTE = "% linear on ImageNet, as its authors measured; CC BY-NC 4.0; no checksum is published"


# facebookresearch/simsiam: README.md, and issue 18 for the 200 epochs.
RELEASES = {
    "simsiam_resnet50_100ep": Release(
        f"{_URL}/100ep/pretrain/checkpoint_0099.pth.tar",
        "",
        {"epochs": 100, "batch_size": 512},
        f"68.1 {_NOTE}",
    ),
    "simsiam_resnet50_100ep_256bs": Release(
        f"{_URL}/100ep-256bs/pretrain/checkpoint_0099.pth.tar",
        "",
        {"epochs": 100, "batch_size": 256},
        f"68.3 {_NOTE}",
    ),
    "simsiam_resnet50_200ep_256bs": Release(
        f"{_URL}/200ep-256bs/pretrain/checkpoint_0199.pth.tar",
        "",
        {"epochs": 200, "batch_size": 256},
        f"69.8 {_NOTE}",
    ),
}


def find_release(name: str) -> Release | None:
    """What is published under a name: one of RELEASES, or torchvision's, such as ResNet50_Weights.IMAGENET1K_V2."""
    if name in RELEASES:
        release = RELEASES[name]
        return release._replace(
            settings={"backbone": "resnet50", "source": "imagenet"}
            | IMAGENET_PREPROCESSING
            | release.settings
        )
    network, dot, _ = name.partition("_Weights.")
    if not dot or os.sep in name:
        return None
    try:
        weights = models.get_weight(name)
        preset = weights.transforms()
        images = {
            "image_size": preset.crop_size[0],
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
        }
    except (KeyError, ValueError, AttributeError):
        raise UsageError(f"torchvision has no classifier's weights {name!r}") from None
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", weights.url)  # torchvision's file names carry them
    words = {"backbone": network.lower(), "source": "imagenet"} | images
    return Release(
        weights.url,
        digits[1] if digits else "",
        words,
        "torchvision's, trained with ImageNet's labels",
    )


def is_published(name: str) -> bool:
    """Whether a name means the same on every machine: a release's, or a repository's on the hub."""
    return name.startswith(HUB_PREFIX) or find_release(name) is not None


def resolve_checkpoint(name_or_path: str | os.PathLike[str]) -> tuple[Path, Release | None]:
    """The file behind a published name (downloaded once), a run folder (its backbone) or a path. Raises UsageError.

    "hf-hub:owner/name" is a run folder that `simsiam export --format huggingface --push` uploaded.
    """
    if release := find_release(os.fspath(name_or_path)):
        return fetch(os.fspath(name_or_path), release), release
    name_or_path = os.fspath(name_or_path)
    path = (
        download_from_hub(name_or_path.removeprefix(HUB_PREFIX))
        if name_or_path.startswith(HUB_PREFIX)
        else Path(name_or_path).expanduser()
    )
    if path.is_dir():
        path = path / "backbone.safetensors"
        if not path.is_file():
            raise UsageError(f"{path} is not there: give a finished run, or a file")
    elif not path.is_file():
        names = [
            *RELEASES,
            "ResNet50_Weights.IMAGENET1K_V2 or another of torchvision's",
            "a file",
            "a run folder",
        ]
        raise unknown_name("checkpoint", name_or_path, names)
    return path, None


def download_from_hub(name: str) -> Path:
    """The folder of a repository on the hub, in its cache. Raises UsageError without the package, WorkFailed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f'{HUB_PREFIX}{name} needs huggingface_hub: pip install "simsiam[hub]"'
        ) from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["recipe.yaml", "backbone.safetensors"]
            )
        )
    except (OSError, ValueError) as error:  # its own errors are among these
        reason = " ".join(str(error).split())[:200]
        raise WorkFailed(f"{name} cannot be fetched from the hub: {reason}") from None


def fetch(name: str, release: Release) -> Path:
    """The release's file in torch's cache, downloaded if it is not there, checked each time. Raises WorkFailed."""
    published = Path(release.url).name
    path = (
        Path(torch.hub.get_dir())
        / "checkpoints"
        / (published if release.sha256_prefix else f"{name}-{published}")
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                release.url, str(path), hash_prefix=release.sha256_prefix or None
            )
        except (OSError, RuntimeError) as error:
            raise WorkFailed(f"{name} cannot be downloaded from {release.url}: {error}") from None
    elif not file_sha256(path).startswith(release.sha256_prefix):
        raise WorkFailed(
            f"{path} is damaged: its sha256 does not start with {release.sha256_prefix}; delete it and try again"
        )
    return path
