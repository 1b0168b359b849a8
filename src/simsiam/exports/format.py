"""What an export format is, and what several formats use."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.errors import UsageError, WorkFailed
from simsiam.model.backbones import RESNETS
from simsiam.model.encoder import Encoder
from simsiam.runs.run_folder import Run

TOLERANCE = 1e-5  # of features: absolute, or relative to the largest one if that is above 1
HEAD_TOLERANCE = 1e-4  # the same after a head, which enlarges small differences
TEST_BATCH_SIZES = (1, 3)  # an exported graph must accept any number of images

Network = Callable[[Tensor], Tensor]  # images (N, C, H, W) to features (N, d)


class Format(NamedTuple):
    """One export format.

    Attributes:
        write: Writes the network of a run into a folder. Raises UsageError if it does not fit.
        reload: Loads what `write` wrote, with the library that the format is for.
        load_code: The line of code that loads it, with {path}, {backbone} and {arguments} to fill
            in; the last are num_classes of a network with a head, and image_size of a ViT.
        packages: What must be installed beyond the dependencies of this package.
        extra: The extra of this package that installs them.
        holds: How much of an encoder it can hold: "all", the backbone with a linear "head", or the
            "backbone" alone.
    """

    write: Callable[[nn.Module, Run, Path], None]
    reload: Callable[[Path, ResolvedRecipe], Network]
    load_code: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    holds: Literal["all", "head", "backbone"] = "all"


def max_difference(eager: Network, exported: Network, recipe: ResolvedRecipe) -> float:
    """Compare the features of two networks on the same random images.

    Args:
        eager: The network as it was trained.
        exported: The network as it was loaded from an export.
        recipe: The recipe, for the shape of the images.

    Returns:
        The largest absolute difference.

    Raises:
        WorkFailed: The shapes differ, or the difference is above TOLERANCE, or HEAD_TOLERANCE for
            an encoder with a head.
    """
    largest = 0.0
    tolerance = HEAD_TOLERANCE if isinstance(eager, Encoder) else TOLERANCE
    for n in TEST_BATCH_SIZES:
        shape = (n, recipe.channels, recipe.image_size, recipe.image_size)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(n))
        x[1:2] = 0  # a flat image
        with torch.no_grad():
            h, exported_h = eager(x), exported(x)
        if h.shape != exported_h.shape:
            raise WorkFailed(
                f"not kept: features of the exported file have the shape "
                f"{tuple(exported_h.shape)}, not {tuple(h.shape)}"
            )
        delta = (h - exported_h).abs().max().item()
        if not delta <= tolerance * max(1.0, h.abs().max().item()):  # true of nan as well
            raise WorkFailed(
                f"not kept: features of the exported file are off by {delta:.2g}, "
                f"more than {tolerance:g}"
            )
        largest = max(largest, delta)
    return largest


def split_encoder(network: nn.Module) -> tuple[nn.Module, nn.Linear | None]:
    """Return the backbone of an encoder, and its head.

    Args:
        network: A backbone, or an encoder without a second branch.
    """
    return (network.backbone, network.head) if isinstance(network, Encoder) else (network, None)


def example_input(recipe: ResolvedRecipe) -> Tensor:
    """Make a batch of two black images, for exporters that trace the network.

    Args:
        recipe: The recipe of the run.
    """
    return torch.zeros(2, recipe.channels, recipe.image_size, recipe.image_size)


def is_standard_backbone(recipe: ResolvedRecipe) -> bool:
    """Tell whether the network is the published one.

    A ResNet of this package may be narrower, or have the stem for small images.

    Args:
        recipe: The recipe of the run.
    """
    standard = (recipe.width, recipe.resnet_stem, recipe.channels) == (64, "large", 3)
    return recipe.backbone not in RESNETS or standard


def missing_backbone(library: str, recipe: ResolvedRecipe) -> UsageError:
    """Make the error for a network that a library does not have.

    Args:
        library: The library.
        recipe: The recipe of the run.
    """
    name = recipe.backbone
    if name in RESNETS:
        name += f" of width {recipe.width} with a {recipe.resnet_stem} stem"
    return UsageError(f"{library} has no {name}: use safetensors, onnx or torch_export")


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress warnings: exporters warn about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
