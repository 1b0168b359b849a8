"""Read thousands of damaged and hostile files, and check that nothing bad happens.

    python tests/stress/fuzz.py --images 20000 --containers 2000 --out results/faults/fuzz

No file may crash or hang the program, have its code run, or cause a write elsewhere. Valid files of
every format are mutated (bits, bytes, sizes, cuts, splices) and read as the verbs read them: images
by `decode_image`, containers and run folders by the command line. Other files are made by hand to
do harm. Processes forked from this one do the reading, so a crash or a hang affects one trial only.
An audit hook in each records every file opened for writing, every process started and every
connection; one in the processes that decode images ends them. Memory and time of each trial are
measured, those processes included: at most 3 GiB and 10 s. Allowed outcomes are: pixels; one short
reason; exit code 0; exit code 1 or 2 and one line. All randomness comes from --seed.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import simsiam.embeddings.neighbors
import simsiam.pages.compare
import simsiam.pages.report
import simsiam.runs.checkpoints.convert
import simsiam.sources.open_source
import simsiam.training.inspect
import simsiam.utils.workers
from simsiam.commands import main as cli
from simsiam.data import decoder_process
from simsiam.data.decode import Unreadable, decode_image, read_header
from simsiam.model.precision import Compute
from simsiam.model.siamese import build
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.sources.file_index import load_index
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_write
from simsiam.utils.system import peak_memory

HANG = 10.0  # seconds of CPU after which a trial counts as hanging
CHUNK = 200  # trials per process
MEMORY = 3 * 2**30  # bytes of memory that a trial may use
# Ends a process that decodes images if it writes, starts or connects to anything.
DECODER_HOOK = """
import os, sys
sys.dont_write_bytecode = True
def hook(event, arguments):
    started = event in ("os.system", "os.exec", "os.fork", "subprocess.Popen", "socket.connect")
    written = event == "open" and arguments[0] != os.devnull and (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ) and not isinstance(arguments[0], int)
    if started or written:
        os._exit(99)
sys.addaudithook(hook)
"""
DECODER_ESCAPED = "exit code 99"  # in the reason
decoder_process.START = DECODER_HOOK.replace("{", "{{").replace("}", "}}") + decoder_process.START
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
TINY = (
    "--backbone resnet10 --width 4 --dim 16 --proj-hidden 16 --pred-dim 4 --batch-size 16 "
    "--epochs 1 --workers 0"
)


# --- valid files ---


def pictures() -> dict[str, bytes]:
    """Make images of 48 x 40 pixels in every format and many variants."""
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 255, (6, 5, 3), np.uint8)).resize(
        (48, 40), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "hello " * 50, zip=True)
    frames: dict[str, Any] = {"save_all": True, "append_images": [low.rotate(90), low.rotate(180)]}
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (low, "JPEG", {"exif": exif}),
        "jpeg progressive": (low, "JPEG", {"progressive": True}),
        "jpeg cmyk": (low.convert("CMYK"), "JPEG", {}),
        "jpeg gray": (low.convert("L"), "JPEG", {}),
        "png": (low, "PNG", {"pnginfo": text}),
        "png palette": (low.quantize(16), "PNG", {"transparency": 3}),
        "png 16 bits": (Image.fromarray(rng.integers(0, 2**16, (40, 48), np.uint16)), "PNG", {}),
        "png rgba": (low.convert("RGBA"), "PNG", {}),
        "webp": (low, "WEBP", {}),
        "webp lossless": (low.convert("RGBA"), "WEBP", {"lossless": True}),
        "webp frames": (low, "WEBP", frames),
        "gif": (low.quantize(64), "GIF", {}),
        "gif frames": (low.quantize(16), "GIF", frames),
        "tiff": (low, "TIFF", {}),
        "tiff lzw": (low, "TIFF", {"compression": "tiff_lzw"}),
        "tiff deflate": (low.convert("L"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff jpeg": (low, "TIFF", {"compression": "jpeg"}),
        "bmp": (low, "BMP", {}),
        "bmp palette": (low.quantize(16), "BMP", {}),
        "ppm": (low, "PPM", {}),
    }
    files = {}
    for name, (image, kind, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, kind, **options)
        files[name] = file.getvalue()
    file = io.BytesIO()
    np.save(file, np.asarray(low))
    return files | {"npy": file.getvalue()}


def containers(folder: Path, images: dict[str, bytes]) -> dict[str, Path]:
    """Make valid containers, checkpoints and a run folder, by kind."""
    some = [images[name] for name in ("jpeg", "png", "gif", "webp") for _ in range(5)]
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(some):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", data)
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for i, data in enumerate(some):
            info = tarfile.TarInfo(f"{'ab'[i % 2]}/{'long' * 30 if i == 3 else ''}{i}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    rows = [{"bytes": data, "path": None} for data in some]
    metadata = {
        "info": {
            "features": {
                "image": {"_type": "Image"},
                "label": {"_type": "ClassLabel", "names": ["a", "b"]},
            }
        }
    }
    table = pa.table({"image": rows, "label": [i % 2 for i in range(len(rows))]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), folder / "a.parquet"
    )
    before = Path.cwd()
    os.chdir(folder)
    (folder / "photos").mkdir()
    for i in range(20):
        shade = np.full((32, 32, 3), 10 * i, np.uint8)
        Image.fromarray(shade).save(folder / "photos" / f"{i}.png")
    code, output = run_verb(["pretrain", "photos", "--out", "run", *TINY.split()])
    assert code == 0, output
    code, output = run_verb(["embed", "run", "--out", "e.parquet"])
    assert code == 0, output
    for kind in ("tar", "parquet"):
        code, output = run_verb(
            ["shard", "a.zip", "--out", f"{kind} shards", "--format", kind, "--per-shard", "10"]
        )
        assert code == 0, output
    cache, os.environ["SIMSIAM_CACHE"] = os.environ["SIMSIAM_CACHE"], str(folder / "kept cache")
    resident = simsiam.sources.open_source.MAX_RESIDENT_BYTES
    simsiam.sources.open_source.MAX_RESIDENT_BYTES = 0
    for kind in ("tar", "parquet"):
        open_source(str(folder / f"{kind} shards"))
    indexed(folder / "photos")
    simsiam.sources.open_source.MAX_RESIDENT_BYTES = resident
    os.environ["SIMSIAM_CACHE"] = cache
    os.chdir(before)
    weights = build("simsiam", backbone="resnet10", width=4, image_size=32).backbone.state_dict()
    torch.save({"state_dict": weights, "epoch": 3}, folder / "a.pt")
    torch.save({"state_dict": weights}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({k: v.clone() for k, v in weights.items()}, folder / "a.safetensors")
    return {
        "zip": folder / "a.zip",
        "tar": folder / "a.tar",
        "parquet": folder / "a.parquet",
        "tar shards": folder / "tar shards",
        "parquet shards": folder / "parquet shards",
        "checkpoint": folder / "a.pt",
        "old checkpoint": folder / "old.pth",
        "safetensors": folder / "a.safetensors",
        "run folder": folder / "run",
        "embedding": folder / "e.parquet",
        "cache": folder / "kept cache",
    }


# --- mutations ---


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Make one to six changes to the data, half of them near its beginning or end."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        if not result:
            break
        near = rng.choice([len(result), len(result), min(96, len(result))])
        at = rng.randrange(near) if rng.random() < 0.85 else len(result) - 1 - rng.randrange(near)
        kind = rng.randrange(9)
        if kind < 3:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            result[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 4:
            form = rng.choice(["<H", ">H", "<I", ">I"])
            number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.randrange(2**32)
            size = struct.calcsize(form)
            result[at : at + size] = struct.pack(form, number & (2 ** (8 * size) - 1))
        elif kind == 5:
            del result[at : at + rng.choice([1, 4, 64, len(result)])]
        elif kind == 6:
            result[at:at] = result[at : at + rng.choice([1, 4, 64, 4096])]
        elif kind == 7:
            start = rng.randrange(len(other))
            result[at:at] = other[start : start + rng.choice([4, 64, 4096])]
        else:
            result[at:at] = rng.randbytes(rng.choice([1, 4, 64]))
    return bytes(result)


# --- trials in watched processes ---

WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "socket.connect",
    "pty.spawn",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
events: list[str] = []  # what the hook has recorded since the last trial
allowed_folders: list[str] = []  # where files may be written; empty: record nothing


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not allowed_folders:
        return
    paths: list[Any] = []
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, str | bytes) and (
            flags & WRITES if isinstance(flags, int) else set(mode or "") & set("wax+")
        ):
            paths = [path]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        paths = [arguments[0]]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = [arguments[1]]
    elif event in WATCHED and not is_expected(arguments):
        events.append(f"{event} {arguments!r}"[:200])
    for path in paths:
        where = (
            os.path.realpath(os.fsdecode(path))
            if isinstance(path, str | bytes | os.PathLike)
            else ""
        )
        if (
            where
            and where != "/dev/null"
            and not any(where.startswith(folder) for folder in allowed_folders)
        ):
            events.append(f"{event} {where}")


def is_expected(arguments: tuple[Any, ...]) -> bool:
    """Return whether a process is started for the commit, for the cores, or to decode images."""
    if any(program in arguments[:1] for program in ("git", "lscpu")):
        return True
    return len(arguments) > 1 and any(
        isinstance(word, str) and word.startswith(DECODER_HOOK) for word in arguments[1]
    )


def run_verb(arguments: list[str]) -> tuple[int, str]:
    """Run a command line; return its exit code and output. Exceptions are not caught."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = cli.main(arguments)
        except SystemExit as error:
            code = int(error.code or 0)
    return code, output.getvalue()


def check_verb(arguments: list[str]) -> tuple[str, str]:
    """Run a command line. Return its outcome, and what is wrong with it."""
    code, output = run_verb(arguments)
    line = (output.strip().splitlines() or [""])[-1]
    if code not in (0, 1, 2) or (code and not line.startswith("simsiam: ")):
        return "", f"exit code {code}: {output[-300:]}"
    if code and len(line) > 2000:
        return "", f"a line of {len(line)} characters"
    if any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in output):
        return "", f"control characters: {output[:300]!r}"
    return ("done" if code == 0 else "one line"), ""


def one_image(data: bytes, rng: random.Random) -> tuple[str, str]:
    channels = rng.choice([3, 3, 3, 1, 4])
    try:
        read_header(data, channels)
        pixels = decode_image(data, channels, rng.choice([0, 0, 16]))
    except Unreadable as error:
        reason = str(error)
        fine = reason.isprintable() and len(reason) < 300 and DECODER_ESCAPED not in reason
        return "a reason", "" if fine else f"the reason {reason!r}"
    fine = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == channels
    return "pixels", "" if fine else f"pixels {pixels.dtype} {pixels.shape}"


def one_source(path: Path) -> tuple[str, str]:
    """Open a source and read its images, as training does."""
    try:
        source = open_source(str(path))
    except (simsiam.UsageError, simsiam.WorkFailed) as error:
        return "one line", "" if "\n" not in str(error) else "two lines"
    count = 0
    for images in source.splits.values():
        images = images.prefetch(np.arange(min(len(images), 50)))
        for i in range(min(len(images), 50)):
            try:
                images.read(i)
                count += 1
            except Unreadable as error:
                if DECODER_ESCAPED in str(error):
                    return "", f"the reason {error}"
    return f"{'some' if count else 'no'} pixels", ""


def indexed(folder: Path) -> tuple[str, str]:
    """Read every file as `inspect` does."""
    table = load_index([folder], open_source(str(folder))).table
    return (
        f"{sum(not reason for reason in table['reason'].to_pylist())} of {len(table)} can be read",
        "",
    )


def mutate_one(run: Path, original: Path, rng: random.Random, other: bytes) -> None:
    """Copy a run folder or shards, and mutate one file of the copy."""
    shutil.copytree(original, run)
    files = [
        path
        for path in sorted(run.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    ]
    path = rng.choice([path for path in files if path.name != ".lock"])
    path.write_bytes(mutate(path.read_bytes(), other, rng))


def one_container(
    kind: str, path: Path, work: Path, rng: random.Random, other: bytes
) -> tuple[str, str]:
    if kind == "run folder":
        mutate_one(work / "run", path, rng, other)
        orders = (
            ["report", "run", "--no-map"],
            ["compare", "run", "run"],
            ["embed", "run", str(path.parent / "photos"), "--out", "e.npy", "--device", "cpu"],
            ["resume", "run"],
        )
        ends = [check_verb(list(order)) for order in rng.sample(orders, 2)]
        return max(end[0] for end in ends), "; ".join(end[1] for end in ends if end[1])
    # Read Parquet block by block, or all of it at once.
    simsiam.sources.open_source.MAX_RESIDENT_BYTES = rng.choice([0, 2**30])
    if kind.endswith("shards"):
        mutate_one(work / "shards", path, rng, other)
        return one_source(work / "shards")
    if kind == "cache":
        return one_cache(path, work, rng, other)
    file = work / f"x{path.suffix}"
    file.write_bytes(mutate(path.read_bytes(), other, rng))
    if kind in ("zip", "tar", "parquet"):
        return one_source(file)
    if kind == "embedding":
        return check_verb(["neighbors", str(file), "0.png", "--html", "near.html"])
    return check_verb(["convert", str(file), "--out", "made"])


def one_cache(cache: Path, work: Path, rng: random.Random, other: bytes) -> tuple[str, str]:
    """Mutate one file of the cache, and open the sources that it is about."""
    mutate_one(work / "cache", cache, rng, other)
    before, os.environ["SIMSIAM_CACHE"] = os.environ["SIMSIAM_CACHE"], str(work / "cache")
    try:
        simsiam.sources.open_source.MAX_RESIDENT_BYTES = 0
        ends = [one_source(cache.parent / f"{kind} shards") for kind in ("tar", "parquet")]
        ends.append(indexed(cache.parent / "photos"))
    finally:
        os.environ["SIMSIAM_CACHE"] = before
    wrongs = [wrong for _, wrong in ends if wrong]
    whole = [end for end, _ in ends] == ["some pixels", "some pixels", "20 of 20 can be read"]
    return "as without it", "; ".join([*wrongs, *[f"it reads {ends}"] * (not whole)])


@dataclass
class Task:
    """Trials that one process does, one after the other."""

    kind: str
    first: int
    trials: list[Callable[[Path], tuple[str, str]]]
    names: list[str] = field(default_factory=list)
    when: float = 0.0  # sort key: kinds take turns, so an interrupted campaign has some of each
    limit: float = HANG


def work_off(task: Task, send: Any, root: Path, until: float) -> None:
    """Do the trials, each in a new folder, and send their outcomes; runs in a forked process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(hook)
    # Without worker processes: the hook could not tell their start from one caused by a file.
    simsiam.utils.workers.parallel_map = lambda work, jobs: (work(*job) for job in jobs)
    root = Path(tempfile.mkdtemp(dir=root))  # each process has its own
    costs = Costs()
    for trial in task.trials:
        if time.monotonic() > until:
            break
        work = Path(tempfile.mkdtemp(dir=root))
        before = {path.name for path in root.iterdir()}
        os.chdir(work)
        costs.start()
        events.clear()
        allowed_folders[:] = [str(work), *(os.environ[f"SIMSIAM_{x}"] for x in ("CACHE", "STATE"))]
        try:
            end, wrong = trial(work)
        except BaseException:
            end, wrong = "", traceback.format_exc()[-1500:]
        allowed_folders.clear()
        seconds, size = costs.stop()
        if seconds > task.limit or size > MEMORY:
            wrong += f" it took {seconds:.1f} s and {size / 2**30:.2f} GiB"
        if events:
            wrong += f" it did {events[:3]}"
        if strays := {path.name for path in root.iterdir()} - before:
            wrong += f" it left {strays}"
        os.chdir(root)
        shutil.rmtree(work, ignore_errors=True)
        send.send((end, wrong, seconds, size))
    send.close()


class Costs:
    """CPU seconds and the most memory of a trial, with the processes that decode for it."""

    def start(self) -> None:
        peak_memory(reset=True)
        self.before, self.dead = self.seconds(), self.largest_dead()
        for child in psutil.Process().children():
            with contextlib.suppress(OSError):
                Path(f"/proc/{child.pid}/clear_refs").write_text("5")

    def stop(self) -> tuple[float, int]:
        size, children = peak_memory() * 2**20, psutil.Process().children()
        for child in children:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                size += int(status.partition("VmHWM:")[2].split()[0]) * 2**10
        if (dead := self.largest_dead()) > self.dead:  # a decoder was ended
            size += dead
        return self.seconds() - self.before, int(size)

    def seconds(self) -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        here = resource.getrusage(resource.RUSAGE_SELF)
        children = psutil.Process().children()
        alive = sum(cpu(child.pid) for child in children)
        return here.ru_utime + here.ru_stime + ended.ru_utime + ended.ru_stime + alive

    def largest_dead(self) -> int:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 2**10


def run_all(
    tasks: list[Task], root: Path, processes: int, until: float
) -> tuple[Counter, list[dict[str, Any]], list[dict[str, Any]]]:
    """Run tasks. Return counts of outcomes, what was wrong, and time and memory of each trial."""
    context = multiprocessing.get_context("fork")
    waiting, ends, wrongs = list(reversed(tasks)), Counter(), list[dict[str, Any]]()
    costs = list[dict[str, Any]]()
    at_work: dict[Any, list[Any]] = {}
    clock, last = 0.0, time.monotonic()
    while waiting or at_work:
        while waiting and len(at_work) < processes:
            task = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=work_off, args=(task, send, root, until))
            process.start()
            send.close()
            at_work[receive] = [task, process, 0, clock, cpu(process.pid)]
        # This clock stands still while this process is suspended.
        clock, last = clock + min(time.monotonic() - last, 0.5), time.monotonic()
        for receive in wait(list(at_work), timeout=0.2):
            task, process, done, since, _ = at_work[receive]
            try:
                end, wrong, seconds, size = receive.recv()
            except EOFError:
                process.join()
                del at_work[receive]
                if done < len(task.trials) and process.exitcode != 0:
                    ends[task.kind, "ended by a signal"] += 1
                    wrongs.append(
                        {
                            "kind": task.kind,
                            "trial": name_of(task, done),
                            "wrong": f"ended by {process.exitcode}",
                        }
                    )
                    rest = Task(
                        task.kind,
                        task.first + done + 1,
                        task.trials[done + 1 :],
                        task.names[done + 1 :],
                        task.when,
                        task.limit,
                    )
                    waiting += [rest] if rest.trials else []
                continue
            ends[task.kind, end or "wrong"] += 1
            if wrong:
                wrongs.append({"kind": task.kind, "trial": name_of(task, done), "wrong": wrong})
            cost = {"seconds": round(seconds, 3), "mib": round(size / 2**20)}
            costs.append({"kind": task.kind, "trial": name_of(task, done), **cost})
            at_work[receive][2:] = [done + 1, clock, cpu(process.pid)]
        for task, process, done, since, used in list(at_work.values()):
            # On a busy machine a process may only wait for its turn: its own CPU time counts, or
            # ten minutes of clock time.
            slow = cpu(process.pid) - used > task.limit or clock - since > 60 * task.limit
            pids = [process.pid, *child_pids(process.pid)]
            if (slow or sum(map(memory_bytes, pids)) > MEMORY) and process.is_alive():
                reason = f"more than {task.limit:g} s" if slow else f"more than {MEMORY:,} bytes"
                wrongs.append({"kind": task.kind, "trial": name_of(task, done), "wrong": reason})
                process.kill()
                process.join()
    return ends, wrongs, costs


def in_a_child(make: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in its own process: processes forked after training cannot train."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: send.send(make(*arguments))
    )
    process.start()
    send.close()
    result = receive.recv()
    process.join()
    return result


def cpu(pid: int | None) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child_pids(pid: int | None) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def memory_bytes(pid: int | None) -> int:
    """Return the bytes of memory that a process uses."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def most(costs: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Return the trial that took the most."""
    none = {"mib": 0, "seconds": 0.0, "trial": "none"}
    return max(costs, key=lambda cost: cost[what], default=none)


def name_of(task: Task, done: int) -> str:
    return task.names[done] if done < len(task.names) else str(task.first + done)


# --- files made by hand ---


class Code:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    ihdr = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(min(width * height, 2**24)), 9)
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs(images: dict[str, bytes]) -> dict[str, bytes]:
    """Make images whose files are small but whose pixels, scans or texts are not."""
    progressive = images["jpeg progressive"]
    scan = progressive.rindex(b"\xff\xda")
    tiff = bytearray(images["tiff"])
    return {
        "png of 60000 x 60000": png(60_000, 60_000),
        "png of 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
        "png with a text of a gigabyte": png(
            8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**30), 9))
        ),
        "png with a profile of 500 MB": png(
            8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(500_000_000), 9))
        ),
        "jpeg with 20000 scans": progressive[:scan] + progressive[scan:-2] * 20_000 + b"\xff\xd9",
        "gif of 65535 x 65535": images["gif"][:6]
        + struct.pack("<2H", 65535, 65535)
        + images["gif"][10:],
        "bmp of 2^31 x 2^31": images["bmp"][:18]
        + struct.pack("<2i", 2**31 - 1, -(2**31))
        + images["bmp"][26:],
        "webp of 16384 x 16384": b"RIFF\x1e\0\0\0WEBPVP8X\n\0\0\0\x02\0\0\0\xff\x3f\0\xff\x3f\0"
        + bytes(12),
        "tiff whose next directory is its first": bytes(tiff),
        "ppm of 10^9 x 10^9": b"P6 1000000000 1000000000 255\n" + bytes(100),
        "ppm of text": b"P3 9000 9000 255\n" + b"1 " * 1000,
        "npy of 10^15": images["npy"][:8]
        + images["npy"][8:].replace(b"(40, 48, 3)", b"(9**15,3,3)"),
    }


def hostile(folder: Path, images: dict[str, bytes]) -> dict[str, Callable[[Path], tuple[str, str]]]:
    """Make hostile containers, checkpoints, recipes and names, each with its trial."""
    trials: dict[str, Callable[[Path], tuple[str, str]]] = {}
    picture = images["png"]
    evil = [
        "../../escaped.png",
        "/tmp/escaped.png",
        "a/../../../escaped.png",
        "C:\\escaped.png",
        "a/./b.png",
        "-rf.png",
    ]

    def source(name: str) -> Path:
        trials[name] = lambda work, path=folder / name: one_source(path)
        return folder / name

    with zipfile.ZipFile(source("traversal.zip"), "w") as archive:
        for name in [*evil, "fine.png"]:
            archive.writestr(name, picture)
    with zipfile.ZipFile(source("link.zip"), "w") as archive:
        link = zipfile.ZipInfo("passwd.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("fine.png", picture)
    with zipfile.ZipFile(source("bomb.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", bytes(2**28))
    with zipfile.ZipFile(source("many.zip"), "w") as archive:
        for i in range(50_000):
            archive.writestr(f"{i}.png", b"")
    with zipfile.ZipFile(source("sizes.zip"), "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", picture)
    data = bytearray((folder / "sizes.zip").read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 20 : at + 28] = struct.pack("<2I", 0x3FFFFFFF, 0x3FFFFFFF)
    (folder / "sizes.zip").write_bytes(data)
    with tarfile.open(source("traversal.tar"), "w") as archive:
        for name in [*evil, "fine.png"]:
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            archive.addfile(info, io.BytesIO(picture))
        for name, kind in (
            ("l.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        device = tarfile.TarInfo("zero.png")
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
        archive.addfile(device)
    with tarfile.open(source("sizes.tar"), "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture)
        archive.addfile(info, io.BytesIO(picture))
        info = tarfile.TarInfo("b.png")
        info.size = 2**40
        archive.fileobj.write(info.tobuf())  # type: ignore[union-attr]
    with tarfile.open(source("headers.tar"), "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(picture), {f"k{i}": "v" * 50 for i in range(50_000)}
        archive.addfile(info, io.BytesIO(picture))
    rows = [
        {"bytes": data, "path": "../../../etc/passwd"} for data in (picture, b"", None, bytes(1000))
    ]
    pq.write_table(pa.table({"image": rows}), source("paths.parquet"))
    for size in (2**20, 2**23, 2**26):
        zeros = pa.table({"image": pa.array([bytes(size)] * 24, pa.large_binary())})
        for rows in (1, 24):
            path = source(f"bomb {size:,} {rows}.parquet")
            pq.write_table(
                zeros, path, compression="zstd", row_group_size=rows, use_dictionary=False
            )
    same = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array([bytes(2**23)]))
    options: dict[str, Any] = {
        "compression": "zstd",
        "dictionary_pagesize_limit": 2**30,
        "store_schema": False,
    }
    pq.write_table(pa.table({"image": same}), source("same.parquet"), **options)
    data = folder.joinpath("same.parquet").read_bytes()
    at = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    folder.joinpath("same.parquet").write_bytes(
        data[:at] + bytes(2000) + data[at:]
    )  # so that the file is large enough for its number of rows
    pq.write_table(pa.table({"image": [b""] * 10**7}), source("rows.parquet"), **options)
    del zeros, same
    for name in ("traversal", "sizes", "headers"):
        source(f"{name} shards").mkdir()
        shutil.copy(folder / f"{name}.tar", folder / f"{name} shards" / "train-000000.tar")

    hostile_files.write_tar_of_negative_size(source("negative.tar"))
    hostile_files.write_tar_cut_in_a_sparse_header(source("sparse.tar"))
    hostile_files.write_lying_footer(source("lying.parquet"), 2**29)
    hostile_files.write_sparse(source("sparse.jpg"), images["jpeg"], 6 * 2**30)
    in_a_child(hostile_files.write_packed, folder)  # which takes memory of its own
    for name in hostile_files.images():
        source(f"packed {name}.zip")
    for name, write in {
        "vectors": lambda path: hostile_files.write_vectors(path, 2**17, 2048),
        "paths": lambda path: hostile_files.write_repeated_text(path, 4000, 2**20),
        "labels": lambda path: hostile_files.write_repeated_text(path, 4000, 2**20, "label"),
        "beginnings": lambda path: hostile_files.write_shared_beginnings(path, 20_000, 2**10),
    }.items():
        write(folder / f"{name} embedding.parquet")
        trials[f"neighbors of {name}"] = lambda work, name=name: check_verb(
            ["neighbors", str(folder / f"{name} embedding.parquet"), "0.jpg"]
        )
    for number, settings in enumerate(("width: 16384", "dim: 1000000000", "proj_hidden: 65536")):
        path = folder / f"model{number}.yaml"
        path.write_text(f"backbone: resnet50\n{settings}\n")
        trials[f"a model of {settings}"] = lambda work, path=path: check_verb(
            ["pretrain", str(folder / "photos"), "--recipe", str(path), "--out", "run"]
        )
    for suffix in (".tar", ".zip", ".parquet", ".txt", ".npy", ".jpg"):
        os.mkfifo(folder / f"pipe{suffix}")
        for verb in (["inspect"], ["shard", "--out", "shards"], ["preview", "--out", "a.png"]):
            order = [verb[0], str(folder / f"pipe{suffix}"), *verb[1:]]
            trials[f"{verb[0]} a pipe{suffix}"] = lambda work, order=order: check_verb(order)

    photos = folder / "pipes"
    photos.mkdir()
    os.mkfifo(photos / "pipe.fifo")
    for name, to in {
        "zero": "/dev/zero",
        "pipe": "pipe.fifo",
        "tty": "/dev/tty",
        "none": "nowhere",
    }.items():
        (photos / f"{name}.png").symlink_to(to)
    (photos / "fine.png").write_bytes(picture)
    (folder / "devices.txt").write_text(
        f"/dev/zero\n/dev/stdin\n{photos}/pipe.fifo\n{photos}/fine.png\n"
    )
    trials["a folder of pipes and devices"] = lambda work: one_source(photos)
    trials["a list of pipes and devices"] = lambda work: one_source(folder / "devices.txt")
    trials["the same, inspected"] = lambda work: indexed(photos)

    weights = {
        k: v.clone()
        for k, v in build(backbone="resnet10", width=4, image_size=32).backbone.state_dict().items()
    }
    wide = dict(weights) | {"conv1.weight": torch.zeros(1).expand(10**6, 10**6, 3, 3)}
    deep: Any = ()
    for _ in range(400):
        deep = (deep,)
    pickles = {
        "code.pt": {"state_dict": weights, "hook": Code()},
        "shell.pt": Shell(),
        "key.pt": {Shell(): 1},
        "wide.pt": wide,
        "sparse.pt": weights | {"conv1.weight": torch.eye(3).to_sparse()},
        "text.pt": {"state_dict": weights, "a": "\x1b[31m<script>" * 100},
        "names.pt": {"\x1b[2J\n<b>" * 9: torch.zeros(1)},
        "deep.pt": {"state_dict": weights, "deep": deep},
        "number.pt": 3,
        "list.pt": [weights],
        "none.pt": None,
        "meta.pt": weights | {"conv1.weight": torch.zeros(4, 3, 3, 3, device="meta")},
        "quantized.pt": weights
        | {"conv1.weight": torch.quantize_per_tensor(torch.zeros(4, 3, 3, 3), 1, 0, torch.qint8)},
        "complex.pt": weights | {"conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.complex64)},
        "self.pt": (loop := dict[str, Any](weights)) | {"state_dict": loop},
    }
    for name, content in pickles.items():
        for zipped in (True, False):
            path = folder / (name if zipped else f"old {name}")
            try:
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
            except (RuntimeError, NotImplementedError):
                continue
            trials[f"convert {path.name}"] = lambda work, path=path: check_verb(
                ["convert", str(path), "--out", "made"]
            )
    for protocol in range(6):
        path = folder / f"pickle{protocol}.pt"
        path.write_bytes(pickle.dumps(Shell(), protocol))
        trials[f"convert {path.name}"] = lambda work, path=path: check_verb(
            ["convert", str(path), "--out", "made"]
        )
        path = folder / f"misnamed{protocol}.safetensors"
        path.write_bytes(pickle.dumps(Shell(), protocol))
        trials[f"convert {path.name}"] = lambda work, path=path: check_verb(
            ["convert", str(path), "--out", "made"]
        )
    for name, text in {
        "size": struct.pack("<Q", 2**62),
        "open": struct.pack("<Q", 8) + b"{" * 8,
        "deep": struct.pack("<Q", 9000) + b"[" * 9000,
        "far": struct.pack("<Q", 60)
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999999]}}',
        "huge": struct.pack("<Q", 66)
        + b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":',
    }.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(text)
        trials[f"convert {path.name}"] = lambda work, path=path: check_verb(
            ["convert", str(path), "--out", "made"]
        )

    photos_ = str(folder / "photos")
    laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    for name, text in {
        "aliases": laughs,
        "source": laughs.replace("a11:", "source:"),
        "deep": "[" * 100_000,
        "deep mapping": "{a: " * 50_000,
        "code": "!!python/object/apply:os.system ['touch executed']",
        "name": "method: !!python/name:os.system",
        "module": "!!python/module:os {}",
        "number": f"epochs: {'9' * 5000}",
        "power": "epochs: 1e400",
        "date": "seed: 2001-99-99",
        "sixty": "epochs: " + ":".join(["59"] * 4000),
        "float": f"base_lr: {'9' * 400}",
        "binary": "backbone: !!binary '%%%'",
        "merge": "<<: 3",
        "keys": "? [a, b]\n: 3",
        "recursive": "&a [*a]",
        "null": "",
        "bytes": "\0\1\2",
        "escape": 'backbone: "\\e[2J"',
        "long": f"backbone: {'x' * 200_000}",
        "large": "#" * 2**20,
        "mean": "mean: [.nan, .inf, -.inf]",
        "huge int": "epochs: 0x" + "f" * 1000,
        "float of int": "cache_gib: 0x" + "f" * 1000,
        "documents": "--- a\n--- b\n",
        "directive": "%YAML 9.9\n---\na: b",
    }.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
        trials[f"recipe {name}"] = lambda work, path=path: check_verb(
            ["pretrain", photos_, "--recipe", str(path), "--out", "run", *TINY.split()]
        )

    def linked(work: Path) -> tuple[str, str]:
        shutil.copytree(folder / "linked", work / "run", symlinks=True)
        end = check_verb(["resume", "run"])
        return end if end[0] == "one line" else ("", "it wrote through a link")

    (folder / "outside").mkdir()
    shutil.copytree(folder / "run", folder / "linked")
    shutil.rmtree(folder / "linked" / "checkpoints")
    (folder / "linked" / "checkpoints").symlink_to(folder / "outside")
    trials["a run folder with a link out of it"] = linked
    trials["names"] = lambda work: names(work, picture)
    return trials


NAMES = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>",
    "\x1b[2J\x1b[31mred",
    "two\nlines",
    "[bold]markup[/bold]",
    "[/]",
    "a" * 200,
    "\udcff\udcfe latin",
    "\u202egnp.exe",
    "-rf",
    "%s%n",
    "${HOME}",
    "`id`",
    "tab\there",
    "emoji \U0001f600",
    "nbsp\u00a0",
    "\x9b31m",
    "trailing ",
    'a;b,c"d',
    "=cmd|' /C calc'!A0",
)


def names(work: Path, picture: bytes) -> tuple[str, str]:
    """Run every verb on a source with such names; all must be escaped in output and pages."""
    rng = np.random.default_rng(0)
    root = work / "<b>photos\x1b[31m"
    for n, name in enumerate(NAMES):
        for split, count in (("train", 3), ("test", 1)):
            for i in range(count):
                file = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(file, "PNG")
                path = (
                    root
                    / split
                    / name.replace("/", "\u2044")
                    / f"{i}{name[:100].replace('/', '')}.png"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.getvalue())
        path.with_name(f"broken {path.name}").write_bytes(
            b"\x1b[31m<script>" if n % 2 else picture[:50]
        )
    orders = [
        ["inspect", str(root), "--out", "facts.json"],
        ["preview", str(root), "--out", "views.png", "--rows", "2"],
        ["pretrain", str(root), "--out", "run\x1b[31m<b>", *TINY.split(), "--max-unreadable", "1"],
        ["evaluate", "run\x1b[31m<b>", "--protocol", "knn", "label_free"],
        ["embed", "run\x1b[31m<b>", "--out", "e.parquet"],
        [
            "neighbors",
            "e.parquet",
            "train/[bold]markup[\u2044bold]/0[bold]markup[bold].png",
            "--html",
            "near.html",
        ],
        ["duplicates", "e.parquet", "--html", "copies.html"],
        ["cluster", "e.parquet", "--html", "clusters.html"],
        ["outliers", "e.parquet", "--html", "outliers.html"],
        ["report", "run\x1b[31m<b>"],
        ["compare", "run\x1b[31m<b>", "run\x1b[31m<b>"],
        ["export", "run\x1b[31m<b>", "--format", "safetensors", "--out", "out"],
    ]
    wrongs = []
    for order in orders:
        end, wrong = check_verb(order)
        if wrong or end != "done":
            wrongs.append(f"{order[0]}: {wrong or run_verb(order)[1][-300:]}")
    for page in work.rglob("*.html"):
        text = page.read_text("utf-8", errors="surrogateescape")
        for sign in ("<script>alert", "<img src=x", "<svg onload", "\x1b", "<b>photos"):
            if sign in text:
                wrongs.append(f"{page.name} has {sign!r}")
    return "done", "; ".join(wrongs)


# --- the campaign ---


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--containers", type=int, default=2_000)
    parser.add_argument(
        "--no-hostile",
        dest="hostile",
        action="store_false",
        help="leave out the files made by hand",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no trial after so many minutes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    valid, trials = root / "valid", root / "trials"
    valid.mkdir(), trials.mkdir()
    os.environ["SIMSIAM_CACHE"] = str(root / "cache")
    os.environ["SIMSIAM_STATE"] = str(root / "state")
    started, start = utc_now(), time.monotonic()
    try:
        images = pictures()
        for name, data in images.items():
            assert one_image(data, random.Random(7))[1] == "", name
        kinds = in_a_child(containers, valid, images)
        every = list(images.items())

        def image(i: int) -> Callable[[Path], tuple[str, str]]:
            def trial(work: Path) -> tuple[str, str]:
                rng = random.Random(f"{options.seed} image {i}")
                return one_image(mutate(every[i % len(every)][1], rng.choice(every)[1], rng), rng)

            return trial

        def container(i: int) -> Callable[[Path], tuple[str, str]]:
            def trial(work: Path) -> tuple[str, str]:
                rng = random.Random(f"{options.seed} container {i}")
                kind = list(kinds)[i % len(kinds)]
                return one_container(kind, kinds[kind], work, rng, rng.choice(every)[1])

            return trial

        tasks = []
        for i in range(0, options.images, CHUNK):
            numbers = range(i, min(i + CHUNK, options.images))
            names_ = [f"{every[n % len(every)][0]} {n}" for n in numbers]
            tasks.append(
                Task("mutated image", i, [image(n) for n in numbers], names_, i / options.images)
            )
        for i in range(0, options.containers, CHUNK // 8):
            numbers = range(i, min(i + CHUNK // 8, options.containers))
            names_ = [f"{list(kinds)[n % len(kinds)]} {n}" for n in numbers]
            tasks.append(
                Task(
                    "mutated container",
                    i,
                    [container(n) for n in numbers],
                    names_,
                    i / options.containers,
                )
            )
        if options.hostile:
            made = {
                name: (lambda work, data=data: one_image(data, random.Random(0)))
                for name, data in bombs(images).items()
            }
            made |= hostile(valid, images)
            limits = {"names": 12 * HANG}  # it runs so many commands
            tasks += [
                Task("made by hand", 0, [t], [n], limit=limits.get(n, HANG))
                for n, t in made.items()
            ]
        until = start + 60 * options.minutes
        ends, wrongs, costs = run_all(
            sorted(tasks, key=lambda task: task.when), trials, options.processes, until
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)

    cpu_seconds = sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    environment = collect_environment(Compute(torch.device("cpu"), "float32"))
    command = "python tests/stress/fuzz.py " + " ".join(sys.argv[1:])
    signals = sum(n for (_, end), n in ends.items() if end.endswith("signal"))
    largest, longest = most(costs, "mib"), most(costs, "seconds")
    rows = "\n".join(f"| {kind} | {end} | {n:,} |" for (kind, end), n in sorted(ends.items()))
    summary = (
        f"`{command}`\n\ncommit {environment['commit']}, {environment['device']}, "
        f"torch {environment['versions']['torch']}, pillow {environment['versions']['pillow']}, "
        f"{started}, {(time.monotonic() - start) / 60:.1f} min "
        f"({cpu_seconds / 60:.1f} CPU-minutes). "
        f"{sum(ends.values()):,} trials, {len(wrongs)} wrong: a crash, more than {HANG:g} s or "
        f"{MEMORY / 2**30:g} GiB, a process started, a file elsewhere, a traceback, or more than "
        f"one line. {signals:,} ended by a signal. "
        "The most memory, with Python and torch and the process that decodes: "
        f"{largest['mib'] / 2**10:.2f} GiB ({largest['trial']}). The longest: "
        f"{longest['seconds']:.1f} s of CPU ({longest['trial']}).\n\n"
        "| file | outcome | trials |\n| --- | --- | --- |\n" + rows + "\n"
    )
    print(summary)
    for wrong in wrongs:
        print(f"WRONG {wrong['kind']} {wrong['trial']}: {wrong['wrong']}")
    if options.out:
        report = {
            "command": command,
            "started": started,
            "environment": environment,
            "cpu_seconds": round(cpu_seconds, 1),
        }
        counts = [{"kind": kind, "end": end, "n": n} for (kind, end), n in sorted(ends.items())]
        dearest = sorted(costs, key=lambda cost: -cost["mib"])[:50]
        dearest += sorted(costs, key=lambda cost: -cost["seconds"])[:50]
        report |= {"trials": counts, "wrong": wrongs, "dearest": dearest}
        for kind, text in {"json": json.dumps(report, indent=1) + "\n", "md": summary}.items():
            with atomic_write(Path(f"{options.out}.{kind}")) as part:
                part.write_text(text)
    return bool(wrongs)


if __name__ == "__main__":
    sys.exit(main())
