"""simsiam embed: a backbone's features of every image of a source, as a file.

The work goes part by part, in a folder beside the file that is to be. A part that is on the disk is not done again, and
a part is a function of its images alone: killed and started anew, it becomes the same file to the bit.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from simsiam.data.images import Images, fingerprint
from simsiam.data.transform import Transform, iter_crops
from simsiam.distributed.collectives import all_reduce_max
from simsiam.distributed.process_group import (
    distributed_entry_point,
    rank,
    rank_zero_context,
    rank_zero_only,
    world_size,
)
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.model.precision import Compute
from simsiam.monitoring.features import compute_outputs
from simsiam.runs.encoder import load
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import file_sha256
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write, exclusive_lock, start_or_continue_job, write_csv
from simsiam.utils.progress_bar import progress_bar

PART_SIZE = 2048  # images that a kill costs at most; a row group of the file
PARTS_PER_FILE = 50  # parts in each file of a folder
THUMBNAIL_SIZE = 96  # pixels a side, at most


@distributed_entry_point
def embed(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str],
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Write the features of all images that can be read, by default of the run's own source; returns the path.

    `out` is a .parquet, a folder for many files of 100,000 images each, or a .npy, the vectors alone, with a .csv of
    their paths beside it. Raises UsageError for a wrong request, WorkFailed where no image can be read.
    """
    path = Path(out)
    write = WRITERS.get(path.suffix)
    if write is None:
        raise UsageError(
            f"--out {path} ends in {path.suffix}: give a .parquet, a .npy, or a folder"
        )
    work, beside = path.with_name(path.name + ".parts"), path.with_suffix(".csv")
    foreign = (
        path.suffix == ".npy" and beside.exists() and not work.exists()
    )  # else a kill may have left it
    if path.exists() or foreign:
        raise UsageError(
            f"{beside if foreign else path} exists and is not written over: choose another --out"
        )
    network, recipe = load(run), Run(run).recipe
    transform: Any = network.transform
    compute = Compute.pick(device, precision)
    opened = open_source(source or recipe.source, recipe.channels)
    splits = list(opened.splits.values())
    about = {
        "run": str(Path(run).absolute()),
        "backbone_sha256": file_sha256(Path(run) / "backbone.safetensors"),
        "source": opened.name,
        "transform": {
            name: getattr(transform, name) for name in ("size", "mean", "std", "interpolation")
        },
    }
    labeled = any(images.labels is not None for images in splits)
    job = about | {
        "device": compute.device.type,
        "precision": compute.precision,
        "labeled": labeled,
        "images": fingerprint(splits),
    }

    compute.place(network)
    with rank_zero_context(exclusive_lock(work / ".lock", str(path))):
        rank_zero_only(start_or_continue_job)(work, job)
        jobs = [
            part.take(slice(start, start + PART_SIZE))
            for part in splits
            for start in range(0, len(part), PART_SIZE)
        ]
        parts = [work / f"{n:06}.parquet" for n in range(len(jobs))]
        mine = slice(
            rank(), None, world_size()
        )  # of several processes each takes every so-manieth part
        with progress_bar("embedding" if rank() == 0 else "", sum(map(len, jobs[mine]))) as advance:
            for part, images in zip(parts[mine], jobs[mine]):
                if not is_intact(part):
                    table = embed_part(network, images, transform, compute, labeled)
                    with atomic_write(part) as file:
                        pq.write_table(table, file, write_page_checksum=True)
                advance(len(images))

        all_reduce_max(0)  # every process has made its parts
        merge_parts(write, parts, path, about, sum(map(len, jobs)))
    return path


@rank_zero_only
def merge_parts(
    write: Callable[[Sequence[Path], Path, str], None],
    parts: Sequence[Path],
    path: Path,
    metadata: Any,
    num_images: int,
) -> None:
    """The parts of n images become the file that was asked for, and are gone."""
    work = parts[0].parent
    lost = [
        line for part in parts for line in json.loads(pq.read_schema(part).metadata[b"unreadable"])
    ]
    if len(lost) == num_images:
        shutil.rmtree(work)
        raise WorkFailed(
            f"none of the {num_images} images can be read; the first, {lost[0][0]}: {lost[0][1]}"
        )
    if lost:
        print(
            f"{len(lost)} of {num_images} images cannot be read; the first, {lost[0][0]}: {lost[0][1]}",
            file=sys.stderr,
        )
    write(parts, path, json.dumps(metadata | {"unreadable": lost}))
    shutil.rmtree(work)


def is_intact(part: Path) -> bool:
    """Whether a part is there, and its pages match the checksums in it."""
    try:
        return (
            part.exists()
            and pq.ParquetFile(part, page_checksum_verification=True).read() is not None
        )
    except (pa.ArrowException, OSError):
        return False


def embed_part(
    network: nn.Module,
    images: Images,
    transform: Transform,
    compute: Compute,
    labeled: bool,
) -> pa.Table:
    """One part: a row of each of these images that can be read, and in the metadata those that cannot."""
    unreadable: list[tuple[str, str]] = []
    vectors, thumbnails, kept = [torch.zeros(0, int(network.dim))], list[bytes](), list[int]()  # type: ignore[arg-type]
    for index, pixels in iter_crops(images, transform, unreadable):
        vectors += compute_outputs(lambda x: (network(x),), pixels, transform, compute)
        thumbnails += map(encode_jpeg, make_thumbnails(pixels))
        kept += index.tolist()
    flat = torch.cat(vectors)
    columns = {
        "path": pa.array([printable(images.keys[i]) for i in kept], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(flat.flatten().numpy()), flat.shape[1]
        ),
        "thumbnail": pa.array(thumbnails, pa.binary()),
    }
    if labeled:
        names = [
            None if images.labels is None else printable(images.classes[images.labels[i]])
            for i in kept
        ]
        columns["label"] = pa.array(names, pa.string())
    said = json.dumps([(printable(key), reason) for key, reason in unreadable])
    return pa.table(columns).replace_schema_metadata({"unreadable": said})


def make_thumbnails(pixels: Tensor) -> np.ndarray:
    """uint8 (N, C, S, S) to (N, s, s, 3), s at most THUMBNAIL: RGB, gray of one channel, the first three of many."""
    side = min(pixels.shape[-1], THUMBNAIL_SIZE)
    color = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return TF.resize(color, [side, side], antialias=True).permute(0, 2, 3, 1).numpy()


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) to a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=85)
    return file.getvalue()


# --- the parts become one -------------------------------------------------------------------------------------------


def read_parts(parts: Sequence[Path]) -> Iterator[pa.Table]:
    return (pq.ParquetFile(part).read() for part in parts)


def write_parquet(parts: Sequence[Path], path: Path, metadata: str) -> None:
    schema = pq.read_schema(parts[0]).with_metadata({"simsiam": metadata})
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, write_page_checksum=True) as to:
        for table in read_parts(parts):
            to.write_table(table.replace_schema_metadata(schema.metadata))


def write_folder(parts: Sequence[Path], path: Path, metadata: str) -> None:
    shards = [
        parts[start : start + PARTS_PER_FILE] for start in range(0, len(parts), PARTS_PER_FILE)
    ]
    folder = parts[0].parent / "whole"
    shutil.rmtree(folder, ignore_errors=True)  # one that was not finished
    folder.mkdir()
    for n, shard in enumerate(shards):
        write_parquet(shard, folder / f"embeddings-{n:05}-of-{len(shards):05}.parquet", metadata)
    os.replace(folder, path)


def write_npy(parts: Sequence[Path], path: Path, metadata: str) -> None:
    """Vectors (N, d) float32 in one file, and a line an image in the .csv beside it."""
    count = sum(pq.read_metadata(part).num_rows for part in parts)
    lines: list[Sequence[str]] = []
    dim = pq.read_schema(parts[0]).field("vector").type.list_size
    with atomic_write(path) as part, open(part, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        )
        for table in read_parts(parts):
            file.write(table["vector"].combine_chunks().flatten().to_numpy().astype("<f4"))
            lines += zip(
                *(
                    table[name].to_pylist()
                    for name in table.column_names
                    if name in ("path", "label")
                )
            )
        names = ["path", "label"] if "label" in table.column_names else ["path"]
        write_csv(path.with_suffix(".csv"), names, lines)


WRITERS: dict[str, Callable[[Sequence[Path], Path, str], None]] = {
    ".parquet": write_parquet,
    "": write_folder,
    ".npy": write_npy,
}
