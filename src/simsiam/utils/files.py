"""Files that appear complete or not at all, and locks between processes."""

import csv
import errno
import glob
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO

import psutil
from platformdirs import user_cache_dir

from simsiam.errors import UsageError, WorkFailed, printable, truncate
from simsiam.utils.read_files import read_text
from simsiam.utils.system import (
    WINDOWS,
    check_no_link,
    guard_folder,
    open_folder,
    open_own,
    replace_path,
    sync_folder,
    try_lock,
    user_temporary_folder,
)

# The marks of this program: only what has one of these names is ever deleted.
PART_NAME = re.compile(r"\.simsiam-([0-9]{1,9})\.part$")  # with the process that writes the file
WORK_FILE = ".simsiam-lock"  # in the folder for the parts of an output
CACHE_BYTES = 2**18  # that a cache must have room for, to be used
OUTPUT_ENDINGS = (".csv", ".tsv", ".txt", ".html", ".htm")  # of tables and pages
# What spreadsheets take for a formula, in any width, or would after an apostrophe is removed; and
# what they take for a number.
FORMULA = re.compile("'*[=+\\-@\\t\\r\\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?[0-9][0-9.]*(e[+-]?[0-9]+)?( ± [0-9.]+)?( %)?")


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
    part, replaced = _part_path(path), False
    try:
        with open_folder(path.parent) as folder:
            _remove_parts(path)
            open_own(part, "xb").close()
            yield part
            _sync_file(part)
            kept = backup if backup is not None and path.exists() else None
            if kept is not None:
                replace_path(path, kept, folder)
            try:
                replace_path(part, path, folder)
            except OSError:
                if kept is not None:
                    replace_path(kept, path, folder)
                raise
            replaced = True
            sync_folder(folder)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        unchanged = "" if replaced else "; what was there before is unchanged"
        raise WorkFailed(f"cannot write {printable(str(path))}: {reason}{unchanged}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def check_writable(
    *paths: str | os.PathLike[str] | None, inputs: Sequence[str | os.PathLike[str]] = ()
) -> None:
    """Check that files can be written, before the work that they are for.

    Args:
        *paths: The files; None is skipped.
        inputs: The files and folders that are read, and must not be written over.

    Raises:
        UsageError: If a path is a folder, its parent folder does not exist, or it is an input or a
            file of one that is neither a table nor a page.
    """
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise UsageError(f"{printable(str(path))} is a folder: give the name of a file")
        if not path.parent.is_dir():
            folder = printable(str(path.parent))
            raise UsageError(
                f"there is no folder {folder} to write {printable(path.name)} into: create it"
            )
        if any(path.exists() and _is_input(path, given) for given in inputs):
            raise UsageError(
                f"{printable(str(path))} exists, and this command may read it: give the output "
                "another name"
            )


def _is_input(path: Path, given: str | os.PathLike[str]) -> bool:
    """Whether an existing file is an input, or in a folder of inputs and neither table nor page."""
    if os.path.isdir(given):
        is_output = path.suffix.lower() in OUTPUT_ENDINGS
        return not is_output and Path(given).resolve() in path.resolve().parents
    return os.path.exists(given) and path.samefile(given)


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
        with open_folder(path.parent, create=True) as folder:
            _remove_parts(path)
            part.mkdir()
            yield part
            for place, _, names in os.walk(part, topdown=False):
                for name in names:
                    _sync_file(Path(place, name))
                with open_folder(Path(place)) as inner:
                    sync_folder(inner)
            replace_path(part, path, folder)
            sync_folder(folder)
    except Exception as error:
        if (reason := os_error_reason(error)) is None:
            raise
        raise WorkFailed(f"cannot write {printable(str(path))}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync_file(path: Path) -> None:
    """Put a file onto the disk."""
    with open_own(path, "rb+") as file:
        os.fsync(file.fileno())


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


def stale_parts(folder: Path, name: str = "") -> list[Path]:
    """List the temporary files and folders that killed processes left behind.

    Args:
        folder: The folder that they are in.
        name: The file that they were for; by default any.
    """
    return [
        part
        for part in folder.glob(f"{glob.escape(name) or '*'}.simsiam-*.part")
        if (match := PART_NAME.search(part.name)) and not psutil.pid_exists(int(match[1]))
    ]


def remove_stale_parts(folder: Path, name: str = "") -> None:
    """Delete what `stale_parts` lists.

    Args:
        folder: The folder that they are in.
        name: The file that they were for; by default any.
    """
    for part in stale_parts(folder, name):
        with suppress(OSError):
            _remove(part)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # a worker of a killed process may still finish its file


def _part_path(path: Path) -> Path:
    """Return the temporary path for `path`."""
    return path.with_name(f"{path.name}.simsiam-{os.getpid()}.part")


def _remove_parts(path: Path) -> None:
    """Delete the temporary files for `path` of killed processes, of one with our number too."""
    remove_stale_parts(path.parent, path.name)
    _remove(_part_path(path))


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
    with ExitStack() as stack:
        try:
            make_folder(path.parent)
            file = stack.enter_context(open_own(path, "ab"))
            locked = try_lock(file, wait=wait)
        except OSError as error:
            folder, reason = printable(str(path.parent)), error.strerror or error
            raise UsageError(f"cannot write to {folder}: {reason}") from None
        # On a full disk the lock holds without the text, which is for users. A file with a second
        # name may be someone's own file there.
        with suppress(OSError):
            if locked and os.fstat(file.fileno()).st_nlink == 1:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield locked


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
            process = printable(truncate(read_text(path, errors="replace"))) or "another process"
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
        UsageError: If another process has the lock, the folder cannot be written, or what is in its
            place is not of this program.
    """
    work = parts_folder(out)
    if not os.path.lexists(work):
        try:
            with atomic_folder(work) as part:
                open_own(part / WORK_FILE, "xb").close()
        except WorkFailed:
            if not os.path.lexists(work):  # no other process was faster
                raise
    check_no_link(work, os.lstat(work))
    if not os.path.lexists(work / WORK_FILE):
        raise UsageError(
            f"{printable(str(work))} is in the way of the parts of {printable(out.name)}, and not "
            "of this program: move it away, or choose another --out"
        )
    guard_folder(work)
    with exclusive_lock(work / WORK_FILE, printable(str(out))):
        yield work
        delete_parts(out)
    if WINDOWS:  # where an open file, such as the lock, cannot be deleted
        delete_parts(out)


def delete_parts(out: Path) -> None:
    """Delete the folder for the parts of an output. Call it under the lock on the folder.

    Args:
        out: The output.
    """
    work = parts_folder(out)
    with suppress(OSError):
        for path in work.iterdir():
            if path.name != WORK_FILE:
                _remove(path)
        (work / WORK_FILE).unlink()  # the mark goes last: a kill leaves nothing without it
        work.rmdir()


def delete_parts_of_finished(out: Path) -> None:
    """Delete the parts of an output that is complete, if a kill has kept them from being deleted.

    Args:
        out: The output, which exists.
    """
    if os.path.lexists(parts_folder(out) / WORK_FILE):
        with suppress(UsageError), locked_work_folder(out):  # unless another process works there
            pass


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Args:
        path: The folder.

    Raises:
        OSError: The system refuses.
        UsageError: It is behind a link in a guarded folder.
    """
    with open_folder(path, create=True):
        pass


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
        write_csv_rows(file, [header, *rows])


def write_csv_rows(file: IO[str], rows: Iterable[Sequence[object]], line_end: str = "\r\n") -> None:
    """Write rows of a CSV file that a spreadsheet takes as data, not as formulas.

    Args:
        file: The open file.
        rows: The values of each row.
        line_end: What ends a row.
    """
    plain = csv.writer(file, lineterminator=line_end)
    quoted = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC)
    for row in rows:
        cells = [spreadsheet_text(cell) if isinstance(cell, str) else cell for cell in row]
        # Some spreadsheets separate cells at these too.
        separable = any(isinstance(cell, str) and re.search("[;\t]", cell) for cell in cells)
        (quoted if separable else plain).writerow(cells)


def spreadsheet_text(text: str) -> str:
    """Mark a text that a spreadsheet would run as a formula: with an apostrophe before it.

    Args:
        text: The text of a cell.

    Returns:
        The text; `plain_text` undoes the mark.
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def plain_text(text: str) -> str:
    """Undo `spreadsheet_text`.

    Args:
        text: The text of a cell.
    """
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def keep_fonts_in_cache() -> None:
    """Make matplotlib keep its list of fonts in this program's cache, and nothing elsewhere."""
    if "matplotlib" not in sys.modules:
        os.environ.setdefault("MPLCONFIGDIR", str(cache_dir("matplotlib")))


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

    Its disk may be full.

    Yields:
        Nothing.
    """
    root = cache_dir("")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(bytes(CACHE_BYTES))
            file.flush()
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
    if read_text(record) != description:
        raise UsageError(
            f"{work_folder} holds the parts of another job, which was not finished: "
            "delete it, or change --out"
        )
    for part in [*work_folder.rglob("*.part")]:  # of processes that have ended, or are about to
        _remove(part)
