"""The embedding file: one row per image, which the other modules of this package read.

An embedding file is a Parquet file or a folder of Parquet files. Its columns are `path`; `label`,
if any image has one; `vector`, the feature h as float32; and `thumbnail`, a small JPEG of the crop
that the network was given. So no verb needs the images again.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from typing_extensions import TypedDict

from simsiam.data.decode import Unreadable, decode_image, read_header
from simsiam.data.parquet_files import open_parquet
from simsiam.data.storage import Column
from simsiam.errors import UsageError, WorkFailed, printable, truncate
from simsiam.sources.open_source import find_shards
from simsiam.utils.names import normalize_name, utf8_name
from simsiam.utils.typed_json import parse_json


class EmbeddingMetadata(TypedDict, total=False):
    """What is checked of the metadata of an embedding file."""

    run: str
    backbone_sha256: str
    head_sha256: str
    source: str
    sources: list[str]
    splits: list[str] | None
    no_labels: bool
    channels: int
    transform: dict[str, object]
    unreadable: list[tuple[str, str]]


COLUMNS = ("path", "label", "vector", "thumbnail")
MAX_THUMBNAIL_PIXELS = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """N embedded images, in the order of their source.

    Attributes:
        paths: The path of each image in its source, "dog/7.jpg"; or split and row, "train#17".
        vectors: The features, (N, d) float32.
        labels: The class name of each image, None for an image without one; None if no image has
            a label.
        thumbnails: A JPEG file of each image; None if another program wrote the file.
        metadata: run, backbone_sha256, source, transform, unreadable; {} if another program wrote
            the file.
    """

    paths: Sequence[str]
    vectors: Tensor
    labels: Sequence[str | None] | None
    thumbnails: Column | None
    metadata: Mapping[str, object]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    @cached_property
    def positions_by_name(self) -> dict[str, list[int]]:
        """Positions by path and by file name; a path takes precedence over an equal file name."""
        by_path: dict[str, list[int]] = {}
        by_name: dict[str, list[int]] = {}
        for i, path in enumerate(self.paths):
            by_path.setdefault(path, []).append(i)
            by_name.setdefault(path.rpartition("/")[2], []).append(i)
        return by_name | by_path

    @cached_property
    def _positions_by_normal_name(self) -> dict[str, list[int]]:
        positions: dict[str, list[int]] = {}
        for i, path in enumerate(map(normalize_name, self.paths)):
            for name in {path, path.rpartition("/")[2]}:
                positions.setdefault(name, []).append(i)
        return positions

    def positions(self, name: str) -> list[int]:
        """Look up images by name; if there is none, by a name that is normalized.

        Args:
            name: The path of an image in its source, or its file name alone.

        Returns:
            The positions of the images with this name.
        """
        exact = self.positions_by_name.get(utf8_name(name))
        return exact or self._positions_by_normal_name.get(normalize_name(name), [])

    def find(self, name: str) -> int:
        """Look up an image by name.

        Args:
            name: The path of the image in its source, or its file name alone.

        Returns:
            The position of the image.

        Raises:
            UsageError: If no image or more than one has this name.
        """
        positions = self.positions(name)
        if len(positions) == 1:
            return positions[0]
        if positions:
            first, second = (printable(self.paths[i]) for i in positions[:2])
            text = f"give the whole path, such as {first} or {second}"
            if first == second:
                text = "they have the same path, so no name tells them apart"
            raise UsageError(f"{len(positions)} images are named {printable(name)}: {text}")
        raise UsageError(
            f"no image {printable(name)} among the {len(self)} embedded ones; "
            f"the first is {printable(self.paths[0])}"
        )

    def label(self, i: int) -> str:
        """Get the label of an image.

        Args:
            i: The position of the image.

        Returns:
            Its class name; "" if it has none.
        """
        return (self.labels[i] or "") if self.labels else ""

    def thumbnail(self, i: int) -> np.ndarray:
        """Decode the thumbnail of an image.

        Args:
            i: The position of the image.

        Returns:
            uint8 (H, W, 3).

        Raises:
            UsageError: It is damaged or large.
        """
        assert self.thumbnails is not None, "checked when the file was opened"
        data = self.thumbnails[i]
        try:
            height, width, _ = read_header(data)
            if height * width > MAX_THUMBNAIL_PIXELS:
                raise Unreadable(f"{width}x{height} pixels are too many")
            return decode_image(data)
        except Unreadable as error:
            raise UsageError(
                f"the thumbnail of {printable(self.paths[i])} cannot be read: {error}; run "
                "`simsiam embed` again"
            ) from None

    def caption(self, i: int) -> str:
        """Get the path of an image, with its label in parentheses if it has one.

        Args:
            i: The position of the image.

        Returns:
            The caption.
        """
        return f"{self.paths[i]} ({self.label(i)})" if self.label(i) else self.paths[i]


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """Read an embedding file.

    Args:
        path: A file or folder that `embed` wrote, or another Parquet file with the columns path
            and vector.

    Returns:
        The embeddings, in memory.

    Raises:
        UsageError: If there is no such file, or it is not an embedding file.
        WorkFailed: If a vector is not finite.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist: create it with `simsiam embed RUN SOURCE --out {path}`"
        )
    embeddings = table_to_embeddings(_read_table(path), printable(str(path)))
    if not embeddings.vectors.isfinite().all():
        raise WorkFailed(f"{path} has vectors that are not finite: its run has diverged")
    return embeddings


def table_to_embeddings(table: pa.Table, name: str = "the embedding") -> Embeddings:
    """Turn the rows of an embedding file into embeddings.

    Args:
        table: At least one row, with the columns path and vector.
        name: What the table is, for errors.

    Returns:
        The embeddings.

    Raises:
        UsageError: The metadata of the table are damaged.
    """
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
    texts = {
        name: table[name].cast(pa.string()).to_pylist()
        for name in ("path", "label")
        if name in table.column_names
    }
    return Embeddings(
        paths=texts["path"],
        vectors=torch.from_numpy(flat.astype(np.float32, copy=False).reshape(len(table), -1)),
        labels=texts.get("label"),
        thumbnails=Column(table["thumbnail"]) if "thumbnail" in table.column_names else None,
        metadata=table_metadata(table, name),
    )


def table_metadata(table: pa.Table, name: str) -> dict[str, object]:
    """Read what `embed` says in the metadata of a table.

    Args:
        table: The table.
        name: What it is, for errors.

    Returns:
        The metadata; {} if another program wrote the file.

    Raises:
        UsageError: They are damaged.
    """
    text = (table.schema.metadata or {}).get(b"simsiam", b"{}")
    return cast(dict[str, object], parse_json(text, EmbeddingMetadata, f"{name}: its description"))


def _read_table(path: Path) -> pa.Table:
    """The table of a file or folder, its columns checked."""
    files = [Path(file) for file in find_shards(str(path))] if path.is_dir() else [path]
    if not files:
        raise UsageError(
            f"{path} has no file of embeddings: `simsiam embed lite0 SOURCE --out FILE.parquet` "
            "writes one"
        )
    try:
        table = pa.concat_tables([_read_columns(file) for file in files])
        for name in {"path", "label"} & set(table.column_names):
            table[name].cast(pa.string())
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{path} is not a Parquet file of `simsiam embed`: {reason}") from None
    vector = table["vector"]
    complete = not (vector.null_count or table["path"].null_count) and len(table)
    if not _is_vector(vector.type) or not complete or pc.list_flatten(vector).null_count:
        raise UsageError(
            f"{path} needs a path and a vector in each row, all vectors of one length: "
            "use a file that `simsiam embed` wrote"
        )
    if "thumbnail" in table.column_names and not _are_files(table["thumbnail"]):
        raise UsageError(
            f"{path} has a column 'thumbnail' that is not a JPEG file in each row: use a file that "
            "`simsiam embed` wrote"
        )
    return table


def _read_columns(file: Path) -> pa.Table:
    """Read the columns of a file that an embedding has."""
    with open_parquet(file) as parquet:
        for name in ("path", "vector"):
            if name not in parquet.schema.names:
                columns = printable(truncate(", ".join(parquet.schema.names)))
                raise UsageError(f"{file} has no column {name!r}, only {columns}")
        return parquet.read(COLUMNS)


def _are_files(column: pa.ChunkedArray) -> bool:
    return column.type in (pa.binary(), pa.large_binary()) and not column.null_count


def _is_vector(dtype: pa.DataType) -> bool:
    if not pa.types.is_fixed_size_list(dtype) or dtype.list_size < 1:
        return False
    return pa.types.is_floating(dtype.value_type) or pa.types.is_integer(dtype.value_type)
