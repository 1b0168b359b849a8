"""The verb `embed`: write an encoder's feature of every image of a source to a file.

The work is done in parts, in a folder next to the output file. A part that is on disk is not
computed again, and it depends only on its images. So if the process is killed and started again,
the file is the same, bit for bit.
"""

import filecmp
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from simsiam.data.images import Images, evenly_spaced, sample
from simsiam.data.parquet_files import count_parquet_rows, read_parquet, read_parquet_schema
from simsiam.data.transform import Transform, iter_crops, iter_processed
from simsiam.distributed.process_group import (
    distributed_entry_point,
    rank,
    rank_zero_context,
    rank_zero_only,
    world_size,
)
from simsiam.embeddings.other_tools import write_fiftyone, write_projector
from simsiam.errors import UsageError, check_ranges, none_readable, printable, unknown_name
from simsiam.model.backbones import feature_dim
from simsiam.model.precision import Compute
from simsiam.monitoring.features import compute_outputs
from simsiam.runs.compose import open_run_source, source_flags
from simsiam.runs.encoder import eval_transform, load, weight_digests
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.fingerprint import (
    check_still_the_same,
    fingerprint_source,
    start_or_continue_on_source,
)
from simsiam.sources.open_source import absolute_sources, source_names
from simsiam.sources.own_marks import make_mark
from simsiam.utils.files import (
    atomic_write,
    delete_parts,
    delete_parts_of_finished,
    locked_work_folder,
    parts_folder,
    write_csv,
)
from simsiam.utils.names import hide_keys, utf8_name
from simsiam.utils.progress_bar import progress_bar
from simsiam.utils.system import replace_path

PART_SIZE = 2048  # images per part: the most that is lost if the process is killed; a row group
CHUNK_SIZE = 64  # images that the network is given at a time, and that the progress bar moves by
PARTS_PER_FILE = 50  # parts in each file of an output folder
THUMBNAIL_SIZE = 96  # the largest side of a thumbnail, in pixels

Writer = Callable[[Sequence[Path], Path, str], None]  # (parts, output path, JSON of the metadata)


@distributed_entry_point
def embed(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    limit: int | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    device: str = "auto",
    precision: str = "auto",
    backbone: str | None = None,
    accept_changed_source: bool = False,
    format: str | None = None,
) -> Path:
    """Write the features of all readable images of a source to a file.

    Args:
        run: A finished run folder, or weights (see `simsiam.runs.weights.open_weights`).
        source: The images; by default the run's own source.
        out: A new .parquet file; a new folder, for many files of 100,000 images each; or a new .npy
            file of the vectors alone, with their paths in a .csv file next to it.
        limit: Use only so many images, evenly spaced in the source, each class in proportion.
        no_labels: Whether to ignore the labels of the source.
        splits: Which folder or shard is which split; see `open_source`.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", of the backbone.
        backbone: The network of a file of weights.
        accept_changed_source: If images have changed since a process that was killed wrote the
            first parts: whether to begin again with the images as they are.
        format: "tensorboard" for a folder that TensorBoard's projector shows, "fiftyone" for one
            that FiftyOne loads; by default the ending of `out` says it.

    Returns:
        The path of the written file or folder.

    Raises:
        UsageError: If an argument is wrong, the output exists, another process is writing it, an
            unfinished job with other arguments is in the way, or the images have changed.
        WorkFailed: If no image can be read, or the output cannot be written.
    """
    check_ranges(SimpleNamespace(limit=limit), limit=(1, inf))
    path = Path(out)
    writer = _choose_writer(path, format)
    run = open_weights(run, backbone=backbone, source=source, splits=splits)
    network, recipe = load(run), Run(run).recipe
    transform, compute = eval_transform(recipe), Compute.pick(device, precision)
    opened = open_run_source(
        Run(run),
        source,
        command=lambda names: (
            ["embed", str(run), *names, "--out", str(path), *source_flags(recipe)]
        ),
        no_labels=no_labels,
        splits=splits,
    )
    chosen = sample_splits(list(opened.splits.values()), limit)
    places = [hide_keys(name) for name in absolute_sources(source or recipe.source)]
    metadata = {
        "run": str(run.absolute()),
        **weight_digests(run),
        "source": opened.name,
        "sources": places,
        "own_mark": make_mark("sources", places),
        "splits": splits if source else splits or recipe.splits,
        "no_labels": no_labels or (not source and recipe.no_labels),
        "channels": recipe.channels,
        "transform": describe_transform(transform),
    }
    labeled = any(images.labels is not None for images in chosen)
    # Images that have moved are the same images.
    places_and_labels = ("source", "sources", "own_mark", "no_labels")
    job = {k: v for k, v in metadata.items() if k not in places_and_labels} | {
        "device": compute.device.type,
        "precision": compute.precision,
        "labeled": labeled,
        "limit": limit,
    }
    compute.place(network)
    work, names = parts_folder(path), source_names(source or recipe.source)
    fingerprint, accept = fingerprint_source(opened, names), accept_changed_source
    with rank_zero_context(locked_work_folder(path)):
        start_or_continue_on_source(work, job, opened, names, fingerprint, accept=accept)
        parts = {
            work / f"{number:06}.parquet": images
            for number, images in enumerate(_split_into_parts(chosen))
        }
        _write_parts(parts, network, transform, compute, labeled)
        # This also waits until every process has written its parts.
        check_still_the_same(opened, names, fingerprint, accept=accept)
        merge_parts(writer, list(parts), path, metadata, sum(map(len, chosen)))
    return path


def describe_transform(transform: Transform) -> dict[str, object]:
    """Describe a preprocessing for the metadata of an embedding file.

    Args:
        transform: The preprocessing.
    """
    names = ("size", "mean", "std", "interpolation", "resize")
    return {name: getattr(transform, name) for name in names}


def sample_splits(splits: Sequence[Images], limit: int | None) -> list[Images]:
    """Choose images that are spread evenly over all splits, each class in proportion.

    Args:
        splits: The images of each split.
        limit: Number of images to choose; None for all.

    Returns:
        The chosen images of each split; splits without any are left out.
    """
    sizes = [len(images) for images in splits]
    bounds = np.cumsum([0, *sizes])
    counts = np.diff(np.searchsorted(evenly_spaced(int(bounds[-1]), limit), bounds))
    return [sample(images, int(count)) for images, count in zip(splits, counts) if count]


def _choose_writer(path: Path, format: str | None) -> Writer:
    """The writer for a format. Raises UsageError if there is none, or the output exists."""
    if format is not None:
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        if path.suffix:
            raise UsageError(f"--format {format} writes a folder: give an --out without an ending")
    writer = WRITERS.get(path.suffix) if format is None else FORMATS[format]
    if writer is None:
        raise UsageError(
            f"--out {path} ends in {path.suffix}: give a .parquet file, a .npy file, or a folder"
        )
    table = path.with_suffix(".csv")
    # A table next to unfinished parts is not in the way: this job wrote it before it was killed.
    blocked = path.suffix == ".npy" and table.exists() and not parts_folder(path).exists()
    if path.exists():
        delete_parts_of_finished(path)
    if blocked or path.exists():
        existing = table if blocked else path
        raise UsageError(f"{existing} exists and is not overwritten: choose another --out")
    return writer


def _split_into_parts(splits: Sequence[Images]) -> list[Images]:
    """The images of each part, at most PART_SIZE of one split."""
    return [
        images.take(slice(start, start + PART_SIZE))
        for images in splits
        for start in range(0, len(images), PART_SIZE)
    ]


def _write_parts(
    parts: Mapping[Path, Images],
    network: nn.Module,
    transform: Transform,
    compute: Compute,
    labeled: bool,
) -> None:
    """Write this process's share of the parts: every world_size-th one."""
    share = list(parts.items())[rank() :: world_size()]
    num_images = sum(len(images) for _, images in share)
    with progress_bar("embedding" if rank() == 0 else "", num_images) as advance:
        for part, images in share:
            if is_intact(part):
                advance(len(images))
                continue
            table = embed_part(network, images, transform, compute, labeled, advance)
            with atomic_write(part) as file:
                pq.write_table(table, file, write_page_checksum=True)


@rank_zero_only
def merge_parts(
    writer: Writer,
    parts: Sequence[Path],
    path: Path,
    metadata: Mapping[str, object],
    num_images: int,
) -> None:
    """Merge the parts into the output.

    Args:
        writer: The writer of the output's format.
        parts: The files of the parts, in order; all in one folder.
        path: The output.
        metadata: What to store in it; the list of unreadable images is added.
        num_images: The number of images, readable or not.

    Raises:
        WorkFailed: If none of the images could be read, or the output cannot be written.
    """
    unreadable = [
        entry
        for part in parts
        for entry in json.loads(read_parquet_schema(part).metadata[b"unreadable"])
    ]
    if unreadable:
        key, reason = unreadable[0]
        if len(unreadable) == num_images:
            delete_parts(path)
            raise none_readable(num_images, key, reason)
        counts = f"{len(unreadable):,} of {num_images:,} images cannot be read"
        print(f"{counts}; the first, {printable(key)}: {reason}", file=sys.stderr)
    writer(parts, path, json.dumps({**metadata, "unreadable": unreadable}))


def is_intact(part: Path) -> bool:
    """Check that a part exists and that its pages match the checksums in it.

    Args:
        part: The file of a part.

    Returns:
        Whether the part can be used.
    """
    try:
        if not part.exists():
            return False
        read_parquet(part)
        return True
    except (pa.ArrowException, OSError, UsageError):
        return False


def embed_part(
    network: nn.Module,
    images: Images,
    transform: Transform,
    compute: Compute,
    labeled: bool,
    advance: Callable[[int], None],
) -> pa.Table:
    """Compute the rows of one part.

    Args:
        network: The backbone: normalized images (N, C, size, size) to features (N, d).
        images: The images of the part.
        transform: The preprocessing of the backbone.
        compute: Where to compute, and in which precision.
        labeled: Whether the table has a column of labels.
        advance: Is called with the number of images that have been done since the last call.

    Returns:
        A row for each image that can be read; the path and the reason of each other image are in
        the metadata, as JSON under "unreadable".
    """
    rows, table, unreadable = embed_images(network, images, transform, compute, advance)
    if labeled:
        labels = label_names(images)
        column = pa.array([labels[i] if labels else None for i in rows], pa.string())
        table = table.append_column("label", column)
    return table.replace_schema_metadata({"unreadable": json.dumps(unreadable)})


def embed_images(
    network: nn.Module,
    images: Images,
    transform: Transform,
    compute: Compute,
    advance: Callable[[int], None],
) -> tuple[list[int], pa.Table, list[tuple[str, str]]]:
    """Compute features and thumbnails of images.

    Args:
        network: The encoder: normalized images (N, C, size, size) to features (N, d).
        images: The images.
        transform: The preprocessing of the encoder.
        compute: Where to compute, and in which precision.
        advance: Is called with the number of images that have been done since the last call.

    Returns:
        The positions of the images that can be read; a table with a row for each of these, and the
        columns path, vector and thumbnail; the path and the reason of each other image.
    """
    skipped: list[tuple[str, str]] = []
    vectors, thumbnails, rows = [torch.zeros(0, feature_dim(network))], list[bytes](), list[int]()
    for index, pixels, jpegs in _iter_inputs(images, transform, skipped):
        vectors += compute_outputs(lambda x: (network(x),), pixels, transform, compute)
        thumbnails += jpegs
        rows += index.tolist()
        advance(len(index))
    advance(len(skipped))
    h = torch.cat(vectors)
    columns = {
        "path": pa.array([utf8_name(images.keys[i]) for i in rows], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(h.flatten().numpy()), h.shape[1]),
        "thumbnail": pa.array(thumbnails, pa.binary()),
    }
    return rows, pa.table(columns), skipped


def _iter_inputs(
    images: Images, transform: Transform, skipped: list[tuple[str, str]]
) -> Iterator[tuple[np.ndarray, Tensor, list[bytes]]]:
    """Yield positions of images, their crops (n, C, size, size) uint8, and their thumbnails."""
    if images.pixels is not None:
        for index, pixels in iter_crops(images, transform, skipped, CHUNK_SIZE):
            yield index, pixels, [*map(encode_jpeg, make_thumbnails(pixels))]
        return

    def process(pixels: Tensor) -> tuple[Tensor, bytes]:
        return transform.crop(pixels), make_thumbnail(pixels, transform)

    for index, results in iter_processed(images, process, transform.min_side, skipped, CHUNK_SIZE):
        crops, thumbnails = zip(*results, strict=True)
        yield index, torch.cat(crops), list(thumbnails)


def label_names(images: Images) -> list[str] | None:
    """List the class name of each image; return None without labels.

    Args:
        images: The images.
    """
    if images.labels is None:
        return None
    names = [*map(utf8_name, images.classes)]
    return [names[label] for label in images.labels]


def make_thumbnail(pixels: Tensor, transform: Transform) -> bytes:
    """Reduce what an encoder sees of an image to at most THUMBNAIL_SIZE pixels a side.

    An encoder for small crops sees fewer pixels than its thumbnail has.

    Args:
        pixels: The image, (1, C, H, W) uint8.
        transform: The preprocessing of the encoder.

    Returns:
        A JPEG file.
    """
    seen = min(pixels.shape[-2:]) * transform.size // transform.resize  # pixels of the image
    side = min(max(seen, transform.size), THUMBNAIL_SIZE)
    shorter_side = round(side * transform.resize / transform.size)
    wider = replace(transform, size=side, shorter_side=shorter_side)
    return encode_jpeg(make_thumbnails(wider.crop(pixels))[0])


def make_thumbnails(pixels: Tensor) -> np.ndarray:
    """Reduce crops to at most THUMBNAIL_SIZE pixels a side, as RGB.

    Args:
        pixels: Crops, (N, C, S, S) uint8. One channel is shown as gray; of more than three, the
            first three are shown.

    Returns:
        (N, s, s, 3) uint8.
    """
    side = min(pixels.shape[-1], THUMBNAIL_SIZE)
    color = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return TF.resize(color, [side, side], antialias=True).permute(0, 2, 3, 1).numpy()


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Encode an image as a JPEG file.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        The bytes of the file.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=85)
    return file.getvalue()


# --- writers: from the parts to the output ---


def _read_parts(parts: Sequence[Path]) -> Iterator[pa.Table]:
    return (read_parquet(part) for part in parts)


def _write_parquet(parts: Sequence[Path], path: Path, metadata: str) -> None:
    schema = read_parquet_schema(parts[0]).with_metadata({"simsiam": metadata})
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(file, schema, write_page_checksum=True) as writer,
    ):
        for table in _read_parts(parts):
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def _write_folder(parts: Sequence[Path], path: Path, metadata: str) -> None:
    files = [
        parts[start : start + PARTS_PER_FILE] for start in range(0, len(parts), PARTS_PER_FILE)
    ]
    folder = parts[0].parent / "whole"
    shutil.rmtree(folder, ignore_errors=True)  # left unfinished by a killed process
    folder.mkdir()
    for number, file_parts in enumerate(files):
        name = f"embeddings-{number:05}-of-{len(files):05}.parquet"
        _write_parquet(file_parts, folder / name, metadata)
    replace_path(folder, path)


def _write_npy(parts: Sequence[Path], path: Path, metadata: str) -> None:
    """Write the vectors, (N, d) float32, and next to them a .csv file with one row per image."""
    num_rows = sum(count_parquet_rows(part) for part in parts)
    schema = read_parquet_schema(parts[0])
    dim = schema.field("vector").type.list_size
    names = [name for name in ("path", "label") if name in schema.names]
    rows: list[Sequence[str]] = []
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, dim)}
    with atomic_write(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part_table in _read_parts(parts):
            file.write(part_table["vector"].combine_chunks().flatten().to_numpy().astype("<f4"))
            rows += zip(*(part_table[name].to_pylist() for name in names))
        table, draft = path.with_suffix(".csv"), parts[0].with_name("table.csv")
        write_csv(draft, names, rows)
        if table.exists() and not filecmp.cmp(draft, table, shallow=False):
            raise UsageError(f"{table} exists and is not overwritten: choose another --out")
        replace_path(draft, table)


FORMATS: dict[str, Writer] = {"tensorboard": write_projector, "fiftyone": write_fiftyone}
WRITERS: dict[str, Writer] = {".parquet": _write_parquet, "": _write_folder, ".npy": _write_npy}
