"""The index of a source: what inspecting each image file shows, kept in the user's cache folder.

A file is inspected again only if its path, modification time or size has changed, or if it could
not be read the last time: a permission or a library may have been missing. This module does not
import torch.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.data.arrow_files import open_arrow_file, write_arrow_file
from simsiam.data.decode import (
    EXTENSIONS,
    FORMAT_EXTENSIONS,
    MAX_PIXELS,
    PIL_MODES,
    Unreadable,
    decode_image,
    read_header,
)
from simsiam.data.images import Images
from simsiam.data.remote_files import is_url
from simsiam.errors import UsageError, WorkFailed
from simsiam.sources.open_source import (
    Source,
    absolute_sources,
    find_nested_shards,
    find_shards,
)
from simsiam.utils.files import cache_dir
from simsiam.utils.workers import parallel_map

INDEX_VERSION = 1  # of the files in the cache
INSPECTION_CHUNK = 128  # images that a worker inspects before it reports
ContainerStamp: TypeAlias = list[str | int]  # path, modification time and size of a file
T = TypeVar("T")
# What shows whether an image has changed; mtime is in ns, or -1: inspect it every time.
STAMP_CHUNK = 10_000  # stamps that are Python objects at the same time
STAMP_SCHEMA = pa.schema({"key": pa.large_binary(), "bytes": pa.int64(), "mtime": pa.int64()})
# What inspecting an image shows.
INSPECTION_SCHEMA = pa.schema(
    [
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("format", pa.string()),
        ("misnamed", pa.bool_()),  # the file name has the extension of another format
        ("reason", pa.string()),  # why it cannot be read, or ""
        ("digest", pa.binary(16)),  # of the file's bytes
    ]
)
INDEX_SCHEMA = pa.schema([*STAMP_SCHEMA, *INSPECTION_SCHEMA])
# The last bytes of a complete file: the marker EOI, or the empty chunk IEND and its checksum.
END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}


@dataclass(frozen=True, eq=False)
class Index:
    """What is known of the images of a source.

    Attributes:
        table: A row per image, with the columns of INDEX_SCHEMA, split after split.
        facts: Other measurements of the images, as JSON values; empty once an image has changed,
            or was added or removed.
        path: The file in the cache.
        containers: The archive or the shards that the images are in.
    """

    table: pa.Table
    facts: dict[str, object]
    path: Path
    containers: list[ContainerStamp]

    def get_or_measure(self, key: str, measure: Callable[[], T]) -> T:
        """Return a measurement, made once for exactly these images.

        Args:
            key: Its name in `facts`.
            measure: Makes it, if it is not there; returns a JSON value.

        Returns:
            The measurement.
        """
        if key not in self.facts:
            self.facts[key] = measure()
            self.save()
        return self.facts[key]  # type: ignore[return-value]  # an older measurement with this key

    def forget(self, key: str) -> None:
        """Forget a measurement, so that it is made again the next time.

        Args:
            key: Its name in `facts`.
        """
        self.facts.pop(key, None)
        self.save()

    def save(self) -> None:
        """Write the index to the cache. A cache that cannot be written is not an error."""
        metadata = json.dumps({"containers": self.containers, "facts": self.facts})
        table = self.table.replace_schema_metadata({"simsiam": metadata})
        with suppress(OSError, WorkFailed):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_arrow_file(self.path, table.schema, table.to_batches())


def load_index(names: Sequence[str | os.PathLike[str]], source: Source, channels: int = 3) -> Index:
    """Index a source, inspecting only the images that have changed since the last time.

    An image is readable if its header can be parsed and its file is complete: a JPEG or PNG that
    ends as it should, or any other file that can be decoded. So no good file is called bad. Damage
    in the middle of a JPEG or PNG shows only when it is decoded, in training. The digest of a file
    is blake2b, 128 bits.

    Args:
        names: The names that opened the source.
        source: The source, just opened.
        channels: Number of channels that images are decoded to.

    Returns:
        The index of all splits.

    Raises:
        WorkFailed: A worker was killed. What was inspected until then, or until Ctrl-C, is saved.
    """
    paths = absolute_sources(names)
    splits = list(source.splits.values())
    pa.default_memory_pool().release_unused()  # what opening a large source used temporarily
    containers, stamps = source_stamps(paths, splits)
    identity = json.dumps([INDEX_VERSION, channels, *paths])
    name = blake2b(identity.encode(), digest_size=16).hexdigest()
    old = _read_index(cache_dir("index") / f"{name}.arrow", containers)
    same_keys = stamps["key"].equals(old.table["key"])
    old_rows = np.arange(len(stamps))  # the row of each image in the old index, or -1
    if not same_keys:
        old_rows = pc.index_in(stamps["key"], old.table["key"]).fill_null(-1).to_numpy()
    kept = np.flatnonzero((old_rows >= 0) & (stamps["mtime"].to_numpy() >= 0))
    for column in ("bytes", "mtime"):
        unchanged = stamps[column].to_numpy()[kept] == old.table[column].to_numpy()[old_rows[kept]]
        kept = kept[unchanged]
    # An unreadable file is inspected again: it may become readable without a change of its own.
    kept = kept[pc.equal(old.table["reason"], "").to_numpy()[old_rows[kept]]]
    if same_keys and len(kept) == len(stamps):
        return old

    others = np.setdiff1d(np.arange(len(stamps)), kept)
    inspected, index = [INSPECTION_SCHEMA.empty_table()], old
    try:
        for table in _inspect_rows(splits, others):
            inspected.append(table)
    finally:  # also if this was interrupted: then `done` are not all of `others`
        results = pa.concat_tables(inspected)
        done = others[: len(results)]
        new = pa.table([*stamps.take(pa.array(done)).columns, *results.columns], INDEX_SCHEMA)
        if not same_keys or not new.equals(old.table.take(pa.array(old_rows[others]))):
            table = pa.concat_tables([old.table.take(pa.array(old_rows[kept])), new])
            order = np.argsort(np.concatenate([kept, done]))
            index = Index(table.take(pa.array(order)), {}, old.path, containers)
            index.save()
    return index


def _read_index(path: Path, containers: list[ContainerStamp]) -> Index:
    """Read an index; an empty one if it is missing, damaged, or of other containers."""
    errors = (OSError, UsageError, ValueError, LookupError, TypeError, pa.ArrowException)
    with suppress(*errors):
        table = open_arrow_file(path).read_all()
        metadata = json.loads(table.schema.metadata[b"simsiam"])
        if table.schema.equals(INDEX_SCHEMA) and metadata["containers"] == containers:
            table = table.replace_schema_metadata(None)
            return Index(table, metadata["facts"], path, containers)
    return Index(INDEX_SCHEMA.empty_table(), {}, path, containers)


def _container_stamps(paths: Sequence[str]) -> list[ContainerStamp]:
    stamps: list[ContainerStamp] = []
    for path in paths:
        if is_url(path) or os.path.isdir(path):
            shards = find_shards(path) or find_nested_shards(path)
            stamps += [[file, time, size] for file, (size, time) in shards.items()]
        elif os.path.isfile(path):
            status = os.stat(path)
            stamps.append([path, str(status.st_mtime_ns), status.st_size])
    return stamps


def _image_stamps(splits: Sequence[Images], containers: list[ContainerStamp]) -> pa.Table:
    """Return the table of STAMP_SCHEMA for the images of all splits, reading no image.

    Images in containers get the latest modification time of these.
    """
    times = (str(time) for _, time, _ in containers)
    latest = max((int(time) if time.isdigit() else 0 for time in times), default=-1)
    tables = []
    for images in splits:
        sizes, mtimes = images.storage.file_stats()
        if images.storage.in_containers:
            mtimes = np.full(len(images), latest, np.int64)
        # `values` are all keys, in order: the source has just been opened.
        tables.append(pa.table([images.keys.values, sizes, mtimes], STAMP_SCHEMA))
    return pa.concat_tables(tables)


def _inspect_rows(splits: Sequence[Images], rows: np.ndarray) -> Iterator[pa.Table]:
    """Inspect images and yield tables of INSPECTION_SCHEMA, INSPECTION_CHUNK images at a time.

    `rows` are positions in all splits together.
    """
    ends = np.cumsum([len(images) for images in splits])
    jobs = [
        (images, local_rows[start : start + INSPECTION_CHUNK])
        for images, end in zip(splits, ends)
        for local_rows in [rows[(rows >= end - len(images)) & (rows < end)] - (end - len(images))]
        for start in range(0, len(local_rows), INSPECTION_CHUNK)
    ]
    if len(rows) <= INSPECTION_CHUNK:  # faster than starting processes
        yield from (inspect_images(*job) for job in jobs)
        return

    from simsiam.utils.progress_bar import progress_bar

    tables = parallel_map(inspect_images, jobs)
    with progress_bar("looking", len(rows)) as advance:
        for table in tables:
            advance(len(table))
            yield table


def inspect_images(images: Images, rows: np.ndarray) -> pa.Table:
    """Inspect images.

    Args:
        images: The images.
        rows: Positions of those to inspect, at least one.

    Returns:
        A table of INSPECTION_SCHEMA.
    """
    loaded = images.prefetch(rows, 0.25)  # a block is read as a whole if enough of it is needed
    columns = zip(*(_inspect_image(loaded, i) for i in rows))
    return pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, INSPECTION_SCHEMA.types)],
        INSPECTION_SCHEMA,
    )


def _inspect_image(images: Images, i: int) -> tuple[int, int, str, bool, str, bytes]:
    """Return a row of INSPECTION_SCHEMA."""
    if images.pixels is not None:
        return *images.read_header(i), False, "", _digest(images.pixels[i].tobytes())
    height, width, kind, reason, digest = 0, 0, "", "", bytes(16)
    try:
        data = images.storage.read_bytes(i)
        digest = _digest(data)
        height, width, kind = read_header(data, images.channels)
        has_end_marker = (
            kind in END_MARKERS and images.channels in PIL_MODES and height * width <= MAX_PIXELS
        )
        if not has_end_marker or not data.endswith(END_MARKERS[kind]):
            decode_image(data, images.channels)
    except (Unreadable, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    extension = os.path.splitext(images.keys[i])[1].lower()
    misnamed = kind != "" and extension in EXTENSIONS and extension not in FORMAT_EXTENSIONS[kind]
    return height, width, kind, misnamed, reason, digest


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def pixel_cache_dir() -> Path:
    """Return the folder of the files of decoded pixels, next to that of the indexes."""
    return cache_dir("pixels")


def source_stamps(
    paths: Sequence[str], splits: Sequence[Images]
) -> tuple[list[ContainerStamp], pa.Table]:
    """Return what shows whether a source has changed.

    Args:
        paths: The names that opened the source.
        splits: Images of the source, just opened.

    Returns:
        Path, time and size of the archive or shards that the images are in, and a table of
        STAMP_SCHEMA with a row per image, split after split.
    """
    containers = _container_stamps(paths) if splits[0].storage.in_containers else []
    return containers, _image_stamps(splits, containers)


def update_with_stamps(digest: blake2b, stamps: pa.Table) -> None:
    """Add the stamps of images to a digest.

    Args:
        digest: The digest.
        stamps: A table of STAMP_SCHEMA.
    """
    for batch in stamps.to_batches(STAMP_CHUNK):
        digest.update(repr(batch.to_pydict()).encode())
