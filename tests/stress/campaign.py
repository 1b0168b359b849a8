"""Kill verbs, fill or cut off their disk and damage their files; check that each ends correctly.

    python tests/stress/campaign.py --kills 220 --full 60 --corruptions 60 --real 4 --cuts 40 \\
        --out results/faults/campaign

A trial runs a verb in a process forked from this one. (Starting Python anew would take most of the
time; --real trials do so.) It harms the verb once or twice, repeats or resumes it, and compares the
result with an uninterrupted run: weights, optimizer, metrics, records and files, bit for bit,
without times. A verb must end with the right result or with one line that says what is wrong.

kills        SIGKILL, SIGTERM or SIGINT at a uniformly random moment of the verb
full         the verb writes to a tmpfs of random size, usually too small; then space is freed
corruptions  a flipped bit, a stretch of zeros or noise, or a cut in checkpoints, weights and parts
cuts         the verb writes to ext4 in a file; what this file holds at a random moment is all that
             is left, as after a power cut: what was not synced is lost, the journal is replayed

--full and --cuts mount file systems and need root. All randomness comes from --seed, and each trial
has its own random stream. So the same command continues with the trials that PATH.json does not
have, and repeats those that failed.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import sklearn.linear_model  # noqa: F401  imported here once, for all forks
import tensorboard.summary.writer.record_writer  # noqa: F401
import timm  # noqa: F401
import torch
from matplotlib import figure  # noqa: F401
from PIL import Image

import simsiam.embeddings.embed
import simsiam.evaluation.evaluate
import simsiam.exports.export
import simsiam.laboratory.bench
import simsiam.pages.report
from simsiam.commands import main as cli
from simsiam.config.recipes import Recipe
from simsiam.laboratory import reproduce, scales
from simsiam.model.memory import min_step_bytes
from simsiam.model.precision import Compute
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.run_folder import Run
from simsiam.utils.files import atomic_write

FLAGS = {
    "backbone": "resnet10", "width": 4, "dim": 16, "proj-hidden": 16, "pred-dim": 4,
    "base-lr": 1.0, "batch-size": 16, "log-every": 1, "epochs": 3, "save-seconds": 0.0,
    "device": "cpu", "precision": "float32",
}  # fmt: skip
TINY = [str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)]
TIMES = {
    "images_per_second",
    "data_wait",
    "seconds",
    "training_seconds",
    "measured",
    "environment",
    "made",
    "start",
    "bytes",  # of metrics.jsonl, which has the times above
    "crc32",
}
OUTSIDE = 98  # exit code: a signal came before or after the verb, while this script ran
LIMIT = 120  # seconds after which a verb counts as hanging


class Case(NamedTuple):
    """A verb with a small job."""

    command: Callable[[Path], list[str]]  # the arguments; called again after the verb was stopped
    result: Callable[[Path], Any]  # the result, in a form that can be compared
    before: Callable[[Path], None] = lambda work: None  # makes what the verb needs


# --- results ---


def content(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def timeless(value: Any) -> Any:
    """Remove times and other values that differ between any two runs."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items() if k not in TIMES}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def trained(work: Path) -> Any:
    run = Run(work / "run")
    files = {name: content(run.path / name) for name in ("recipe.yaml", "backbone.safetensors")}
    return files | {
        "checkpoint": plain(run.checkpoint()), "metrics": timeless(run.metrics()),
        "summary": timeless(run.json("summary.json")),
    }  # fmt: skip


def evaluated(work: Path) -> Any:
    return timeless(Run(work / "run").evaluations())


def reproduced(work: Path) -> Any:
    return {
        path.name: content(path)
        for path in sorted((work / "results" / "tiny").glob("table1.[cs]*v*"))
    }


def embedded(work: Path) -> Any:
    return content(work / "out.parquet")


def exported(work: Path) -> Any:
    return {path.name: content(path) for path in sorted((work / "out").iterdir())}


def converted(work: Path) -> Any:
    files = {
        name: content(work / "out" / name)
        for name in ("recipe.yaml", "backbone.safetensors", "converted.json")
    }
    return files | {"checkpoint": plain(Run(work / "out").checkpoint())}


def sharded(work: Path) -> Any:
    assert not (work / "shards.parts").exists()
    return {path.name: content(path) for path in sorted((work / "shards").iterdir())}


def reported(work: Path) -> Any:
    page = (work / "run" / "report.html").read_text("utf-8")
    return page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


# --- jobs ---


def copy(name: str) -> Callable[[Path], None]:
    return lambda work: shutil.copytree(ROOT / name, work / "run") and None


def train(source: str, *flags: str) -> Callable[[Path], list[str]]:
    def command(work: Path) -> list[str]:
        if (work / "run" / "recipe.yaml").exists():
            return ["resume", "run"]
        return ["pretrain", source, "--out", "run", *TINY, *flags]

    return command


def evaluate(*flags: str) -> Callable[[Path], list[str]]:
    return lambda work: ["evaluate", "run", "--device", "cpu", "--precision", "float32", *flags]


def once(*command: str) -> Callable[[Path], list[str]]:
    return lambda work: list(command)


def cases() -> dict[str, Case]:
    photos = str(ROOT / "photos")
    streamed = ["--cache-gib", "0", "--epochs", "2"]
    embed = [
        "embed",
        "run",
        photos,
        "--out",
        "out.parquet",
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    return {
        "pretrain": Case(train(photos), trained),
        "pretrain, workers": Case(train(photos, "--workers", "1", *streamed), trained),
        "pretrain, tar": Case(train(str(ROOT / "tar"), "--workers", "1", *streamed), trained),
        "pretrain, Parquet": Case(
            train(str(ROOT / "parquet"), "--workers", "0", *streamed), trained
        ),
        "shard": Case(once("shard", photos, "--out", "shards", "--per-shard", "6"), sharded),
        "shard, Parquet": Case(
            once("shard", photos, "--out", "shards", "--per-shard", "6", "--format", "parquet"),
            sharded,
        ),
        "resume": Case(once("resume", "run"), trained, copy("half")),
        "embed": Case(once(*embed), embedded, copy("run")),
        "evaluate": Case(evaluate("--protocol", "knn", "label_free"), evaluated, copy("run")),
        "finetune": Case(
            evaluate("--protocol", "finetune", "--finetune-epochs", "2"), evaluated, copy("run")
        ),
        "reproduce": Case(
            once(
                "reproduce",
                "table1",
                "--only",
                "baseline",
                "--seeds",
                "1",
                "--source",
                photos,
                "--device",
                "cpu",
            ),
            reproduced,
        ),
        "export": Case(
            once("export", "run", "--format", "safetensors", "--out", "out"), exported, copy("run")
        ),
        "convert": Case(
            once("convert", str(ROOT / "run" / "checkpoints" / "last.pt"), "--out", "out"),
            converted,
        ),
        "report": Case(once("report", "run", "--limit", "40"), reported, copy("run")),
    }


def shrink() -> None:
    """Make parts and the laboratory small, in the processes that will be harmed."""
    simsiam.embeddings.embed.PART_SIZE = 16
    tiny = scales.SCALES["tiny"]
    base = tiny.base | {
        "width": 4,
        "dim": 16,
        "pred_dim": 4,
        "proj_hidden": 16,
        "batch_size": 16,
        "log_every": 1,
    }
    scales.SCALES["tiny"] = reproduce.SCALES["tiny"] = replace(tiny, base=base, epochs=1)


def photographs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(96):
        path = folder / ("train" if i < 80 else "test") / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 128 + 127 * (i % 2), (32, 32, 3), np.uint8)).save(path)


# --- processes ---


class Ended(NamedTuple):
    code: int  # negative: ended by that signal
    seconds: float
    output: str


def launch(
    arguments: list[str],
    work: Path,
    *,
    real: bool = False,
    harm: Callable[[], None] = lambda: None,
) -> int:
    """Start a verb in the folder `work`, after `harm` in its process; return the process id."""
    output = os.open(work / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    if real:
        command = [sys.executable, "-m", "simsiam", *arguments]
        pid = subprocess.Popen(command, cwd=work, stdout=output, stderr=output).pid
    elif (pid := os.fork()) == 0:
        code = 99
        try:
            os.chdir(work)
            for stream in (1, 2):
                os.dup2(output, stream)
            shrink()
            signal.signal(signal.SIGTERM, lambda *_: os._exit(OUTSIDE))
            sys.argv = ["simsiam", *arguments]
            harm()
            code = cli.main(arguments)
        except KeyboardInterrupt:
            code = OUTSIDE
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    os.close(output)
    return pid


def finish(pid: int, work: Path, begin: float) -> Ended:
    """Wait for a process, at most LIMIT seconds during which this process was not suspended."""
    waited, last = 0.0, time.monotonic()
    while True:
        waited, last = waited + min(time.monotonic() - last, 0.1), time.monotonic()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            output = (work / "output.txt").read_text(errors="replace")
            return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - begin, output)
        if waited > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Ended(
                -999, time.monotonic() - begin, (work / "output.txt").read_text(errors="replace")
            )
        time.sleep(0.002)


def perform(case: Case, work: Path, *, real: bool = False) -> Ended:
    begin = time.monotonic()
    return finish(launch(case.command(work), work, real=real), work, begin)


def last_line(ended: Ended) -> str:
    return (ended.output.strip().splitlines() or [""])[-1]


def complaint(ended: Ended, allowed: set[int]) -> str:
    """Say what is wrong with how a process ended; "" for success or one clear line."""
    if ended.code == -999:
        return f"hung for {LIMIT} s"
    if "Traceback" in ended.output:
        return (
            f"a traceback: {ended.output[max(0, ended.output.index('Traceback') - 300) :][:1500]}"
        )
    if ended.code not in allowed:
        return f"exit code {ended.code}: {ended.output.strip()[-200:]}"
    if (
        ended.code not in (0, OUTSIDE)
        and ended.code > 0
        and not last_line(ended).startswith("simsiam: ")
    ):
        return f"exit code {ended.code} without a line"
    return ""


def compared(case: Case, work: Path, expected: Any) -> str:
    """Say what is wrong with the result; "" if it equals that of the uninterrupted run."""
    try:
        result = case.result(work)
    except Exception as error:
        return f"no result: {type(error).__name__}: {error}"
    if left := [str(path.relative_to(work)) for path in work.rglob("*.part")]:
        return f"left behind: {left}"
    if result == expected:
        return ""
    keys = (
        [key for key in expected if result.get(key) != expected[key]]
        if isinstance(expected, dict)
        else []
    )
    return f"another result {keys}"


# --- trials ---


def kill(
    case: Case, work: Path, expected: Any, seconds: float, rng: random.Random, real: bool
) -> tuple[str, str]:
    """Kill a verb. Return what was done, and what is wrong with how it ended."""
    done = []
    for _ in range(1 + (rng.random() < 0.3)):
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        wait, begin = rng.uniform(0, 1.05 * seconds), time.monotonic()
        pid = launch(case.command(work), work, real=real)
        time.sleep(wait)
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        ended = finish(pid, work, begin)
        done.append(f"{number.name} after {wait:.2f} s: {ended.code}")
        early = {-number} if number == signal.SIGKILL or real else set()
        # a complete export or embedding is not overwritten
        if wrong := complaint(ended, {0, 2, 128 + number, OUTSIDE} | early):
            return ", ".join(done), wrong
        if ended.code == 2 and "exists and is not" not in ended.output:
            return ", ".join(done), ended.output.strip()[-300:]
    ended = perform(case, work)
    wrong = complaint(ended, {0, 2})
    if ended.code == 2 and "exists and is not" not in ended.output:
        wrong = ended.output.strip()[-300:]
    return ", ".join(done), wrong or compared(case, work, expected)


def fill(case: Case, work: Path, expected: Any, need: int, rng: random.Random) -> tuple[str, str]:
    """Do the same on a file system that is too small at first."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", work], check=True)
    try:
        case.before(work)
        used = sum(file.stat().st_blocks * 512 for file in work.rglob("*")) + 4096
        room = rng.randint(0, int(1.1 * (need - used)) if need > 1.1 * used else 60_000)
        done = f"{room:,} bytes of room"
        subprocess.run(["mount", "-o", f"remount,size={used + room}", work], check=True)
        outside = work.with_name(work.name + ".output")
        outside.mkdir()
        (work / "output.txt").symlink_to(outside / "output.txt")
        ended = perform(case, work)
        done += f": {ended.code}, {last_line(ended)}"
        if wrong := complaint(ended, {0, 1, 2}):
            return done, wrong
        if ended.code and "No space left" not in ended.output:
            return done, "the error does not name the reason"
        subprocess.run(["mount", "-o", "remount,size=64m", work], check=True)
        if ended.code:
            ended = perform(case, work)
            if wrong := complaint(ended, {0}):
                return done, wrong
        (work / "output.txt").unlink()
        return done, compared(case, work, expected)
    finally:
        unmount(work)


IMAGE_BYTES = 2**27


def mount_image(image: Path, work: Path, *options: str) -> None:
    chosen = ",".join(["loop", *options])
    subprocess.run(["mount", "-o", chosen, image, work], check=True, capture_output=True)


def unmount(work: Path) -> None:
    """Unmount a file system; children of a killed process hold it for a moment."""
    for _ in range(100):
        if not subprocess.run(["umount", work], capture_output=True).returncode:
            return
        time.sleep(0.1)
    subprocess.run(["umount", work], check=True)


def cut_power(
    case: Case, work: Path, expected: Any, seconds: float, rng: random.Random
) -> tuple[str, str]:
    """Run a verb on a disk whose power is cut, then repeat it on what the disk holds."""
    image, copy = work.with_name("disk"), work.with_name("disk.copy")
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    commit = rng.choice([5, 300])  # seconds between two commits that no program asks for
    mount_image(image, work, f"commit={commit}")
    outside = work.with_name(work.name + ".output")
    outside.mkdir()
    try:
        case.before(work)
        (work / "output.txt").symlink_to(outside / "output.txt")
        subprocess.run(["sync", "-f", work], check=True)
        # Sometimes so late that the disk has the names of files, but not their content.
        wait = rng.uniform(0.2, 1.1) * seconds + rng.choice([0, 0, 8])
        begin = time.monotonic()
        pid = launch(case.command(work), work)
        time.sleep(wait)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        hold_still(image, copy)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ended = finish(pid, work, begin)
        done = f"cut after {wait:.2f} s, commits every {commit} s: {ended.code}"
    finally:
        unmount(work)
    image.unlink()
    mount_image(copy, work)  # which replays the journal
    try:
        if empty := [path.name for path in work.rglob("*.safetensors") if not path.stat().st_size]:
            return done, f"empty files: {empty}"
        ended = perform(case, work)
        wrong = complaint(ended, {0, 2})
        if ended.code == 2 and "exists and is not" not in ended.output:
            wrong = ended.output.strip()[-300:]
        if "is not what it was when the checkpoint" in ended.output:
            wrong = last_line(ended) + ": metrics.jsonl was not synced"
        (work / "output.txt").unlink()
        return done, wrong or compared(case, work, expected)
    finally:
        unmount(work)
        copy.unlink()


def hold_still(image: Path, copy: Path) -> None:
    """Copy a disk that the kernel may still write to, as it was at one moment."""
    while True:
        shutil.copyfile(image, copy)
        if content(image) == content(copy):
            return


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of several ways; return a description."""
    data = bytearray(path.read_bytes())
    kind, at = (
        rng.choice(["bit", "bit", "bit", "zeros", "cut", "noise", "empty"]),
        rng.randrange(len(data)),
    )
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "noise":
        data[at : at + 64] = rng.randbytes(len(data[at : at + 64]))
    else:
        del data[at if kind == "cut" else 0 :]
    path.write_bytes(data)
    return f"{path.name}: {kind} at {at:,} of {path.stat().st_size:,}"


def corrupt(kind: str, work: Path, expected: dict[str, Any], rng: random.Random) -> tuple[str, str]:
    """Damage a file of one kind, then run the verb that reads it."""
    all_cases = cases()
    if kind in ("last", "last and previous", "gone"):
        case = all_cases["resume"]
        case.before(work)
        folder = work / "run" / "checkpoints"
        if kind == "gone":
            done = "last.pt is gone"
            (folder / "last.pt").unlink()
        else:
            done = damage(folder / "last.pt", rng)
            if kind != "last":
                done += "; " + damage(folder / "previous.pt", rng)
        ended = perform(case, work)
        wrong = complaint(ended, {0, 2} if kind == "last and previous" else {0})
        if not wrong and ended.code == 0:
            wrong = compared(case, work, expected["resume"])
        return f"{done}: {ended.code}", wrong
    if kind == "backbone":
        case = all_cases["embed"]
        case.before(work)
        done = damage(work / "run" / "backbone.safetensors", rng)
        ended = perform(case, work)
        wrong = complaint(ended, {0, 2})
        if not wrong and ended.code == 0:  # damage in the format's padding has no effect
            wrong = vectors(work, expected["embed"])
        return f"{done}: {ended.code}", wrong
    if kind == "part":
        case = all_cases["embed"]
        case.before(work)
        pid, begin = launch(case.command(work), work), time.monotonic()
        while (
            len(list(work.glob("out.parquet.parts/*.parquet"))) < 3
            and time.monotonic() - begin < LIMIT
        ):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        finish(pid, work, begin)
        parts = sorted(work.glob("out.parquet.parts/*.parquet"))
        done = damage(rng.choice(parts), rng) if parts else "it had ended"
        ended = perform(case, work)
        return f"{done}: {ended.code}", complaint(ended, {0, 2}) or compared(
            case, work, expected["embed"]
        )
    assert kind == "finetune"
    case = all_cases["finetune"]
    case.before(work)
    perform(case, work)
    path = next((work / "run" / "finetuning").rglob("last.pt"))
    done = damage(path, rng)
    ended = perform(case, work)
    wrong = complaint(ended, {0, 2})
    return f"{done}: {ended.code}", wrong or compared(case, work, expected["finetune"])


def vectors(work: Path, expected: str) -> str:
    """Say whether the embedding differs from that of undamaged weights, their digest aside."""
    table = pq.read_table(work / "out.parquet")
    return "" if table.equals(pq.read_table(ROOT / "reference.parquet")) else "other vectors"


def measure_need(work: Path) -> int:
    """Return the bytes that a job has on disk at its end."""
    return sum(path.stat().st_size for path in work.rglob("*") if path.is_file())


def read_earlier(path: Path, seed: int) -> dict[str, Any]:
    """Read what a campaign with this seed has done already; {} if there is none."""
    with suppress(OSError, ValueError):
        report = json.loads(path.read_text())
        if report.get("seed") == seed:
            return report
    return {}


def prepare(work: Path) -> None:
    """Make photographs, shards of them, and two runs: one finished, one stopped halfway."""
    photos = str(ROOT / "photos")
    photographs(ROOT / "photos")
    # Do the imports and compilations of a first step once, not in every process.
    settings = {"backbone": "resnet10", "width": 4, "image_size": 32, "precision": "float32"}
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    min_step_bytes(Recipe().replace(**settings, **statistics).resolve(), 2)
    for format in ("tar", "parquet"):
        work.mkdir()
        command = [
            "shard",
            photos,
            "--out",
            str(ROOT / format),
            "--per-shard",
            "20",
            "--format",
            format,
        ]
        ended = perform(Case(once(*command), sharded), work)
        assert ended.code == 0, ended.output
        shutil.rmtree(work)
    for name in ("run", "half"):
        work.mkdir()
        case, begin = Case(train(photos), trained), time.monotonic()
        pid = launch(case.command(work), work)
        while (
            name == "half"
            and len(Run(work / "run").metrics() if (work / "run/recipe.yaml").exists() else []) < 5
        ):
            time.sleep(0.001)
        if name == "half":
            os.kill(pid, signal.SIGTERM)
        ended = finish(pid, work, begin)
        assert ended.code == (128 + signal.SIGTERM if name == "half" else 0), ended.output
        shutil.move(work / "run", ROOT / name)
        shutil.rmtree(work)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--full", type=int, default=60)
    parser.add_argument("--corruptions", type=int, default=60)
    parser.add_argument(
        "--real", type=int, default=0, help="also kill so many newly started programs"
    )
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="cases")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="start no trial after so many minutes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts background processes without it
    os.environ["SIMSIAM_CACHE"] = str(ROOT / "cache")
    os.environ["SIMSIAM_STATE"] = str(ROOT / "state")
    start, started_at, environment = (
        time.monotonic(),
        utc_now(),
        collect_environment(Compute(torch.device("cpu"), "float32")),
    )
    work = ROOT / "work"  # always the same: some files contain their path
    before = read_earlier(Path(f"{options.out}.json"), options.seed) if options.out else {}
    trials: list[dict[str, Any]] = [t for t in before.get("trials", []) if not t["wrong"]]
    made = {t["trial"] for t in trials}

    prepare(work)
    chosen = {
        name: case for name, case in cases().items() if not options.only or name in options.only
    }
    expected: dict[str, Any] = {}
    seconds, need = {}, {}
    for name, case in chosen.items():
        work.mkdir()
        case.before(work)
        ended = perform(case, work)
        assert ended.code == 0, ended.output
        expected[name], seconds[name], need[name] = (
            case.result(work),
            ended.seconds,
            measure_need(work),
        )
        print(f"{name:<20}{ended.seconds:6.2f} s{need[name]:>12,} bytes", flush=True)
        if name == "resume" and "pretrain" in expected:
            assert expected["resume"] == expected["pretrain"], "a resumed run has another result"
        if name == "embed":
            shutil.copy(work / "out.parquet", ROOT / "reference.parquet")
        shutil.rmtree(work)

    Harm = Callable[[str, Path, random.Random], tuple[str, str]]
    todo: list[
        tuple[float, str, str, int, Harm, bool]
    ] = []  # in turns, so that an interrupted campaign has some of each

    def plan(kind: str, names: list[str], n: int, harm: Harm, ready: bool) -> None:
        todo.extend((i / n, kind, names[i % len(names)], i, harm, ready) for i in range(n))

    names = list(chosen)
    quick = [name for name in chosen if name in ("pretrain", "resume", "shard", "convert")]
    often = names + [
        name for name in names if name != "reproduce"
    ]  # which takes longer than all others
    starting = 4.0  # seconds that a new process needs to load Python and torch
    plan(
        "kill",
        often,
        options.kills,
        lambda k, w, rng: kill(chosen[k], w, expected[k], seconds[k], rng, False),
        True,
    )
    plan(
        "real kill",
        quick,
        options.real,
        lambda k, w, rng: kill(chosen[k], w, expected[k], seconds[k] + starting, rng, True),
        True,
    )
    plan(
        "full",
        often,
        options.full,
        lambda k, w, rng: fill(chosen[k], w, expected[k], need[k], rng),
        False,
    )
    plan(
        "cut",
        often,
        options.cuts,
        lambda k, w, rng: cut_power(chosen[k], w, expected[k], seconds[k], rng),
        False,
    )
    needs = {"backbone": "embed", "part": "embed", "finetune": "finetune"}
    kinds = ["last", "last", "last and previous", "gone", "backbone", "part", "finetune"]
    kinds = [kind for kind in kinds if needs.get(kind, "resume") in chosen]
    plan(
        "corruption",
        kinds,
        options.corruptions,
        lambda k, w, rng: corrupt(k, w, expected, rng),
        False,
    )

    def write() -> str:
        """Write PATH.json and PATH.md of the trials so far; return the text of the latter."""
        cpu_seconds = sum(
            sum(resource.getrusage(who)[:2])
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        cpu_seconds += before.get("cpu_seconds", 0.0)
        seconds_spent = time.monotonic() - start + before.get("seconds", 0.0)
        failed = [t for t in trials if t["wrong"]]
        count = Counter((t["kind"], t["case"]) for t in trials)
        wrong = Counter((t["kind"], t["case"]) for t in failed)
        rows = [
            f"| {kind} | {case} | {n} | {wrong[kind, case]} |"
            for (kind, case), n in sorted(count.items())
        ]
        commits = ", ".join(dict.fromkeys(t["commit"] for t in trials)) or environment["commit"]
        command = "python tests/stress/campaign.py " + " ".join(sys.argv[1:])
        started = before.get("started", started_at)
        summary = (
            f"`{command}`\n\ncommit {commits}, {environment['device']}, "
            f"torch {environment['versions']['torch']}, {started}, {seconds_spent / 60:.1f} min ("
            f"{cpu_seconds / 60:.1f} CPU-minutes). "
            f"{len(trials)} of {len(todo)} trials were made; {len(failed)} ended neither with the "
            "result of an uninterrupted run nor with one clear line.\n\n"
            "| harm | job | trials | wrong |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
        )
        if options.out:
            report = {
                "command": command,
                "seed": options.seed,
                "started": started,
                "environment": environment,
            }
            report |= {
                "seconds": round(seconds_spent, 1),
                "cpu_seconds": round(cpu_seconds, 1),
                "trials": trials,
            }
            for kind, text in {"json": json.dumps(report, indent=1) + "\n", "md": summary}.items():
                with atomic_write(Path(f"{options.out}.{kind}")) as part:
                    part.write_text(text)
        return summary

    for _, kind, name, i, harm, ready in sorted(todo, key=lambda one: one[0]):
        trial = f"{kind} {i}"
        if trial in made or time.monotonic() - start > 60 * options.minutes:
            continue
        shutil.rmtree(ROOT / "cache", ignore_errors=True)
        work.mkdir()
        if ready:
            chosen[name].before(work)
        done, wrong = harm(name, work, random.Random(f"{options.seed} {trial}"))
        facts = {
            "trial": trial,
            "kind": kind,
            "case": name,
            "done": done,
            "wrong": wrong,
            "commit": environment["commit"],
        }
        trials.append(facts)
        print(f"{kind:<12}{name:<20}{done}{'   WRONG: ' + wrong if wrong else ''}", flush=True)
        for folder in (work, work.with_name(work.name + ".output")):
            shutil.rmtree(folder, ignore_errors=True)
        write()
    print(write())
    return any(t["wrong"] for t in trials)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        ROOT = Path(folder).resolve()
        sys.exit(main())
