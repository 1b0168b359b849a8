"""The verb `search`: from a folder of images and a query to the most similar images."""

import os
import sys
from collections.abc import Sequence
from math import inf
from types import SimpleNamespace

from simsiam.data.images import Images
from simsiam.data.storage import FolderFiles
from simsiam.embeddings.kept_embedding import SourceEncoder, SourceImages, keep_embedding
from simsiam.embeddings.neighbors import (
    Neighbor,
    Query,
    embed_query,
    find_neighbors,
    find_query,
)
from simsiam.embeddings.table import Embeddings
from simsiam.errors import UsageError, WorkFailed, check_ranges, printable
from simsiam.model.precision import Compute
from simsiam.runs.closed_form import fit_patches_run
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import PATCHES, open_weights, run_folder_of
from simsiam.sources.open_source import open_source, source_names
from simsiam.utils.files import check_writable, writable_cache
from simsiam.utils.names import normalize_name, slashed

# The commands' help names license and size.
DEFAULT_ENCODERS = ("timm:vit_small_patch16_224.dino", "lite0", PATCHES)
RELEARN = 0.1


def search(
    source: str | os.PathLike[str] | Sequence[str],
    query: str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    k: int = 10,
    html: str | os.PathLike[str] | None = None,
    channels: int | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    relearn: float = RELEARN,
    device: str = "auto",
    precision: str = "auto",
) -> list[Neighbor]:
    """Find the k images of a source that are most similar to a query, by the cosine of features.

    The features are kept in the user's cache. The next search embeds only images that are new or
    have changed, and forgets those that are gone.

    Args:
        source: The images, as for `pretrain`.
        query: The path or the file name of an image of the source, which is not among its own
            neighbors; or another image file.
        encoder: A run folder or the name of weights. By default the first of DEFAULT_ENCODERS that
            can be used here.
        backbone: The network, if `encoder` is a file of weights that does not name it.
        k: The number of images to find, at least 1.
        html: A web page to write, which shows the query and the images found.
        channels: Number of channels that images are decoded to; by default those of the run folder,
            else 3.
        no_labels: Whether to leave out the labels of the images found.
        splits: Which folder or shard is which split; see `open_source`.
        relearn: If the encoder is learned from the images of the source, it is learned again when
            this share of them is new, 0 to 1.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", of the encoder.

    Returns:
        The images, the most similar first.

    Raises:
        UsageError: If an argument is wrong, or there is no such image.
        WorkFailed: If no image can be read, or the weights cannot be downloaded.
    """
    check_ranges(SimpleNamespace(k=k, relearn=relearn), k=(1, inf), relearn=(0, 1))
    names = source_names(source)
    check_writable(html, inputs=[query, *names])
    compute = Compute.pick(device, precision)
    with writable_cache():
        chosen = choose_encoder(encoder, backbone, names, channels or 3, splits)
        if chosen.run is not None:
            needed = Run(chosen.run).recipe.channels
            if channels not in (None, needed):
                raise UsageError(f"channels is {channels}, and {chosen.name} takes {needed}")
            channels = needed
        opened = open_source(names, channels or 3, no_labels=no_labels, splits=splits)
        images = SourceImages(names, opened)
        _check_query(os.fspath(query), images.splits)
        with keep_embedding(
            images, chosen, compute, channels=channels or 3, relearn=relearn
        ) as kept:
            shown = _find_query(os.fspath(query), images.splits, kept)
        return find_neighbors(shown, kept, k, html)


def choose_encoder(
    encoder: str | os.PathLike[str] | None,
    backbone: str | None,
    source: Sequence[str | os.PathLike[str]],
    channels: int,
    splits: Sequence[str] | None,
) -> SourceEncoder:
    """Find the encoder that a name stands for, or the first of the default ones.

    Args:
        encoder: A run folder or the name of weights; None for the default ones, of which each that
            cannot be used here is reported.
        backbone: The network of a file of weights.
        source: The names of the source.
        channels: Number of channels of the images.
        splits: Which of them are for training; see `open_source`.

    Returns:
        The encoder.

    Raises:
        UsageError: If there is no such encoder, or a package for it is missing.
        WorkFailed: If it cannot be downloaded.
    """
    if encoder is None and backbone is not None:
        raise UsageError(f"--backbone {backbone} belongs to a file of weights: give --encoder FILE")
    names = (os.fspath(encoder),) if encoder is not None else DEFAULT_ENCODERS
    if encoder is None and channels != 3:  # published weights are for RGB
        names = (PATCHES,)
    for name, following in zip(names, (*names[1:], "")):
        if name == PATCHES and run_folder_of(name) is None:
            return SourceEncoder(
                name, learn=lambda path: fit_patches_run(source, channels, splits=splits, out=path)
            )
        try:
            run = open_weights(
                name, backbone=backbone, source=source, channels=channels, splits=splits
            )
            return SourceEncoder(name, run)
        except (UsageError, WorkFailed) as error:
            if encoder is not None:
                raise
            reason = " ".join(str(error).split())
            text = f"{following} is used, because {name} is not available: {reason}"
            print(printable(text), file=sys.stderr)
    raise AssertionError("the last of the default encoders needs nothing")


def _check_query(query: str, splits: Sequence[Images]) -> None:
    """Raise UsageError if there is no such image, before all images are embedded."""
    if os.path.isfile(query):
        return
    name = normalize_name(query)
    keys = (normalize_name(key) for images in splits for key in images.keys)
    if not any(name in (key, key.rpartition("/")[2]) for key in keys):
        raise UsageError(
            f"no image {printable(query)}: it is neither a file nor the path or name of an image "
            f"of the source, such as {printable(splits[0].keys[0])}"
        )


def _find_query(query: str, splits: Sequence[Images], images: Embeddings) -> Query:
    """Find the query: a file of the source, a name in it, or another file."""
    if os.path.isfile(query):
        for storage in (split.storage for split in splits):
            if isinstance(storage, FolderFiles):
                path = os.path.abspath(query)
                below = slashed(os.path.relpath(path, os.path.abspath(storage.folder)))
                for name in (below, path):  # lists may have absolute paths
                    for position in images.positions(name):
                        if normalize_name(images.paths[position]) == normalize_name(name):
                            return Query(query, images.vectors[position], position)
        if not images.positions(query):
            return embed_query(query, str(images.metadata["run"]))
    return find_query(query, images)
