"""The index of a source: what every image file says of itself, looked at once and kept in the user's cache folder.

A file is looked at again only if its path, modification time or size has changed, or if it could not be read: a right
or a library may have been missing. Loads no torch.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.data.decode import (
    EXTENSIONS,
    MAX_PIXELS,
    PIL_MODES,
    Unreadable,
    decode_image,
    open_regular_file,
    read_header,
)
from simsiam.data.images import Images
from simsiam.data.shards import Shards, is_url
from simsiam.data.storage import ArchiveMembers, Column
from simsiam.sources.open_source import Source, absolute_source, find_shards
from simsiam.utils.files import atomic_write, cache_dir
from simsiam.utils.workers import parallel_map

INDEX_VERSION = 1  # of the files in the cache
INSPECTION_CHUNK = 128  # images looked at before a worker reports
STATUS_CHUNK = 10_000  # file names held as Python objects at a time
# What tells whether a file has changed; an mtime in ns, or -1: look every time.
STAMP_SCHEMA = pa.schema({"key": pa.large_binary(), "bytes": pa.int64(), "mtime": pa.int64()})
# What a look at it finds.
INSPECTION_SCHEMA = pa.schema(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("format", pa.string()),
        ("misnamed", pa.bool_()),  # the name ends as that of another format
        ("reason", pa.string()),  # why it cannot be read, or ""
        ("digest", pa.binary(16)),  # of the file's bytes
    ]
)
INDEX_SCHEMA = pa.schema([*STAMP_SCHEMA, *INSPECTION_SCHEMA])
# What the files of a format are called; elsewhere just like the format.
FORMAT_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
# How a complete file ends: with the marker EOI, or with the chunk IEND, empty, and its checksum.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}


@dataclass(frozen=True, eq=False)
class Index:
    """A row an image, split after split in the order of the source, and what is known of exactly these images."""

    table: pa.Table  # of SCHEMA
    facts: dict[
        str, Any
    ]  # whatever was measured on the images, as JSON; empty once one has changed, come or gone
    path: Path  # where it is kept
    containers: list[
        Any
    ]  # path, mtime and size of the archive or the Parquet files that the images lie in

    def get_or_measure(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure()` returned, once for exactly these images; it is JSON."""
        if key not in self.facts:
            self.facts[key] = measure()
            self.save()
        return self.facts[key]

    def save(self) -> None:
        """Keep it for the next time. A cache that cannot be written is no error."""
        about = json.dumps({"containers": self.containers, "facts": self.facts})
        table = self.table.replace_schema_metadata({"simsiam": about})
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (
                atomic_write(self.path) as part,
                pa.OSFile(str(part), "wb") as file,
                pa.ipc.new_file(file, table.schema) as to,
            ):
                to.write_table(table)


def load_index(names: Sequence[str | os.PathLike[str]], source: Source, channels: int = 3) -> Index:
    """The index of the source that `names` opened, taken from the cache as far as that still holds.

    A file is readable if its header parses and it is complete: a JPEG or PNG that ends as it should, and anything else
    if it decodes, so no good file is called bad. Damage in the middle of a JPEG or PNG shows only when it is decoded,
    in training. The digest is of the file's bytes: blake2b, 128 bits.

    Raises WorkFailed if a worker is killed. What has been seen by then, or by Ctrl-C, is kept.
    """
    paths = [absolute_source(name) for name in names]
    containers = (
        _container_stamps(paths)
        if isinstance(source.train.encoded, ArchiveMembers | Column | Shards)
        else []
    )
    name = blake2b(
        json.dumps([INDEX_VERSION, channels, *paths]).encode(), digest_size=16
    ).hexdigest()
    old = _read_index(cache_dir("index") / f"{name}.arrow", containers)
    parts = list(source.splits.values())
    pa.default_memory_pool().release_unused()  # what opening a large source took besides
    stamps = _image_stamps(parts, containers)

    alike = stamps["key"].equals(old.table["key"])
    before = np.arange(len(stamps))  # the row of each image in the old index
    if not alike:
        before = pc.index_in(stamps["key"], old.table["key"]).fill_null(-1).to_numpy()
    kept = np.flatnonzero((before >= 0) & (stamps["mtime"].to_numpy() >= 0))
    for column in ("bytes", "mtime"):
        kept = kept[stamps[column].to_numpy()[kept] == old.table[column].to_numpy()[before[kept]]]
    kept = kept[
        pc.equal(old.table["reason"], "").to_numpy()[before[kept]]
    ]  # a reason may pass without the file's help
    if alike and len(kept) == len(stamps):
        return old

    others = np.setdiff1d(np.arange(len(stamps)), kept)
    seen = [INSPECTION_SCHEMA.empty_table()]
    try:
        for part in _inspect_rows(parts, others):
            seen.append(part)
    finally:
        looked = pa.concat_tables(seen)
        done = others[: len(looked)]  # all, unless it was interrupted
        fresh = pa.table([*stamps.take(pa.array(done)).columns, *looked.columns], INDEX_SCHEMA)
        found = old
        if not alike or not fresh.equals(old.table.take(pa.array(before[others]))):
            table = pa.concat_tables([old.table.take(pa.array(before[kept])), fresh])
            order = np.argsort(np.concatenate([kept, done]))
            found = Index(table.take(pa.array(order)), {}, old.path, containers)
            found.save()
    return found


def _read_index(path: Path, containers: list[Any]) -> Index:
    """The index in a file; an empty one if it is not there, damaged, or of other containers."""
    with suppress(OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        about = json.loads(table.schema.metadata[b"simsiam"])
        if table.schema.equals(INDEX_SCHEMA) and about["containers"] == containers:
            return Index(table.replace_schema_metadata(None), about["facts"], path, containers)
    return Index(INDEX_SCHEMA.empty_table(), {}, path, containers)


def _container_stamps(paths: Sequence[str]) -> list[Any]:
    found = []
    for path in paths:
        if is_url(path) or os.path.isdir(path):
            found += [[file, stamp, size] for file, (size, stamp) in find_shards(path).items()]
        elif os.path.isfile(path):
            found.append([path, str((status := os.stat(path)).st_mtime_ns), status.st_size])
    return found


def _image_stamps(parts: Sequence[Images], containers: list[Any]) -> pa.Table:
    """What tells whether the images of all parts have changed, from the file system alone."""
    newest = max((int(stamp) if stamp.isdigit() else 0 for _, stamp, _ in containers), default=-1)
    tables = []
    for images in parts:
        keys = images.keys.values  # all of them, in order: the source has just been opened
        sizes, mtimes = np.zeros(len(images), np.int64), np.full(len(images), newest, np.int64)
        if isinstance(images.encoded, Path):
            jobs = [
                (images.encoded, keys[start : start + STATUS_CHUNK])
                for start in range(0, len(keys), STATUS_CHUNK)
            ]
            sizes, mtimes = np.concatenate(
                [np.zeros((2, 0), np.int64), *parallel_map(_stat_files, jobs)], axis=1
            )
        elif isinstance(images.encoded, ArchiveMembers):
            sizes = images.encoded.entries[:, 2]
        elif isinstance(images.encoded, Shards):
            sizes = np.concatenate([np.zeros(0, np.int64), *images.encoded.locations.sizes])
        elif isinstance(images.encoded, Column):
            sizes = _byte_lengths(images.encoded.values).fill_null(0).to_numpy()
        elif images.pixels is not None and len(images):
            sizes[:] = images.pixels[0].nbytes
        tables.append(pa.table([keys, sizes, mtimes], STAMP_SCHEMA))
    return pa.concat_tables(tables)


def _byte_lengths(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Bytes of each value; equal ones may stand in Arrow memory once for many rows."""
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([_byte_lengths(chunk) for chunk in values.chunks], pa.int64())
    if pa.types.is_dictionary(values.type):
        return _byte_lengths(values.dictionary).take(values.indices)
    return pc.binary_length(values).cast(pa.int64())


def _stat_files(folder: Path, names: pa.ChunkedArray) -> np.ndarray:
    """Bytes and mtimes of files, int64 (2, N); 0 and -1 where there is none."""
    start, found = os.fsencode(folder) + b"/", []
    for name in names.to_pylist():
        try:
            status = os.stat(name if name.startswith(b"/") else start + name)
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append((0, -1))
    return np.array(found, np.int64).T


def _inspect_rows(parts: Sequence[Images], rows: np.ndarray) -> Iterator[pa.Table]:
    """What is seen of the images at `rows`, counted over all parts, in that order, CHUNK by CHUNK."""
    ends = np.cumsum([len(images) for images in parts])
    jobs = [
        (images, mine[start : start + INSPECTION_CHUNK])
        for images, end in zip(parts, ends)
        for mine in [rows[(rows >= end - len(images)) & (rows < end)] - (end - len(images))]
        for start in range(0, len(mine), INSPECTION_CHUNK)
    ]
    if len(rows) <= INSPECTION_CHUNK:  # done before processes would have started
        yield from (inspect_images(*job) for job in jobs)
        return

    from simsiam.utils.progress_bar import progress_bar

    found = parallel_map(inspect_images, jobs)
    with progress_bar("looking", len(rows)) as advance:
        for part in found:
            advance(len(part))
            yield part


def inspect_images(images: Images, rows: np.ndarray) -> pa.Table:
    """What is seen of the images at `rows` (at least one): a table of SEEN."""
    near = images.prefetch(rows, 0.25)  # all of a block is read where much of it is asked for
    columns = zip(*(_inspect_image(near, i) for i in rows))
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, INSPECTION_SCHEMA.types)],
        INSPECTION_SCHEMA,
    )


def _inspect_image(images: Images, i: int) -> tuple[int, int, str, bool, str, bytes]:
    if images.pixels is not None:
        return *images.read_header(i), False, "", _digest(images.pixels[i].tobytes())
    height, width, kind, reason, digest = 0, 0, "", "", bytes(16)
    try:
        file = images.file(i)
        data = file if isinstance(file, bytes) else _read_file(file)
        digest = _digest(data)
        height, width, kind = read_header(data, images.channels)
        cheap = (
            kind in END_MARKERS and images.channels in PIL_MODES and height * width <= MAX_PIXELS
        )
        if not cheap or not data.endswith(END_MARKERS[kind]):
            decode_image(data, images.channels)
    except (Unreadable, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    extension = os.path.splitext(images.keys[i])[1].lower()
    misnamed = (
        kind != ""
        and extension in EXTENSIONS
        and extension not in FORMAT_EXTENSIONS.get(kind, (f".{kind.lower()}",))
    )
    return height, width, kind, misnamed, reason, digest


def _read_file(file: str) -> bytes:
    with open_regular_file(file) as stream:
        return stream.read()


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def pixel_cache_dir() -> Path:
    """Where decoded pixels are kept, beside the indices."""
    return cache_dir("pixels")


def source_stamps(paths: Sequence[str], images: Images) -> tuple[list[Any], pa.Table]:
    """What tells whether anything of a source that has just been opened has changed: its containers, and STAMPs."""
    containers = (
        _container_stamps(paths)
        if isinstance(images.encoded, ArchiveMembers | Column | Shards)
        else []
    )
    return containers, _image_stamps([images], containers)
