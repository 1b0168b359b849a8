"""The fingerprint of a source: it shows whether the images are still those that a job began with.

It holds digests of the names, relative to the source, of the sizes of the files, of the labels and
of the content of a sample, and one of the times. A source that was moved or copied has the same
fingerprint, or differs in the times alone. So times do not decide; if they differ, and the sample
is not all images, that is said.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from shutil import rmtree

import numpy as np
import pyarrow as pa

from simsiam.data.decode import Unreadable
from simsiam.data.images import PREFETCH_CHUNK, RUN_LENGTH, Images, quick_sample
from simsiam.data.remote_files import is_url
from simsiam.distributed.collectives import all_gather_objects
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError, printable
from simsiam.sources.file_index import source_stamps
from simsiam.sources.open_source import Source, absolute_sources
from simsiam.utils.files import start_or_continue_job, write_text
from simsiam.utils.read_files import read_text

VERSION = "1"  # changes whenever the digests of the same images do
# The content of so many images of a split is compared, or of fewer if they are large.
SAMPLE_IMAGES, SAMPLE_BYTES = 2000, 2**27
REMOTE_SAMPLE_IMAGES = 16  # of a source in the network, where each read takes long
FINGERPRINT_FILE = "source.txt"  # in a folder of parts
DIGEST_CHUNK = 10_000  # names that are Python objects at the same time
ASPECTS = {
    "splits": "",  # which splits there are, with their numbers of images
    "names": "other names, or another order",
    "sizes": "other sizes of files",
    "labels": "other labels",
    "content": "other content",
    "paths": "other paths",  # only for work in parts, whose results have them
}


def fingerprint_source(source: Source, names: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Compute the fingerprint of a source; under torchrun, check that all processes have the same.

    The sizes and times of all files are asked for, and a sample is read.

    Args:
        source: The source, just opened.
        names: The names that opened it.

    Returns:
        `version`, `splits`, `names`, `sizes`, `labels`, `content`, `times`; and `sampled`: how many
        images `content` is of, and of how many.

    Raises:
        UsageError: Another process has another fingerprint.
    """
    splits, places = list(source.splits.values()), absolute_sources(names)
    containers, stamps = source_stamps(places, splits)
    sizes = stamps["bytes"].to_numpy()
    remote = any(map(is_url, places))
    samples, start = [], 0
    for images in splits:
        cost = int(sizes[start : start + len(images)].sum()) // max(1, len(images))
        if images.blocks is not None and images.blocks.required:
            cost = max(cost, images.storage.block_bytes // RUN_LENGTH)
        limit = REMOTE_SAMPLE_IMAGES if remote else SAMPLE_IMAGES
        limit = max(1, min(limit, SAMPLE_BYTES // max(1, cost)))
        samples.append(quick_sample(images.drop_labels(), limit))
        start += len(images)
    container_times = "".join(f"{time}\0" for _, time, _ in containers).encode()
    labels = (part for images in splits for part in _iter_labels(images))
    found = {
        "version": VERSION,
        "splits": ", ".join(f"{name} {len(images)}" for name, images in source.splits.items()),
        "names": _digest(_iter_names(stamps["key"])),
        "sizes": _digest([sizes.astype("<i8").tobytes()]),
        "labels": _digest(labels),
        "content": _digest(digest for images in samples for digest in _iter_digests(images)),
        "times": _digest([stamps["mtime"].to_numpy().astype("<i8").tobytes(), container_times]),
        "sampled": f"{sum(map(len, samples)):,} of {len(stamps):,}",
    }
    for other in all_gather_objects([found]):
        if changes := describe_changes(found, other):
            raise UsageError(
                f"the processes do not see the same images; on another process: {changes}"
            )
    return found


def digest_images(images: Images, annotations: Iterable[bytes] = ()) -> str:
    """Digest the content of a sample of images, their labels and their annotations.

    Args:
        images: The images of a training, in their order.
        annotations: What else the training depends on.

    Returns:
        32 hexadecimal digits.
    """
    content = _iter_digests(quick_sample(images.drop_labels(), SAMPLE_IMAGES))
    return _digest(chain(_iter_labels(images), content, annotations))


def describe_changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Say how the images of a source differ from those of an earlier time.

    Args:
        before: The fingerprint of that time.
        now: The fingerprint of the source as it is.

    Returns:
        What has changed, as in "other labels"; "" if nothing has, or only the times.
    """
    changed = [name for name in ASPECTS if before.get(name) != now.get(name)]
    if "names" in changed and "paths" in changed:
        changed.remove("paths")
    if "splits" in changed:
        return f"{now['splits']} images in place of {before['splits']}"
    return " and ".join(ASPECTS[name] for name in changed)


def compare_sources(
    before: dict[str, str], now: dict[str, str], *, advice: str, accept: bool
) -> list[str]:
    """Compare the images of a source with those that a job began with.

    Args:
        before: The fingerprint at the beginning; {} if there is none.
        now: The fingerprint of the source as it is.
        advice: What to do if they differ, the end of the error.
        accept: Whether the job goes on with the images as they are.

    Returns:
        Lines to print: what has changed, or cannot be compared.

    Raises:
        UsageError: The images are others, and that is not accepted.
    """
    if not _is_comparable(before, now):
        return ["whether the images have changed is not known: nothing was noted about them before"]
    if changes := describe_changes(before, now):
        if not accept:
            raise UsageError(f"the images have changed: {changes}; {advice}")
        return [f"the images have changed, which is accepted: {changes}"]
    sampled, _, total = now["sampled"].partition(" of ")
    if before["times"] != now["times"] and sampled != total:
        return [
            "files have other times than before; names, sizes, labels and the content of "
            f"{now['sampled']} images are as they were"
        ]
    return []


@rank_zero_only
def start_or_continue_on_source(
    work: Path,
    job: Mapping[str, object],
    source: Source,
    names: Sequence[str | os.PathLike[str]],
    now: dict[str, str],
    *,
    accept: bool,
) -> None:
    """Prepare a folder for work in parts; see `start_or_continue_job`. Parts of others are no use.

    Parts have the paths of their images. Those of a list of absolute paths change when it moves.

    Args:
        work: The folder, under a lock.
        job: What determines the result besides the images.
        source: The source.
        names: The names that opened it.
        now: Its fingerprint.
        accept: If the images have changed since the parts were made: whether to begin again.

    Raises:
        UsageError: The folder holds parts of another job, or of other images.
    """
    start_or_continue_job(work, job)
    keys = (key for images in source.splits.values() for key in images.keys)
    paths = _digest(f"{key}\0".encode("utf-8", "surrogateescape") for key in keys)
    place = _digest([json.dumps(absolute_sources(names)).encode()])
    now = now | {"place": place, "paths": paths}
    file, before = work / FINGERPRINT_FILE, dict[str, str]()
    with suppress(OSError):  # a new job has none
        lines = read_text(file).splitlines()
        before = {name: text for name, _, text in (line.partition(" ") for line in lines)}
    folder = printable(str(work))
    if not _is_comparable(before, now):
        before = {}
    elif before["place"] != now["place"] and describe_changes(before, now):
        raise UsageError(
            f"{folder} holds the parts of another job, which was not finished: delete it, or "
            "change --out"
        )
    else:
        advice = (
            f"{folder} holds parts of the images as they were. To begin again with the images as "
            "they are, give --accept-changed-source"
        )
        say(compare_sources(before, now, advice=advice, accept=accept))
    if not before or describe_changes(before, now):
        for path in work.glob("[!.]*"):
            if path.is_dir() and not path.is_symlink():
                rmtree(path)
            elif path.name != "job.json":
                path.unlink()
        write_text(file, "".join(f"{name} {text}\n" for name, text in now.items()))


def check_still_the_same(
    source: Source,
    names: Sequence[str | os.PathLike[str]],
    before: dict[str, str],
    *,
    accept: bool,
) -> None:
    """Check that the images of a source have not changed while they were read.

    Args:
        source: The source, as it was opened.
        names: The names that opened it.
        before: Its fingerprint at the beginning.
        accept: Whether changed images are accepted.

    Raises:
        UsageError: They have changed, and that is not accepted.
    """
    advice = "give the command again when they no longer change, with --accept-changed-source"
    say(compare_sources(before, fingerprint_source(source, names), advice=advice, accept=accept))


@rank_zero_only
def say(lines: Sequence[str]) -> None:
    """Print lines on stderr.

    Args:
        lines: The lines.
    """
    for line in lines:
        print(f"note     {printable(line)}", file=sys.stderr, flush=True)


def _is_comparable(before: object, now: dict[str, str]) -> bool:
    """Tell whether an earlier fingerprint, which may be damaged, is of this version."""
    if not isinstance(before, dict) or before.keys() != now.keys():
        return False
    return bool(before["version"] == VERSION)


def _digest(parts: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _iter_names(keys: pa.ChunkedArray) -> Iterable[bytes]:
    """Yield the names of images; those of a list of absolute paths without their common folder."""
    ends = [chunk for chunk in keys.chunks if len(chunk)]
    first = ends[0][0].as_py() if ends else b""
    common = 0
    if os.path.isabs(first):
        names = [os.fsdecode(name) for chunk in ends for name in _min_and_max(chunk)]
        prefix = os.path.commonprefix(names)  # noqa: RUF071  of characters, and cut at a folder
        common = os.fsencode(prefix).rfind(b"/") + 1
    for chunk in ends:
        for i in range(0, len(chunk), DIGEST_CHUNK):
            yield b"".join(
                name[common:] + b"\0" for name in chunk[i : i + DIGEST_CHUNK].to_pylist()
            )


def _min_and_max(chunk: pa.Array) -> tuple[bytes, bytes]:
    import pyarrow.compute as pc

    ends = pc.min_max(chunk)
    return ends["min"].as_py(), ends["max"].as_py()


def _iter_labels(images: Images) -> Iterable[bytes]:
    yield "".join(f"{name}\0" for name in images.classes).encode("utf-8", "surrogateescape")
    yield b"\1" if images.labels is None else images.labels.astype("<i8").tobytes()


def _iter_digests(images: Images) -> Iterable[bytes]:
    """Yield a digest of the content of each image."""
    loaded = images
    for i in range(len(images)):
        if i % PREFETCH_CHUNK == 0:
            chunk = np.arange(i, min(i + PREFETCH_CHUNK, len(images)))
            loaded = images.prefetch(chunk, 0.25)
        data = b""
        with suppress(Unreadable, OSError, UsageError):
            pixels = loaded.pixels
            data = loaded.storage.read_bytes(i) if pixels is None else pixels[i].tobytes()
        yield blake2b(data, digest_size=16).digest()
