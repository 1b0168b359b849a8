"""The catalog of a set of shards: where each image is, so that a set of any size opens quickly.

Scanning a tar reads all its headers; for Parquet the footers are enough. The result is kept as an
Arrow file in the user's cache folder, which is memory-mapped and valid until a shard changes its
size or modification time. `simsiam shard` also writes a catalog next to the tars, so that they need
no scan. This module does not import torch.
"""

import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.data.arrow_files import open_arrow_file, read_foreign_arrow_file, write_arrow_file
from simsiam.data.decode import EXTENSIONS, MAX_FILE_BYTES, OPTIONAL_EXTENSIONS
from simsiam.data.images import Images
from simsiam.data.parquet_files import ParquetReader, open_parquet
from simsiam.data.remote_files import (
    filesystem,
    is_corruption,
    is_url,
    open_file,
    printable_name,
    read_error,
)
from simsiam.data.shards import ROW_GROUP_STRIDE, ImageLocations, Shards, uncompressed_sizes
from simsiam.data.storage import Names
from simsiam.errors import UsageError, WorkFailed, printable, truncate
from simsiam.sources.file_kinds import VIDEOS, is_hidden, is_image_path, join_kinds
from simsiam.utils.files import cache_dir, file_lock, writable_cache
from simsiam.utils.names import slashed
from simsiam.utils.read_files import open_regular
from simsiam.utils.workers import parallel_map_with_progress

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SHARD_SUFFIXES = (".parquet", ".tar")
CATALOG_VERSION = 4  # of the files in the cache
SIDECAR_VERSIONS = (1, 2, 3, 4)  # of the catalogs next to shards; all have the same content
CATALOG_FILE = "index.arrow"  # a catalog next to the shards
# Usual names of a column of images, and of a label in a column or in JSON; the first is preferred.
IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "photo")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "category")
WEBDATASET_MEMBERS = 1000  # members of a tar that show whether it has the layout of WebDataset
MAX_METADATA_BYTES = 2**20  # limit for a .cls, a .json, and a long name in a tar
# One record batch per shard, one row per image.
CATALOG_SCHEMA = pa.schema(
    {"key": pa.large_binary(), "start": pa.int64(), "size": pa.int64(), "label": pa.int64()}
)
# What `tarfile` raises for damaged files.
TAR_ERRORS = (
    tarfile.TarError,
    ValueError,
    LookupError,
    EOFError,
    OverflowError,
    RuntimeError,
    OSError,
)
# What scanning one shard shows, before the set of all labels is known.
SCAN_SCHEMA = pa.schema(
    {"key": pa.large_binary(), "start": pa.int64(), "size": pa.int64(), "label": pa.large_binary()}
)


class ShardFile(NamedTuple):
    """A shard in a list of files.

    Attributes:
        path: Its path or URL.
        size: Its size in bytes.
        stamp: A text that changes when the file does: its time in ns, or the ETag of a store.
        split: "train", "val" or "test".
        name: What the keys of its images begin with; its file name, or its path in the source.
    """

    path: str
    size: int
    stamp: str
    split: str
    name: str


CacheKey: TypeAlias = list[int | list[str | int]]  # version, and fields of each ShardFile


@dataclass(frozen=True, eq=False)
class Catalog:
    """Where the images of a set of shards are.

    Attributes:
        files: The shards.
        batches: For each shard, a record batch of CATALOG_SCHEMA; a label is a position in
            `classes`, or -1.
        classes: Class names.
        damage: (shard, what is lost with it) of each damaged shard.
        column: Parquet: the column of image files.
    """

    files: Sequence[ShardFile]
    batches: Iterable[pa.RecordBatch]
    classes: tuple[str, ...]
    damage: tuple[tuple[str, str], ...]
    column: str | None

    def load_split(self, split: str) -> tuple[Images, np.ndarray | None]:
        """Return the images of a split, in the order of files.

        Args:
            split: "train", "val" or "test".

        Returns:
            The images, and their labels, int64 (N,), or None unless every image has one.
        """
        batches = [batch for file, batch in zip(self.files, self.batches) if file.split == split]
        starts, sizes, labels = (
            [batch[name].to_numpy() for batch in batches] for name in ("start", "size", "label")
        )
        keys = Names(pa.chunked_array([batch["key"] for batch in batches], pa.large_binary()))
        files = tuple(file.path for file in self.files if file.split == split)
        images = Images(keys, Shards(ImageLocations(files, starts, sizes, self.column)))
        complete = bool(self.classes) and all((part >= 0).all() for part in labels)
        return images, np.concatenate(labels) if complete else None


# --- listing files ------------------------------------------------------------------------------


def list_files(folder: str, depth: int = 0) -> dict[str, tuple[int, str]]:
    """List the visible files in a folder or under a URL.

    Args:
        folder: A folder or a URL.
        depth: How many folders deep files are listed; 0 for the folder alone.

    Returns:
        (size in bytes, stamp) of each file by its path, sorted; {} if there is no such folder. A
        URL of a shard is that of one file.

    Raises:
        UsageError: A server does not say how large a shard is.
        WorkFailed: A remote folder cannot be listed.
    """
    if is_url(folder):
        return _list_remote_files(folder, depth)
    stats = dict[str, tuple[int, str]]()
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                status = entry.stat()
                stats[slashed(entry.path)] = status.st_size, str(status.st_mtime_ns)
            elif depth and entry.is_dir():
                stats |= list_files(slashed(entry.path), depth - 1)
    return dict(sorted(stats.items()))


def _list_remote_files(folder: str, depth: int) -> dict[str, tuple[int, str]]:
    system, path = filesystem(folder)
    is_shard = folder.endswith(SHARD_SUFFIXES)
    try:  # to list the URL of a file would download it from a web server
        info: dict[str, Any] = system.info(path) if is_shard else {"type": "directory"}
        entries = [info] if info["type"] == "file" else system.ls(path, detail=True)
    except FileNotFoundError as error:
        if is_shard and isinstance(error.__cause__, Exception):  # what happened on the network
            raise read_error(folder, error.__cause__) from None
        return {}
    except Exception as error:  # the client of a store may raise anything
        raise read_error(folder, error) from None
    stamp_names = ("ETag", "mtime", "LastModified", "created")  # names differ between stores
    stats = dict[str, tuple[int, str]]()
    for entry in entries:
        url = system.unstrip_protocol(entry["name"])
        if url.rstrip("/").rsplit("/", 1)[-1].startswith("."):
            continue
        if entry["type"] == "file":
            if entry["size"] is None and url.endswith(SHARD_SUFFIXES):
                entry = _sized_entry(system, entry["name"], url)
            stamp = next((entry[name] for name in stamp_names if entry.get(name)), None)
            stats[url] = entry["size"] or 0, str(stamp)
        elif depth and entry["type"] == "directory":
            stats |= _list_remote_files(url, depth - 1)
    return dict(sorted(stats.items()))


def _sized_entry(system: "AbstractFileSystem", path: str, url: str) -> dict[str, Any]:
    """Ask for the size of a shard: web servers list names alone."""
    try:
        entry: dict[str, Any] = system.info(path)
    except Exception as error:  # the client of a store may raise anything
        raise read_error(url, error) from None
    if entry["size"] is None:
        raise UsageError(
            f"{printable(url)} cannot be read in place, because the server does not say how large "
            "it is: download it and give the file"
        )
    return entry


def load_catalog(
    location: str, files: Sequence[ShardFile], layout: "ParquetLayout | None" = None
) -> Catalog:
    """Load the catalog of shards: from the cache, from the file next to them, or by a scan.

    A scan uses all cores. If it is interrupted, the next one continues it.

    Args:
        location: The folder or URL of the shards.
        files: The shards.
        layout: The columns of Parquet shards; None for tars.

    Returns:
        The catalog, memory-mapped.

    Raises:
        UsageError: Parquet files have different columns, or are implausible.
        WorkFailed: A shard cannot be read.
    """
    readable = sorted(EXTENSIONS & OPTIONAL_EXTENSIONS.keys())  # with the packages installed now
    cache_key: CacheKey = [CATALOG_VERSION, [*readable]]
    cache_key += [[file.path, file.size, file.stamp, file.split] for file in files]
    name = blake2b(location.encode(), digest_size=16).hexdigest()
    path = cache_dir("catalogs") / f"{name}.arrow"
    if (catalog := _read_cached(path, files, cache_key)) is not None:
        return catalog
    # The processes of a run open their source at the same time: one scans, the others wait.
    with writable_cache():
        path = cache_dir("catalogs") / path.name
        with file_lock(path.with_suffix(".lock"), wait=True):
            if (catalog := _read_cached(path, files, cache_key)) is not None:
                return catalog
            notes: list[tuple[str, str]] = []
            sidecar = _read_sidecar(location, files, notes) if layout is None else None
            if sidecar is None:
                _build_catalog(path, files, cache_key, layout, notes)
            else:
                _write_catalog(path, sidecar, cache_key)
            catalog = _read_cached(path, files, cache_key)
    if catalog is None:
        raise WorkFailed(
            f"{printable(str(path))} was just written and cannot be read: check the disk, or name "
            "another folder in SIMSIAM_CACHE"
        )
    return catalog


def write_sidecar_catalog(folder: Path, files: Sequence[ShardFile]) -> None:
    """Write the catalog of tars next to them, so that opening them needs no scan.

    Args:
        folder: The folder of the tars.
        files: The tars.

    Raises:
        WorkFailed: A tar cannot be read.
    """
    cache_key: CacheKey = [CATALOG_VERSION]
    cache_key += [[file.name, file.size, "", file.split] for file in files]
    _build_catalog(folder / CATALOG_FILE, files, cache_key, None, [], checksum=False)


def _build_catalog(
    path: Path,
    files: Sequence[ShardFile],
    cache_key: CacheKey,
    layout: "ParquetLayout | None",
    notes: list[tuple[str, str]],
    *,
    checksum: bool = True,
) -> None:
    """Scan the shards that have not been scanned, and merge the results."""
    folder = path.with_suffix(".parts")
    folder.mkdir(exist_ok=True)
    digests = [blake2b(repr(file).encode(), digest_size=16).hexdigest() for file in files]
    parts = [folder / f"{digest}.arrow" for digest in digests]
    jobs = [(file, part, layout) for file, part in zip(files, parts) if not part.exists()]
    parallel_map_with_progress(_scan_shard, jobs, "scanning")
    merged = _merge_parts(files, parts, layout, notes)
    _write_catalog(path, merged, cache_key, checksum=checksum)
    shutil.rmtree(folder)


# --- reading and writing catalogs ---------------------------------------------------------------


def _read_cached(path: Path, files: Sequence[ShardFile], cache_key: CacheKey) -> Catalog | None:
    """Map the catalog in the cache; return None if there is none of exactly these files."""
    errors = (OSError, UsageError, ValueError, LookupError, TypeError, pa.ArrowException)
    with suppress(*errors):
        reader = open_arrow_file(path)
        metadata = json.loads(reader.schema.metadata[b"simsiam"])
        if metadata["files"] == cache_key and reader.num_record_batches == len(files):
            batches = [reader.get_batch(i) for i in range(len(files))]
            damage = tuple((name, reason) for name, reason in metadata["damage"])
            classes = tuple(metadata["classes"])
            return Catalog(files, batches, classes, damage, metadata["column"])
    return None


def _write_catalog(
    path: Path, catalog: Catalog, cache_key: CacheKey, *, checksum: bool = True
) -> None:
    metadata = {
        "files": cache_key,
        "classes": catalog.classes,
        "damage": catalog.damage,
        "column": catalog.column,
    }
    schema = CATALOG_SCHEMA.with_metadata({"simsiam": json.dumps(metadata)})
    write_arrow_file(path, schema, catalog.batches, checksum=checksum)


def _read_sidecar(
    location: str, files: Sequence[ShardFile], notes: list[tuple[str, str]]
) -> Catalog | None:
    """Read the catalog next to the shards, after checking it.

    If it does not match the shards or is damaged, append to `notes` and return None: the shards are
    then scanned.
    """
    path = f"{location.rstrip('/')}/{CATALOG_FILE}"
    there = list_files(location)
    if path not in there:
        return None
    try:
        with tempfile.TemporaryDirectory(dir=cache_dir("catalogs")) as folder:
            copy = path
            if is_url(path):
                copy = f"{folder}/{CATALOG_FILE}"
                with open_file(path) as remote, open(copy, "wb") as local:
                    shutil.copyfileobj(remote, local)
            metadata, batches = read_foreign_arrow_file(copy, CATALOG_SCHEMA)
            others = {name.rsplit("/", 1)[-1] for name in there} - {file.name for file in files}
            return _check_sidecar(json.loads(metadata[b"simsiam"]), batches, files, others, notes)
    except (
        OSError,
        UsageError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        pa.ArrowException,
    ) as error:
        if isinstance(error, OSError) and not is_corruption(error):
            raise read_error(path, error) from None
        notes.append((CATALOG_FILE, "is damaged, and the shards were scanned instead"))
        return None


def _check_sidecar(
    metadata: Mapping[str, Any],
    listed_batches: Sequence[pa.RecordBatch],
    files: Sequence[ShardFile],
    others: Set[str],
    notes: list[tuple[str, str]],
) -> Catalog | None:
    """Return the catalog of these shards if it has all of them; see `_read_sidecar`.

    `others` are the names of the files beside them, which `--splits` may leave out.
    """
    version, *listed = metadata["files"]
    batches = {
        name: (size, batch)
        for batch, (name, size, *_) in zip(listed_batches, listed)
        if name not in others
    }
    sizes = {file.path.rsplit("/", 1)[-1]: file.size for file in files}
    for name, (size, batch) in batches.items():
        if sizes.get(name) != size:
            state = f"has {sizes[name]:,} bytes, not {size:,}" if name in sizes else "is not there"
            notes.append((name, f"{state}: of its {len(batch):,} images, some or all are lost"))
    if notes or batches.keys() != sizes.keys() or version not in SIDECAR_VERSIONS:
        return None
    ordered = [batches[name][1] for name in sizes]
    classes = tuple(metadata["classes"])
    for file, batch in zip(files, ordered):
        _check_batch(file, batch, classes)
    if len(batches) < len(listed):
        ordered, classes = _keep_used_classes(ordered, classes)
    damage = tuple(
        (str(name), str(reason)) for name, reason in metadata["damage"] if name not in others
    )
    return Catalog(files, ordered, classes, damage, None)


def _keep_used_classes(
    batches: Sequence[pa.RecordBatch], classes: tuple[str, ...]
) -> tuple[list[pa.RecordBatch], tuple[str, ...]]:
    """Leave out the classes that no image of these shards has, as a scan of them would."""
    labels = {label for batch in batches for label in pc.unique(batch["label"]).to_pylist()}
    used, kept = pa.array(sorted(labels - {-1}), pa.int64()), list[pa.RecordBatch]()
    for batch in batches:
        codes = pc.index_in(batch["label"], used).fill_null(-1).cast(pa.int64())
        columns = [*batch.columns[:-1], codes]
        kept.append(pa.RecordBatch.from_arrays(columns, schema=CATALOG_SCHEMA))
    return kept, tuple(classes[label] for label in used.to_pylist())


def _check_batch(file: ShardFile, batch: pa.RecordBatch, classes: tuple[str, ...]) -> None:
    """Raise ValueError if a batch has impossible values."""
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("classes")
    start, size, label = (batch[name].to_numpy() for name in ("start", "size", "label"))
    inside = (
        (start >= 0)
        & (size >= 0)
        & (size <= MAX_FILE_BYTES)
        & (start <= file.size)
        & (start + size <= file.size)
    )
    increasing = (np.diff(start) > 0).all()
    known_labels = ((label >= -1) & (label < len(classes))).all()
    if not (inside.all() and increasing and known_labels):
        raise ValueError("places")


# --- scanning -----------------------------------------------------------------------------------


class ParquetLayout(NamedTuple):
    """What the columns of a Parquet file are.

    Attributes:
        image_column: The column of image files, such as "image.bytes".
        label_column: A column of integers, texts or other single values, or None.
        class_names: Class names; () if the file has none.
        unused: Columns that might have been meant and are not used.
    """

    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    unused: tuple[str, ...]


def detect_parquet_layout(parquet: ParquetReader, file: str) -> ParquetLayout:
    """Find the columns of images and labels.

    Args:
        parquet: The open file.
        file: Its path or URL.

    Returns:
        The columns and the class names.

    Raises:
        UsageError: There is no column of image files.
    """
    schema = parquet.schema
    features = _huggingface_features(schema.metadata or {})
    kinds = {name: feature.get("_type") for name, feature in features.items()}
    images = sorted(
        image_columns(schema),
        key=lambda f: (kinds.get(f.name) != "Image", _rank(f.name, IMAGE_NAMES)),
    )
    if not images:
        if _is_embedding(schema):
            raise UsageError(
                f"{printable(file)} holds no images: `simsiam embed` wrote it. Give the images it "
                "was made of; if it is in their folder, move it out of there"
            )
        columns = truncate(", ".join(schema.names))
        raise UsageError(printable(f"no column of image files in {file!r}, only {columns}"))
    named = [f for f in schema if kinds.get(f.name) == "ClassLabel" or f.name in LABEL_NAMES]
    labels = [f.name for f in named if _is_label_type(f.type)]
    labels.sort(key=lambda name: (kinds.get(name) != "ClassLabel", _rank(name, LABEL_NAMES)))
    names = features.get(labels[0], {}).get("names") if labels else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = []
    image = images[0].name + ".bytes" * pa.types.is_struct(images[0].type)
    other_images = [f.name for f in images[1:] if kinds.get(f.name) == kinds.get(images[0].name)]
    unused = [f.name for f in named if not labels or f.name != labels[0]]
    return ParquetLayout(
        image, labels[0] if labels else None, tuple(names), (*other_images, *unused)
    )


def image_columns(schema: pa.Schema) -> list[pa.Field]:
    """Find the columns of a Parquet file that may be image files.

    Args:
        schema: Its columns.

    Returns:
        Columns of bytes; none of an embedding, which has small copies of images.
    """
    return [] if _is_embedding(schema) else [f for f in schema if _is_bytes_type(f.type)]


def _is_embedding(schema: pa.Schema) -> bool:
    """Return whether `simsiam embed` wrote a Parquet file."""
    return b"simsiam" in (schema.metadata or {}) and "vector" in schema.names


def _rank(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _huggingface_features(metadata: Mapping[bytes, bytes]) -> dict[str, dict]:
    """Read Hugging Face's description of each column, as far as it is valid."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _is_bytes_type(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
        dtype = dtype.field("bytes").type
    return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype)


def _is_label_type(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
    return pa.types.is_large_string(dtype) or any(check(dtype) for check in checks)


def label_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert a column of labels to texts.

    Args:
        column: Integers, floats, booleans or texts.

    Returns:
        The texts, large_binary: without spaces around them, and 1.0 as "1"; null where there is no
        label: a null, NaN or an empty text.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
        texts = [_label_text(value) for value in column.to_pylist()]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed).cast(pa.large_binary())


def _label_text(value: object) -> str:
    """Return the text of a label; "" if it is none."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _scan_shard(file: ShardFile, part: Path, layout: ParquetLayout | None) -> None:
    """Scan one shard and write the result."""
    table, notes = _scan_tar(file) if layout is None else (_scan_parquet(file, layout), [])
    schema = SCAN_SCHEMA.with_metadata({"simsiam": json.dumps(notes)})
    write_arrow_file(part, schema, table.to_batches())


def _scan_parquet(file: ShardFile, layout: ParquetLayout) -> pa.Table:
    """List the rows of a Parquet file; keys are assigned when all rows are counted."""
    try:
        with open_parquet(file.path) as parquet:
            found = detect_parquet_layout(parquet, file.path)
            if found[:3] not in (layout[:3], (layout.image_column, None, ())):
                raise UsageError(
                    f"{printable_name(file.path)} has other columns or class names than the first: "
                    f"{found[:3]}"
                )
            starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
            group_sizes = uncompressed_sizes(parquet, layout.image_column)
            for group, size in enumerate(group_sizes):
                rows = np.arange(parquet.metadata.row_group(group).num_rows)
                starts.append(group * ROW_GROUP_STRIDE + rows)
                sizes.append(size * (rows + 1) // len(rows) - size * rows // len(rows))
            labels = pa.nulls(parquet.metadata.num_rows, pa.large_binary())
            if found.label_column:
                labels = label_texts(parquet.read([found.label_column])[found.label_column])
    except (pa.ArrowException, OSError) as error:
        raise read_error(file.path, error) from None
    keys = pa.nulls(len(labels), pa.large_binary())
    return pa.table([keys, np.concatenate(starts), np.concatenate(sizes), labels], SCAN_SCHEMA)


class _TarScan:
    """The images of a tar and their labels, collected member by member."""

    def __init__(self, shard: bytes):
        self.shard = shard  # name of the shard
        self.keys, self.labels = list[bytes](), list[bytes | None]()
        self.starts, self.sizes = list[int](), list[int]()
        self.ignored = 0  # members that are neither folders nor plain files inside
        # The current sample: its name, its images (name, start, size), and its metadata.
        self.sample = b""
        self.images = list[tuple[bytes, int, int]]()
        self.metadata = dict[str, bytes]()
        self.not_read = Counter[str]()  # images and videos of kinds that are not read

    def add(self, info: tarfile.TarInfo, opened: BinaryIO) -> None:
        """Take a member into the current sample, or begin the next one."""
        name = normalize_member_path(info.name)
        too_large = info.size > MAX_FILE_BYTES
        if not info.isfile() or info.issparse() or name is None or too_large:
            self.ignored += not info.isdir()
            return
        if is_hidden(name):  # as "._7.jpg", which macOS puts between the files of a sample
            return
        stem, _, extension = name.rpartition(b"/")[2].partition(b".")
        sample = name.rpartition(b"/")[0] + b"/" + stem
        if sample != self.sample:
            self.close_sample()
            self.sample = sample
        if is_image_path(name):
            self.images.append((name, info.offset_data, info.size))
        elif (kind := extension.lower().rpartition(b".")[2]) in (b"cls", b"json"):
            if info.size <= MAX_METADATA_BYTES:
                opened.seek(info.offset_data)
                self.metadata |= _parse_sample_metadata(kind, opened.read(info.size))
        elif (suffix := f".{os.fsdecode(kind)}") in {*OPTIONAL_EXTENSIONS, *VIDEOS}:
            self.not_read[suffix] += 1

    def close_sample(self) -> None:
        """Record the images of the current sample."""
        for name, start, size in self.images:
            folder = name.split(b"/")[0] if b"/" in name else None
            has_path = len(self.images) == 1 and "path" in self.metadata
            self.keys.append(self.metadata["path"] if has_path else self.shard + b"/" + name)
            self.labels.append(self.metadata.get("class") or self.metadata.get("label") or folder)
            self.starts.append(start)
            self.sizes.append(size)
        self.images, self.metadata = [], {}

    def table(self) -> pa.Table:
        columns = zip((self.keys, self.starts, self.sizes, self.labels), SCAN_SCHEMA.types)
        return pa.table([pa.array(column, kind) for column, kind in columns], SCAN_SCHEMA)


def _scan_tar(file: ShardFile) -> tuple[pa.Table, list[tuple[str, str]]]:
    """List the images in a tar with their labels, and what is wrong with the tar.

    As in WebDataset, consecutive files with the same name up to the first dot are one sample. Its
    `.cls` is the label; its `.json` may have `label`, and `path` and `class`, which `simsiam shard`
    writes. Without these, a folder in the tar is the label.
    """
    scan, notes = _TarScan(os.fsencode(file.name)), list[tuple[str, str]]()
    name, end = file.name, 0
    try:
        with open_file(file.path) as opened:
            for info in iter_tar_members(opened):
                end = info.offset_data + info.size
                if end > file.size:
                    raise tarfile.ReadError("cut off")
                scan.add(info, opened)
    except TAR_ERRORS as error:
        if not is_corruption(error):
            raise read_error(file.path, error) from None
        scan.close_sample()
        reason = (
            f"damaged or cut off near byte {min(end, file.size):,} of {file.size:,}: "
            f"the {len(scan.keys):,} images before it are used, what follows is lost"
        )
        notes.append((name, reason))
    else:
        scan.close_sample()
    if scan.ignored:
        reason = (
            f"{scan.ignored:,} links, devices, too large files or paths that lead outside "
            "are ignored"
        )
        notes.append((name, reason))
    if scan.not_read:
        notes.append((name, f"not read: {join_kinds(scan.not_read)}"))
    return scan.table(), notes


def _parse_sample_metadata(extension: bytes, data: bytes) -> dict[str, bytes]:
    """Read `label`, `path` and `class` from the .cls or .json of a sample."""
    if extension == b"cls":
        return {"label": data.strip()} if data.strip() else {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    content = content if isinstance(content, dict) else {}
    texts = {"path": content["path"]} if isinstance(content.get("path"), str) else {}
    for name in ("class", *LABEL_NAMES):
        if isinstance(content.get(name), bool | int | float | str):
            texts["class" if name == "class" else "label"] = _label_text(content[name])
            break
    return {name: _encode_name(text) for name, text in texts.items() if text}


def _encode_name(text: str) -> bytes:
    """Encode a name as the system does; escape what it cannot encode with backslashes."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def _read_part(path: Path) -> pa.Table:
    """Read the result of a scan."""
    try:
        return open_arrow_file(path).read_all()
    except (OSError, ValueError, pa.ArrowException) as error:
        path.unlink(missing_ok=True)
        raise WorkFailed(
            f"a file in the cache was damaged and is deleted now; try again: {error}"
        ) from None


def label_sort_key(label: bytes) -> tuple[int, int, bytes]:
    """Sort numbers by value, before everything else.

    Args:
        label: The text of a label.

    Returns:
        What to compare.
    """
    return (0, int(label), label) if label.isdigit() and len(label) < 19 else (1, 0, label)


def _merge_parts(
    files: Sequence[ShardFile],
    parts: Sequence[Path],
    layout: ParquetLayout | None,
    notes: list[tuple[str, str]],
) -> Catalog:
    """Merge the results of all scans; labels become positions in the sorted label texts."""
    label_texts, damage = set[bytes | None](), list(notes)
    for part in parts:
        table = _read_part(part)
        damage += [(name, why) for name, why in json.loads(table.schema.metadata[b"simsiam"])]
        label_texts |= set(pc.unique(table["label"]).to_pylist())
    if layout and layout.class_names:
        classes = layout.class_names
        label_values = [str(i).encode() for i in range(len(classes))]
    else:
        label_values = sorted((t for t in label_texts if t is not None), key=label_sort_key)
        classes = tuple(map(os.fsdecode, label_values))
    value_set = pa.array(label_values, pa.large_binary())
    row_counts = {file.split: 0 for file in files}

    def iter_batches() -> Iterator[pa.RecordBatch]:
        for file, part in zip(files, parts):
            table = _read_part(part)
            keys = table["key"]
            labels = pc.index_in(table["label"], value_set).fill_null(-1).cast(pa.int64())
            if layout:
                first = row_counts[file.split]
                row_counts[file.split] += len(table)
                rows = pa.array(np.arange(first, first + len(table))).cast(pa.string())
                keys = pc.binary_join_element_wise(f"{file.split}#", rows, "")
                keys = keys.cast(pa.large_binary())
            columns = [keys, table["start"], table["size"], labels]
            batches = pa.table(columns, CATALOG_SCHEMA).combine_chunks().to_batches()
            yield batches[0] if len(table) else pa.RecordBatch.from_pylist([], CATALOG_SCHEMA)

    column = layout.image_column if layout else None
    return Catalog(files, iter_batches(), classes, tuple(damage), column)


# --- tar ----------------------------------------------------------------------------------------


class _CheckedTarInfo(tarfile.TarInfo):
    """A member with a checked header: no name of gigabytes, and no negative size."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        long = self.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
        )
        if self.size < 0 or (long and self.size > MAX_METADATA_BYTES):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def is_webdataset(path: str) -> bool:
    """Return whether images in a .tar have a .cls or .json with a label or a path.

    Args:
        path: The path of the .tar, of which only the first members are read.

    Returns:
        Whether one of these images has; False also for a file that is damaged.
    """
    scan = _TarScan(b"")
    with (
        suppress(*TAR_ERRORS),
        open_regular(path) as opened,
    ):
        for info in islice(iter_tar_members(opened), WEBDATASET_MEMBERS):
            scan.add(info, opened)
            if scan.images and scan.metadata:
                return True
    return False


def iter_tar_members(opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Read the headers of a .tar.

    Args:
        opened: The open file.

    Yields:
        Its members, in order.

    Raises:
        tarfile.TarError: The file is damaged, or does not end in zeros. `tarfile` may raise other
            errors for damaged files.
    """
    with tarfile.open(fileobj=opened, mode="r:", tarinfo=_CheckedTarInfo) as archive:
        end = -1
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte per file
            if archive.offset <= end or info.size < 0:  # it would be read again and again
                raise tarfile.ReadError(f"damaged at byte {end:,}")
            end = archive.offset
            yield info
        opened.seek(archive.offset)  # tarfile stops at a damaged header as if at the end
        if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")


def normalize_member_path(name: str) -> bytes | None:
    """Normalize the path of a member of an archive.

    Args:
        name: Its name in the archive.

    Returns:
        The path without "." and empty parts; None if it is empty or leads outside the archive.
    """
    parts = [part for part in os.fsencode(name).split(b"/") if part not in (b"", b".")]
    return b"/".join(parts) if parts and b".." not in parts else None
