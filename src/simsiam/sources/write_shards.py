"""Any source as shards: few large files that are quick to copy and to read, from anywhere.

What is written is a function of the images and the arguments, byte for byte. The folder appears when it is complete;
killed and started anew, the work goes on with the first shard that is missing.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from simsiam.data.decode import Unreadable, read_header
from simsiam.data.images import Images, fingerprint
from simsiam.data.shards import BLOCK_BYTES
from simsiam.errors import UsageError, WorkFailed, printable, unknown_name
from simsiam.sources.catalog import ShardFile, write_sidecar_catalog
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write, exclusive_lock, start_or_continue_job
from simsiam.utils.workers import parallel_map_with_progress

SHARD_FORMATS = ("tar", "parquet")
FORMAT_SUFFIXES = {
    "JPEG": "jpg",
    "TIFF": "tif",
    "NumPy": "npy",
}  # others end like the name of their format
LEFT_OUT_FILE = "left_out.txt"  # beside the shards: images that are not in them, with the reason


def write_shards(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    format: str = "tar",
    per_shard: int = 10_000,
    channels: int = 3,
) -> Path:
    """Write the images of a source, in its order, as shards of `per_shard` images into a new folder, which is returned.

    Files of images are copied as they are; decoded ones become PNG. An image whose header does not parse is left out
    and listed. tar: WebDataset's layout, with a catalog beside it; parquet: Hugging Face's. Raises UsageError where
    `out` exists or was begun for something else, WorkFailed where no image is left.
    """
    if format not in SHARD_FORMATS:
        raise unknown_name("format", format, SHARD_FORMATS)
    if per_shard < 1:
        raise UsageError(f"per_shard is {per_shard}; it is at least 1")
    path = Path(out)
    if path.exists():
        raise UsageError(
            f"{printable(str(path))} exists and is not written over: choose another --out"
        )
    source = open_source(sources, channels)
    splits = source.splits
    work = path.with_name(path.name + ".parts")
    job = {
        "format": format,
        "per_shard": per_shard,
        "channels": channels,
        "images": fingerprint(list(splits.values())),
    }
    with exclusive_lock(work / ".lock", str(path)):
        start_or_continue_job(work, job)
        jobs: list[tuple[Images, Path, str, int]] = []
        for split, images in splits.items():
            count = -(-len(images) // per_shard)
            for n in range(count):
                name = (
                    f"{split}-{n:06}.tar"
                    if format == "tar"
                    else f"{split}-{n:05}-of-{count:05}.parquet"
                )
                jobs.append(
                    (
                        images.take(slice(n * per_shard, (n + 1) * per_shard)),
                        work / name,
                        split,
                        n * per_shard,
                    )
                )
        missing = [
            (part, path, first)
            for part, path, _, first in jobs
            if not (path.exists() and _left_out_path(path).exists())
        ]
        parallel_map_with_progress(
            _write_tar if format == "tar" else _write_parquet, missing, "writing shards"
        )

        lost = [
            line
            for _, path, *_ in jobs
            for line in _left_out_path(path).read_text().splitlines(keepends=True)
        ]
        if len(lost) == sum(map(len, splits.values())):
            shutil.rmtree(work)
            raise WorkFailed(
                f"none of the {len(lost)} images can be read; the first, {' '.join(lost[0].split())}"
            )
        if format == "tar":
            write_sidecar_catalog(
                work,
                [
                    ShardFile(str(path), path.stat().st_size, "", split)
                    for _, path, split, _ in jobs
                ],
            )
        if lost:
            with atomic_write(work / LEFT_OUT_FILE) as part:
                part.write_text("".join(lost))
        for _, path, *_ in jobs:
            _left_out_path(path).unlink()
        (work / "job.json").unlink()
        (work / ".lock").unlink()
        os.replace(work, out)
    return Path(out)


def format_shard_summary(path: Path) -> str:
    """What was written, in a few words."""
    shards = [file for file in path.iterdir() if file.suffix in (".tar", ".parquet")]
    size = sum(file.stat().st_size for file in shards)
    text = f"{path}: {len(shards):,} shards, {size / 1e9:,.3g} GB"
    lost = path / LEFT_OUT_FILE
    if lost.exists():
        lines = lost.read_text().splitlines()
        text += f"; {len(lines):,} images cannot be read and are left out: {lost}"
    return text


def _left_out_path(shard_path: Path) -> Path:
    """Where the images are listed that did not come into a shard: it is written first."""
    return shard_path.with_suffix(".lost")


def _iter_readable(images: Images, left_out_path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Position, file and the ending of its name of each image; in the end, the others are listed in `lost`."""
    lines, near = list[str](), images
    for i in range(len(images)):
        near = near.prefetch(np.arange(i, min(i + 64, len(images))), 0.25) if i % 64 == 0 else near
        try:
            data = near.storage.read_bytes(i)
            kind = read_header(data, images.channels).format
        except (Unreadable, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            lines.append(f"{printable(images.keys[i])}\t{reason}\n")
            continue
        yield i, data, FORMAT_SUFFIXES.get(kind, kind.lower())
    with atomic_write(left_out_path) as part:
        part.write_text("".join(lines))


def encode_pixels(pixels: np.ndarray) -> bytes:
    """A file of decoded pixels (H, W, channels): PNG, or NumPy's where that knows no such number of channels."""
    file = io.BytesIO()
    if pixels.shape[2] in (1, 3, 4):
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    else:
        np.save(file, pixels)
    return file.getvalue()


def _write_tar(images: Images, path: Path, start_index: int) -> None:
    """`000000017.jpg`, its label in `.cls`, its path in the source and its class in `.json`."""

    def add(name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # as of 1970, of nobody
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    with atomic_write(path) as part, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as archive:
        for i, data, ending in _iter_readable(images, _left_out_path(path)):
            stem, about = f"{start_index + i:09}", {"path": images.keys[i]}
            add(f"{stem}.{ending}", data)
            if images.labels is not None:
                add(f"{stem}.cls", str(images.labels[i]).encode())
                about["class"] = images.classes[images.labels[i]]
            add(f"{stem}.json", json.dumps(about).encode())


def _write_parquet(images: Images, path: Path, start_index: int) -> None:
    """Rows of {bytes, path} and a label; a row group is what is read at once."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    if images.classes:
        kinds["label"], features["label"] = (
            pa.int64(),
            {"_type": "ClassLabel", "names": list(map(printable, images.classes))},
        )
    schema = pa.schema(
        kinds, metadata={"huggingface": json.dumps({"info": {"features": features}})}
    )
    rows, size = list[dict[str, Any]](), 0
    with (
        atomic_write(path) as part,
        pq.ParquetWriter(part, schema, compression="NONE", use_dictionary=False) as writer,
    ):
        for i, data, _ in _iter_readable(images, _left_out_path(path)):
            label = {} if images.labels is None else {"label": int(images.labels[i])}
            rows.append({"image": {"bytes": data, "path": printable(images.keys[i])}} | label)
            size += len(data)
            if size >= BLOCK_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
