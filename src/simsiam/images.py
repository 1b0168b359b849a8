"""Any source becomes images by position; labels are used where there are any and never required.

`open_source` takes a name, a folder or Parquet and returns a `Source`: up to three splits of `Images`. What follows
never asks where an image came from, only for the i-th one. A broken file is an ordinary event in a pile of photographs,
so it has its own exception, `Unreadable`, and need not stop a run.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from simsiam.errors import UsageError, WorkFailed, unknown

SOURCES = ("shapes", "cifar10", "cifar100", "stl10")  # the names that open_source knows
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # their spelling: ours
LABELS = ("label", "labels", "fine_label")  # usual names of an integer label column
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; Pillow would run Ghostscript on an EPS
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MAX_PIXELS = 89_478_485  # where Pillow starts to warn of a decompression bomb: 256 MiB in RGB

# Pillow's own failures are OSErrors, but its parsers let through whatever a damaged header made them raise.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class Unreadable(Exception):
    """One image could not be decoded; str(error) is a short reason in one line."""


class Column(Sequence):
    """Strings or bytes by position, in Arrow memory: one object rather than N, so forked workers share its pages.

    `column[i]` is one value; `column[indices]` is a column of those rows that copies no value.
    """

    def __init__(self, values: pa.ChunkedArray, rows: np.ndarray | None = None):
        self.values = values
        self.rows = np.arange(len(values)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        rows = self.rows[at]
        return Column(self.values, rows) if isinstance(rows, np.ndarray) else self.values[int(rows)].as_py()


@dataclass(frozen=True, eq=False)
class Images:
    """N images, by position. Picklable, and cheap to fork into the workers of a DataLoader."""

    keys: Column  # what to call each image: its path in the source, "dog/7.jpg", or its split and row, "train#17"
    encoded: Column | Path | None = None  # image files as bytes, or the folder that `keys` lie in; None with `pixels`
    labels: np.ndarray | None = None  # int64 (N,), positions in `classes`; None where any image has none
    classes: tuple[str, ...] = ()  # class names; () without labels
    pixels: torch.Tensor | None = None  # uint8 (N, 3, H, W) when decoded and in memory

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> Image.Image:
        """Image i in RGB, upright (EXIF), 8 bits a channel, the first frame of an animation. Raises Unreadable."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[i].permute(1, 2, 0).numpy())
        with self._header(i) as image:
            return _upright_rgb(image)

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of image i as stored, before any EXIF rotation; decodes nothing. Raises Unreadable."""
        if self.pixels is not None:
            return self.pixels.shape[2], self.pixels.shape[3]
        with self._header(i) as image:
            return image.height, image.width

    def take(self, indices: Any) -> "Images":
        """The images at `indices` (whatever indexes a NumPy array), in that order. Encoded bytes are not copied."""
        rows = np.arange(len(self))[indices]
        return replace(
            self,
            keys=self.keys[rows],
            encoded=self.encoded[rows] if isinstance(self.encoded, Column) else self.encoded,
            labels=None if self.labels is None else self.labels[rows],
            pixels=None if self.pixels is None else self.pixels[torch.from_numpy(rows)],
        )

    @contextmanager
    def _header(self, i: int) -> Iterator[Image.Image]:
        """Image i opened, not yet decoded. Whatever goes wrong with it, here or in the block, is Unreadable."""
        file = self._file(i)  # outside the `try`: an i out of range is our mistake, not the image's
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Unreadable(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
                yield image
        except BROKEN as error:
            raise Unreadable(_reason(error)) from error

    def _file(self, i: int) -> Path | BytesIO:
        if isinstance(self.encoded, Path):
            return self.encoded / self.keys[i]
        assert self.encoded is not None, "images are either encoded or pixels"
        return BytesIO(self.encoded[i] or b"")  # Parquet's null: a row without an image


@dataclass(frozen=True, eq=False)
class Source:
    name: str  # short, usable in a folder name: "shapes", "cifar10", the folder's name
    train: Images
    val: Images | None = None
    test: Images | None = None


def open_source(source: str | os.PathLike[str]) -> Source:
    """The images behind a name of SOURCES, a folder of images, or Parquet in Hugging Face's image layout.

    Folder: images at any depth, in the bytewise order of their paths; hidden names are skipped, links are followed and
    each folder is walked once. A sub-folder `train` makes `train`, `val` and `test` the splits, and what lies beside
    them is left alone. If train's images all lie in first-level folders, two or more, these are the classes.
    Parquet: a file, or shards in a folder (or its `data`) whose first word is the split: `test-00000-of-00001.parquet`.
    Without a `train` split, everything is train. A name wins over a folder of that name: write `./cifar10`.

    Raises UsageError if the source is none of these or holds no image, WorkFailed if it cannot be fetched or read.
    """
    text = os.path.expanduser(os.fspath(source))
    if text == "shapes":
        return _shapes()
    if text in SOURCES:
        return _torchvision(text)
    if not os.path.exists(text):
        raise unknown("source", text, [*SOURCES, "a folder of images", "a Parquet file or folder"])
    path = Path(text)
    if path.suffix == ".parquet" and path.is_file():
        return _parquet(path, [path])
    if not path.is_dir():
        raise UsageError(f"{text!r} is one file: give a folder of images, Parquet, or one of {', '.join(SOURCES)}")
    shards = sorted(path.glob("[!.]*.parquet")) or sorted(path.glob("data/[!.]*.parquet"))
    return _parquet(path, shards) if shards else _folder(path)


def from_arrays(split: str, pixels: np.ndarray, labels: Any = None, classes: Sequence[str] = ()) -> Images:
    """Images already decoded: pixels uint8 (N, 3, H, W), perhaps labels (N,); the keys are "split#0", "split#1", ..."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3, (pixels.dtype, pixels.shape)
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    keys = _numbered(split, len(pixels))
    return Images(keys, None, None if labels is None else np.asarray(labels, np.int64), tuple(classes), tensor)


def in_memory(images: Images, limit_bytes: int, threads: int = CORES) -> tuple[Images, list[tuple[str, str]]]:
    """Images decoded into one uint8 tensor (N, 3, H, W), and the (key, reason) of each unreadable image left out.

    Returns the images as they are, to be streamed, if they differ in size or would take more than `limit_bytes`.
    Raises WorkFailed if not one can be read.
    """
    if images.pixels is not None or not len(images):
        return images, []
    sizes = measure_sizes(images)
    if not len(sizes):
        sizes = measure_sizes(images, None)
    n, (height, width) = len(images), sizes[0] if len(sizes) else (0, 0)
    if (sizes != (height, width)).any() or n * 3 * height * width > limit_bytes:
        return images, []

    pixels = np.empty((n, 3, height, width), np.uint8)

    def decode(positions: np.ndarray) -> dict[int, str]:
        reasons = {}
        for i in positions:
            try:
                image = images.read(i)
            except Unreadable as error:
                reasons[i] = str(error)
                continue
            if image.size != (width, height):
                raise _AnotherSize
            pixels[i] = np.asarray(image).transpose(2, 0, 1)
        return reasons

    unreadable: dict[int, str] = {}
    try:
        with ThreadPoolExecutor(threads) as pool:  # threads suffice: Pillow decodes without the GIL
            for reasons in pool.map(decode, np.array_split(np.arange(n), n // 256 + 1)):
                unreadable |= reasons
    except _AnotherSize:
        return images, []
    left_out = [(images.keys[i], reason) for i, reason in unreadable.items()]
    kept = np.setdiff1d(np.arange(n), list(unreadable))
    if not len(kept):
        raise WorkFailed(f"none of the {n} images can be read; the first, {left_out[0][0]!r}: {left_out[0][1]}")
    if left_out:
        for to, i in enumerate(kept):  # close the gaps in place: a copy would need the memory twice
            pixels[to] = pixels[i]
    return replace(images.take(kept), encoded=None, pixels=torch.from_numpy(pixels[: len(kept)])), left_out


def spread(n: int, limit: int | None) -> np.ndarray:
    """`limit` positions spread evenly over range(n), int64 and increasing; all n if `limit` is None or at least n."""
    return np.arange(n) if limit is None or limit >= n else np.arange(limit) * n // limit


def sample(images: Images, limit: int | None) -> Images:
    """`limit` images spread evenly over the source, in order, each class in proportion; all if `limit` is None."""
    order = np.arange(len(images)) if images.labels is None else np.argsort(images.labels, kind="stable")
    return images.take(np.sort(order[spread(len(images), limit)]))


def hold_out(images: Images, count: int, seed: int = 0) -> tuple[Images, Images]:
    """(the rest, `count` images held out): a function of (labels, count, seed), in order, each class in proportion.

    Raises UsageError unless 0 < count < N.
    """
    if not 0 < count < len(images):
        raise UsageError(f"cannot hold out {count} of {len(images)} images: give 1 to {len(images) - 1}")
    order = np.random.default_rng(seed).permutation(len(images))
    if images.labels is not None:
        order = order[np.argsort(images.labels[order], kind="stable")]  # shuffled within each class
    held = np.sort(order[spread(len(images), count)])
    return images.take(np.setdiff1d(order, held)), images.take(held)


def measure_sizes(images: Images, sample: int | None = 200) -> np.ndarray:
    """(height, width) of `sample` evenly spread images, int64 (M, 2), from headers alone; skips unreadable ones."""
    sizes = []
    for i in spread(len(images), sample):
        with suppress(Unreadable):
            sizes.append(images.size(i))
    return np.array(sizes, np.int64).reshape(-1, 2)


class _AnotherSize(Exception):
    """An image that is not the size of the first."""


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(*BROKEN):  # broken EXIF is no reason to lose good pixels
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("transparency", None)  # `convert` drops it too, and warns
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own text shows the address of a buffer
        return f"empty, or not one of {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__  # strerror leaves the path out
    return " ".join(text.split())[:200]


def _column(values: Sequence[str]) -> Column:
    return Column(pa.chunked_array([pa.array(values, pa.large_string())]))


def _numbered(split: str, n: int) -> Column:
    return _column([f"{split}#{i}" for i in range(n)])


def _shapes() -> Source:
    from simsiam import shapes

    splits = ((split, *shapes.draw(split)) for split in ("train", "val", "test"))
    return Source("shapes", *(from_arrays(split, pixels, labels, shapes.CLASSES) for split, pixels, labels in splits))


def _torchvision(name: str) -> Source:
    from torchvision.datasets import CIFAR10, CIFAR100, STL10

    root = os.path.expanduser(os.environ.get("SIMSIAM_DATA") or "~/.cache/simsiam/data")

    def fetch(split: str, data_set: Any, part: str | bool) -> Images:
        try:
            got = data_set(root, part, download=True)
        except (OSError, RuntimeError, HTTPException) as error:  # no network or disk; wrong checksum; cut connection
            raise WorkFailed(
                f"{name} could not be fetched into {root!r} ({_reason(error)}): "
                "give a local Parquet file or a folder of images instead"
            ) from error
        if part == "unlabeled":
            return from_arrays(split, got.data)
        if name == "stl10":
            return from_arrays(split, got.data, got.labels, got.classes)
        return from_arrays(split, got.data.transpose(0, 3, 1, 2), got.targets, got.classes)

    if name == "stl10":  # its labeled training images are few: the unlabeled ones are there to be learned from
        parts = {"train": "unlabeled", "val": "train", "test": "test"}
        return Source(name, *(fetch(split, STL10, part) for split, part in parts.items()))
    cifar = CIFAR10 if name == "cifar10" else CIFAR100
    return Source(name, fetch("train", cifar, True), None, fetch("test", cifar, False))


def _folder(root: Path) -> Source:
    folders = {name.lower(): name for _, names, _ in islice(os.walk(root), 1) for name in sorted(names)}
    splits = {split: folders[word] for word, split in SPLITS.items() if word in folders}
    parts: dict[str, tuple[Images, np.ndarray | None]] = {}
    for split, folder in splits.items() if "train" in splits else [("train", "")]:
        paths = _walk(root / folder)
        if not paths:
            raise UsageError(f"no image in {str(root / folder)!r}: looked for {' '.join(sorted(EXTENSIONS))}")
        nested = all("/" in path for path in paths)
        first = np.array([path.partition("/")[0] for path in paths]) if nested else None
        parts[split] = Images(_column([os.path.join(folder, path) for path in paths]), root), first
    return _assemble(root, parts)


def _walk(folder: Path) -> list[str]:
    """The paths of the images below `folder`, relative to it and with "/", in bytewise order."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder that has been walked, perhaps an ancestor
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(here).relative_to(folder).as_posix()
        for name in files:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                found.append(f"{below}/{name}".removeprefix("./"))
    try:
        return sorted(found, key=str.encode)
    except UnicodeEncodeError as error:
        raise UsageError(f"the file name {os.fsencode(error.object)!r} is not UTF-8: rename it") from error


def _parquet(path: Path, files: list[Path]) -> Source:
    shards: dict[str, list[Path]] = {}
    for file in files:
        word = re.match("[a-z]*", file.name.lower())
        shards.setdefault(SPLITS.get(word.group() if word else "", "train"), []).append(file)
    if "train" not in shards:
        shards = {"train": files}
    parts, names = {}, set()
    for split, group in shards.items():
        columns, labels, theirs = zip(*map(_shard, group))
        encoded = Column(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.large_binary()))
        raw = None if any(part is None for part in labels) else np.concatenate(labels)
        parts[split] = Images(_numbered(split, len(encoded)), encoded), raw
        names |= {one for one in theirs if one}
    if not len(parts["train"][0]):
        raise UsageError(f"no row in {str(path)!r}")
    if len(names) > 1:
        raise UsageError(f"the Parquet files in {str(path)!r} disagree about the class names")
    return _assemble(path, parts, *names)


def _shard(file: Path) -> tuple[pa.ChunkedArray, np.ndarray | None, tuple[str, ...]]:
    """One file's images (large_binary), labels (None if any is missing) and class names (() if it gives none)."""
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        kinds = {name: feature.get("_type") for name, feature in about.items() if isinstance(feature, dict)}
        images = sorted((f for f in schema if _holds_bytes(f.type)), key=lambda f: kinds.get(f.name) != "Image")
        if not images:
            raise UsageError(f"no column of image files in {str(file)!r}, only {', '.join(schema.names)}")
        nested = pa.types.is_struct(images[0].type)
        labels = [f.name for f in schema if pa.types.is_integer(f.type)]
        labels = [name for name in labels if kinds.get(name) == "ClassLabel" or name in LABELS]
        labels.sort(key=lambda name: (kinds.get(name) != "ClassLabel", name not in LABELS))
        table = parquet.read([images[0].name + ".bytes" * nested, *labels[:1]])
    except (pa.ArrowException, OSError) as error:
        raise WorkFailed(f"cannot read {str(file)!r}: {_reason(error)}") from error
    encoded = table[images[0].name]
    encoded = (encoded.flatten()[0] if nested else encoded).cast(pa.large_binary())
    if not labels:
        return encoded, None, ()
    raw, names = table[labels[0]], tuple(about.get(labels[0], {}).get("names", ()))
    # A label of -1 is how Hugging Face hides the labels of a test set.
    missing = raw.null_count or (names and (raw.to_numpy() < 0).any())
    return encoded, None if missing else raw.to_numpy(), names


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _assemble(path: Path, parts: dict[str, tuple[Images, np.ndarray | None]], names: tuple[str, ...] = ()) -> Source:
    """The source of (images, raw labels) by split. Raw labels are positions in `names` or, without, train's values."""
    raw = parts["train"][1]
    known = np.arange(len(names)) if names or raw is None else np.unique(raw)
    if len(known) < 2:  # a label that never varies says nothing
        known = known[:0]

    def split(name: str) -> Images | None:
        images, raw = parts.get(name, (None, None))
        if images is None or raw is None or not len(known):
            return images
        labels = np.searchsorted(known, raw).clip(max=len(known) - 1)
        strange = raw[known[labels] != raw]
        if len(strange):
            raise unknown(f"class in the {name} split of {str(path)!r}", str(strange[0]), map(str, known))
        return replace(images, labels=labels.astype(np.int64), classes=names or tuple(map(str, known)))

    train = split("train")
    assert train is not None
    stem = os.path.basename(os.path.abspath(path)).removesuffix(".parquet")
    return Source(re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "images", train, split("val"), split("test"))
