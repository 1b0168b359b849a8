"""Write any source as shards: few large files that are quick to copy and to read from anywhere.

Every byte written is a function of the images and the arguments. The folder appears when it is
complete; if the work is killed and started again, it continues with the first missing shard.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from simsiam.data.decode import FORMAT_EXTENSIONS, Unreadable, read_header
from simsiam.data.images import Images
from simsiam.data.shards import BLOCK_BYTES
from simsiam.errors import UsageError, none_readable, printable, unknown_name
from simsiam.sources.catalog import ShardFile, write_sidecar_catalog
from simsiam.sources.fingerprint import (
    check_still_the_same,
    fingerprint_source,
    start_or_continue_on_source,
)
from simsiam.sources.open_source import open_source, source_names
from simsiam.utils.files import (
    atomic_write,
    delete_parts,
    delete_parts_of_finished,
    locked_work_folder,
    make_folder,
)
from simsiam.utils.names import read_names, reason_line, utf8_name, write_names
from simsiam.utils.system import replace_path
from simsiam.utils.workers import parallel_map_with_progress

SHARD_FORMATS = ("tar", "parquet")
LEFT_OUT_FILE = "left_out.txt"  # lists images that are not in the shards, with the reason


def write_shards(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    format: str = "tar",
    per_shard: int = 10_000,
    channels: int = 3,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    accept_changed_source: bool = False,
) -> Path:
    """Write the images of a source, in its order, as shards into a new folder.

    Image files are copied as they are; decoded images become PNG. An image whose header cannot be
    parsed is left out and listed. Tar shards have the layout of WebDataset, with a catalog next to
    them; Parquet shards have that of Hugging Face.

    Args:
        sources: What `open_source` accepts.
        out: The folder to write.
        format: "tar" or "parquet".
        per_shard: Number of images in a shard.
        channels: Number of channels that images will be decoded to.
        no_labels: Whether to leave out the labels.
        splits: Which folder or shard is which split; see `open_source`.
        accept_changed_source: If images have changed since a process that was killed wrote the
            first shards: whether to begin again with the images as they are.

    Returns:
        The folder.

    Raises:
        UsageError: `out` exists or was started with other arguments, an argument is not allowed, or
            the images have changed.
        WorkFailed: No image can be read, or the source cannot be read.
    """
    if format not in SHARD_FORMATS:
        raise unknown_name("format", format, SHARD_FORMATS)
    if per_shard < 1:
        raise UsageError(f"per_shard is {per_shard}; it is at least 1")
    folder = Path(out)
    if folder.exists():
        delete_parts_of_finished(folder)
        raise UsageError(
            f"{printable(str(folder))} exists and is not written over: choose another --out"
        )
    source = open_source(sources, channels, no_labels=no_labels, splits=splits)
    names, accept = source_names(sources), accept_changed_source
    fingerprint = fingerprint_source(source, names)
    job = {
        "format": format,
        "per_shard": per_shard,
        "channels": channels,
        "no_labels": no_labels,
    }
    with locked_work_folder(folder) as work:
        start_or_continue_on_source(work, job, source, names, fingerprint, accept=accept)
        whole = work / "whole"
        make_folder(whole)
        shards = _plan_shards(source.splits, whole, format, per_shard)
        missing = [
            (shard.images, shard.path, shard.start)
            for shard in shards
            if not (shard.path.exists() and _left_out_path(shard.path).exists())
        ]
        write = _write_tar if format == "tar" else _write_parquet
        parallel_map_with_progress(write, missing, "writing shards")
        check_still_the_same(source, names, fingerprint, accept=accept)
        _finish_shards(shards, whole, format, folder)
        replace_path(whole, folder)
    return folder


class _Shard(NamedTuple):
    """A shard to write."""

    images: Images
    path: Path
    split: str
    start: int  # position of its first image in the split


def _plan_shards(
    splits: Mapping[str, Images], folder: Path, format: str, per_shard: int
) -> list[_Shard]:
    shards = []
    for split, images in splits.items():
        count = -(-len(images) // per_shard)
        for n in range(count):
            parquet_name = f"{split}-{n:05}-of-{count:05}.parquet"
            path = folder / (f"{split}-{n:06}.tar" if format == "tar" else parquet_name)
            start = n * per_shard
            shards.append(_Shard(images.take(slice(start, start + per_shard)), path, split, start))
    return shards


def _finish_shards(shards: Sequence[_Shard], folder: Path, format: str, out: Path) -> None:
    """Write the catalog and the list of images left out, and remove the temporary files."""
    lists = [_left_out_path(shard.path) for shard in shards]
    lines = [line for file in lists for line in read_names(file)]
    if len(lines) == sum(len(shard.images) for shard in shards):
        delete_parts(out)
        name, _, reason = lines[0].partition("\t")
        raise none_readable(len(lines), name, reason)
    if format == "tar":
        files = [
            ShardFile(str(s.path), s.path.stat().st_size, "", s.split, s.path.name) for s in shards
        ]
        write_sidecar_catalog(folder, files)
    if lines:
        write_names(folder / LEFT_OUT_FILE, lines)
    for file in lists:
        file.unlink()


def format_shard_summary(path: Path) -> str:
    """Summarize what was written.

    Args:
        path: The folder of shards.

    Returns:
        One line: number and size of the shards, and of the images that are left out.
    """
    shards = [file for file in path.iterdir() if file.suffix in (".tar", ".parquet")]
    size = sum(file.stat().st_size for file in shards)
    text = f"{path}: {len(shards):,} shards, {size / 1e9:,.3g} GB"
    left_out = path / LEFT_OUT_FILE
    if left_out.exists():
        lines = read_names(left_out)
        text += f"; {len(lines):,} images cannot be read and are left out: {left_out}"
    return text


def _left_out_path(shard_path: Path) -> Path:
    """Return the file that lists the images left out of a shard; it is written before that."""
    return shard_path.with_suffix(".lost")


def _iter_readable(images: Images, left_out_path: Path) -> Iterator[tuple[int, bytes, str]]:
    """Yield position, content and file name extension of each image; then list the unreadable."""
    lines, loaded = list[str](), images
    for i in range(len(images)):
        if i % 64 == 0:
            loaded = loaded.prefetch(np.arange(i, min(i + 64, len(images))), 0.25)
        try:
            data = loaded.storage.read_bytes(i)
            kind = read_header(data, images.channels).format
        except (Unreadable, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            lines.append(reason_line(images.keys[i], reason))
            continue
        yield i, data, FORMAT_EXTENSIONS[kind][0]
    write_names(left_out_path, lines)


def _write_tar(images: Images, path: Path, start_index: int) -> None:
    """Write `000000017.jpg`, its label as `.cls`, its path and its class as `.json`."""

    def add(name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # without time and owner
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))

    with atomic_write(path) as part, tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as archive:
        for i, data, extension in _iter_readable(images, _left_out_path(path)):
            stem, metadata = f"{start_index + i:09}", {"path": images.keys[i]}
            add(f"{stem}{extension}", data)
            if images.labels is not None:
                add(f"{stem}.cls", str(images.labels[i]).encode())
                metadata["class"] = images.classes[images.labels[i]]
            add(f"{stem}.json", json.dumps(metadata).encode())


def _write_parquet(images: Images, path: Path, start_index: int) -> None:
    """Write rows of {bytes, path} and a label; a row group is what will be read at once."""
    features: dict[str, dict[str, object]] = {"image": {"_type": "Image"}}
    types = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    if images.classes:
        names = list(map(utf8_name, images.classes))
        types["label"], features["label"] = pa.int64(), {"_type": "ClassLabel", "names": names}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(types, metadata=metadata)
    rows, size = list[dict[str, object]](), 0
    with (
        atomic_write(path) as part,
        pq.ParquetWriter(part, schema, compression="NONE", use_dictionary=False) as writer,
    ):
        for i, data, _ in _iter_readable(images, _left_out_path(path)):
            row: dict[str, object] = {"image": {"bytes": data, "path": utf8_name(images.keys[i])}}
            if images.labels is not None:
                row["label"] = int(images.labels[i])
            rows.append(row)
            size += len(data)
            if size >= BLOCK_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
