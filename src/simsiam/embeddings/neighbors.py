"""The verb `neighbors`: find the images most similar to a given image."""

import os
from collections.abc import Sequence
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.decode import Unreadable, decode_image
from simsiam.data.transform import image_to_tensor
from simsiam.embeddings.copies.originals import Originals
from simsiam.embeddings.embed import make_thumbnail
from simsiam.embeddings.gallery import Figure, Section, write_page
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, WorkFailed, check_ranges, printable
from simsiam.model.precision import Compute
from simsiam.monitoring.features import compute_outputs
from simsiam.runs.encoder import eval_transform, load, weight_digests
from simsiam.runs.run_folder import Run
from simsiam.utils.files import check_writable


class Neighbor(NamedTuple):
    """An image and its similarity to the query.

    Attributes:
        path: The path of the image in its source.
        label: Its class name; "" if it has none.
        cosine: The cosine of its feature with that of the query, -1 to 1.
    """

    path: str
    label: str
    cosine: float


def neighbors(
    file: str | os.PathLike[str],
    query: str,
    *,
    k: int = 10,
    html: str | os.PathLike[str] | None = None,
) -> list[Neighbor]:
    """Find the k embedded images nearest to a query by the cosine of features; exact.

    Args:
        file: A file or folder that `embed` wrote.
        query: The path or the file name of an embedded image, which is not among its own
            neighbors; or another image file, whose feature the run's backbone then computes.
        k: The number of neighbors, at least 1; at most all images are returned.
        html: A web page to write, which shows the query and its neighbors.

    Returns:
        The neighbors, the nearest first.

    Raises:
        UsageError: If `k` is less than 1, the file is not an embedding file, there is no such
            image, the run that made the file is gone or has changed, or `html` cannot be written.
        WorkFailed: If the query's image file cannot be read.
    """
    check_ranges(SimpleNamespace(k=k), k=(1, inf))
    check_writable(html, inputs=[file, query])
    images = read_embeddings(file)
    originals = Originals(images, Path(file)) if html else None
    return find_neighbors(find_query(query, images), images, k, html, originals)


class Query(NamedTuple):
    """An image whose neighbors are looked for.

    Attributes:
        name: What the user called it.
        h: Its feature, (d,) float32.
        position: Its position among the embedded images; None if it is not one of them.
        thumbnail: If it is not one of them, a JPEG file of it.
    """

    name: str
    h: Tensor
    position: int | None
    thumbnail: bytes = b""


def find_neighbors(
    query: Query,
    images: Embeddings,
    k: int,
    html: str | os.PathLike[str] | None,
    originals: Originals | None = None,
) -> list[Neighbor]:
    """Find the k embedded images nearest to a query, and show them on a page.

    Args:
        query: The query.
        images: The embedded images.
        k: The number of neighbors; at most all images are returned.
        html: The web page to write, if any.
        originals: The files of the images, which the page links to.

    Returns:
        The neighbors, the nearest first.
    """
    cosine = F.normalize(images.vectors, dim=1) @ F.normalize(query.h, dim=0)
    if query.position is not None:
        cosine[query.position] = -2
    count = min(k, len(images) - (query.position is not None))
    order = cosine.sort(descending=True, stable=True).indices[:count].tolist()
    if html:
        shown: Figure = (query.thumbnail, query.name)
        if query.position is not None:
            shown = (query.position, images.caption(query.position))
        figures = [(i, f"{cosine[i]:.3f} {images.caption(i)}") for i in order]
        sections: list[Section] = [("Query", [shown]), ("Neighbors, nearest first", figures)]
        note = f"The {count} nearest images by cosine."
        write_page(Path(html), f"Neighbors of {query.name}", note, sections, images, originals)
    return [Neighbor(images.paths[i], images.label(i), cosine[i].item()) for i in order]


def find_query(query: str, images: Embeddings) -> Query:
    """Find a query among the embedded images, or embed it.

    Args:
        query: The path or the file name of an embedded image, or an image file.
        images: The embedded images.

    Returns:
        The query and its feature.

    Raises:
        UsageError: If there is no such image, or the run that made the embeddings is gone or has
            changed.
        WorkFailed: If the image file cannot be read.
    """
    if images.positions(query) or not os.path.isfile(query):
        position = images.find(query)
        return Query(query, images.vectors[position], position)
    return embed_query(query, run_of(images, query))


def run_of(images: Embeddings, query: str) -> Path:
    """Find the run folder of the encoder that embedded the images.

    Args:
        images: The embedded images.
        query: What is to be embedded by it, for the error.

    Raises:
        UsageError: If the run is gone, or its encoder has changed.
    """
    run = str(images.metadata.get("run", ""))
    # Of a file that others wrote: a folder on another machine is not asked for.
    if not run or run.startswith(("//", "\\\\")) or not Path(run).is_dir():
        raise UsageError(
            f"{printable(query)} is not embedded, and the run with the backbone does not exist: "
            f"{run or 'unknown'}"
        )
    names = ("backbone_sha256", "head_sha256")
    if weight_digests(run) != {n: images.metadata[n] for n in names if n in images.metadata}:
        raise UsageError(
            f"{printable(query)} is not embedded, and the encoder of {run} has changed since the "
            "other images were: run `simsiam embed` again"
        )
    return Path(run)


def embed_query(file: str | bytes, run: str | os.PathLike[str], name: str | None = None) -> Query:
    """Compute the feature of an image file, on the CPU in float32.

    Args:
        file: The file, or its content.
        run: The run folder of the encoder.
        name: What to call it; by default as the file.

    Returns:
        The query.

    Raises:
        WorkFailed: If the file cannot be read.
    """
    name = name if name is not None else os.fsdecode(file)
    network, recipe = load(run), Run(run).recipe
    transform, compute = eval_transform(recipe), Compute(torch.device("cpu"), "float32")
    try:
        pixels = image_to_tensor(decode_image(file, recipe.channels, transform.min_side))
    except Unreadable as error:
        raise WorkFailed(f"{printable(name)} cannot be read: {error}") from None
    crop = transform.crop(pixels)
    (h,) = compute_outputs(lambda x: (network(x),), crop, transform, compute)
    return Query(name, h[0], None, make_thumbnail(pixels, transform))


def format_neighbors(results: Sequence[Neighbor]) -> str:
    """List neighbors as text.

    Args:
        results: What `neighbors` returned.

    Returns:
        One line per image: cosine, path and label.
    """
    return "\n".join(
        printable(f"{x.cosine:6.3f}  {x.path}" + f"  ({x.label})" * bool(x.label)) for x in results
    )
