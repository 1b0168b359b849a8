"""The catalog of a set of shards: where each image lies, found once and kept, so that a set of any size opens at once.

A tar is scanned header by header; of Parquet the footers suffice. The catalog is an Arrow file in the user's cache
folder, mapped rather than read, and holds as long as no shard changes its size or its time. `simsiam shard` leaves one
beside the tars, so that nobody has to scan them. Loads no torch.
"""

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simsiam.data.decode import EXTENSIONS
from simsiam.data.images import Images
from simsiam.data.shards import (
    MAX_FILE_BYTES,
    ROW_GROUP_STRIDE,
    ImageLocations,
    Shards,
    filesystem,
    is_corruption,
    is_url,
    open_file,
    printable_name,
    read_error,
    uncompressed_sizes,
)
from simsiam.data.storage import Names
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.files import atomic_write, cache_dir, file_lock
from simsiam.utils.workers import parallel_map_with_progress

CATALOG_VERSION = 1  # of the files in the cache
CATALOG_FILE = "index.arrow"  # a catalog beside the shards
LABEL_NAMES = ("label", "labels", "fine_label")  # usual names of a label
IMAGE_SUFFIXES = tuple(extension.encode() for extension in EXTENSIONS)
MAX_METADATA_BYTES = 2**20  # bytes of a .cls, a .json or a tar's long name
# One record batch a shard, one row an image.
CATALOG_SCHEMA = pa.schema(
    {"key": pa.large_binary(), "start": pa.int64(), "size": pa.int64(), "label": pa.int64()}
)
# What is found in one shard, before all labels are known.
SCAN_SCHEMA = pa.schema(
    {"key": pa.large_binary(), "start": pa.int64(), "size": pa.int64(), "label": pa.large_binary()}
)


class ShardFile(NamedTuple):
    """A shard, as it is listed."""

    path: str  # or URL
    size: int
    stamp: str  # changes when the file does: its time in ns, or a store's ETag
    split: str


@dataclass(frozen=True, eq=False)
class Catalog:
    files: Sequence[ShardFile]
    batches: Iterable[
        pa.RecordBatch
    ]  # of SCHEMA, one a file; a label is a position in `classes`, or -1
    classes: tuple[str, ...]
    damage: tuple[tuple[str, str], ...]  # files, and what is lost with them
    column: str | None  # of Parquet

    def load_split(self, split: str) -> tuple[Images, np.ndarray | None]:
        """The images of a split, in the order of files, and their labels if each has one."""
        mine = [batch for file, batch in zip(self.files, self.batches) if file.split == split]
        starts, sizes, labels = (
            [batch[name].to_numpy() for batch in mine] for name in ("start", "size", "label")
        )
        keys = Names(pa.chunked_array([batch["key"] for batch in mine], pa.large_binary()))
        files = tuple(file.path for file in self.files if file.split == split)
        images = Images(keys, Shards(ImageLocations(files, starts, sizes, self.column)))
        complete = bool(self.classes) and all((part >= 0).all() for part in labels)
        return images, np.concatenate(labels) if complete else None


# --- what is there ----------------------------------------------------------------------------------------------------


def list_files(folder: str) -> dict[str, tuple[int, str]]:
    """Size and stamp of each visible file in a folder or under a URL, by path; {} where there is no such folder."""
    if not is_url(folder):
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
            found = {
                e.path: e.stat() for e in entries if not e.name.startswith(".") and e.is_file()
            }
            return {
                path: (status.st_size, str(status.st_mtime_ns))
                for path, status in sorted(found.items())
            }
        return {}
    system, path = filesystem(folder)
    try:
        entries = system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    except Exception as error:  # a store's client raises what it likes
        raise read_error(folder, error) from None
    files = {system.unstrip_protocol(e["name"]): e for e in entries if e["type"] == "file"}
    return {
        url: (
            e["size"],
            str(e.get("ETag") or e.get("mtime") or e.get("LastModified") or e.get("created")),
        )
        for url, e in sorted(files.items())
        if not url.rsplit("/", 1)[-1].startswith(".")
    }


def load_catalog(
    location: str, files: Sequence[ShardFile], layout: "ParquetLayout | None" = None
) -> Catalog:
    """The catalog of tar shards, or of Parquet in a layout: the one that is kept, the one beside them, or a new one.

    A new one is made by all cores; stopped, it goes on where it was. Raises WorkFailed where a shard cannot be read.
    """
    about = [CATALOG_VERSION, *map(list, files)]
    kept = cache_dir("catalogs") / f"{blake2b(location.encode(), digest_size=16).hexdigest()}.arrow"
    if (found := _read_cached(kept, files, about)) is not None:
        return found
    kept.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(
        kept.with_suffix(".lock"), wait=True
    ):  # the processes of a run open their source at the same time
        if (found := _read_cached(kept, files, about)) is not None:
            return found
        notes: list[tuple[str, str]] = []
        shipped = _read_sidecar(location, files, notes) if layout is None else None
        if shipped is None:
            _build_catalog(kept, files, about, layout, notes)
        else:
            _write_catalog(kept, shipped, about)
        found = _read_cached(kept, files, about)
    assert found is not None
    return found


def write_sidecar_catalog(folder: Path, files: Sequence[ShardFile]) -> None:
    """Leave the catalog of these tars beside them, for whoever opens them."""
    about = [
        CATALOG_VERSION,
        *([printable_name(file.path), file.size, "", file.split] for file in files),
    ]
    _build_catalog(folder / CATALOG_FILE, files, about, None, [])


def _build_catalog(
    path: Path,
    files: Sequence[ShardFile],
    cache_key: list[Any],
    layout: "ParquetLayout | None",
    notes: list[tuple[str, str]],
) -> None:
    """Scan the shards that have not been scanned, and put together what was found."""
    folder = path.with_suffix(".parts")
    folder.mkdir(exist_ok=True)
    parts = [
        folder / f"{blake2b(repr(file).encode(), digest_size=16).hexdigest()}.arrow"
        for file in files
    ]
    parallel_map_with_progress(
        _scan_shard,
        [(file, part, layout) for file, part in zip(files, parts) if not part.exists()],
        "scanning",
    )
    _write_catalog(path, _merge_parts(files, parts, layout, notes), cache_key)
    shutil.rmtree(folder)


# --- keeping ----------------------------------------------------------------------------------------------------------


def _read_cached(path: Path, files: Sequence[ShardFile], cache_key: list[Any]) -> Catalog | None:
    """The catalog in the cache, mapped; None where there is none of exactly these files."""
    with suppress(OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        known = json.loads(reader.schema.metadata[b"simsiam"])
        if known["files"] == cache_key and reader.num_record_batches == len(files):
            batches = [reader.get_batch(i) for i in range(len(files))]
            damage = tuple((name, what) for name, what in known["damage"])
            return Catalog(files, batches, tuple(known["classes"]), damage, known["column"])
    return None


def _write_catalog(path: Path, catalog: Catalog, cache_key: list[Any]) -> None:
    facts = {"classes": catalog.classes, "damage": catalog.damage, "column": catalog.column}
    schema = CATALOG_SCHEMA.with_metadata({"simsiam": json.dumps({"files": cache_key} | facts)})
    with (
        atomic_write(path) as part,
        pa.OSFile(str(part), "wb") as file,
        pa.ipc.new_file(file, schema) as to,
    ):
        for batch in catalog.batches:
            to.write_batch(batch.replace_schema_metadata(schema.metadata))


def _read_sidecar(
    location: str, files: Sequence[ShardFile], notes: list[tuple[str, str]]
) -> Catalog | None:
    """The catalog beside the shards, believed only as far as it can do no harm; a note where it does not fit."""
    path = f"{location.rstrip('/')}/{CATALOG_FILE}"
    if path not in list_files(location):
        return None
    try:
        with tempfile.TemporaryDirectory(dir=cache_dir("catalogs")) as folder:
            copy = path
            if is_url(path):
                copy, (system, there) = f"{folder}/{CATALOG_FILE}", filesystem(path)
                system.get_file(there, copy)
            reader = pa.ipc.open_file(pa.memory_map(copy))
            known = json.loads(reader.schema.metadata[b"simsiam"])
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            counts = {
                name: (size, len(batch))
                for (name, size, *_), batch in zip(known["files"][1:], batches)
            }
            here = {file.path.rsplit("/", 1)[-1]: file.size for file in files}
            for name, (size, count) in counts.items():
                if here.get(name) != size:
                    now = (
                        f"has {here[name]:,} bytes, not {size:,}"
                        if name in here
                        else "is not there"
                    )
                    notes.append(
                        (printable(name), f"{now}: of its {count:,} images, some or all are lost")
                    )
            if notes or counts.keys() != here.keys() or known["files"][0] != CATALOG_VERSION:
                return None
            ordered = [batches[list(counts).index(name)] for name in here]
            classes = tuple(known["classes"])
            for file, batch in zip(files, ordered):
                _check_batch(file, batch, classes)
            damage = tuple((str(name), str(what)) for name, what in known["damage"])
            return Catalog(files, ordered, classes, damage, None)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pa.ArrowException,
    ) as error:
        if isinstance(error, OSError) and not is_corruption(error):
            raise read_error(path, error) from None
        notes.append((CATALOG_FILE, "is damaged, and the shards were scanned instead"))
        return None


def _check_batch(file: ShardFile, batch: pa.RecordBatch, classes: tuple[str, ...]) -> None:
    """Raises ValueError where a batch says what cannot be."""
    batch.validate(full=True)
    if not batch.schema.equals(CATALOG_SCHEMA) or not all(
        isinstance(name, str) for name in classes
    ):
        raise ValueError("schema")
    start, size, label = (batch[name].to_numpy() for name in ("start", "size", "label"))
    inside = (
        (start >= 0)
        & (size >= 0)
        & (size <= MAX_FILE_BYTES)
        & (start <= file.size)
        & (start + size <= file.size)
    )
    if (
        not inside.all()
        or (np.diff(start) <= 0).any()
        or (label < -1).any()
        or (label >= len(classes)).any()
    ):
        raise ValueError("places")


# --- scanning ---------------------------------------------------------------------------------------------------------


class ParquetLayout(NamedTuple):
    """What the columns of a Parquet file are."""

    image_column: str  # the column of image files, "image.bytes"
    label_column: str | None  # a column of whole numbers
    class_names: tuple[str, ...]  # of the classes; () where the file does not say


def detect_parquet_layout(parquet: pq.ParquetFile, file: str) -> ParquetLayout:
    """Raises UsageError where there is no column of image files."""
    schema = parquet.schema_arrow
    about = _huggingface_features(schema.metadata or {})
    kinds = {name: feature.get("_type") for name, feature in about.items()}
    images = sorted(
        (f for f in schema if _is_bytes_type(f.type)), key=lambda f: kinds.get(f.name) != "Image"
    )
    if not images:
        raise UsageError(f"no column of image files in {file!r}, only {', '.join(schema.names)}")
    labels = [f.name for f in schema if pa.types.is_integer(f.type)]
    labels = [name for name in labels if kinds.get(name) == "ClassLabel" or name in LABEL_NAMES]
    labels.sort(key=lambda name: (kinds.get(name) != "ClassLabel", name not in LABEL_NAMES))
    names = about.get(labels[0], {}).get("names") if labels else None
    names = (
        tuple(names)
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
        else ()
    )
    image = images[0].name + ".bytes" * pa.types.is_struct(images[0].type)
    return ParquetLayout(image, labels[0] if labels else None, names)


def _huggingface_features(metadata: Mapping[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """What Hugging Face says of the columns, as far as it makes sense."""
    try:
        about = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in about.items() if isinstance(feature, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _is_bytes_type(dtype: pa.DataType) -> bool:
    if pa.types.is_struct(dtype) and dtype.get_field_index("bytes") >= 0:
        dtype = dtype.field("bytes").type
    return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype)


def _scan_shard(file: ShardFile, part: Path, layout: ParquetLayout | None) -> None:
    """Look through one shard, and keep what was found."""
    table, notes = _scan_tar(file) if layout is None else (_scan_parquet(file, layout), [])
    schema = SCAN_SCHEMA.with_metadata({"simsiam": json.dumps(notes)})
    with (
        atomic_write(part) as path,
        pa.OSFile(str(path), "wb") as to,
        pa.ipc.new_file(to, schema) as writer,
    ):
        writer.write_table(table.replace_schema_metadata(schema.metadata))


def _scan_parquet(file: ShardFile, layout: ParquetLayout) -> pa.Table:
    """Rows by row group and row; keys are given when all are counted."""
    try:
        with open_file(file.path) as opened:
            parquet = pq.ParquetFile(opened)
            if (theirs := detect_parquet_layout(parquet, file.path)) != layout:
                raise UsageError(
                    f"{printable_name(file.path)} has other columns or class names than the first: {theirs}"
                )
            starts, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
            for group, size in enumerate(
                uncompressed_sizes(parquet, layout.image_column, file.path, file.size)
            ):
                rows = np.arange(parquet.metadata.row_group(group).num_rows)
                starts.append(group * ROW_GROUP_STRIDE + rows)
                sizes.append(size * (rows + 1) // len(rows) - size * rows // len(rows))
            labels = pa.nulls(parquet.metadata.num_rows, pa.large_binary())
            if layout.label_column:
                labels = (
                    parquet.read([layout.label_column])[layout.label_column]
                    .cast(pa.string())
                    .cast(pa.large_binary())
                )
    except (pa.ArrowException, OSError) as error:
        raise read_error(file.path, error) from None
    keys = pa.nulls(len(labels), pa.large_binary())
    return pa.table([keys, np.concatenate(starts), np.concatenate(sizes), labels], SCAN_SCHEMA)


def _scan_tar(file: ShardFile) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The images in a tar, with the label that stands beside them, and what is wrong with the tar.

    As WebDataset has it: files that follow each other and have one name up to the first dot are one sample; `.cls` is
    its label; `.json` may hold `label`, and `path` and `class`, which `simsiam shard` writes. Without, a folder in the
    tar is the label.
    """
    keys, starts, sizes, labels = list[bytes](), list[int](), list[int](), list[bytes | None]()
    shard, notes, odd = os.fsencode(file.path.rsplit("/", 1)[-1]), list[tuple[str, str]](), 0
    sample, about, images = b"", dict[str, bytes](), list[tuple[bytes, int, int]]()

    def close() -> None:
        for name, start, size in images:
            folder = name.split(b"/")[0] if b"/" in name else None
            keys.append(
                about.get("path", b"")
                if len(images) == 1 and "path" in about
                else shard + b"/" + name
            )
            labels.append(about.get("class") or about.get("label") or folder)
            starts.append(start)
            sizes.append(size)

    end = 0
    try:
        with open_file(file.path) as opened:
            for info in iter_tar_members(opened):
                end = info.offset_data + info.size
                if end > file.size:
                    raise tarfile.ReadError("cut off")
                name = normalize_member_path(info.name)
                if (
                    not info.isfile()
                    or info.issparse()
                    or name is None
                    or info.size > MAX_FILE_BYTES
                ):
                    odd += not info.isdir()
                    continue
                stem, _, extension = name.rpartition(b"/")[2].partition(b".")
                key = name.rpartition(b"/")[0] + b"/" + stem
                if key != sample:
                    close()
                    sample, about, images = key, {}, []
                if is_image_path(name):
                    images.append((name, info.offset_data, info.size))
                elif extension.lower() in (b"cls", b"json") and info.size <= MAX_METADATA_BYTES:
                    opened.seek(info.offset_data)
                    about |= _parse_sample_metadata(extension.lower(), opened.read(info.size))
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RuntimeError, OSError) as error:
        if not is_corruption(error):
            raise read_error(file.path, error) from None
        close()
        notes.append((
            printable_name(file.path),
            f"damaged or cut off near byte {min(end, file.size):,} of {file.size:,}: the {len(keys):,} images before "
            "it are used, what follows is lost",
        ))  # fmt: skip
    else:
        close()
    if odd:
        notes.append(
            (
                printable_name(file.path),
                f"{odd:,} links, devices, giants or paths that lead outside are ignored",
            )
        )
    return pa.table(
        [
            pa.array(column, kind)
            for column, kind in zip((keys, starts, sizes, labels), SCAN_SCHEMA.types)
        ],
        SCAN_SCHEMA,
    ), notes


def _parse_sample_metadata(extension: bytes, data: bytes) -> dict[str, bytes]:
    """What a sample's .cls or .json says of its image."""
    if extension == b"cls":
        return {"label": data.strip()} if data.strip() else {}
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    said = said if isinstance(said, dict) else {}
    label = next(
        (said[name] for name in LABEL_NAMES if isinstance(said.get(name), int | str)), None
    )
    found = {name: said[name] for name in ("path", "class") if isinstance(said.get(name), str)}
    found |= {} if label is None else {"label": str(label)}
    return {name: _encode_name(value) for name, value in found.items() if value}


def _encode_name(text: str) -> bytes:
    """As the system has names; what it cannot have, with backslashes."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def _read_part(path: Path) -> pa.Table:
    """What was found in one shard; read and closed, as there may be more of them than files may be open."""
    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        path.unlink(missing_ok=True)
        raise WorkFailed(
            f"the cache held something damaged, which is gone now; try again: {error}"
        ) from None


def _label_sort_key(label: bytes) -> tuple[int, int, bytes]:
    """Numbers as numbers, before everything else."""
    return (0, int(label), label) if label.isdigit() and len(label) < 19 else (1, 0, label)


def _merge_parts(
    files: Sequence[ShardFile],
    parts: Sequence[Path],
    layout: ParquetLayout | None,
    notes: list[tuple[str, str]],
) -> Catalog:
    """All parts as one, with labels as positions among their sorted names; numbers are sorted as numbers."""
    texts, damage = set[bytes | None](), list(notes)
    for part in parts:
        table = _read_part(part)
        damage += [(name, what) for name, what in json.loads(table.schema.metadata[b"simsiam"])]
        texts |= set(pc.unique(table["label"]).to_pylist())
    named = sorted((text for text in texts if text is not None), key=_label_sort_key)
    known = (
        [str(i).encode() for i in range(len(layout.class_names))]
        if layout and layout.class_names
        else named
    )
    values, numbers = (
        pa.array(known, pa.large_binary()),
        {split: 0 for split in {file.split for file in files}},
    )
    classes = (
        layout.class_names if layout and layout.class_names else tuple(map(os.fsdecode, named))
    )

    def batches() -> Iterator[pa.RecordBatch]:
        for file, part in zip(files, parts):
            table = _read_part(part)
            labels, keys = (
                pc.index_in(table["label"], values).fill_null(-1).cast(pa.int64()),
                table["key"],
            )
            if layout:
                numbers[file.split] += len(table)
                count = pa.array(
                    np.arange(numbers[file.split] - len(table), numbers[file.split])
                ).cast(pa.string())
                keys = pc.binary_join_element_wise(f"{file.split}#", count, "").cast(
                    pa.large_binary()
                )
            columns = [keys, table["start"], table["size"], labels]
            whole_table = pa.table(columns, CATALOG_SCHEMA).combine_chunks()
            yield (
                whole_table.to_batches()[0]
                if len(table)
                else pa.RecordBatch.from_pylist([], CATALOG_SCHEMA)
            )

    return Catalog(
        files, batches(), classes, tuple(damage), layout.image_column if layout else None
    )


# --- tar --------------------------------------------------------------------------------------------------------------


class _CheckedTarInfo(tarfile.TarInfo):
    """A member whose header is not believed blindly: a long name may not be gigabytes, and nothing leads backwards."""

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


def iter_tar_members(opened: Any) -> Iterator[tarfile.TarInfo]:
    """The members of an open .tar; raises what tarfile does, and ReadError where it does not end in zeros."""
    with tarfile.open(fileobj=opened, mode="r:", tarinfo=_CheckedTarInfo) as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte a file
            yield info
        opened.seek(archive.offset)  # tarfile takes a damaged header for the end
        if opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")


def normalize_member_path(name: str) -> bytes | None:
    """The path of a member of an archive, without "." and empty parts; None where it leads outside."""
    parts = [part for part in os.fsencode(name).split(b"/") if part not in (b"", b".")]
    return b"/".join(parts) if parts and b".." not in parts else None


def is_image_path(name: bytes) -> bool:
    """Whether a path is that of a visible image file."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not any(
        part.startswith(b".") for part in name.split(b"/")
    )
