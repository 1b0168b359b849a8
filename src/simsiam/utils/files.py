"""Files that appear complete or not at all, and locks between processes."""

import csv
import errno
import glob
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import psutil
from platformdirs import user_cache_dir

from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.system import WINDOWS, replace_path, try_lock, user_temporary_folder


@contextmanager
def atomic_write(path: Path, *, backup: Path | None = None) -> Iterator[Path]:
    """Write a file beside `path` and move it to `path` once it is complete and on the disk.

    Args:
        path: The file to write.
        backup: Where to keep what was at `path` before; None keeps nothing.

    Yields:
        The temporary file to write.

    Raises:
        WorkFailed: If the system refuses to write; what was at `path` is unchanged.
    """
    part = _part_path(path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            replace_path(path, backup)
        replace_path(part, path)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        raise WorkFailed(
            f"cannot write {printable(str(path))}: {reason}; what was there before is unchanged"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(*paths: str | os.PathLike[str] | None) -> None:
    """Check that files can be written, before the work that they are for.

    Args:
        *paths: The files; None is skipped.

    Raises:
        UsageError: If a path is a folder, or its parent folder does not exist.
    """
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise UsageError(f"{printable(str(path))} is a folder: give the name of a file")
        if not path.parent.is_dir():
            folder = printable(str(path.parent))
            raise UsageError(
                f"there is no folder {folder} to write {printable(path.name)} into: create it"
            )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside `path` and move it to `path` once it is complete and on the disk.

    Args:
        path: The folder to create; an empty folder may exist there.

    Yields:
        The temporary folder to fill.

    Raises:
        WorkFailed: If the system refuses to write.
    """
    part = _part_path(path)
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        replace_path(part, path)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        raise WorkFailed(f"cannot write {printable(str(path))}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def os_error_reason(error: BaseException | None) -> str | None:
    """Return why the operating system refused something.

    Libraries raise errors of their own because of an OSError, so the causes are searched for one.

    Args:
        error: The exception.

    Returns:
        The system's message; None if no OSError is the cause, or the error is one of ours.
    """
    if isinstance(error, UsageError | WorkFailed):
        return None
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return None if error is None else os.strerror(error.errno or 0)


def remove_stale_parts(folder: Path, name: str = "") -> None:
    """Delete the temporary files that killed processes left behind.

    Args:
        folder: The folder to clean.
        name: The file that the temporary files were for; by default any.
    """
    for part in folder.glob(f"{glob.escape(name) or '*'}.*.part"):
        pid = part.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with suppress(OSError):
                _remove(part)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # a worker of a killed process may still finish its file


def _part_path(path: Path) -> Path:
    """Return the temporary path for `path`, after deleting those of killed processes."""
    remove_stale_parts(path.parent, path.name)
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextmanager
def file_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a file against other processes; the lock ends with the process, however that ends.

    On a file system without locks every process gets the lock.

    Args:
        path: The lock file, which is created if it does not exist.
        wait: Whether to wait until the lock is free.

    Yields:
        Whether this process has the lock.

    Raises:
        UsageError: If the lock file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        folder, reason = printable(str(path.parent)), error.strerror or error
        raise UsageError(f"cannot write to {folder}: {reason}") from None
    with file:
        if not try_lock(file, wait=wait):
            yield False
            return
        # On a full disk the lock holds without the text, which is for users.
        with suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield True


@contextmanager
def exclusive_lock(path: Path, work_name: str) -> Iterator[None]:
    """Run the body under a lock file, or fail if another process has the lock.

    Args:
        path: The lock file.
        work_name: What is being worked on, for the error.

    Yields:
        Nothing.

    Raises:
        UsageError: If another process has the lock, or the lock file cannot be written.
    """
    with file_lock(path) as locked:
        if not locked:
            process = path.read_text("utf-8") or "another process"
            raise UsageError(f"{work_name} is being worked on by {process}: one at a time")
        yield


def parts_folder(out: Path) -> Path:
    """Return the folder for the parts of an output, beside it.

    Args:
        out: The output.
    """
    return out.with_name(f"{out.name}.parts")


@contextmanager
def locked_work_folder(out: Path) -> Iterator[Path]:
    """Lock the folder for the parts of an output; delete it when the output is complete.

    If the body fails, the folder stays, and the parts in it are used the next time.

    Args:
        out: The output.

    Yields:
        The folder.

    Raises:
        UsageError: If another process has the lock, or the folder cannot be written.
    """
    work = parts_folder(out)
    with exclusive_lock(work / ".lock", printable(str(out))):
        yield work
        shutil.rmtree(work, ignore_errors=True)  # under the lock: nobody else works in it
    if WINDOWS:  # where an open file, such as the lock, cannot be deleted
        with suppress(OSError):
            (work / ".lock").unlink()
            work.rmdir()


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8, the same on every system, complete or not at all.

    Args:
        path: The file.
        content: The text.
    """
    with atomic_write(path) as part:
        part.write_text(content, encoding="utf-8", newline="\n")


def append_bytes(file: FileIO, data: bytes) -> None:
    """Write bytes to an unbuffered file, all of them or with an error.

    Args:
        file: The file.
        data: The bytes.

    Raises:
        OSError: Not all of them could be written.
    """
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file in UTF-8, complete or not at all.

    Args:
        path: The file.
        header: Names of the columns.
        rows: The values of each row.
    """
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def cache_dir(name: str) -> Path:
    """Return a folder in the user's cache.

    Args:
        name: Its name.

    Returns:
        The folder in $SIMSIAM_CACHE, or in the system's place for caches.
    """
    root = os.environ.get("SIMSIAM_CACHE") or user_cache_dir("simsiam", appauthor=False)
    return Path(os.path.expanduser(root), name)


@contextmanager
def writable_cache() -> Iterator[None]:
    """Use a temporary folder as the cache while the body runs, if the user's cannot be written.

    Yields:
        Nothing.
    """
    root = cache_dir("")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        temporary = user_temporary_folder()
        text = (
            f"the cache {root} cannot be written to ({error.strerror or error}): {temporary} is "
            "used instead; SIMSIAM_CACHE names another folder"
        )
        print(printable(text), file=sys.stderr)
    else:
        yield
        return
    previous = os.environ.get("SIMSIAM_CACHE")
    os.environ["SIMSIAM_CACHE"] = str(temporary)
    try:
        yield
    finally:
        del os.environ["SIMSIAM_CACHE"]
        if previous is not None:
            os.environ["SIMSIAM_CACHE"] = previous


def start_or_continue_job(work_folder: Path, job: Mapping[str, object]) -> None:
    """Prepare a folder for work in parts, keeping the parts of the same unfinished job.

    Call it under a lock on the folder.

    Args:
        work_folder: The folder, which exists.
        job: What determines the result, to be stored as JSON.

    Raises:
        UsageError: If the folder holds the parts of another job that was not finished.
    """
    description, record = json.dumps(job, indent=2), work_folder / "job.json"
    if not record.exists():
        for path in work_folder.glob("[!.]*"):  # a finished job was killed while it cleaned up
            _remove(path)
        write_text(record, description)
    if record.read_text("utf-8") != description:
        raise UsageError(
            f"{work_folder} holds the parts of another job, which was not finished: "
            "delete it, or change --out"
        )
    for part in [*work_folder.rglob("*.part")]:  # of processes that have ended, or are about to
        _remove(part)
