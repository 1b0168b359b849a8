"""An embedding file as images of a page: its thumbnails, labels and features."""

import os
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
from torch import Tensor

from simsiam.data.images import Images, evenly_spaced
from simsiam.data.parquet_files import read_parquet_schema
from simsiam.data.remote_files import is_url
from simsiam.data.storage import EncodedColumn, Names
from simsiam.embeddings.table import Embeddings
from simsiam.errors import UsageError, WorkFailed
from simsiam.pages.image_map import MIN_MAP_IMAGES
from simsiam.pages.thumbnails import Gallery, build_gallery
from simsiam.sources.open_source import find_shards

NO_LABEL = "(no label)"  # the class of images without one, if others have a label


class EmbeddingFacts(TypedDict):
    """What the page says about an embedding."""

    images: int
    dim: int  # of the features
    source: str  # "" if another program wrote the file


def is_embedding(path: str | os.PathLike[str]) -> bool:
    """Tell an embedding from a run folder and from the name of weights.

    Args:
        path: What the user gave.

    Returns:
        Whether it is a Parquet file with vectors, or a folder of such files that is no run folder.
        Of a file that does not exist or is damaged, the name decides.
    """
    if is_url(os.fspath(path)):
        return False
    path = Path(path)
    if not path.is_dir():
        return path.suffix == ".parquet" and _has_vectors(path)
    files = [] if (path / "recipe.yaml").exists() else [*find_shards(str(path))]
    return bool(files) and all(file.endswith(".parquet") and _has_vectors(file) for file in files)


def _has_vectors(file: str | os.PathLike[str]) -> bool:
    """Whether a Parquet file has the column of an embedding; of one that is damaged, True."""
    try:
        return "vector" in read_parquet_schema(file).names
    except (pa.ArrowException, OSError, UsageError, WorkFailed):
        return True  # whoever reads it says what is wrong


def embedding_gallery(
    embeddings: Embeddings, limit: int, *, no_labels: bool = False
) -> tuple[Gallery, Tensor]:
    """Make a gallery of the thumbnails of embedded images.

    Args:
        embeddings: The embedded images.
        limit: The number of images, evenly spaced in the file.
        no_labels: Whether to ignore the labels.

    Returns:
        The gallery, and the features (N, d) of its images.

    Raises:
        WorkFailed: There are too few images, no thumbnails, or damaged ones.
    """
    rows = evenly_spaced(len(embeddings), limit)
    if embeddings.thumbnails is None:
        raise WorkFailed("the file has no thumbnails")
    if len(rows) < MIN_MAP_IMAGES:
        raise WorkFailed(f"a map needs at least {MIN_MAP_IMAGES} images, and there are {len(rows)}")
    keys = Names(pa.array([os.fsencode(embeddings.paths[i]) for i in rows], pa.large_binary()))
    images = Images(keys, EncodedColumn(embeddings.thumbnails.values, rows))
    if embeddings.labels is not None and not no_labels:
        names = [embeddings.labels[i] or NO_LABEL for i in rows]
        classes, labels = np.unique(names, return_inverse=True)
        images = Images(keys, images.storage, labels, tuple(classes.tolist()))
    gallery = build_gallery(images)
    if len(gallery.images) < len(images):
        raise WorkFailed(f"{len(images) - len(gallery.images)} thumbnails are damaged")
    return gallery, embeddings.vectors[rows]
