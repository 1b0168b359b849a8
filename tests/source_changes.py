"""Sources of every kind, and everything that can happen to the images of one.

Used by test_fingerprint.py and by stress/changed_sources.py.
"""

import io
import json
import os
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pictures = list[tuple[str, str, bytes]]  # name, label and file of each image
CLASSES = ("cat", "dog")


def draw(number: int, rng: random.Random, form: str) -> bytes:
    """Make an image file. Those of form "bmp" and "npy" all have one size in bytes."""
    pixels = np.random.default_rng([number, rng.randrange(2**32)]).integers(0, 256, (16, 16, 3))
    file = io.BytesIO()
    if form == "npy":
        np.save(file, pixels.astype(np.uint8))
    else:
        Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def pictures(count: int, rng: random.Random, form: str) -> Pictures:
    """Draw images of two classes."""
    return [(f"{i:04}.{form}", CLASSES[i % 2], draw(i, rng, form)) for i in range(count)]


# --- what can happen ---


class Change(NamedTuple):
    """What happens to a source."""

    change: Callable[[Pictures, random.Random], Pictures]
    harmless: bool = False  # whether the images are still the same


def removed(images: Pictures, rng: random.Random) -> Pictures:
    gone = rng.randrange(len(images))
    return images[:gone] + images[gone + 1 :]


def added(images: Pictures, rng: random.Random) -> Pictures:
    at, form = rng.randrange(len(images) + 1), images[0][0].rpartition(".")[2]
    new = (f"{rng.randrange(9999):04}x.{form}", rng.choice(CLASSES), draw(-1 % 2**32, rng, form))
    return [*images[:at], new, *images[at:]]


def swapped(images: Pictures, rng: random.Random) -> Pictures:
    """Two images exchange their content."""
    a, b = rng.sample(range(len(images)), 2)
    result = list(images)
    result[a] = (*images[a][:2], images[b][2])
    result[b] = (*images[b][:2], images[a][2])
    return result


def relabeled(images: Pictures, rng: random.Random) -> Pictures:
    at = rng.randrange(len(images))
    name, label, data = images[at]
    other = CLASSES[1 - CLASSES.index(label)]
    return [*images[:at], (name, other, data), *images[at + 1 :]]


def reordered(images: Pictures, rng: random.Random) -> Pictures:
    result = list(images)
    while result == images:
        rng.shuffle(result)
    return result


def renamed(images: Pictures, rng: random.Random) -> Pictures:
    at = rng.randrange(len(images))
    name, label, data = images[at]
    return [*images[:at], (f"new-{name}", label, data), *images[at + 1 :]]


def redrawn(images: Pictures, rng: random.Random) -> Pictures:
    """One image gets other pixels; in some formats its file has the same size."""
    at = rng.randrange(len(images))
    name, label, _ = images[at]
    new = draw(at, rng, name.rpartition(".")[2])
    return [*images[:at], (name, label, new), *images[at + 1 :]]


def all_redrawn(images: Pictures, rng: random.Random) -> Pictures:
    return [
        (name, label, draw(i, rng, name.rpartition(".")[2]))
        for i, (name, label, _) in enumerate(images)
    ]


def same(images: Pictures, rng: random.Random) -> Pictures:
    return images


CHANGES = {
    "removed": Change(removed),
    "added": Change(added),
    "swapped": Change(swapped),
    "relabeled": Change(relabeled),
    "reordered": Change(reordered),
    "renamed": Change(renamed),
    "redrawn": Change(redrawn),
    "all redrawn": Change(all_redrawn),
    "touched": Change(same, harmless=True),
    "moved": Change(same, harmless=True),
}

# --- kinds of sources ---

TIME = 1_700_000_000  # of every file, also after a change of its content


def write_file(path: Path, data: bytes, time: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (time, time))


def folder(images: Pictures, place: Path, time: int) -> Path:
    for name, label, data in images:
        write_file(place / label / name, data, time)
    return place


def flat_list(images: Pictures, place: Path, time: int) -> Path:
    lines = []
    for name, label, data in images:
        write_file(place / "files" / name, data, time)
        lines.append(f"files/{name}\t{label}\n")
    write_file(place / "list.txt", "".join(lines).encode(), time)
    return place / "list.txt"


def absolute_list(images: Pictures, place: Path, time: int) -> Path:
    path = flat_list(images, place, time)
    text = "".join(f"{place}/{line}\n" for line in path.read_text().splitlines())
    write_file(path, text.encode(), time)
    return path


def tar(images: Pictures, place: Path, time: int) -> Path:
    place.mkdir(parents=True)
    with tarfile.open(place / "a.tar", "w") as archive:
        for name, label, data in images:
            info = tarfile.TarInfo(f"{label}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    os.utime(place / "a.tar", (time, time))
    return place / "a.tar"


def zip_archive(images: Pictures, place: Path, time: int) -> Path:
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "a.zip", "w") as archive:
        for name, label, data in images:
            archive.writestr(zipfile.ZipInfo(f"{label}/{name}"), data)
    os.utime(place / "a.zip", (time, time))
    return place / "a.zip"


def webdataset(images: Pictures, place: Path, time: int) -> Path:
    place.mkdir(parents=True)
    halves = images[: len(images) // 2], images[len(images) // 2 :]
    for number, half in enumerate(halves):
        path = place / f"train-{number}.tar"
        with tarfile.open(path, "w") as archive:
            for name, label, data in half:
                stem, _, form = name.rpartition(".")
                number_of = str(CLASSES.index(label)).encode()
                for member, content in ((f"{stem}.{form}", data), (f"{stem}.cls", number_of)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        os.utime(path, (time, time))
    return place


def parquet(images: Pictures, place: Path, time: int) -> Path:
    place.mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}
    rows = [{"bytes": data, "path": name} for name, _, data in images]
    labels = [CLASSES.index(label) for _, label, _ in images]
    table = pa.table({"image": rows, "label": labels}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, place / "train.parquet", row_group_size=8, compression="NONE")
    os.utime(place / "train.parquet", (time, time))
    return place


# The writer of each kind, and the form of its image files.
KINDS: dict[str, tuple[Callable[[Pictures, Path, int], Path], str]] = {
    "folder": (folder, "png"),
    "folder of bmp": (folder, "bmp"),
    "folder of npy": (folder, "npy"),
    "list": (flat_list, "bmp"),
    "absolute list": (absolute_list, "png"),
    "tar": (tar, "bmp"),
    "zip": (zip_archive, "png"),
    "webdataset": (webdataset, "bmp"),
    "parquet": (parquet, "bmp"),
}
# Names are sorted there, so the order in which files are written changes nothing.
SORTED = ("folder", "folder of bmp", "folder of npy", "tar", "zip")
# The images have no names there.
UNNAMED = ("parquet",)


def change_source(
    kind: str, change: str, work: Path, rng: random.Random, count: int
) -> tuple[Path, Callable[[], Path], bool]:
    """Write a source.

    Returns:
        Its path; what changes it and returns its new path; whether the images are then the same.
    """
    write, form = KINDS[kind]
    images, place = pictures(count, rng, form), work / "here"
    path = write(images, place, TIME)
    harmless = CHANGES[change].harmless
    harmless |= change == "reordered" and kind in SORTED
    harmless |= change == "renamed" and kind in UNNAMED

    def happen() -> Path:
        new = CHANGES[change].change(images, rng)
        shutil.rmtree(place)
        at = work / "there" if change == "moved" else place
        # A catalog of shards is kept until the size or the time of a shard changes.
        unseen = kind == "webdataset" and change in ("relabeled", "renamed", "reordered")
        later = change == "touched" or unseen
        return write(new, at, TIME + later)

    return path, happen, harmless
