"""simsiam neighbors: the images most similar to one."""

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
from simsiam.embeddings.gallery import write_page
from simsiam.embeddings.table import Embeddings, read_embeddings
from simsiam.errors import UsageError, WorkFailed, check_ranges
from simsiam.model.precision import Compute
from simsiam.monitoring.features import compute_outputs
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import file_sha256
from simsiam.utils.files import check_writable


class Neighbor(NamedTuple):
    path: str
    label: str  # "" without one
    cosine: float


def neighbors(
    file: str | os.PathLike[str],
    query: str,
    *,
    k: int = 10,
    html: str | os.PathLike[str] | None = None,
) -> list[Neighbor]:
    """The k images nearest to `query` by the cosine of h, nearest first; `html` is a page to write.

    `query` is an embedded image, by its path or its file's name, which is not its own neighbor; or another image file,
    which then goes through the run's backbone. The search is exact. Raises UsageError.
    """
    check_ranges(SimpleNamespace(k=k), k=(1, inf))
    check_writable(html)
    images = read_embeddings(file)
    h, own = query_vector(query, images)
    cosine = F.normalize(images.vectors, dim=1) @ F.normalize(h, dim=0)
    if own is not None:
        cosine[own] = -2
    count = min(k, len(images) - (own is not None))
    order = cosine.sort(descending=True, stable=True).indices[:count].tolist()
    if html:
        figures = [(i, f"{cosine[i]:.3f} {images.caption(i)}") for i in order]
        sections = [("Neighbors, nearest first", figures)]
        if own is not None:
            sections.insert(0, ("Query", [(own, images.caption(own))]))
        write_page(
            Path(html), f"Neighbors of {query}", f"The {count} nearest by cosine.", sections, images
        )
    return [Neighbor(images.paths[i], images.label(i), cosine[i].item()) for i in order]


def query_vector(query: str, images: Embeddings) -> tuple[Tensor, int | None]:
    """h of the query, (d,), and its position if it is an embedded image."""
    if query in images.positions_by_name or not os.path.isfile(query):
        own = images.find(query)
        return images.vectors[own], own
    run = images.metadata.get("run", "")
    if not run or not Path(run).is_dir():
        raise UsageError(
            f"{query} is not embedded, and the run that could do it is gone: {run or 'unknown'}"
        )
    if file_sha256(Path(run) / "backbone.safetensors") != images.metadata["backbone_sha256"]:
        raise UsageError(
            f"{query} is not embedded, and {run} has changed since the others were: embed them anew"
        )
    network = load(run)
    try:
        pixels = image_to_tensor(decode_image(query, Run(run).recipe.channels))
    except Unreadable as error:
        raise WorkFailed(f"{query} cannot be read: {error}") from None
    transform = eval_transform(Run(run).recipe)
    size = transform.crop(pixels)
    (h,) = compute_outputs(
        lambda x: (network(x),), size, transform, Compute(torch.device("cpu"), "float32")
    )
    return h[0], None


def format_neighbors(results: Sequence[Neighbor]) -> str:
    return "\n".join(
        f"{x.cosine:6.3f}  {x.path}" + f"  ({x.label})" * bool(x.label) for x in results
    )
