"""Files appear whole or not at all."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from simsiam.errors import UsageError, shown


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`; it takes the place of `path` once it is complete and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raises UsageError for a file that cannot be written, before the work for it is done; None is no file."""
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise UsageError(f"{shown(str(path))} is a folder: give the name of a file")
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {shown(str(path.parent))} to write {shown(path.name)} into: make it")


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with whole(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *rows])
