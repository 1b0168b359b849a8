"""Make this package believe that it is on another system: SIMSIAM_TEST_SYSTEM is win32 or darwin.

    SIMSIAM_TEST_SYSTEM=win32 PYTHONPATH=tests/other_system python -m simsiam ...

Python imports this file when it starts. Third-party packages and the standard library keep what
they need. Only modules of the package see the other system: they get `os`, `signal` and `sys`
without what that system lacks, cannot import the modules that it lacks, and start processes as it
does. As win32, a file that is open or mapped can be neither deleted nor replaced, and a locked file
is locked for every other handle, of the same process too.
"""

import builtins
import importlib
import os
import types

SYSTEM = os.environ.get("SIMSIAM_TEST_SYSTEM")
MISSING_MODULES = {
    "win32": {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"},
    "darwin": {"msvcrt"},
}
MISSING = {
    "win32": {
        "os": [
            "O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "pread", "pwrite", "preadv",
            "sched_yield", "sched_getaffinity", "getuid", "geteuid", "getgid", "getpgid", "setsid",
            "fork", "forkpty", "killpg", "mkfifo", "mknod", "statvfs", "fstatvfs", "getloadavg",
            "uname", "chown", "lchown", "sync", "fdatasync", "posix_fadvise", "posix_fallocate",
            "nice", "getpriority", "sysconf", "register_at_fork", "sendfile", "wait", "initgroups",
            "openpty", "ttyname", "fchmod", "fchown", "memfd_create", "kill",
        ],
        "signal": [
            "pthread_sigmask", "pthread_kill", "SIGKILL", "SIGHUP", "SIGPIPE", "SIGUSR1", "SIGUSR2",
            "SIGALRM", "alarm", "setitimer", "sigwait", "siginterrupt", "SIG_BLOCK", "SIG_UNBLOCK",
        ],
    },
    "darwin": {
        "os": [
            "sched_yield", "sched_getaffinity", "sched_setaffinity", "posix_fadvise",
            "posix_fallocate", "memfd_create", "copy_file_range", "O_TMPFILE", "O_DIRECT", "splice",
        ],
        "signal": ["sigtimedwait", "sigwaitinfo", "SIGRTMIN"],
    },
}  # fmt: skip


class StandIn(types.ModuleType):
    """A module of the standard library, without what the other system lacks."""

    def __init__(self, name: str, system: str):
        super().__init__(name)
        own = {"platform": system} if name == "sys" else {}
        real, lacks = importlib.import_module(name), MISSING[system].get(name, [])
        self.__dict__.update(real=real, lacks=lacks, **own)

    def __getattr__(self, name: str) -> object:
        if name in self.lacks:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)


def stand_in_msvcrt() -> types.ModuleType:
    """`msvcrt.locking`, by flock: it too belongs to the handle, not to the process."""
    import fcntl

    module = types.ModuleType("msvcrt")
    module.LK_NBLCK = 2

    def locking(descriptor: int, mode: int, num_bytes: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None

    module.locking = locking
    return module


def open_files() -> set[str]:
    """The files that this process has open or mapped."""
    import psutil

    process = psutil.Process()
    return {file.path for file in process.open_files()} | {m.path for m in process.memory_maps()}


def refuse_open_files(function):
    """Refuse to delete or replace what is open, and to replace folders."""

    def checked(*paths, **words):
        texts = [os.path.realpath(os.fsdecode(p)) for p in paths if not isinstance(p, int)]
        if any(os.path.isfile(text) for text in texts) and not words.get("dir_fd"):
            for text in open_files() & set(texts):
                raise PermissionError(13, "The process cannot access the file", text)
        if len(texts) == 2 and os.path.isdir(texts[1]):
            raise PermissionError(13, "Access is denied", texts[1])
        if len(texts) == 2 and os.path.isdir(texts[0]):
            for text in open_files():
                if text.startswith(texts[0] + os.sep):
                    raise PermissionError(13, "The process cannot access the file", text)
        return function(*paths, **words)

    return checked


def install(system: str) -> None:
    """Give modules of the package the stand-ins from now on."""
    if system == "win32":
        for name in ("replace", "rename", "unlink", "remove"):
            setattr(os, name, refuse_open_files(getattr(os, name)))
    stand_ins = {name: StandIn(name, system) for name in ("os", "signal", "sys")}
    if system == "win32":
        stand_ins["msvcrt"] = stand_in_msvcrt()
    import_module = builtins.__import__

    def import_as_there(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__") or ""
        if importer == "simsiam" or importer.startswith("simsiam."):
            if name in MISSING_MODULES[system]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in stand_ins:
                return stand_ins[name]
        return import_module(name, globals, locals, fromlist, level)

    builtins.__import__ = import_as_there


if SYSTEM:
    install(SYSTEM)
