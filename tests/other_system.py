"""Run every verb as if the package were on another system.

    python tests/other_system.py win32|darwin FOLDER

Third-party packages and the standard library keep what they need. Only this package sees the other
system: it imports `os`, `signal` and `sys` without what that system lacks, cannot import the
modules that it lacks, and starts processes as it does. As `win32`, a file that is open or mapped
can be neither deleted nor replaced, a locked file is locked for every other handle, and the names
of all files that were written have to be possible there.
"""

import builtins
import importlib
import json
import os
import sys
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import torchvision  # noqa: F401

SYSTEM = sys.argv[1]
MISSING_MODULES = {
    "win32": {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix"},
    "darwin": {"msvcrt"},
}[SYSTEM]
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
            "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate",
            "memfd_create", "copy_file_range", "O_TMPFILE", "O_DIRECT", "splice",
        ],
        "signal": ["sigtimedwait", "sigwaitinfo", "SIGRTMIN"],
    },
}[SYSTEM]  # fmt: skip
RESERVED = {"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(10))}
import_module = builtins.__import__


def stand_in_msvcrt() -> types.ModuleType:
    """`msvcrt.locking` locks a byte for all other handles, of this process too, as flock does."""
    import fcntl

    module = types.ModuleType("msvcrt")
    module.LK_NBLCK, module.LK_UNLCK = 2, 0  # type: ignore[attr-defined]

    def locking(descriptor: int, mode: int, num_bytes: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(13, "Permission denied") from None

    module.locking = locking  # type: ignore[attr-defined]
    return module


def stand_in(name: str) -> types.ModuleType:
    """A module without what the other system lacks."""
    real = importlib.import_module(name)
    module = types.ModuleType(name)
    lacks = MISSING.get(name, [])
    module.__dict__.update({k: v for k, v in vars(real).items() if k not in lacks})
    if name == "sys":
        module.platform = SYSTEM  # type: ignore[attr-defined]
    return module


STAND_INS = {name: stand_in(name) for name in ("os", "signal", "sys")}
if SYSTEM == "win32":
    STAND_INS["msvcrt"] = stand_in_msvcrt()


def import_as_there(name, globals=None, locals=None, fromlist=(), level=0):
    """The import statement, which gives this package the other system's modules."""
    importer = (globals or {}).get("__name__") or ""
    if importer == "simsiam" or importer.startswith("simsiam."):
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in STAND_INS:
            return STAND_INS[name]
    return import_module(name, globals, locals, fromlist, level)


def open_files() -> set[str]:
    """The files that this process has open or mapped."""
    process = psutil.Process()
    return {file.path for file in process.open_files()} | {m.path for m in process.memory_maps()}


def as_on_windows(function):
    """Refuse to delete or replace what is open, and to replace folders."""

    def checked(*paths, **words):
        texts = [os.path.realpath(os.fsdecode(path)) for path in paths if not isinstance(path, int)]
        for text in texts:
            if text.startswith(str(FOLDER)) and os.path.isfile(text) and text in open_files():
                raise PermissionError(13, "The process cannot access the file", text)
        if len(texts) == 2 and os.path.isdir(texts[1]):
            raise PermissionError(13, "Access is denied", texts[1])
        if len(texts) == 2 and os.path.isdir(texts[0]):
            inside = [path for path in open_files() if path.startswith(texts[0] + os.sep)]
            if inside:
                raise PermissionError(13, "The process cannot access the file", inside[0])
        return function(*paths, **words)

    return checked


FOLDER = Path(sys.argv[2]).resolve()
builtins.__import__ = import_as_there
if SYSTEM == "win32":
    for name in ("replace", "rename", "unlink", "remove"):
        checked = as_on_windows(getattr(os, name))
        setattr(os, name, checked)
        setattr(STAND_INS["os"], name, checked)
else:
    del psutil.Process.cpu_affinity


def write_images(folder: Path, count: int) -> None:
    """Write drawn images of two classes."""
    from simsiam.sources.shapes import draw_split

    images, labels = draw_split("train")
    for i in range(count):
        place = folder / f"class {labels[i] % 2}"
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.moveaxis(images[i], 0, -1)).save(place / f"{i:03}.png")


def commands() -> list[str]:
    """A small command line for each verb; "|" stands between arguments."""
    small = "--backbone|resnet10|--width|4|--dim|16|--proj-hidden|16|--pred-dim|4|--image-size|32"
    small += "|--batch-size|16|--holdout|8|--workers|2|--out|run"
    embedding = "features.parquet"
    return [
        "methods",
        "inspect|photos|--out|facts.json",
        "plan|photos",
        "preview|photos|--out|views.png",
        f"pretrain|photos|--epochs|2|{small}",
        "resume|run|--epochs|3",
        "evaluate|run|--protocol|knn|label_free",
        "report|run",
        "embed|run|photos|--out|features.parquet",
        f"neighbors|{embedding}|photos/class 0/{FIRST}|--html|neighbors.html",
        f"duplicates|{embedding}|--html|copies.html",
        f"cluster|{embedding}|--clusters|2|--out|clusters.csv",
        f"outliers|{embedding}",
        f"probe|{embedding}|labels.csv|--out|predicted.csv",
        f"search|photos|photos/class 0/{FIRST}|--encoder|run",
        f"search|photos|photos/class 0/{FIRST}|--encoder|run",
        "shard|photos|--out|shards",
        "embed|run|shards|--out|features2.parquet",
        "export|run|--format|safetensors",
        "convert|run|--out|converted",
        "adapt|photos|--minutes|1|--out|adapted",
        "transfer|run|scenes|--steps|2|--batch-size|2|--precise-bn|0|--test-side|64|--train-sides|64",
        "compare|run|adapted",
        "reproduce|figure3",
    ]


def main() -> None:
    """Run the verbs, and check the names of what they wrote."""
    from simsiam.commands.main import main as run

    os.chdir(FOLDER)
    failed = []
    for command in commands():
        with suppress(SystemExit):
            code = run(command.split("|"))
            print(f"{SYSTEM}: simsiam {command.replace('|', ' ')}: exit {code}", flush=True)
            failed += [command] if code else []
    names = [path for path in FOLDER.rglob("*") if "photos" not in path.parts]
    for path in names:
        stem = path.name.partition(".")[0].lower()
        if set('<>:"|?*\\') & set(path.name) or path.name[-1] in ". " or stem in RESERVED:
            failed.append(f"cannot be a name on Windows: {path}")
    lower = [str(path).lower() for path in names]
    failed += [f"differs in case alone: {text}" for text in lower if lower.count(text) > 1]
    print(json.dumps(failed))


if __name__ == "__main__":
    os.environ["SIMSIAM_CACHE"] = str(FOLDER / "cache")
    write_images(FOLDER / "photos", 48)
    from simsiam.detection.scenes import write_scenes

    write_scenes(FOLDER / "scenes", {"train": 8, "val": 4, "test": 4})
    FIRST = sorted((FOLDER / "photos/class 0").iterdir())[0].name
    (FOLDER / "labels.csv").write_text(
        "path,label\n"
        + "".join(
            f"{p.parent.name}/{p.name},{p.parent.name}\n"
            for p in sorted((FOLDER / "photos").rglob("*.png"))[::5]
        )
    )
    main()
