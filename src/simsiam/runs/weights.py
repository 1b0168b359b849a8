"""Weights by name: whatever a verb takes in place of a run folder becomes one, once.

The run folder is made by `convert`, in the user's cache, and used again until its origin changes.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from simsiam.config.recipes import PREPROCESSING_SETTINGS, Recipe, ResolvedRecipe
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError, printable, truncate, unknown_name
from simsiam.model.backbones import RESNETS, fit_positions
from simsiam.model.encoder import Encoder
from simsiam.model.patches import ClosedFormStart, Patches
from simsiam.runs.checkpoints.convert import convert, format_unused
from simsiam.runs.checkpoints.foreign_checkpoints import resampling_note
from simsiam.runs.checkpoints.published_weights import (
    HUB_PREFIX,
    RELEASES,
    download_from_hub,
    file_in_folder,
    find_release,
)
from simsiam.runs.checkpoints.timm_weights import (
    LITE_PACKAGES,
    TIMM_WEIGHTS_PREFIX,
    find_timm_config,
    timm_folder,
)
from simsiam.runs.closed_form import fit_patches_run
from simsiam.runs.encoder import build_backbone
from simsiam.runs.encoder import load as load_run
from simsiam.runs.run_folder import BACKBONE_FILE, HEAD_FILE, ORIGIN_FILE, Run
from simsiam.utils.checksums import file_sha256
from simsiam.utils.files import cache_dir, file_lock, writable_cache

SourceNames = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
PATCHES = "patches"  # the name of the encoder that is learned from the source's images
CACHE_VERSION = 2  # changes whenever `convert` makes something else of the same weights
KINDS = (
    "timm:NAME", "hf-hub:OWNER/NAME", "ResNet50_Weights.IMAGENET1K_V2 or another of torchvision's",
    PATCHES, *LITE_PACKAGES, *RELEASES, "a run folder", "a file with --backbone NAME",
)  # fmt: skip


@rank_zero_only
def open_weights(
    name: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    source: SourceNames | None = None,
    channels: int = 3,
    splits: Sequence[str] | None = None,
) -> Path:
    """Return the run folder of a run or of weights.

    Args:
        name: A run folder, which is returned as it is; or weights, for which a run folder is made
            in the cache once: one of KINDS.
        backbone: The network of a file; needed if it is no ResNet. With other weights it must be
            theirs.
        source: The images that "patches" is learned from.
        channels: Channels of these images.
        splits: Which of these images are for training; see `open_source`.

    Returns:
        The run folder.

    Raises:
        UsageError: There are no such weights, or a package is missing.
        WorkFailed: A download failed.
    """
    text = os.fspath(name)
    path = run_folder_of(text)
    if path is None:
        if text == PATCHES:
            path = _fit_patches(source, channels, splits)
        else:
            path = _open_cached(text, backbone)
    network = Run(path).recipe.backbone
    if backbone not in (None, network):
        raise UsageError(
            f"--backbone is {backbone}, and the weights {printable(text)} are of {network}: leave "
            "--backbone out"
        )
    return path


def load(
    run: str | os.PathLike[str], *, head: bool = True, backbone: str | None = None
) -> nn.Module:
    """Load the encoder of a finished run or of weights: its backbone, and its head if it has one.

    >>> encoder = load("lite0")
    >>> h = encoder(encoder.transform("photo.jpg"))  # (1, encoder.dim)

    Args:
        run: A run folder, or weights; see `open_weights`.
        head: Whether to load the head; without it, the result is the backbone alone.
        backbone: The network of a file of weights; needed if it is no ResNet.

    Returns:
        A module in eval mode, from normalized images (N, C, H, W) to features h (N, `.dim`). Its
        parameters have no gradients; `requires_grad_(True)` gives them back. Its attribute
        `.transform` turns image files and images into such a batch. It is an `Encoder` if there is
        a head, else the backbone.

    Raises:
        UsageError: There is no such run or weights, or its files do not fit together.
        WorkFailed: A download failed.
    """
    return load_run(open_weights(run, backbone=backbone), head=head)


def run_folder_of(name: str | os.PathLike[str]) -> Path | None:
    """Return the run folder that a path names by itself.

    Args:
        name: A run folder or its backbone.safetensors; or anything else.

    Returns:
        The folder, or None for anything else.
    """
    path = Path(name).expanduser()
    folder = path.parent if path.name == BACKBONE_FILE else path
    return folder if (folder / "recipe.yaml").is_file() else None


def canonical_name(name: str) -> str:
    """Return what a recipe records as its initial weights.

    Args:
        name: A name of weights or a path.

    Returns:
        A name that means the same on every machine as it is; a path as an absolute path.
    """
    prefixes = (TIMM_WEIGHTS_PREFIX, HUB_PREFIX)
    published = name in (PATCHES, *LITE_PACKAGES) or name.startswith(prefixes)
    if run_folder_of(name) is None and (published or find_release(name)):
        return name
    return str(Path(name).expanduser().resolve())


def _fit_patches(source: SourceNames | None, channels: int, splits: Sequence[str] | None) -> Path:
    if not source:
        raise UsageError(
            f"{PATCHES} is learned from images: run `simsiam adapt SOURCE` first, and give the run "
            "folder that it makes"
        )
    with writable_cache():
        return fit_patches_run(source, channels, splits=splits)


def _open_cached(name: str, backbone: str | None) -> Path:
    """Return the run folder of weights in the cache, and make it if it is not there."""
    name, key = _identify(name)
    if backbone in RESNETS or not os.path.isfile(name):
        backbone = None  # the tensors of a ResNet and other weights say which network they are for
    text = json.dumps([CACHE_VERSION, name, backbone, key])
    slug = re.sub(r"[^\w.-]+", "-", Path(name).name if os.path.isfile(name) else name)[:60]
    with writable_cache():
        path = cache_dir("weights") / f"{slug}-{sha256(text.encode()).hexdigest()[:10]}"
        with file_lock(path.with_name(f".{path.name}.lock"), wait=True):
            if not (path / "recipe.yaml").is_file() or not (path / BACKBONE_FILE).is_file():
                shutil.rmtree(path, ignore_errors=True)
                convert(name, out=path, backbone=backbone)
                origin = Run(path).json(ORIGIN_FILE)
                line = f"{name}: {origin['origin']}; license: {origin['license']}; kept in {path}"
                for text in (line, *format_unused(path)):
                    print(printable(text), file=sys.stderr)
    return path


def _identify(name: str) -> tuple[str, str]:
    """Return the full name of weights, and what changes if and only if they do."""
    if name in LITE_PACKAGES:
        return name, LITE_PACKAGES[name].sha256
    if name.startswith(TIMM_WEIGHTS_PREFIX):
        config = find_timm_config(name.removeprefix(TIMM_WEIGHTS_PREFIX))
        return name, str(config.hf_hub_id or config.url)
    if name.startswith(HUB_PREFIX):
        return name, download_from_hub(name.removeprefix(HUB_PREFIX)).name
    if release := find_release(name):
        return name, release.url
    path = Path(name).expanduser()
    if folder := timm_folder(path):
        parts = (file_sha256(folder / part) for part in ("model.safetensors", "config.json"))
        return str(folder.resolve()), " ".join(parts)
    if path.is_dir():  # an export may be no more than the weights
        path = file_in_folder(path)
    if not path.is_file():
        hint = str(unknown_name("weights", name, KINDS)).partition(": ")[2]
        raise UsageError(f"{printable(name)} is not a run folder, and no weights: {hint}")
    return str(path.resolve()), file_sha256(path)


def load_init_weights(model: nn.Module, recipe: ResolvedRecipe) -> None:
    """Load the weights that the setting `init` names into a backbone.

    Args:
        model: The backbone.
        recipe: The recipe.

    Raises:
        UsageError: There are no such weights, or they do not fit exactly.
        WorkFailed: A download failed.
    """
    if isinstance(model, ClosedFormStart):
        _start_from_patches(model, recipe)
        return
    folder = open_weights(
        recipe.init or "",
        backbone=recipe.backbone,
        source=recipe.source,
        channels=recipe.channels,
    )
    tensors, _ = fit_positions(
        recipe.backbone,
        load_run(folder, head=False).state_dict(),
        model.state_dict(),
        image_size=recipe.image_size,
        channels=recipe.channels,
    )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = truncate(" ".join(str(error).split()))
        raise UsageError(f"init {recipe.init} does not fit {recipe.backbone}: {reason}") from None


def open_patches(recipe: Recipe | ResolvedRecipe) -> Path:
    """Return the run folder of the patches that are learned from the images of a recipe.

    Args:
        recipe: The recipe.

    Raises:
        UsageError: There are too few images.
    """
    return open_weights(
        PATCHES, source=recipe.source, channels=recipe.channels, splits=recipe.splits
    )


def _start_from_patches(model: ClosedFormStart, recipe: ResolvedRecipe) -> None:
    folder = open_patches(recipe)
    encoder = load_run(folder)
    patches, head = (
        (encoder.backbone, encoder.head) if isinstance(encoder, Encoder) else (encoder, None)
    )
    assert isinstance(patches, Patches)
    try:
        model.fill(patches, head, recipe.mean, recipe.std)
    except RuntimeError:
        raise UsageError(
            f"{recipe.backbone} does not fit the patches of these images, which are "
            f"{Run(folder).recipe.backbone}: leave --backbone out, or give the network alone"
        ) from None


def describe_resampling(folder: Path, recipe: ResolvedRecipe) -> list[str]:
    """Say that position embeddings of initial weights are resampled, if they are.

    Args:
        folder: The run folder of the initial weights.
        recipe: The recipe of the run that starts from them.

    Returns:
        One line, or none.

    Raises:
        UsageError: The network does not take images of the recipe's size.
    """
    own = Run(folder).recipe
    if recipe.backbone in RESNETS or own.image_size == recipe.image_size:
        return []
    with torch.device("meta"):
        before, after = (build_backbone(r).state_dict() for r in (own, recipe))
    if all(before[name].shape == after[name].shape for name in after):
        return []
    return [resampling_note(own.image_size, recipe.image_size)]


def record_origin(run: Run) -> None:
    """Copy origin.json of the initial weights into a run that starts from them.

    Args:
        run: The run.
    """
    recipe = run.recipe
    if recipe.init in (None, PATCHES):
        return
    folder = open_weights(
        recipe.init, backbone=recipe.backbone, source=recipe.source, channels=recipe.channels
    )
    if origin := Run(folder).json(ORIGIN_FILE):
        run.write(ORIGIN_FILE, origin)


def known_preprocessing(folder: Path) -> dict[str, object]:
    """Return the preprocessing that weights bring with them.

    Args:
        folder: Their run folder.

    Returns:
        Those of PREPROCESSING_SETTINGS that were not assumed when the run folder was made.
    """
    run = Run(folder)
    assumed = run.json("converted.json").get("assumed", [])
    return {
        name: getattr(run.recipe, name) for name in PREPROCESSING_SETTINGS if name not in assumed
    }


def left_out_head(folder: Path) -> list[str]:
    """Say that training starts from the backbone alone, if there is more.

    Args:
        folder: The run folder of the initial weights.

    Returns:
        One line, or none.
    """
    if not Run(folder).has_head:
        return []
    return [f"{HEAD_FILE} of the initial weights is left out: training starts from the backbone"]
