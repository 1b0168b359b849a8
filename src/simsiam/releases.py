"""Checkpoint files: the published ones known by name, their download, and reading one without running what it holds."""

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save as serialized
from torch import Tensor
from torchvision import models

from simsiam.errors import UsageError, WorkFailed, brief, unknown

CHECKSUM = "sha256 of tensors"  # its key in a safetensors file's metadata
HUB = "hf-hub:"  # as timm writes it
IMAGENET: dict[str, Any] = {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Release(NamedTuple):
    """Published weights."""

    url: str
    sha256: str  # its first digits; "" where none are published
    words: dict[str, Any]  # what is known of the recipe
    note: str


_URL = "https://dl.fbaipublicfiles.com/simsiam/models"
_NOTE = "% linear on ImageNet, as its authors measured; CC BY-NC 4.0; no checksum is published"
# facebookresearch/simsiam: README.md, and issue 18 for the 200 epochs.
RELEASES = {
    "simsiam_resnet50_100ep": Release(
        f"{_URL}/100ep/pretrain/checkpoint_0099.pth.tar", "", {"epochs": 100, "batch_size": 512}, f"68.1 {_NOTE}"
    ),
    "simsiam_resnet50_100ep_256bs": Release(
        f"{_URL}/100ep-256bs/pretrain/checkpoint_0099.pth.tar", "", {"epochs": 100, "batch_size": 256}, f"68.3 {_NOTE}"
    ),
    "simsiam_resnet50_200ep_256bs": Release(
        f"{_URL}/200ep-256bs/pretrain/checkpoint_0199.pth.tar", "", {"epochs": 200, "batch_size": 256}, f"69.8 {_NOTE}"
    ),
}


def release_of(name: str) -> Release | None:
    """What is published under a name: one of RELEASES, or torchvision's, such as ResNet50_Weights.IMAGENET1K_V2."""
    if name in RELEASES:
        release = RELEASES[name]
        return release._replace(words={"backbone": "resnet50", "source": "imagenet"} | IMAGENET | release.words)
    network, dot, _ = name.partition("_Weights.")
    if not dot or os.sep in name:
        return None
    try:
        weights = models.get_weight(name)
        preset = weights.transforms()
        images = {"image_size": preset.crop_size[0], "mean": tuple(preset.mean), "std": tuple(preset.std)}
    except (KeyError, ValueError, AttributeError):
        raise UsageError(f"torchvision has no classifier's weights {name!r}") from None
    digits = re.search(r"-([0-9a-f]{8,})\.\w+$", weights.url)  # torchvision's file names carry them
    words = {"backbone": network.lower(), "source": "imagenet"} | images
    return Release(weights.url, digits[1] if digits else "", words, "torchvision's, trained with ImageNet's labels")


def published(name: str) -> bool:
    """Whether a name means the same on every machine: a release's, or a repository's on the hub."""
    return name.startswith(HUB) or release_of(name) is not None


def locate(given: str | os.PathLike[str]) -> tuple[Path, Release | None]:
    """The file behind a published name (downloaded once), a run folder (its backbone) or a path. Raises UsageError.

    "hf-hub:owner/name" is a run folder that `simsiam export --format huggingface --push` uploaded.
    """
    if release := release_of(os.fspath(given)):
        return fetch(os.fspath(given), release), release
    given = os.fspath(given)
    path = from_hub(given.removeprefix(HUB)) if given.startswith(HUB) else Path(given).expanduser()
    if path.is_dir():
        path = path / "backbone.safetensors"
        if not path.is_file():
            raise UsageError(f"{path} is not there: give a finished run, or a file")
    elif not path.is_file():
        names = [*RELEASES, "ResNet50_Weights.IMAGENET1K_V2 or another of torchvision's", "a file", "a run folder"]
        raise unknown("checkpoint", given, names)
    return path, None


def from_hub(name: str) -> Path:
    """The folder of a repository on the hub, in its cache. Raises UsageError without the package, WorkFailed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(f'{HUB}{name} needs huggingface_hub: pip install "simsiam[hub]"') from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["recipe.yaml", "backbone.safetensors"]))
    except (OSError, ValueError) as error:  # its own errors are among these
        reason = " ".join(str(error).split())[:200]
        raise WorkFailed(f"{name} cannot be fetched from the hub: {reason}") from None


def fetch(name: str, release: Release) -> Path:
    """The release's file in torch's cache, downloaded if it is not there, checked each time. Raises WorkFailed."""
    published = Path(release.url).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / (published if release.sha256 else f"{name}-{published}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(release.url, str(path), hash_prefix=release.sha256 or None)
        except (OSError, RuntimeError) as error:
            raise WorkFailed(f"{name} cannot be downloaded from {release.url}: {error}") from None
    elif not sha256(path).startswith(release.sha256):
        raise WorkFailed(f"{path} is damaged: its sha256 does not start with {release.sha256}; delete it and try again")
    return path


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Damaged(ValueError):
    """A file's content does not match the checksum in it."""


def load_state(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, each record held against its checksum in the file. Runs no code.

    Raises Damaged, or whatever a broken pickle makes torch raise.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):  # what torch wrote before 1.6 has no checksums
            with zipfile.ZipFile(file) as archive:
                if record := archive.testzip():
                    raise Damaged(f"{record} does not match its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def save_weights(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """A safetensors file with `about` and a checksum of its tensors in the metadata; the format itself has none.

    Not by `save_file`, which has an error of its own for a full disk.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        file.write(serialized(plain, {CHECKSUM: digest(plain), **(about or {})}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, held against the checksum in it where there is one. Raises Damaged."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    if CHECKSUM in about and about[CHECKSUM] != digest(tensors):
        raise Damaged("its tensors do not match their checksum")
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, kinds, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors in a PyTorch or safetensors file, and the names of what else is in it.

    Runs nothing that the file holds. Raises UsageError for code, damage, or no state dict.
    """
    content: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles; what matters becomes an error
            content = load_weights(path) if path.suffix == ".safetensors" else load_state(path)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            advice = "none of it was run; where you trust the file, save its state dict alone"
            raise UsageError(f"{path} carries code ({code[1]}): {advice}") from None
        known = f": {error}" if isinstance(error, Damaged) else f" ({type(error).__name__})"
        raise UsageError(f"{path} is no checkpoint that can be read{known}") from None
    aside: list[str] = []
    inner = [key for key, value in content.items() if holds_tensors(value)] if isinstance(content, Mapping) else []
    if inner:
        chosen = next(key for key in ("state_dict", "model", *inner) if key in inner)
        aside = [str(key) for key in content if key != chosen]
        content = content[chosen]
    if not holds_tensors(content):
        held = ", ".join(map(str, content))[:160] if isinstance(content, Mapping) else type(content).__name__
        raise UsageError(f"{path} holds no state dict, only {held or 'nothing'}")
    for key, value in content.items():
        if isinstance(value, Tensor) and not is_plain(value):
            raise UsageError(f"{path}: {brief(key)} is no plain array of numbers, or has more of them than the file")
    aside += [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    return {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}, aside


def is_plain(tensor: Tensor) -> bool:
    """Whether each of its numbers is in memory: no sparse, quantized or meta tensor, and no one number seen as many."""
    ordinary = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return ordinary and tensor.nbytes <= tensor.untyped_storage().nbytes()


def holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
