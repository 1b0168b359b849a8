"""What a backbone says of every image of a source, in a file that everything else here works on.

One Parquet file, or a folder of them, with a row an image: `path`; `label`, where any image has one; `vector`, its
feature h as float32; `thumbnail`, a small JPEG of what the network saw. So no verb needs the images again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from simsiam.data.storage import Column
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.sources.open_source import find_shards


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """N images, in the order of their source."""

    paths: Sequence[str]  # in the source: "dog/7.jpg", or split and row, "train#17"
    vectors: Tensor  # (N, d), float32
    labels: Sequence[str | None] | None  # class names; None where no image has one
    thumbnails: Column | None  # JPEG files; None where another program wrote the file
    metadata: dict[str, Any]  # run, backbone_sha256, source, transform, unreadable; {} likewise

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def positions_by_name(self) -> dict[str, list[int]]:
        """Positions by file name and by path, which wins."""
        names: dict[str, list[int]] = {}
        for i, path in enumerate(self.paths):
            names.setdefault(path.rpartition("/")[2], []).append(i)
        return names | {path: [i] for i, path in enumerate(self.paths)}

    def find(self, name: str) -> int:
        """The position of an image, by its path or by its file's name alone. Raises UsageError."""
        found = self.positions_by_name.get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            first, second = (self.paths[i] for i in found[:2])
            raise UsageError(
                f"{printable(name)} is the name of {len(found)} images: say {first}, or {second}, ..."
            )
        raise UsageError(
            f"no image {printable(name)} among the {len(self)} embedded, of which {self.paths[0]} is the first"
        )

    def label(self, i: int) -> str:
        """The label of image i, "" without one."""
        return (self.labels[i] or "") if self.labels else ""

    def caption(self, i: int) -> str:
        return f"{self.paths[i]} ({self.label(i)})" if self.label(i) else self.paths[i]


def read_embeddings(path: str | os.PathLike[str]) -> Embeddings:
    """What `simsiam embed` wrote, a file or a folder. Raises UsageError where it is something else."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} is not there: `simsiam embed RUN SOURCE --out {path}` makes it")
    files = [Path(file) for file in find_shards(str(path))] if path.is_dir() else [path]
    try:
        table = pa.concat_tables(
            [pq.ParquetFile(file, page_checksum_verification=True).read() for file in files]
        )
        columns = {
            n: table[n].cast(pa.string()).to_pylist()
            for n in ("path", "label")
            if n in table.column_names
        }
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"{path} is no Parquet of `simsiam embed`: {reason or 'no file in it'}"
        ) from None
    for name in ("path", "vector"):
        if name not in table.column_names:
            raise UsageError(
                f"{path} has no column {name!r}, only {', '.join(table.column_names)[:160]}"
            )
    vector = table["vector"]
    complete = not (vector.null_count or table["path"].null_count) and len(table)
    if not pa.types.is_fixed_size_list(vector.type) or not complete:
        raise UsageError(
            f"{path} has no path and vector of one length in each row: `simsiam embed` writes such files"
        )
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in vector.chunks]).astype(
        np.float32, copy=False
    )
    vectors = torch.from_numpy(flat.reshape(len(table), -1))
    if not vectors.isfinite().all():
        raise WorkFailed(f"{path} has vectors that are not finite: the run behind it has diverged")
    metadata = table.schema.metadata or {}
    return Embeddings(
        paths=columns["path"],
        vectors=vectors,
        labels=columns.get("label"),
        thumbnails=Column(table["thumbnail"]) if "thumbnail" in table.column_names else None,
        metadata=json.loads(metadata.get(b"simsiam", b"{}")),
    )
