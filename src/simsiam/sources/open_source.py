"""Open a source of images: a name, folders, a list, an archive, Parquet or shards.

`open_source` returns a `Source`: up to three splits of `Images`. It reads file names and never an
image, so it opens a million files in seconds.
"""

import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simsiam.data.decode import EXTENSIONS
from simsiam.data.images import Images, from_arrays
from simsiam.data.parquet_files import open_parquet
from simsiam.data.remote_files import is_url, read_error
from simsiam.data.shards import read_image_column, uncompressed_sizes
from simsiam.data.storage import (
    ArchiveMembers,
    EncodedColumn,
    FolderFiles,
    Names,
    Storage,
    numbered_keys,
)
from simsiam.errors import (
    UsageError,
    WorkFailed,
    nearest_name,
    printable,
    truncate,
    unknown_name,
)
from simsiam.sources.catalog import (
    SHARD_SUFFIXES,
    ParquetLayout,
    ShardFile,
    detect_parquet_layout,
    image_columns,
    is_webdataset,
    label_sort_key,
    label_texts,
    list_files,
    load_catalog,
)
from simsiam.sources.file_kinds import NO_SPLIT, REPLACED, FileCounts, is_image_path
from simsiam.sources.listing import (
    ARCHIVE_ERRORS,
    iter_archive_images,
    list_folder,
    no_image_error,
    to_arrow,
)
from simsiam.sources.splits import (
    NAME_CHUNK,
    SPLITS,
    SplitPart,
    canonical_split,
    given_parts,
    join_names,
    named_parts,
    note_folder_labels,
    note_left_out,
    note_split_like,
    path_component,
    shard_splits,
)
from simsiam.utils.names import hide_keys, read_list, slashed

BUILTIN_SOURCES = ("shapes", "cifar10", "cifar100", "stl10")  # data sets with a name
SOURCE_KINDS = (
    "a folder of images, a Parquet file or folder, a .zip or .tar of images, "
    "a folder of .tar shards, a .txt that lists images, a URL of shards"
)
# Bytes of Parquet that are read into memory; larger sources are read a block at a time.
MAX_RESIDENT_BYTES = 2**30
# A line of a list in which spaces separate path and label, as Caffe and timm write it.
SPACED_LABEL = re.compile(
    rb"(?i)(?P<path>.*(?:%s)) +(?P<label>.*)"
    % b"|".join(re.escape(extension.encode()) for extension in EXTENSIONS)
)
NESTED_DEPTH = 3  # folders below a source in which shards are looked for, as in data/CONFIG/train

ENCODED_TYPE = pa.dictionary(pa.int32(), pa.large_binary())  # of image files in memory

# Images, their labels as positions in class names or None, and the class names.
SplitParts: TypeAlias = tuple[Images, np.ndarray | None, tuple[str, ...]]


class _Options(NamedTuple):
    """What the user says about the images besides where they are; see `open_source`."""

    splits: Sequence[str] | None = None
    no_labels: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """An opened source of images.

    Attributes:
        name: A short name that can be part of a folder name: "shapes", "cifar10", or the folder's
            own name.
        train: Images to train on.
        val: Images for validation, if the source has them.
        test: Images for the test, if the source has them.
        damage: (shard, what is lost with it) of each damaged shard.
        notes: What names have decided, and which files are left out: a line for each.
        passed_over: Number of files that are not among the images, by kind; see `file_kinds`.
        only_class: The name of the class, if all training images have the same, so that there are
            no labels to tell apart; else "".
    """

    name: str
    train: Images
    val: Images | None = None
    test: Images | None = None
    damage: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    passed_over: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    only_class: str = field(default="", kw_only=True)

    @property
    def splits(self) -> dict[str, Images]:
        """The images of each split that the source has, by name."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in splits.items() if images is not None}


def open_source(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    channels: int = 3,
    *,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
) -> Source:
    """Open a source of images, and say on stderr what its names decided.

    - Name: one of BUILTIN_SOURCES. A name is preferred to a folder with the same name: write
      `./cifar10` for the folder.
    - Folder: images at any depth, in the bytewise order of their paths. Hidden names are skipped;
      links are followed, and each folder is visited once. If there is a sub-folder `train`, then
      `train`, `val` and `test` are the splits, and everything next to them is left out (other names
      of splits are in `SPLIT_WORDS`). If all training images are in two or more first-level
      folders, these are the classes.
    - Several folders and image files: one set, with the classes of all folders.
    - List: a .txt with one path per line, relative to the folder of the list, optionally followed
      by a tab or spaces and a label; in UTF-8, or in UTF-16 with a byte order mark.
    - Archive: a .zip or .tar, read in place by the rules of a folder. Folders that contain
      everything else are ignored. A .tar in the layout of WebDataset is a shard.
    - Shards: Parquet or .tar files in a folder (or in its folder `data`), local or at a URL that
      fsspec supports; or in folders of a folder, if there is no image. A word in the name of a
      shard is the split, as in `test-00000-of-00001.parquet`, or in that of its folder, as in
      `default/train/0000.parquet`. A .tar has the layout of WebDataset: `7.jpg`, `7.cls`, `7.json`.
      Parquet without images, and embeddings that `simsiam embed` wrote, are passed over in a folder
      of images.

    Without a `train` split, all images are training images.

    Args:
        source: One name, path or URL, or several folders and image files.
        channels: Number of channels that images are decoded to.
        no_labels: Whether to ignore the labels: folder names are then not used as classes.
        splits: Which folder or shard is which split, as in ("train=A", "test=B"): paths in the
            source, in which "*" stands for any characters of a name; "train=." takes all images.
            None lets names decide.

    Returns:
        The source.

    Raises:
        UsageError: The source is none of these, or has no images.
        WorkFailed: It cannot be downloaded or read.
    """
    texts = [slashed(os.path.expanduser(name)) for name in source_names(source)]
    options = _Options(splits, no_labels)
    suffix = Path(texts[0]).suffix.lower() if len(texts) == 1 else ""
    one_set = len(texts) == 1 and texts[0] not in BUILTIN_SOURCES
    if splits is not None and (not one_set or suffix in (".txt", *EXTENSIONS)):
        raise UsageError("--splits needs one folder, archive or set of shards as SOURCE")
    opened = _open_several(texts, options) if len(texts) != 1 else _open_one(texts[0], options)
    for images in opened.splits.values():
        if images.pixels is not None and images.channels != channels:
            raise UsageError(
                f"the images of {opened.name} have {images.channels} channels, not {channels}"
            )

    parts = {name: replace(images, channels=channels) for name, images in opened.splits.items()}
    if no_labels:
        parts = {name: images.drop_labels() for name, images in parts.items()}
    for note in opened.notes:
        _say_once(tuple(texts), f"{opened.name}: {note}")
    return replace(opened, train=parts["train"], val=parts.get("val"), test=parts.get("test"))


@cache
def _say_once(source: tuple[str, ...], line: str) -> None:
    """Print a line about a source, once in a process, and in one of those of torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(line), file=sys.stderr)


def source_names(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[str]:
    """List the names of one or several sources.

    Args:
        sources: A name or a path, or several.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else sources
    return [os.fspath(source) for source in several]


def absolute_source(name: str | os.PathLike[str]) -> str:
    """Make a source independent of the working directory.

    Args:
        name: A name, path or URL.

    Returns:
        Built-in names and URLs as they are; paths as absolute paths.
    """
    text = os.path.expanduser(os.fspath(name)).removeprefix("file://")
    return text if text in BUILTIN_SOURCES or is_url(text) else os.path.abspath(text)


def absolute_sources(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[str]:
    """Make one or several sources independent of the working directory.

    Args:
        names: A name, path or URL, or several.

    Returns:
        Each as `absolute_source` returns it.
    """
    return [absolute_source(name) for name in source_names(names)]


def _open_one(text: str, options: _Options) -> Source:
    text = text.removeprefix("file://")
    if text == "shapes":
        return _open_shapes()
    if text in BUILTIN_SOURCES:
        return _open_torchvision(text)
    if is_url(text):
        return _open_shards(text, find_shards(text) or find_nested_shards(text), options)
    if not os.path.exists(text):
        raise _missing_source_error(text)
    path = Path(text)
    if path.is_dir():
        counts = FileCounts()
        keys = list_folder(path, set(), counts)
        shards = find_shards(text)
        if not len(keys):
            shards = shards or find_nested_shards(text)
        elif not any(map(_has_images, shards)):
            shards = {}  # tables beside the images, such as metadata or an embedding of them
        if shards:
            source = _open_shards(text, shards, options)
            beside = len(keys) and f"images beside the shards, which are not read: {len(keys):,}"
            return replace(source, notes=(*source.notes, beside)) if beside else source
        return _open_tree(path, keys, lambda names, _: FolderFiles(path, names), options, counts)
    kind = path.suffix.lower()
    if kind == ".parquet" or (kind == ".tar" and is_webdataset(text)):
        stats = {text: (path.stat().st_size, str(path.stat().st_mtime_ns))}
        return _open_shards(text, stats, options)
    if kind == ".txt":
        return _open_list(path, options)
    if kind in (".zip", ".tar"):
        return _open_archive(path, options)
    if kind in EXTENSIONS:
        return _open_several([text], options)
    if kind in (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"):
        raise UsageError(
            f"{printable(text)} cannot be read in place: unpack it, or pack it as .zip or .tar"
        )
    raise UsageError(
        f"{printable(text)} is not a source: give {', '.join(BUILTIN_SOURCES)}, {SOURCE_KINDS}"
    )


def _open_several(texts: list[str], options: _Options) -> Source:
    """Open folders and image files as one set; keys are relative to their common folder."""
    if not texts:
        raise UsageError("no source is given")
    for text in texts:
        is_image = os.path.exists(text) and Path(text).suffix.lower() in EXTENSIONS
        if not os.path.isdir(text) and not is_image:
            raise UsageError(
                f"{printable(text)} is neither a folder nor an image file: "
                "only these can be combined"
            )
    paths = sorted({os.path.abspath(text) for text in texts}, key=os.fsencode)
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if path not in folders]
    try:
        root = Path(os.path.commonpath([*folders, *map(os.path.dirname, files)]))
    except ValueError:  # on Windows
        raise UsageError(
            f"{', '.join(map(printable, texts))} are on different drives: only what is on one "
            "drive can be combined"
        ) from None
    keys, labels, visited, counts = [], [], set[tuple[int, int]](), FileCounts()
    for folder in folders:
        paths_below = list_folder(Path(folder), visited, counts)
        prefix = (
            b""
            if Path(folder) == root
            else os.fsencode(slashed(os.path.relpath(folder, root))) + b"/"
        )
        empty = pa.scalar(b"", paths_below.type)
        prefix_scalar = pa.scalar(prefix, pa.large_binary())
        keys.append(pc.binary_join_element_wise(prefix_scalar, paths_below, empty))
        labels.append(path_component(paths_below, 0))
    relative_files = [os.fsencode(slashed(os.path.relpath(file, root))) for file in files]
    file_keys = pa.array(relative_files, pa.large_binary())
    in_folders = pc.is_in(file_keys, pa.chunked_array(keys, file_keys.type))
    file_keys = file_keys.filter(pc.invert(in_folders))
    labels.append(pa.nulls(len(file_keys), pa.dictionary(pa.int32(), file_keys.type)))
    all_keys = pa.concat_arrays([*keys, file_keys])
    if not len(all_keys):
        raise no_image_error(texts, counts)
    order = pc.sort_indices(all_keys)
    image_names = Names(all_keys.take(order))
    images = Images(image_names, FolderFiles(root, image_names))
    codes_and_classes = _encode_labels(pa.concat_arrays(labels).take(order))
    path = paths[0] if len(paths) == 1 else root
    source = _build_source(path, {"train": (images, *codes_and_classes)}, options)
    notes = (*counts.notes(len(all_keys)), *note_folder_labels(source.train.classes))
    return replace(source, notes=notes, passed_over=counts.passed_over)


def _missing_source_error(text: str) -> UsageError:
    """Make the error for a name or path that does not exist; it names the nearest that does."""
    path = text.rstrip("/")
    folder, name = os.path.split(path)
    if os.path.isfile(path):
        return UsageError(f"{printable(path)} is a file and no folder: leave out the / at the end")
    while folder and not os.path.isdir(folder):
        path = folder
        folder, name = os.path.split(path)
    names = list(BUILTIN_SOURCES) if path == text else []
    with suppress(OSError), os.scandir(folder or ".") as entries:
        names += [entry.name for entry in islice(entries, NAME_CHUNK)]
    if nearest := nearest_name(name, names):
        hint = f"did you mean {printable(os.path.join(folder, nearest))}?"
    else:
        hint = f"give {', '.join(BUILTIN_SOURCES)}, {SOURCE_KINDS}"
    return UsageError(f"no such file or folder: {printable(truncate(path))}; {hint}")


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

    def download(split: str, dataset_class: Callable, part: str | bool) -> Images:
        try:
            dataset = dataset_class(root, part, download=True)
        # no network or full disk; wrong checksum; interrupted connection
        except (OSError, RuntimeError, HTTPException) as error:
            raise WorkFailed(
                f"{name} could not be downloaded to {root!r} "
                f"({' '.join(str(error).split())[:200]}): "
                "give a local Parquet file or a folder of images instead"
            ) from error
        if part == "unlabeled":
            return from_arrays(split, dataset.data)
        if name == "stl10":
            return from_arrays(split, dataset.data, dataset.labels, dataset.classes)
        pixels = dataset.data.transpose(0, 3, 1, 2)
        return from_arrays(split, pixels, dataset.targets, dataset.classes)

    # The unlabeled images of STL-10 are the training set: the labeled training images are few.
    if name == "stl10":
        parts = {"train": "unlabeled", "val": "train", "test": "test"}
        return Source(name, *(download(split, STL10, part) for split, part in parts.items()))
    cifar = CIFAR10 if name == "cifar10" else CIFAR100
    return Source(name, download("train", cifar, True), None, download("test", cifar, False))


def _encode_labels(names: pa.DictionaryArray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Return labels as positions in a sorted tuple of their names; None and () if one is null."""
    if names.null_count:
        return None, ()
    distinct = names.dictionary.to_pylist()
    classes = sorted(distinct)
    code_of = {name: i for i, name in enumerate(classes)}
    codes = np.array([code_of[name] for name in distinct], np.int64)[names.indices.to_numpy()]
    return codes, tuple(map(os.fsdecode, classes))


def _open_tree(
    path: Path,
    keys: pa.Array,
    make_storage: Callable[[Names, np.ndarray | slice], Storage],
    options: _Options,
    counts: FileCounts,
    skip_outer_folders: bool = False,
) -> Source:
    """Find splits and classes from the paths of images in a folder or an archive.

    Args:
        path: The folder or archive.
        keys: The paths of the images in it.
        make_storage: From names and their positions in `keys` to the storage of these images.
        options: What the user says about splits and labels.
        counts: The other files that are there; updated by the images in no split.
        skip_outer_folders: Ignore folders that contain everything else.

    Returns:
        The source.

    Raises:
        UsageError: There is no image, or none where `--splits` says.
    """
    if not len(keys):
        raise no_image_error([str(path)], counts)
    depth, first = 0, path_component(keys, 0)
    if skip_outer_folders:
        while (
            not first.null_count
            and len(first.dictionary) == 1
            and canonical_split(os.fsdecode(first.dictionary[0].as_py())) != "train"
        ):
            depth, first = depth + 1, path_component(keys, depth + 1)
    chosen = given_parts(keys, options.splits, depth) or named_parts(first, depth)
    used = chosen or [SplitPart("train", np.arange(len(keys)), depth)]
    parts = {
        split: _merge_parts(keys, same, make_storage)
        for split in SPLITS
        if (same := [part for part in used if part.split == split])
    }
    source = _build_source(path, parts, options)
    classes = source.train.classes
    left_out = np.ones(len(keys), bool)
    for part in used:
        left_out[part.rows] = False
    counts.passed_over[NO_SPLIT] += int(left_out.sum())
    notes = counts.notes(len(keys))
    notes += note_left_out(keys, np.flatnonzero(left_out), depth, given=options.splits is not None)
    if not chosen:
        notes += note_split_like(keys, depth, labeled=bool(classes))
    notes += note_folder_labels(classes)
    return replace(source, notes=tuple(notes), passed_over=+counts.passed_over)


def _merge_parts(
    keys: pa.Array,
    parts: Sequence[SplitPart],
    make_storage: Callable[[Names, np.ndarray | slice], Storage],
) -> SplitParts:
    """Return the images of a split, in the order of `keys`, and their labels."""
    rows = np.concatenate([part.rows for part in parts])
    labels = [path_component(_take(keys, part.rows), part.depth) for part in parts]
    order = np.argsort(rows, kind="stable")
    names = Names(_take(keys, rows[order]))
    images = Images(
        names, make_storage(names, rows[order] if len(rows) < len(keys) else slice(None))
    )
    return images, *_encode_labels(pa.concat_arrays(labels).take(pa.array(order)))


def _take(keys: pa.Array, rows: np.ndarray) -> pa.Array:
    return keys if len(rows) == len(keys) else keys.take(pa.array(rows))


def _open_list(path: Path, options: _Options) -> Source:
    """Open a list: one path per line, optionally followed by a tab or spaces and a label."""
    try:
        lines = read_list(path)
    except OSError as error:
        raise WorkFailed(f"cannot read {printable(str(path))}: {error.strerror}") from error
    if not lines:
        raise UsageError(f"{printable(str(path))} lists no image: write one path per line")
    names = Names(to_arrow(_split_line(line)[0] for line in lines))
    images = Images(names, FolderFiles(path.absolute().parent, names))
    labels = to_arrow(_split_line(line)[1] or None for line in lines)
    return _build_source(
        path, {"train": (images, *_encode_labels(labels.dictionary_encode()))}, options
    )


def _split_line(line: bytes) -> tuple[bytes, bytes]:
    """Split a line of a list into path and label; spaces end a path only after an extension."""
    path, _, label = line.partition(b"\t")
    if not is_image_path(path) and (match := SPACED_LABEL.fullmatch(path)):
        path, label = match["path"], label or match["label"]
    return path, label.strip()


def _open_archive(path: Path, options: _Options) -> Source:
    """Open the images in a .zip or .tar; of two with one name the last, as if unpacked."""
    entries, counts = array("q"), FileCounts()

    def iter_names() -> Iterator[bytes]:
        for name, entry in iter_archive_images(path, counts):
            entries.extend(entry)
            yield name

    try:
        keys = to_arrow(iter_names())
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
    counts.passed_over[REPLACED] += len(keys) - len(rows)
    members = ArchiveMembers(path.absolute(), np.asarray(entries).reshape(-1, 5)[rows])
    return _open_tree(
        path,
        keys.filter(last),
        lambda _, indices: members.take(indices),
        options,
        counts,
        skip_outer_folders=True,
    )


def find_shards(location: str) -> dict[str, tuple[int, str]]:
    """Find the Parquet files, or else the tars, of a source.

    Tars in a local folder are shards only if there is neither an image nor a folder next to them.

    Args:
        location: A folder or a URL, whose folder `data` is searched as well; or the URL of one
            shard.

    Returns:
        (size in bytes, stamp) of each shard by its path or URL. A stamp changes when a file does.
    """
    if is_url(location) and location.endswith(SHARD_SUFFIXES):
        return list_files(location)
    for folder in (location.rstrip("/"), f"{location.rstrip('/')}/data"):
        files = list_files(folder)
        for kind in SHARD_SUFFIXES:
            shards = {path: stat for path, stat in files.items() if path.endswith(kind)}
            if shards and (kind == ".parquet" or is_url(folder) or not _contains_images(folder)):
                return shards
    return {}


def find_nested_shards(location: str) -> dict[str, tuple[int, str]]:
    """Find the Parquet files, or else the tars, at most NESTED_DEPTH folders below a folder.

    Args:
        location: A folder or a URL.

    Returns:
        As `find_shards`.
    """
    files = list_files(location, NESTED_DEPTH)
    for kind in SHARD_SUFFIXES:
        if shards := {path: stat for path, stat in files.items() if path.endswith(kind)}:
            return shards
    return {}


def _has_images(shard: str) -> bool:
    """Return whether a shard is a tar, or a Parquet file with a column of image files."""
    if not shard.endswith(".parquet"):
        return True
    try:
        with open_parquet(shard) as parquet:
            return bool(image_columns(parquet.schema))
    except (pa.ArrowException, OSError) as error:
        raise read_error(shard, error) from None


def _contains_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(
            not entry.name.startswith(".")
            and (entry.is_dir() or is_image_path(os.fsencode(entry.name)))
            for entry in entries
        )


def _open_shards(
    location: str, shard_stats: Mapping[str, tuple[int, str]], options: _Options
) -> Source:
    """Open shards: Parquet in memory unless it is too large, everything else in place."""
    if not shard_stats:
        raise UsageError(
            f"no .parquet or .tar at {printable(location)}: `simsiam shard` makes them of images"
        )
    folders = {path.rpartition("/")[0] for path in shard_stats}
    prefix = f"{location.rstrip('/')}/" if len(folders) > 1 else ""
    names = {
        path: path.removeprefix(prefix) if prefix else path.rpartition("/")[2]
        for path in shard_stats
    }
    splits, notes = shard_splits(names, options.splits)
    files = [
        ShardFile(path, *shard_stats[path], split, names[path]) for path, split in splits.items()
    ]
    layout = None
    if files[0].path.endswith(".parquet"):
        layout = _read_layout(files)
        if layout.unused:
            used = " and ".join(filter(None, (layout.image_column, layout.label_column)))
            notes.append(f"columns that are used: {used}; not used: {join_names(layout.unused)}")
        if (
            sum(file.size for file in files) <= MAX_RESIDENT_BYTES
            and _total_uncompressed_size(files) <= MAX_RESIDENT_BYTES
        ):
            return replace(_load_parquet(location, files, options), notes=tuple(notes))
    is_one_file = location.endswith(SHARD_SUFFIXES)
    catalog = load_catalog(
        location if is_one_file or len(folders) > 1 else folders.pop(), files, layout
    )
    parts = {}
    for split in SPLITS:
        if split in splits.values():
            parts[split] = *catalog.load_split(split), catalog.classes
    if not len(parts["train"][0]):
        damage = "; ".join(f"{name} is {reason}" for name, reason in catalog.damage)
        raise UsageError(f"no image in {printable(location)}" + f": {damage}" * bool(damage))
    source = _build_source(location, parts, options)
    if layout is None and all(map(canonical_split, source.train.classes)):  # folders in the tars
        notes += note_folder_labels(source.train.classes)
    notes += [f"{name}: {reason}" for name, reason in catalog.damage]
    return replace(source, damage=catalog.damage, notes=tuple(notes))


def _read_layout(files: Sequence[ShardFile]) -> ParquetLayout:
    """Find the columns of Parquet files, from the first file of each split: one may lack labels."""
    first_files = {file.split: file.path for file in reversed(files)}
    layouts = []
    for path in (first_files[split] for split in SPLITS if split in first_files):
        try:
            with open_parquet(path) as parquet:
                layouts.append(detect_parquet_layout(parquet, path))
        except (pa.ArrowException, OSError) as error:
            raise read_error(path, error) from None
    return next((layout for layout in layouts if layout.label_column), layouts[0])


def _total_uncompressed_size(files: Sequence[ShardFile]) -> int:
    """Return the bytes that the images in Parquet files take in memory; see uncompressed_sizes."""
    total = 0
    for file in files:
        try:
            with open_parquet(file.path) as parquet:
                column = detect_parquet_layout(parquet, file.path).image_column
                total += sum(uncompressed_sizes(parquet, column))
        except (pa.ArrowException, OSError) as error:
            raise read_error(file.path, error) from None
    return total


def _load_parquet(path: str, files: Sequence[ShardFile], options: _Options) -> Source:
    """Read Parquet files into memory."""
    parts: dict[str, SplitParts] = {}
    distinct_names = set()
    for split in dict.fromkeys(file.split for file in files):
        contents = (_read_parquet_columns(file.path) for file in files if file.split == split)
        columns, labels, class_names = zip(*contents)
        chunks = [chunk for column in columns for chunk in column.chunks]
        encoded = EncodedColumn(pa.chunked_array(chunks, ENCODED_TYPE))
        names: tuple[str, ...] = next((known for known in class_names if known), ())
        labeled = [part for part in labels if part is not None]
        kinds = {known for known, part in zip(class_names, labels) if known or part is not None}
        distinct_names |= kinds - {()}  # another split may name its classes by texts
        if max(len(kinds), len(distinct_names)) > 1 and not options.no_labels:
            raise UsageError(
                f"the Parquet files in {printable(path)} disagree about the class names, or some "
                "have none; --no-labels ignores them"
            )
        complete = len(labeled) == len(labels) and not options.no_labels
        codes = np.concatenate(labeled) if complete else None
        if codes is not None and not names:
            texts = sorted(set(codes), key=label_sort_key)
            code_of = {text: code for code, text in enumerate(texts)}
            codes = np.array([code_of[text] for text in codes], np.int64)
            names = tuple(map(os.fsdecode, texts))
        parts[split] = Images(numbered_keys(split, len(encoded)), encoded), codes, names
    if not len(parts["train"][0]):
        raise UsageError(f"no row in {printable(path)}")
    return _build_source(path, parts, options)


def _read_parquet_columns(file: str) -> tuple[pa.ChunkedArray, np.ndarray | None, tuple[str, ...]]:
    """Read the images, the labels and the class names of a file.

    Labels are None if any is missing; positions in the class names, or bytes if the file has none:
    then the class names are ().
    """
    try:
        with open_parquet(file) as parquet:
            image, label, names, _ = detect_parquet_layout(parquet, file)
            groups = range(parquet.metadata.num_row_groups)
            columns = [read_image_column(parquet, group, image) for group in groups]
            raw = parquet.read([label])[label] if label else None
    except (pa.ArrowException, OSError) as error:
        raise read_error(file, error) from error
    chunks = [_dictionary_encode(chunk) for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, ENCODED_TYPE)
    if raw is None:
        return encoded, None, ()
    if not names or not pa.types.is_integer(raw.type):
        texts = label_texts(raw)
        return encoded, None if texts.null_count else np.array(texts.to_pylist(), object), ()
    # A label of -1 means that Hugging Face withholds the labels of a test set.
    missing = raw.null_count or (raw.to_numpy() < 0).any()
    return encoded, None if missing else raw.to_numpy(), names


def _dictionary_encode(chunk: pa.Array) -> pa.DictionaryArray:
    """Convert an array of bytes to the one type of all chunks, without copying images."""
    chunk = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
    return pa.DictionaryArray.from_arrays(
        chunk.indices.cast(pa.int32()), chunk.dictionary.cast(pa.large_binary())
    )


def _build_source(path: str | Path, parts: Mapping[str, SplitParts], options: _Options) -> Source:
    """Make the source of these splits; its classes are those of the training images."""
    names = () if options.no_labels else parts["train"][2]
    classes = names if len(names) > 1 else ()  # one class tells nothing apart
    only_class = "".join(names) if not classes else ""
    splits: dict[str, Images] = {}
    for split, (images, codes, names) in parts.items():
        if codes is not None and classes:
            used = np.unique(codes)
            unknown = [c for c in used if not 0 <= c < len(names) or names[c] not in classes]
            if unknown:
                code = unknown[0]
                name = names[code] if 0 <= code < len(names) else str(code)
                kind = f"class in the {split} split of {printable(str(path))}"
                error = unknown_name(kind, name, classes)
                raise UsageError(f"{error}; --no-labels ignores the classes")
            new_codes = np.zeros(len(names), np.int64)
            new_codes[used] = [classes.index(names[code]) for code in used]
            images = replace(images, labels=new_codes[codes], classes=classes)
        splits[split] = images
    absolute = Path(os.path.abspath(hide_keys(str(path))))
    stem = absolute.stem if absolute.is_file() else absolute.name
    name = re.sub(r"[^\w.-]+", "-", stem, flags=re.ASCII).strip("-.") or "images"
    return Source(
        name, splits["train"], splits.get("val"), splits.get("test"), only_class=only_class
    )
