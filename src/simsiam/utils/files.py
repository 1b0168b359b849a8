"""Files appear whole or not at all, and no two processes do the same work at once."""

import csv
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from simsiam.errors import UsageError, WorkFailed, printable


@contextmanager
def atomic_write(path: Path, *, backup: Path | None = None) -> Iterator[Path]:
    """A file to write beside `path`; it takes the place of `path` once it is complete and on the disk.

    What stood at `path` is kept as `before`, where that is given. Raises WorkFailed if the system refuses to write.
    """
    part = _part_path(path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(part, path)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        where = printable(str(path))
        raise WorkFailed(
            f"cannot write {where}: {reason}; whatever was there before is untouched"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Raises UsageError for a file that cannot be written, before the work for it is done; None is no file."""
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise UsageError(f"{printable(str(path))} is a folder: give the name of a file")
        if not path.parent.is_dir():
            raise UsageError(
                f"there is no folder {printable(str(path.parent))} to write {printable(path.name)} into: make it"
            )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`; it becomes `path` once everything in it is written. An empty one may be there."""
    part = _part_path(path)
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, path)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        raise WorkFailed(f"cannot write {printable(str(path))}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def os_error_reason(error: BaseException | None) -> str | None:
    """Why the system refused, in its words; None of another error. Libraries bury it under errors of their own."""
    if isinstance(error, UsageError | WorkFailed):
        return None
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return None if error is None else os.strerror(error.errno or 0)


def remove_stale_parts(folder: Path, name: str = "") -> None:
    """Delete what killed processes left unfinished in a folder, of the file `name` or of all."""
    for stray in folder.glob(f"{glob.escape(name) or '*'}.*.part"):
        pid = stray.name.split(".")[-2]
        if pid.isdigit() and not _process_exists(int(pid)):
            with suppress(OSError):
                shutil.rmtree(
                    stray
                ) if stray.is_dir() and not stray.is_symlink() else stray.unlink()


def _part_path(path: Path) -> Path:
    """Where what becomes `path` is written."""
    remove_stale_parts(path.parent, path.name)
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds the lock file `path`; the lock goes with the process, however it ends.

    A record lock rather than flock: data workers, which outlive a killed process by seconds, do not inherit it, and NFS
    keeps it between hosts. A file system without locks lets everyone through.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"cannot write to {printable(str(path.parent))}: {error.strerror or error}"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        with suppress(
            OSError
        ):  # a full disk: the name is for others to read, the lock holds without it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield True


@contextmanager
def exclusive_lock(path: Path, work_name: str) -> Iterator[None]:
    """Do `work`, named in the error, under a lock file. Raises UsageError where another process is at it."""
    with file_lock(path) as mine:
        if not mine:
            raise UsageError(
                f"{work_name} is being worked on by {path.read_text() or 'another process'}: one at a time"
            )
        yield


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def cache_dir(name: str) -> Path:
    """A folder in the user's cache: in $SIMSIAM_CACHE, or in `simsiam` in $XDG_CACHE_HOME or ~/.cache."""
    given, shared = os.environ.get("SIMSIAM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(given or os.path.join(shared, "simsiam")), name)


def start_or_continue_job(work_folder: Path, job: dict[str, Any]) -> None:
    """Start the work in a folder, or go on with what was left there. Raises UsageError where another job left it."""
    about = json.dumps(job, indent=2)
    if not (work_folder / "job.json").exists():
        for stray in work_folder.glob(
            "[!.]*"
        ):  # of a job that ended, and was killed while it cleared up
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
        with atomic_write(work_folder / "job.json") as part:
            part.write_text(about)
    if (work_folder / "job.json").read_text() != about:
        raise UsageError(
            f"{work_folder} holds the parts of another job, which was not finished: delete it, or change --out"
        )
    for stray in work_folder.glob(
        "*.part"
    ):  # under the lock: whoever began it is gone, or a zombie
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
