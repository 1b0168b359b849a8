"""The embedding of a source that `search` keeps in the user's cache and brings up to date.

An entry of the cache is a folder for one source, one encoder and one preprocessing. It holds

- `embedding.parquet`, an embedding file with the columns of STAMP_SCHEMA besides, which tell
  whether an image has changed;
- `new-*.parquet`, parts of it that an interrupted update has left: they are not computed again;
- `encoder/` and `learned_from.parquet`, if the encoder was learned from the images themselves.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from simsiam.data.images import Images
from simsiam.data.parquet_files import read_parquet
from simsiam.embeddings.embed import PART_SIZE, describe_transform, embed_images, label_names
from simsiam.embeddings.table import Embeddings, table_metadata, table_to_embeddings
from simsiam.errors import UsageError, WorkFailed, none_readable, printable
from simsiam.model.precision import Compute
from simsiam.runs.encoder import eval_transform, load, weight_digests
from simsiam.runs.run_folder import Run
from simsiam.sources.file_index import STAMP_SCHEMA, ContainerStamp, source_stamps
from simsiam.sources.open_source import Source, absolute_sources
from simsiam.utils.files import atomic_write, cache_dir, file_lock, remove_stale_parts
from simsiam.utils.progress_bar import progress_bar

ENTRY_VERSION = 2  # of the folders in the cache
PRIVATE = 0o700  # thumbnails of a user's images are not for other users
NOTHING = STAMP_SCHEMA.empty_table()


class SourceEncoder(NamedTuple):
    """An encoder for the images of a source.

    Attributes:
        name: What the user called it.
        run: Its run folder; None if it is learned from the images of the source.
        learn: Learns it from them, and writes its run folder to a new path.
    """

    name: str
    run: Path | None = None
    learn: Callable[[Path], object] | None = None


class SourceImages:
    """The images of an opened source, and what tells whether they have changed.

    Args:
        names: The names that opened it.
        source: The source, just opened.

    Attributes:
        names: Absolute names.
        splits: The images of each split.
        containers: The archive or the shards that the images are in.
        stamps: A table of STAMP_SCHEMA, a row per image. Its keys are unique.
        fixed: Whether the images are a data set that never changes.
    """

    def __init__(self, names: Sequence[str | os.PathLike[str]], source: Source):
        self.names = absolute_sources(names)
        self.name = source.name
        self.splits = list(source.splits.values())
        self.containers: list[ContainerStamp]
        self.containers, stamps = source_stamps(self.names, self.splits)
        self.stamps = stamps.set_column(0, "key", _number_repeats(stamps["key"].combine_chunks()))
        self.fixed = source.train.pixels is not None

    def __len__(self) -> int:
        return len(self.stamps)

    def rows_in(self, stamps: pa.Table) -> np.ndarray:
        """Find the unchanged images in an older table.

        Args:
            stamps: A table with the columns of STAMP_SCHEMA.

        Returns:
            int64 (N,): the row of each image there; -1 if it is not there or has changed.
        """
        rows = pc.index_in(self.stamps["key"], stamps["key"]).fill_null(-1).to_numpy().copy()
        for name in ("bytes", "mtime"):
            now, then = self.stamps[name].to_numpy(), stamps[name].to_numpy()
            known = np.flatnonzero(rows >= 0)
            rows[known[now[known] != then[rows[known]]]] = -1
        if not self.fixed:  # an image whose time is unknown may have changed
            rows[self.stamps["mtime"].to_numpy() < 0] = -1
        return rows.astype(np.int64)

    def parts(self, rows: np.ndarray) -> Iterator[tuple[Images, np.ndarray]]:
        """Yield images in parts of at most PART_SIZE, each of one split.

        Args:
            rows: Positions of images among those of all splits, increasing.

        Yields:
            The images of a part, and their positions.
        """
        start = 0
        for images in self.splits:
            own = rows[(rows >= start) & (rows < start + len(images))]
            for first in range(0, len(own), PART_SIZE):
                part = own[first : first + PART_SIZE]
                yield images.take(part - start), part
            start += len(images)

    def labels(self) -> list[str | None] | None:
        """List the class name of each image, None for an image without one; None if none has."""
        names = list[str | None]()
        for images in self.splits:
            names += label_names(images) or [None] * len(images)
        return names if any(names) else None


def _number_repeats(keys: pa.Array) -> pa.Array:
    """Make keys unique: shards may hold several images with one name."""
    codes = keys.dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    repeats = np.empty(len(codes), np.int64)
    repeats[order] = np.arange(len(codes)) - np.searchsorted(ordered, ordered)
    if not repeats.any():
        return keys
    numbers = pa.array(repeats).cast(pa.string()).cast(keys.type)
    return pc.binary_join_element_wise(keys, numbers, pa.scalar(b"\0", keys.type))


@contextmanager
def keep_embedding(
    images: SourceImages, encoder: SourceEncoder, compute: Compute, *, channels: int, relearn: float
) -> Iterator[Embeddings]:
    """Bring the kept embedding of a source up to date: embed what is new, forget what is gone.

    While the body runs, other processes wait, so that they do not change the encoder.

    Args:
        images: The images of the source.
        encoder: The encoder.
        compute: Where to compute, and in which precision.
        channels: Number of channels that images are decoded to.
        relearn: Share of new images from which on an encoder that was learned from the images is
            learned again; then all images are embedded again.

    Yields:
        The embeddings, with the labels of the source.

    Raises:
        UsageError: If the encoder cannot be learned or loaded.
        WorkFailed: If no image can be read, or the cache cannot be written.
    """
    key = _describe_encoder(encoder.run) if encoder.run else encoder.name
    identity = [ENTRY_VERSION, images.names, channels, compute.precision, key]
    digest = blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    folder = cache_dir("search") / digest
    folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    with _wait_for_lock(folder / ".lock"):
        remove_stale_parts(folder)
        run = encoder.run or _learned_run(folder, encoder, images, relearn)
        table, positions = _update(folder, images, run, compute)
        embeddings, labels = table_to_embeddings(table), images.labels()
        if not embeddings.vectors.isfinite().all():
            raise WorkFailed(f"the features of {encoder.name} are not finite: its run has diverged")
        yield replace(
            embeddings,
            labels=[labels[i] for i in positions] if labels else None,
            metadata={**embeddings.metadata, "run": str(run.absolute())},
        )


def _describe_encoder(run: Path) -> dict[str, object]:
    """Return what determines the feature of an image, as JSON gives it back."""
    transform = describe_transform(eval_transform(Run(run).recipe))
    return json.loads(json.dumps({**weight_digests(run), "transform": transform}))


@contextmanager
def _wait_for_lock(path: Path) -> Iterator[None]:
    with file_lock(path) as locked:
        if locked:
            yield
            return
    _say("another process is embedding these images: waiting for it")
    with file_lock(path, wait=True):
        yield


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _learned_run(
    folder: Path, encoder: SourceEncoder, images: SourceImages, relearn: float
) -> Path:
    """Return the encoder that was learned from the images, after learning it if need be."""
    run, record = folder / "encoder", folder / "learned_from.parquet"
    if (known := _read_file(record)) is not None:
        new = int((images.rows_in(known) < 0).sum())
        if _metadata(known) != weight_digests(run):
            _say(f"{run} is damaged and is made again")
        elif new < relearn * len(images):
            return run
        else:
            _say(
                f"{new:,} of {len(images):,} images are new: {encoder.name} is learned again, "
                "and all images are embedded again"
            )
    assert encoder.learn is not None, "an encoder has a run folder or is learned"
    record.unlink(missing_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    try:
        encoder.learn(run)
    except UsageError as error:
        raise UsageError(
            f"{encoder.name} cannot be learned from these images ({error}): give another --encoder"
        ) from None
    _write_file(images.stamps, record, weight_digests(run))
    return run


def _update(
    folder: Path, images: SourceImages, run: Path, compute: Compute
) -> tuple[pa.Table, np.ndarray]:
    """Bring embedding.parquet up to date; return it, and the position of the image in each row."""
    path = folder / "embedding.parquet"
    # The first row of an image counts: the newest one, in which it may be unchanged.
    parts = sorted(folder.glob("new-*.parquet"), key=lambda part: -part.stat().st_mtime_ns)
    identity = {**_describe_encoder(run), "containers": images.containers}
    tables = [_read_file(file, identity) for file in (*parts, path)]
    old = pa.concat_tables([table for table in tables if table is not None] or [NOTHING])
    rows = images.rows_in(old)
    kept, new = np.flatnonzero(rows >= 0), np.flatnonzero(rows < 0)
    added, unreadable = _embed(folder, images, new, run, compute, identity)
    positions = np.concatenate([kept, *(part for part, _ in added)])
    if unreadable:
        key, reason = unreadable[0]
        if not len(positions):
            raise none_readable(len(images), key, reason)
        number = f"{len(unreadable):,} of {len(images):,} images"
        _say(f"{number} cannot be read; the first, {printable(key)}: {reason}")
    order = np.argsort(positions)
    stamps = images.stamps.take(pa.array(positions[order]))
    table = tables[-1]
    if table is None or not table.select(STAMP_SCHEMA.names).equals(stamps):
        gone = pc.invert(pc.is_in(old["key"], images.stamps["key"].combine_chunks()))
        counts = (len(positions) - len(kept), pc.sum(gone).as_py() or 0, len(kept))
        _say("{:,} images embedded, {:,} removed, {:,} unchanged".format(*counts))
        unchanged = [old.take(pa.array(rows[kept]))] if len(kept) else []
        table = pa.concat_tables([*unchanged, *(part for _, part in added)])
        table = _write_file(table.take(pa.array(order)), path, {**identity, "source": images.name})
    for file in folder.glob("new-*.parquet"):
        file.unlink()
    return table, positions[order]


def _embed(
    folder: Path,
    images: SourceImages,
    rows: np.ndarray,
    run: Path,
    compute: Compute,
    identity: Mapping[str, object],
) -> tuple[list[tuple[np.ndarray, pa.Table]], list[tuple[str, str]]]:
    """Embed images and write each part to a file, so that it is not lost with the process.

    Returns:
        The positions and the table of each part; key and reason of each unreadable image.
    """
    if not len(rows):
        return [], []
    network, transform = compute.place(load(run)), eval_transform(Run(run).recipe)
    added, unreadable = [], list[tuple[str, str]]()
    with progress_bar("embedding", len(rows)) as advance:
        for part, positions in images.parts(rows):
            read, table, skipped = embed_images(network, part, transform, compute, advance)
            unreadable += sorted(skipped)
            if not read:
                continue
            stamps = images.stamps.take(pa.array(positions[read]))
            # 32-bit offsets would limit all thumbnails together to 2 GiB.
            thumbnails = table["thumbnail"].cast(pa.large_binary())
            columns = [*table.select(["path", "vector"]).columns, thumbnails, *stamps.columns]
            names = ["path", "vector", "thumbnail", *STAMP_SCHEMA.names]
            table = pa.table(columns, names)
            file = folder / f"new-{uuid4().hex}.parquet"
            added.append((positions[read], _write_file(table, file, identity)))
    return added, unreadable


# --- the files of an entry ------------------------------------------------------------------------


def _metadata(table: pa.Table) -> dict[str, object]:
    return table_metadata(table, "the kept embedding")


def _read_file(path: Path, identity: Mapping[str, object] | None = None) -> pa.Table | None:
    """Read a file of an entry.

    Returns:
        The table; None if there is no such file, if its metadata differs from `identity`, or if it
        is damaged. Then it is deleted, and a damaged one is reported.
    """
    if not path.exists():
        return None
    try:
        table = read_parquet(path)
        table.select(STAMP_SCHEMA.names).cast(STAMP_SCHEMA)
        metadata = _metadata(table)
    except (pa.ArrowException, OSError, UsageError, ValueError, LookupError) as error:
        _say(f"{path} is damaged and is made again: {' '.join(str(error).split())[:160]}")
        path.unlink()
        return None
    if any(metadata.get(name) != value for name, value in (identity or {}).items()):
        path.unlink()
        return None
    return table


def _write_file(table: pa.Table, path: Path, metadata: Mapping[str, object]) -> pa.Table:
    """Write a file of an entry, and return the table with its metadata."""
    table = table.replace_schema_metadata({"simsiam": json.dumps(metadata)})
    with atomic_write(path) as part:
        pq.write_table(table, part, row_group_size=PART_SIZE, write_page_checksum=True)
    return table
