"""Any source becomes images by position: a name, folders, a list, an archive, Parquet.

`open_source` returns a `Source`: up to three splits of `Images`. It looks at names, never into an image, so a million
files are open in seconds.
"""

import os
import re
import stat
import struct
import tarfile
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simsiam.data.decode import EXTENSIONS
from simsiam.data.images import Images, from_arrays
from simsiam.data.shards import (
    extract_image_column,
    is_url,
    open_file,
    read_error,
    uncompressed_sizes,
)
from simsiam.data.storage import ArchiveMembers, Column, Names, numbered_keys
from simsiam.errors import UsageError, WorkFailed, printable, unknown_name
from simsiam.sources.catalog import (
    ParquetLayout,
    ShardFile,
    detect_parquet_layout,
    is_image_path,
    iter_tar_members,
    list_files,
    load_catalog,
    normalize_member_path,
)

BUILTIN_SOURCES = ("shapes", "cifar10", "cifar100", "stl10")  # the names that open_source knows
SOURCE_KINDS = (
    "a folder of images, a Parquet file or folder, a .zip or .tar of images, a folder of .tar shards, "
    "a .txt that lists images, a URL of shards"
)
SPLIT_ALIASES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}  # their spelling: ours
MAX_RESIDENT_BYTES = (
    2**30
)  # bytes of Parquet that are read into memory at once; more is read a block at a time
NAME_CHUNK = 10_000  # file names held as Python objects at a time

# What zipfile and tarfile raise.
ARCHIVE_ERRORS = (
    OSError, ValueError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    name: str  # short, usable in a folder name: "shapes", "cifar10", the folder's name
    train: Images
    val: Images | None = None
    test: Images | None = None
    damage: tuple[tuple[str, str], ...] = field(
        default=(), kw_only=True
    )  # shards, and what is lost with them

    @property
    def splits(self) -> dict[str, Images]:
        """The splits there are, by name."""
        found = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in found.items() if images is not None}


def open_source(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int = 3
) -> Source:
    """The images behind a name of SOURCES, one or more folders or image files, a list, an archive, or Parquet.

    Folder: images at any depth, in the bytewise order of their paths; hidden names are skipped, links are followed and
    each folder is walked once. A sub-folder `train` makes `train`, `val` and `test` the splits, and what lies beside
    them is left alone. If train's images all lie in first-level folders, two or more, these are the classes.
    Several folders are one set, with the classes of all; an image file among them is itself.
    List: a .txt with a path a line, relative to the list's folder, perhaps a tab and a label.
    Archive: a .zip or .tar, read in place by the rules of a folder; folders around everything do not count.
    Shards: Parquet or .tar files in a folder (or its `data`), here or at a URL that fsspec knows; the first word of a
    name is the split: `test-00000-of-00001.parquet`. A .tar has WebDataset's layout: `7.jpg`, `7.cls`, `7.json`.
    Without a `train` split, everything is train. A name wins over a folder of that name: write `./cifar10`.

    Raises UsageError if the source is none of these or holds no image, WorkFailed if it cannot be fetched or read.
    """
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    texts = [os.path.expanduser(os.fspath(one)) for one in given]
    opened = _open_several(texts) if len(texts) != 1 else _open_one(texts[0])
    for part in opened.splits.values():
        if part.pixels is not None and part.channels != channels:
            raise UsageError(
                f"the images of {opened.name} have {part.channels} channels, not {channels}"
            )
    parts: dict[str, Any] = {
        split: replace(part, channels=channels) for split, part in opened.splits.items()
    }
    return replace(opened, **parts)


def absolute_source(name: str | os.PathLike[str]) -> str:
    """What a source is called wherever one stands: names and URLs as they are, paths from the root."""
    text = os.path.expanduser(os.fspath(name)).removeprefix("file://")
    return text if text in BUILTIN_SOURCES or is_url(text) else os.path.abspath(text)


def _open_one(text: str) -> Source:
    text = text.removeprefix("file://")
    if text == "shapes":
        return _open_shapes()
    if text in BUILTIN_SOURCES:
        return _open_torchvision(text)
    if is_url(text):
        return _open_shards(text, find_shards(text))
    if not os.path.exists(text):
        raise unknown_name("source", text, [*BUILTIN_SOURCES, *SOURCE_KINDS.split(", ")])
    path = Path(text)
    if path.is_dir():
        shards = find_shards(text)
        return (
            _open_shards(text, shards)
            if shards
            else _open_tree(path, path, _walk_folder(path, set()))
        )
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _open_shards(text, {text: (path.stat().st_size, str(path.stat().st_mtime_ns))})
    if kind == ".txt":
        return _open_list(path)
    if kind in (".zip", ".tar"):
        return _open_archive(path)
    if kind in EXTENSIONS:
        return _open_several([text])
    if kind in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"):
        raise UsageError(
            f"{printable(text)} cannot be read in place: unpack it, or pack it as .zip or .tar"
        )
    raise UsageError(
        f"{printable(text)} is not a source: give {', '.join(BUILTIN_SOURCES)}, {SOURCE_KINDS}"
    )


def _open_several(texts: list[str]) -> Source:
    """Folders and image files as one set; keys are relative to what they have in common."""
    if not texts:
        raise UsageError("no source is given")
    for text in texts:
        if not os.path.isdir(text) and not (
            os.path.exists(text) and Path(text).suffix.lower() in EXTENSIONS
        ):
            raise UsageError(
                f"{printable(text)} is neither a folder nor an image file: only these can be several"
            )
    paths = sorted({os.path.abspath(text) for text in texts}, key=os.fsencode)
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if path not in folders]
    root = Path(os.path.commonpath([*folders, *map(os.path.dirname, files)]))
    keys, names, seen = [], [], set[tuple[int, int]]()
    for folder in folders:
        found = _walk_folder(Path(folder), seen)
        lead = b"" if Path(folder) == root else os.fsencode(os.path.relpath(folder, root)) + b"/"
        keys.append(
            pc.binary_join_element_wise(
                pa.scalar(lead, pa.large_binary()), found, pa.scalar(b"", found.type)
            )
        )
        names.append(_path_component(found, 0))
    alone = pa.array(
        [os.fsencode(os.path.relpath(file, root)) for file in files], pa.large_binary()
    )
    alone = alone.filter(pc.invert(pc.is_in(alone, pa.chunked_array(keys, alone.type))))
    every = pa.concat_arrays([*keys, alone])
    if not len(every):
        raise UsageError(
            f"no image in {', '.join(map(printable, texts))}: looked for {' '.join(sorted(EXTENSIONS))}"
        )
    order = pc.sort_indices(every)
    labels = pa.concat_arrays(
        [*names, pa.nulls(len(alone), pa.dictionary(pa.int32(), alone.type))]
    ).take(order)
    images = Images(Names(every.take(order)), root)
    return _build_source(
        paths[0] if len(paths) == 1 else root, {"train": (images, *_encode_labels(labels))}
    )


def _open_shapes() -> Source:
    from simsiam.sources import shapes

    splits = ((split, *shapes.draw_split(split)) for split in ("train", "val", "test"))
    return Source(
        "shapes",
        *(from_arrays(split, pixels, labels, shapes.CLASSES) for split, pixels, labels in splits),
    )


def _open_torchvision(name: str) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100, STL10

    root = os.path.expanduser(os.environ.get("SIMSIAM_DATA") or "~/.cache/simsiam/data")

    def fetch(split: str, data_set: Any, part: str | bool) -> Images:
        try:
            got = data_set(root, part, download=True)
        except (
            OSError,
            RuntimeError,
            HTTPException,
        ) as error:  # no network or disk; wrong checksum; cut connection
            raise WorkFailed(
                f"{name} could not be fetched into {root!r} ({' '.join(str(error).split())[:200]}): "
                "give a local Parquet file or a folder of images instead"
            ) from error
        if part == "unlabeled":
            return from_arrays(split, got.data)
        if name == "stl10":
            return from_arrays(split, got.data, got.labels, got.classes)
        return from_arrays(split, got.data.transpose(0, 3, 1, 2), got.targets, got.classes)

    if (
        name == "stl10"
    ):  # its labeled training images are few: the unlabeled ones are there to be learned from
        parts = {"train": "unlabeled", "val": "train", "test": "test"}
        return Source(name, *(fetch(split, STL10, part) for split, part in parts.items()))
    cifar = CIFAR10 if name == "cifar10" else CIFAR100
    return Source(name, fetch("train", cifar, True), None, fetch("test", cifar, False))


def _walk_folder(folder: Path, visited: set[tuple[int, int]]) -> pa.Array:
    """The paths of the images below `folder`, relative to it and with "/", in bytewise order; bytes, as the system has
    them. Folders in `seen` have been walked already: so links do not loop, and what lies below keeps its own path.
    """

    def found() -> Iterator[bytes]:
        root, folders, links = os.fsencode(folder), [b""], list[bytes]()
        while folders or links:
            if not folders:
                links.sort(
                    reverse=True
                )  # links come last, in an order that is not the file system's
            below = (folders or links).pop()
            status = os.stat(os.path.join(root, below))
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, below)) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(below + entry.name + b"/")
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(below + entry.name + b"/")
                    elif is_image_path(entry.name) and (
                        entry.is_file() or entry.is_symlink()
                    ):  # a dead link is listed
                        yield below + entry.name

    try:
        keys = _to_arrow(found())
    except OSError as error:
        raise WorkFailed(
            f"cannot read the folder {printable(os.fsdecode(error.filename or folder))}: {error.strerror}"
        ) from error
    return keys.take(pc.sort_indices(keys))


def _to_arrow(values: Iterable[bytes | None]) -> pa.Array:
    """Bytes as large_binary; as Python objects, a million names would take 100 MB."""
    values, chunks = iter(values), [pa.array([], pa.large_binary())]
    while chunk := list(islice(values, NAME_CHUNK)):
        chunks.append(pa.array(chunk, pa.large_binary()))
    whole = pa.concat_arrays(chunks)
    chunks.clear()
    pa.default_memory_pool().release_unused()  # half of what the chunks took: they grew by doubling
    return whole


def _path_component(paths: pa.Array, depth: int) -> pa.DictionaryArray:
    """The name of each path's folder at a depth; null where there is none."""
    pattern, names = "^" + "[^/]*/" * depth + "(?P<name>[^/]*)/", []
    for start in range(0, len(paths), NAME_CHUNK):
        found = pc.extract_regex(paths[start : start + NAME_CHUNK], pattern)
        names.append(found.flatten()[0].dictionary_encode())  # `field` would forget the nulls
    return (
        pa.chunked_array(names, pa.dictionary(pa.int32(), paths.type))
        .unify_dictionaries()
        .combine_chunks()
    )


def _encode_labels(names: pa.DictionaryArray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Label names as positions in a sorted tuple of them; None and () where one is null."""
    if names.null_count:
        return None, ()
    found = names.dictionary.to_pylist()
    classes = sorted(found)
    place = {name: i for i, name in enumerate(classes)}
    codes = np.array([place[name] for name in found], np.int64)[names.indices.to_numpy()]
    return codes, tuple(map(os.fsdecode, classes))


def _open_tree(path: Path, storage: Path | ArchiveMembers, keys: pa.Array) -> Source:
    """Splits and classes read from the paths of images, which lie in a folder or in an archive."""
    if not len(keys):
        raise UsageError(
            f"no image in {printable(str(path))}: looked for {' '.join(sorted(EXTENSIONS))}"
        )
    depth, first = 0, _path_component(keys, 0)
    if isinstance(storage, ArchiveMembers):  # folders around everything are the archive's wrapping
        while (
            not first.null_count
            and len(first.dictionary) == 1
            and _canonical_split(first.dictionary[0]) != "train"
        ):
            depth, first = depth + 1, _path_component(keys, depth + 1)
    words = [_canonical_split(name) for name in first.dictionary]
    if "train" not in words:
        return _build_source(
            path, {"train": (Images(Names(keys), storage), *_encode_labels(first))}
        )
    codes, parts = first.indices.fill_null(-1).to_numpy(), {}
    for split in ("train", "val", "test"):
        rows = np.flatnonzero(np.isin(codes, [i for i, word in enumerate(words) if word == split]))
        if len(rows):
            mine = keys.take(pa.array(rows))
            images = Images(
                Names(mine), storage[rows] if isinstance(storage, ArchiveMembers) else storage
            )
            parts[split] = images, *_encode_labels(_path_component(mine, depth + 1))
    return _build_source(path, parts)


def _canonical_split(name: pa.Scalar) -> str | None:
    return SPLIT_ALIASES.get(name.as_py().decode("ascii", "replace").lower())


def _open_list(path: Path) -> Source:
    """A path a line, perhaps a tab and a label."""
    try:
        lines = (
            path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        )  # some editors put UTF-8's mark first
    except OSError as error:
        raise WorkFailed(f"cannot read {printable(str(path))}: {error.strerror}") from error
    rows = [line for line in lines if line.strip()]
    if not rows:
        raise UsageError(f"{printable(str(path))} lists no image: it takes a path a line")
    images = Images(
        Names(_to_arrow(row.partition(b"\t")[0] for row in rows)), path.absolute().parent
    )
    labels = _to_arrow(row.partition(b"\t")[2] or None for row in rows)
    return _build_source(path, {"train": (images, *_encode_labels(labels.dictionary_encode()))})


def _open_archive(path: Path) -> Source:
    """The images in a .zip or .tar, by where their bytes lie; of two with one name, the last, as if unpacked."""
    places = array("q")

    def names() -> Iterator[bytes]:
        for name, place in (
            _iter_zip_images if path.suffix.lower() == ".zip" else _iter_tar_images
        )(path):
            places.extend(place)
            yield name

    try:
        keys = _to_arrow(names())
    except UsageError:
        raise
    except ARCHIVE_ERRORS as error:
        raise WorkFailed(
            f"cannot read {printable(str(path))}: {' '.join(str(error).split())[:200]}"
        ) from error
    order = pc.sort_indices(keys)  # stable
    keys = keys.take(order)
    last = pa.array(np.append(pc.not_equal(keys[1:], keys[:-1]), True)[: len(keys)])
    rows = order.filter(last).to_numpy()
    return _open_tree(
        path,
        ArchiveMembers(path.absolute(), np.asarray(places).reshape(-1, 5)[rows]),
        keys.filter(last),
    )


def _member_image_path(name: str) -> bytes | None:
    """The path of an image in an archive; None for other files, for hidden ones, and for those that lead outside."""
    path = normalize_member_path(name)
    return path if path and is_image_path(path) else None


def _iter_zip_images(path: Path) -> Iterator[tuple[bytes, tuple[int, int, int, int, int]]]:
    """Name and place (as in Packed) of each image in a .zip."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            name = _member_image_path(info.filename)
            if name is None or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if info.flag_bits & 1 or info.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise UsageError(
                    f"{printable(str(path))} is encrypted or packed in a rare way: unpack it"
                )
            file.seek(
                info.header_offset + 26
            )  # the lengths of the local header's two variable fields
            start = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            yield name, (start, info.compress_size, info.file_size, deflated, info.CRC)


def _iter_tar_images(path: Path) -> Iterator[tuple[bytes, tuple[int, int, int, int, int]]]:
    """Name and place (as in Packed) of each image in a .tar."""
    with open(path, "rb") as file:
        for info in iter_tar_members(file):
            if info.isreg() and not info.issparse() and (name := _member_image_path(info.name)):
                yield name, (info.offset_data, info.size, info.size, False, -1)


def find_shards(location: str) -> dict[str, tuple[int, str]]:
    """Size and stamp of the Parquet files, or else the tars, in a folder, under a URL or in its `data`; or of itself.

    Tars in a folder are shards only where neither an image nor a folder of images lies beside them.
    """
    if is_url(location) and location.endswith((".parquet", ".tar")):
        return {path: about for path, about in list_files(location).items()}
    for folder in (location.rstrip("/"), f"{location.rstrip('/')}/data"):
        files = list_files(folder)
        for kind in (".parquet", ".tar"):
            found = {path: about for path, about in files.items() if path.endswith(kind)}
            if found and (kind == ".parquet" or is_url(folder) or not _contains_images(folder)):
                return found
    return {}


def _contains_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(
            not entry.name.startswith(".")
            and (entry.is_dir() or is_image_path(os.fsencode(entry.name)))
            for entry in entries
        )


def _open_shards(location: str, shard_stats: Mapping[str, tuple[int, str]]) -> Source:
    """The images in shards: Parquet that is not too large in memory, everything else where it lies."""
    if not shard_stats:
        raise UsageError(
            f"no .parquet or .tar at {printable(location)}: `simsiam shard` makes them of images"
        )
    words = {path: re.match("[a-z]*", path.rsplit("/", 1)[-1].lower()) for path in shard_stats}
    splits = {
        path: SPLIT_ALIASES.get(word.group() if word else "", "train")
        for path, word in words.items()
    }
    if "train" not in splits.values():
        splits = dict.fromkeys(shard_stats, "train")
    files = [ShardFile(path, *about, splits[path]) for path, about in shard_stats.items()]
    layout = None
    if files[0].path.endswith(".parquet"):
        layout = _read_layout(files[0])
        if (
            sum(file.size for file in files) <= MAX_RESIDENT_BYTES
            and _total_uncompressed_size(files) <= MAX_RESIDENT_BYTES
        ):
            return _load_parquet(location, files)
    alone = location.endswith((".tar", ".parquet"))
    catalog = load_catalog(location if alone else files[0].path.rpartition("/")[0], files, layout)
    parts = {}
    for split in ("train", "val", "test"):
        if split in splits.values():
            parts[split] = *catalog.load_split(split), catalog.classes
    if not len(parts["train"][0]):
        said = "; ".join(f"{name} is {what}" for name, what in catalog.damage)
        raise UsageError(f"no image in {printable(location)}" + f": {said}" * bool(said))
    return replace(_build_source(location, parts), damage=catalog.damage)


def _read_layout(file: ShardFile) -> ParquetLayout:
    """The columns of a Parquet file."""
    try:
        with open_file(file.path) as opened:
            return detect_parquet_layout(pq.ParquetFile(opened), file.path)
    except (pa.ArrowException, OSError) as error:
        raise read_error(file.path, error) from None


def _total_uncompressed_size(files: Sequence[ShardFile]) -> int:
    """How many bytes the images in Parquet files take in memory. Raises UsageError for a bomb."""
    total = 0
    for file in files:
        try:
            with open_file(file.path) as opened:
                parquet = pq.ParquetFile(opened)
                total += sum(
                    uncompressed_sizes(
                        parquet,
                        detect_parquet_layout(parquet, file.path).image_column,
                        file.path,
                        file.size,
                    )
                )
        except (pa.ArrowException, OSError) as error:
            raise read_error(file.path, error) from None
    return total


def _load_parquet(path: str, files: Sequence[ShardFile]) -> Source:
    parts: dict[str, Any] = {}
    agreed = set()
    for split in dict.fromkeys(file.split for file in files):
        columns, labels, theirs = zip(
            *(_read_parquet_columns(file.path) for file in files if file.split == split)
        )
        chunks = [_dictionary_encode(chunk) for column in columns for chunk in column.chunks]
        encoded = Column(pa.chunked_array(chunks, pa.dictionary(pa.int32(), pa.large_binary())))
        names = next((one for one in theirs if one), ())
        agreed |= {one for one in theirs if one}
        codes = None if any(part is None for part in labels) else np.concatenate(labels)
        if codes is not None and not names:
            values, codes = np.unique(codes, return_inverse=True)
            names = tuple(map(str, values))
        parts[split] = Images(numbered_keys(split, len(encoded)), encoded), codes, names
    if not len(parts["train"][0]):
        raise UsageError(f"no row in {printable(path)}")
    if len(agreed) > 1:
        raise UsageError(f"the Parquet files in {printable(path)} disagree about the class names")
    return _build_source(path, parts)


def _read_parquet_columns(file: str) -> tuple[pa.ChunkedArray, np.ndarray | None, tuple[str, ...]]:
    """One file's images (by reference), labels (None if any is missing) and class names (() if it gives none)."""
    try:
        with open_file(file) as opened:
            parquet = pq.ParquetFile(opened)
            image, label, names = detect_parquet_layout(parquet, file)
            parquet = pq.ParquetFile(
                opened, metadata=parquet.metadata, read_dictionary=[image]
            )  # equal images once
            columns, groups = (
                [image, *([label] if label else [])],
                range(parquet.metadata.num_row_groups),
            )
            table = pa.concat_tables(
                [parquet.read_row_group(i, columns) for i in groups] or [parquet.read(columns)]
            )
    except (pa.ArrowException, OSError) as error:
        raise WorkFailed(f"cannot read {file!r}: {' '.join(str(error).split())[:200]}") from error
    encoded = extract_image_column(table, image)
    if not label:
        return encoded, None, ()
    # A label of -1 is how Hugging Face hides the labels of a test set.
    raw = table[label]
    missing = raw.null_count or (names and (raw.to_numpy() < 0).any())
    return encoded, None if missing else raw.to_numpy(), names


def _dictionary_encode(chunk: pa.Array) -> pa.DictionaryArray:
    """The same images, all in one type."""
    chunk = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
    return pa.DictionaryArray.from_arrays(
        chunk.indices.cast(pa.int32()), chunk.dictionary.cast(pa.large_binary())
    )


def _build_source(
    path: str | Path, parts: dict[str, tuple[Images, np.ndarray | None, tuple[str, ...]]]
) -> Source:
    """The source of (images, labels as positions in names, names) by split; the classes are those of train."""
    known = (
        parts["train"][2] if len(parts["train"][2]) > 1 else ()
    )  # a label that never varies says nothing
    splits: dict[str, Any] = {}
    for split, (images, codes, names) in parts.items():
        if codes is not None and known:
            used = np.unique(codes)
            if strange := [
                code for code in used if not 0 <= code < len(names) or names[code] not in known
            ]:
                name = names[strange[0]] if 0 <= strange[0] < len(names) else str(strange[0])
                raise unknown_name(
                    f"class in the {split} split of {printable(str(path))}", name, known
                )
            place = np.zeros(len(names), np.int64)
            place[used] = [known.index(names[code]) for code in used]
            images = replace(images, labels=place[codes], classes=known)
        splits[split] = images
    whole = Path(os.path.abspath(path))
    stem = whole.stem if whole.is_file() else whole.name
    return Source(re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "images", **splits)
