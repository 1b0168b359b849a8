"""What depends on the operating system. Everything outside of this module is portable.

`simsiam --help` imports it, so it imports what takes long where it is used.
"""

import ctypes
import errno
import os
import platform
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from io import FileIO
from math import nan
from pathlib import Path
from shutil import disk_usage
from typing import IO, TYPE_CHECKING

from simsiam.errors import UsageError, printable

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from typing_extensions import Buffer
if sys.platform == "win32":
    import msvcrt
else:
    import fcntl
    import resource

WINDOWS = sys.platform == "win32"
LOCKED_BYTE = 2**30  # the byte that is locked on Windows, behind the text, which others can read
LOCK_POLLING_SECONDS = 0.05
REPLACE_SECONDS = 2.0  # time in which another program on Windows has to close a file
SHARED_MEMORY = "/dev/shm"  # where data workers put the crops that they have made
JUNCTION = 0xA0000003  # the tag of a folder on Windows that leads to another one
_guarded = set[str]()  # folders below which no link is followed
# Ctrl-C, the request to end, and on Windows Ctrl-Break, which also stands for a closed window.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)


def count_cores() -> int:
    """Return how many processor cores this process may use."""
    if sys.platform == "darwin":
        return os.cpu_count() or 1
    import psutil

    return len(psutil.Process().cpu_affinity())


def cpu_name() -> str:
    """Return the name of the processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    if sys.platform == "darwin":
        import subprocess

        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(command, encoding="utf-8").strip()
    return platform.processor() or platform.machine()


def gpu_devices() -> list[str]:
    """List NVIDIA's GPUs without initializing CUDA; none where the system does not list them."""
    return sorted(glob("/dev/nvidia[0-9]*"))


def available_memory() -> int:
    """Return the main memory that this process can still allocate, in bytes."""
    import psutil

    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # a container's limit; "max" if it has none
        group = Path("/sys/fs/cgroup")
        limit, used = (
            int((group / name).read_text(encoding="utf-8"))
            for name in ("memory.max", "memory.current")
        )
        available = min(available, limit - used)
    return available


def peak_memory(*, reset: bool = False) -> float:
    """Return the most main memory that this process has used at once.

    Args:
        reset: Whether to set the peak to the current use first.

    Returns:
        MiB; nan if the system does not say, as only Linux does.
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return nan
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def limit_process(*, memory: int | None = None, cpu_seconds: int | None = None) -> None:
    """Limit what this process may use from now on. It cannot be limited on Windows.

    Args:
        memory: Bytes of address space. macOS does not keep to it.
        cpu_seconds: Seconds of processor time, after which the process is ended by SIGXCPU.
    """
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if memory is not None:
            with suppress(ValueError):  # macOS refuses less than what is in use
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if cpu_seconds is not None:
            used = int(time.process_time()) + 1
            _, hard = resource.getrlimit(resource.RLIMIT_CPU)
            resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_seconds, hard))


def free_shared_memory() -> int | None:
    """Return the bytes of shared memory that are free; None where the system has no such limit."""
    return disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory: the next step needs as much, and mapping new pages is slow."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    with suppress(AttributeError, OSError, TypeError):  # macOS, Windows and musl have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def yield_core() -> None:
    """Let another process use the core, if one waits for it."""
    if sys.platform == "linux":
        os.sched_yield()
    else:
        time.sleep(0)


def lower_thread_priority() -> None:
    """Let others go first from now on; Linux alone can do this for a thread and those it starts."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)


def process_context() -> "BaseContext":
    """Return how processes are started.

    Linux forks, which is much the fastest, also from Python 3.14 on, where that is no longer the
    default. Other systems start a new interpreter. `multiprocessing.set_start_method` decides
    otherwise.

    Returns:
        A context of multiprocessing.

    Raises:
        UsageError: A new interpreter would import the running script, which would start again.
    """
    from multiprocessing import get_context, get_start_method

    default = "fork" if sys.platform == "linux" else "spawn"
    method = get_start_method(allow_none=True) or default
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull)
    guarded = not script.is_file() or "__name__" in script.read_text("utf-8", "replace")
    if method != "fork" and not guarded:
        raise UsageError(
            f"each process that {printable(str(script))} starts will import it: put what it runs "
            'under `if __name__ == "__main__":`'
        )
    return get_context(method)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Delay the stop signals until the body has run. Windows cannot delay them.

    An exception that a signal handler raises in the middle of a fork would be lost.

    Yields:
        Nothing.
    """
    if sys.platform == "win32":
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def unblock_stop_signals() -> None:
    """Deliver the stop signals that `block_stop_signals` of a parent process delays."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def is_broken_pipe(error: BaseException) -> bool:
    """Return whether the reader of a pipe has ended, as in `... | head`.

    Args:
        error: What writing into the pipe raised. Windows calls it an invalid argument.
    """
    invalid = isinstance(error, OSError) and error.errno == errno.EINVAL and not error.filename
    return isinstance(error, BrokenPipeError) or (WINDOWS and invalid)


def try_lock(file: FileIO, *, wait: bool = False) -> bool:
    """Lock an open file against other processes until it is closed.

    On POSIX it is a record lock and not flock: data workers, which outlive a killed process by
    seconds, do not inherit it, and NFS keeps it between hosts. On a file system without locks every
    process gets the lock.

    Args:
        file: A file that is open for writing.
        wait: Whether to wait until the lock is free.

    Returns:
        Whether this process has the lock.

    Raises:
        OSError: The system cannot lock it for another reason.
    """
    while True:
        try:
            if sys.platform == "win32":
                os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return True
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise
            if not wait:
                return False
            time.sleep(LOCK_POLLING_SECONDS)


def guard_folder(path: str | os.PathLike[str]) -> None:
    """From now on, follow no link below a folder when a file in it is opened, locked or moved.

    Args:
        path: The folder. It may be a link itself, or be reached through one.
    """
    _guarded.add(os.path.normcase(os.path.abspath(path)))


def find_guarded(path: str | os.PathLike[str]) -> Path | None:
    """Return the guarded folder that a path lies in: the outermost one; None if there is none.

    Args:
        path: The path.
    """
    path = Path(os.path.abspath(path))
    folders = [folder for folder in (path, *path.parents) if os.path.normcase(folder) in _guarded]
    return folders[-1] if folders else None


def check_no_link(path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Check that a path leads to no other: it is no symbolic link, and on Windows no junction.

    Args:
        path: The path, for the error.
        status: What `os.lstat` says of it.

    Raises:
        UsageError: It does.
    """
    if stat.S_ISLNK(status.st_mode) or getattr(status, "st_reparse_tag", 0) == JUNCTION:
        raise UsageError(
            f"{printable(os.fspath(path))} is a link, and nothing is read or written through it: "
            "put the file or folder itself in its place"
        )


def check_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    """Check that a file is a regular one: a pipe or a device would block, or never end.

    Args:
        path: Its path, for the error.
        status: What the system says of it.

    Raises:
        UsageError: It is something else.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise UsageError(f"{printable(os.fspath(path))} is {kind}, not a regular file")


def _status(path: Path, folder: int | None) -> os.stat_result:
    return os.stat(_at(path, folder), dir_fd=folder, follow_symlinks=False)


def _at(path: Path, folder: int | None) -> Path:
    """Return how a file is named beside the descriptor of its folder."""
    return path if folder is None else Path(path.name)


@contextmanager
def open_folder(path: Path, *, create: bool = False) -> Iterator[int | None]:
    """Open a folder, following no link below a guarded folder.

    Args:
        path: The folder.
        create: Whether to make it and the folders above it, where they are missing.

    Yields:
        A descriptor of it; None on Windows, which has none. There links are looked for.

    Raises:
        OSError: The system refuses.
        UsageError: It is behind a link.
    """
    path = Path(os.path.abspath(path))
    place = find_guarded(path) or path
    if create:
        place.mkdir(parents=True, exist_ok=True)
    folder = None
    if sys.platform != "win32":
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in path.relative_to(place).parts:
            place /= name
            try:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(_at(place, folder), dir_fd=folder)
                check_no_link(place, _status(place, folder))
                if sys.platform != "win32" and folder is not None:
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    outer, folder = folder, os.open(name, flags, dir_fd=folder)
                    os.close(outer)
            except OSError as error:
                error.filename = os.fspath(place)
                raise
        yield folder
    finally:
        if folder is not None:
            os.close(folder)


class NamedFile(FileIO):
    """A file whose errors in reading say its path; the system does not."""

    def readinto(self, buffer: "Buffer") -> int | None:
        """Read into a buffer; return the number of bytes."""
        with self._named():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Read all that is left."""
        with self._named():
            return super().readall()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = os.fspath(self.name)
            raise


def open_own(path: Path, mode: str) -> NamedFile:
    """Open or create a file of this program, unbuffered: a regular file, and no link to one.

    It is looked at before it is touched.

    Args:
        path: The file.
        mode: A mode of `open`, binary.

    Returns:
        The open file.

    Raises:
        OSError: The system refuses.
        UsageError: It is something else, or it is behind a link below a guarded folder.
    """

    def opener(_: str, flags: int) -> int:
        if sys.platform != "win32":
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        with open_folder(path.parent) as folder:
            try:
                with suppress(FileNotFoundError):
                    check_no_link(path, status := _status(path, folder))
                    check_regular(path, status)
                return os.open(_at(path, folder), flags, 0o666, dir_fd=folder)
            except OSError as error:
                error.filename = os.fspath(path)
                raise

    return NamedFile(os.fspath(path), mode, opener=opener)


def sync_folder(folder: int | None) -> None:
    """Put onto the disk which files a folder has. Windows does so itself.

    Args:
        folder: What `open_folder` yielded.

    Raises:
        OSError: The disk fails.
    """
    if folder is not None:
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not on this file system
                raise


def open_nonblocking(path: str, flags: int) -> int:
    """Open a file without waiting for the other end of a pipe; an `opener` of `open`.

    Args:
        path: The file.
        flags: The flags of `os.open`.

    Returns:
        A file descriptor.
    """
    if sys.platform != "win32":
        flags |= os.O_NONBLOCK
    return os.open(path, flags)


def read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    """Read a part of a file.

    Args:
        file: The open file.
        offset: The first byte.
        size: Number of bytes.

    Returns:
        The bytes; fewer if the file ends before.
    """
    if sys.platform != "win32":
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


def replace_path(source: Path, target: Path, folder: int | None = None) -> None:
    """Move a file or folder to `target`, in place of a file or of an empty folder.

    Windows refuses while another program has the file open, as virus scanners do for a moment,
    and where a folder exists.

    Args:
        source: What to move.
        target: Where to.
        folder: A descriptor of the folder that both are in, from `open_folder`; None if there is
            none.

    Raises:
        OSError: The system refuses.
    """
    if WINDOWS and source.is_dir():
        with suppress(OSError):
            target.rmdir()
    deadline = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            names = _at(source, folder), _at(target, folder)
            os.replace(*names, src_dir_fd=folder, dst_dir_fd=folder)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(LOCK_POLLING_SECONDS)


def user_temporary_folder() -> Path:
    """Return a temporary folder of this user: the same every time, if nobody else can write it."""
    import tempfile

    folder = Path(tempfile.gettempdir(), "simsiam")
    with suppress(OSError):
        if sys.platform == "win32":  # where each user has a folder for temporary files
            folder.mkdir(exist_ok=True)
            return folder
        folder = folder.with_name(f"simsiam-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if own and not status.st_mode & 0o022:
            return folder
    return Path(tempfile.mkdtemp(prefix="simsiam-"))
