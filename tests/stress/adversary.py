"""Put links, pipes and devices in the place of files, and make system calls fail, for every verb.

    python tests/stress/adversary.py --faults 520 --links 320 --pipes 320 \\
        --out results/faults/adversary

A trial runs a verb in a process forked from this one, as campaign.py does, with a library in front
of the C library (faults.c, which is compiled first). The library lists every path that the verb
opens, makes or renames in its work folder, so each of them is harmed, at every depth.

faults  the n-th open, read, write, fsync, rename or mkdir in the work folder or the cache fails
        with EIO or ENOSPC, once or from then on. The verb must end with the result of an
        undisturbed run, or with one line that names the file or its folder; then the same command
        without the fault must end with that result.
links   one path is a link to a file, a folder or nothing outside. Nothing outside may change.
pipes   one path is a pipe, a socket, or a link to a pipe or a device. The verb may not hang.

All randomness comes from --seed, and each trial has its own random stream. So the same command
continues with the trials that PATH.json does not have, and repeats those that failed.
"""

import argparse
import ctypes
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
if "FAULTS_LIBRARY" not in os.environ:  # start again, with the library in front
    library_folder = tempfile.mkdtemp(prefix="faults-library-")
    library_path = os.path.join(library_folder, "faults.so")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library_path, str(HERE / "faults.c"), "-ldl"],
        check=True,
    )
    os.environ |= {"FAULTS_LIBRARY": library_path, "LD_PRELOAD": library_path}
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ.pop("LD_PRELOAD")  # not for programs that a verb starts

sys.path.insert(0, str(HERE))
import campaign  # noqa: E402
import torch  # noqa: E402
from campaign import Case, complaint, copy, last_line, once  # noqa: E402

from simsiam.model.precision import Compute  # noqa: E402
from simsiam.runs.environment import collect_environment, utc_now  # noqa: E402
from simsiam.utils.files import atomic_write  # noqa: E402

KINDS = ("open", "read", "write", "fsync", "rename", "mkdir")  # in the order of faults.c
LETTERS = dict(zip("orwfnm", KINDS, strict=True))
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
LIBRARY = ctypes.CDLL(os.environ["FAULTS_LIBRARY"])
for function in (LIBRARY.fault_list, LIBRARY.fault_path):
    function.restype = ctypes.c_char_p
for function in (LIBRARY.fault_count, LIBRARY.fault_fired):
    function.restype = ctypes.c_long
LIBRARY.fault_arm.argtypes = [
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int,
]  # fmt: skip


class Harmed(NamedTuple):
    """What an undisturbed run of a verb does."""

    case: Case
    result: Any
    counts: dict[str, int]  # calls by kind
    places: list[str]  # every path used in the work folder, relative to it


# --- verbs ---


def cases() -> dict[str, Case]:
    """The verbs of campaign.py, and those that are not worth killing."""
    photos, one = str(campaign.ROOT / "photos"), str(campaign.ROOT / "photos/train/a/00.png")
    cpu = ("--device", "cpu", "--precision", "float32")

    def embedding(work: Path) -> None:
        shutil.copy(campaign.ROOT / "features.parquet", work / "e.parquet")
        shutil.copy(campaign.ROOT / "labels.csv", work / "labels.csv")

    def files(*names: str) -> Callable[[Path], Any]:
        return lambda work: {name: campaign.content(work / name) for name in names}

    def two_runs(work: Path) -> None:
        shutil.copytree(campaign.ROOT / "run", work / "run")
        shutil.copytree(campaign.ROOT / "half", work / "half")

    def there(*names: str) -> Callable[[Path], Any]:
        return lambda work: [(work / name).exists() for name in names]

    return campaign.cases() | {
        "embed, folder": Case(
            once("embed", "run", photos, "--out", "out", *cpu),
            lambda work: {p.name: campaign.content(p) for p in sorted((work / "out").iterdir())},
            copy("run"),
        ),
        "embed, npy": Case(
            once("embed", "run", photos, "--out", "out.npy", *cpu),
            files("out.npy", "out.csv"),
            copy("run"),
        ),
        "neighbors": Case(
            once("neighbors", "e.parquet", "train/a/00.png", "--html", "n.html"),
            files("n.html"),
            embedding,
        ),
        "duplicates": Case(
            once("duplicates", "e.parquet", "--out", "d.csv", "--html", "d.html"),
            files("d.csv", "d.html"),
            embedding,
        ),
        "cluster": Case(
            once("cluster", "e.parquet", "--clusters", "2", "--out", "c.csv"),
            files("c.csv"),
            embedding,
        ),
        "outliers": Case(
            once("outliers", "e.parquet", "--out", "o.csv"), files("o.csv"), embedding
        ),
        "probe": Case(
            once("probe", "e.parquet", "labels.csv", "--out", "p.csv"), files("p.csv"), embedding
        ),
        "search": Case(
            once("search", photos, one, "--encoder", "run", "--html", "s.html"),
            there("s.html"),
            copy("run"),
        ),
        "preview": Case(once("preview", photos, "--out", "v.png"), files("v.png")),
        "inspect": Case(once("inspect", photos, "--out", "i.json"), there("i.json")),
        "inspect, tar": Case(
            once("inspect", str(campaign.ROOT / "tar"), "--out", "i.json"), there("i.json")
        ),
        "plan": Case(once("plan", photos), there()),
        "compare": Case(once("compare", "run", "half"), there(), two_runs),
        "evaluate, few_label": Case(
            campaign.evaluate("--protocol", "few_label"), campaign.evaluated, copy("run")
        ),
        "export, huggingface": Case(
            once("export", "run", "--format", "huggingface"),
            there("run/exports/huggingface/README.md"),
            copy("run"),
        ),
        "transfer": Case(
            once(
                "transfer", "run", "shapes", "--steps", "2", "--batch-size", "2", "--precise-bn",
                "0", "--test-side", "64", "--train-sides", "64", "--device", "cpu",
            ),
            there("run/transfers/detection.json"),
            copy("run"),
        ),
        "adapt": Case(
            once("adapt", photos, "--minutes", "0.05", "--out", "out", "--device", "cpu"),
            there("out/summary.json"),
        ),
    }  # fmt: skip


# --- one run of a verb ---


def cache() -> Path:
    return campaign.ROOT / "cache"


def run(
    case: Case, work: Path, kind: str = "", n: int = 0, error: int = 0, lasting: bool = False
) -> campaign.Ended:
    """Run a verb; the n-th call of a kind fails, none if n is 0. Counts go on until the next."""
    output = campaign.ROOT / "output.txt"  # outside of what is harmed
    (work / "output.txt").unlink(missing_ok=True)
    (work / "output.txt").symlink_to(output)
    LIBRARY.fault_reset()
    number = KINDS.index(kind) if kind else -1

    def arm() -> None:
        folders = (os.fsencode(work), os.fsencode(cache()))
        LIBRARY.fault_arm(*folders, number, n, error, int(lasting))

    begin = time.monotonic()
    pid = campaign.launch(case.command(work), work, harm=arm)
    ended = campaign.finish(pid, work, begin)
    (work / "output.txt").unlink(missing_ok=True)
    return ended


def start(case: Case, work: Path) -> None:
    shutil.rmtree(cache(), ignore_errors=True)
    work.mkdir()
    case.before(work)


def clear(work: Path) -> None:
    for path in (work, campaign.ROOT / "outside"):
        shutil.rmtree(path, ignore_errors=True)


def observe(case: Case, work: Path) -> Harmed:
    """Run a verb undisturbed, and note its calls and the places of its files."""
    start(case, work)
    ended = run(case, work)
    assert ended.code == 0, ended.output
    counts = {kind: LIBRARY.fault_count(i) for i, kind in enumerate(KINDS)}
    lines = LIBRARY.fault_list().decode("utf-8", "replace").splitlines()
    paths = {os.path.normpath(line[1:]) for line in lines}
    places = {os.path.relpath(p, work) for p in paths if p.startswith(f"{work}{os.sep}")}
    # Names with the number of a process, a time or random digits are others the next time.
    kept = [p for p in places if not re.search(r"[0-9]{5,}|simsiam-[0-9]|[0-9a-f]{32}", p)]
    result = case.result(work)
    clear(work)
    return Harmed(case, result, counts, sorted(kept))


# --- harms: each returns what was done, and what is wrong with how the verb ended ---


def fault(harmed: Harmed, work: Path, rng: random.Random) -> tuple[str, str]:
    """Make one call fail; then run the verb again without."""
    kind = rng.choice([kind for kind in KINDS if harmed.counts[kind]])
    n = rng.randint(1, harmed.counts[kind])
    name, lasting = rng.choice(list(ERRORS)), rng.random() < 0.5
    ended = run(harmed.case, work, kind, n, ERRORS[name], lasting)
    path = LIBRARY.fault_path().decode("utf-8", "replace")
    hit = path.removeprefix(f"{campaign.ROOT}{os.sep}")
    done = f"{kind} {n}{' and later' if lasting else ''}: {name}"
    done += f" at {hit}: {ended.code}, {last_line(ended)[:200]}" if path else ": it did not come"
    if wrong := complaint(ended, {0, 1, 2}):
        return done, wrong
    if ended.code:
        # The file itself, or what it is a part of.
        paths = [re.sub(r"\.simsiam-[0-9]+\.part", "", hit), *harmed.places]
        names = {part for path in paths for part in Path(path).parts}
        if not any(part in last_line(ended) for part in names):
            return done, f"the line does not name the file: {last_line(ended)}"
        ended = run(harmed.case, work)
        if wrong := complaint(ended, {0, 2}):
            return done, f"afterwards: {wrong}"
        if ended.code == 2 and "exists and is not" not in ended.output:
            return done, f"afterwards: {last_line(ended)}"
    return done, campaign.compared(harmed.case, work, harmed.result)


def make_room(path: Path) -> None:
    """Remove what is at a path, and make the folder that it is in."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    with suppress(FileNotFoundError):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder: bytes of files, targets of links, times."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted([folder, *folder.rglob("*")])
    }


def link(harmed: Harmed, work: Path, rng: random.Random) -> tuple[str, str]:
    """Put a link to somewhere else in the place of a file or folder."""
    outside = campaign.ROOT / "outside"
    (outside / "folder" / "inner").mkdir(parents=True)
    (outside / "letter.txt").write_text("dear reader")
    (outside / "folder" / "letter.txt").write_text("dear reader")
    before = tree(outside)
    place = rng.choice([p for p in harmed.places if p not in NAMED] or ["nothing"])
    target = rng.choice(["letter.txt", "folder", "folder/inner", "nothing", "nothing/there"])
    make_room(work / place)
    (work / place).symlink_to(outside / target)
    ended = run(harmed.case, work)
    done = f"{place} -> outside/{target}: {ended.code}, {last_line(ended)[:200]}"
    if tree(outside) != before:
        return (
            done,
            f"written outside: {[k for k, v in tree(outside).items() if before.get(k) != v]}",
        )
    return done, complaint(ended, {0, 1, 2})


def pipe(harmed: Harmed, work: Path, rng: random.Random) -> tuple[str, str]:
    """Put a pipe, a socket or a device in the place of a file or folder."""
    outside = campaign.ROOT / "outside"
    outside.mkdir()
    os.mkfifo(outside / "pipe")
    place = rng.choice(harmed.places or ["nothing"])
    kind = rng.choice(["pipe", "link to pipe", "/dev/zero", "/dev/full", "/dev/tty", "socket"])
    path = work / place
    make_room(path)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            folder = os.open(path.parent, os.O_RDONLY)  # the address of a socket is short
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
            os.close(folder)
    else:
        path.symlink_to(outside / "pipe" if kind == "link to pipe" else kind)
    ended = run(harmed.case, work)
    done = f"{place} is a {kind}: {ended.code}, {last_line(ended)[:200]}"
    return done, complaint(ended, {0, 1, 2})


# Folders of pages that `reproduce` is given: whoever runs it may have put them elsewhere by a link.
NAMED = ("results", "results/tiny")
HARMS = {"fault": fault, "link": link, "pipe": pipe}


# --- the trials ---


def prepare(work: Path) -> None:
    """Make what campaign.py makes, an embedding, and labels of some of its images."""
    campaign.prepare(work)
    work.mkdir()
    case = campaign.cases()["embed"]
    case.before(work)
    ended = run(case, work)
    assert ended.code == 0, ended.output
    shutil.move(work / "out.parquet", campaign.ROOT / "features.parquet")
    names = [f"train/{'ab'[i % 2]}/{i:02}.png,{'ab'[i % 2]}" for i in range(0, 80, 7)]
    (campaign.ROOT / "labels.csv").write_text("\n".join(["path,label", *names]) + "\n")
    clear(work)


def page(options: argparse.Namespace, report: dict[str, Any], planned: int) -> str:
    """The page about the trials so far."""
    trials = report["trials"]
    count = Counter((t["kind"], t["case"]) for t in trials)
    wrong = Counter((t["kind"], t["case"]) for t in trials if t["wrong"])
    came = sum(t["kind"] == "fault" and "did not come" not in t["done"] for t in trials)
    ends = Counter(
        (t["kind"], "undisturbed" if ": 0, " in t["done"] else "one line") for t in trials
    )
    commits = ", ".join(dict.fromkeys(t["commit"] for t in trials))
    rows = [
        f"| {kind} | {case} | {n} | {wrong[kind, case]} |"
        for (kind, case), n in sorted(count.items())
    ]
    return (
        f"`{report['command']}`\n\ncommit {commits}, {report['environment']['device']}, "
        f"torch {report['environment']['versions']['torch']}, {report['started']}, "
        f"{report['seconds'] / 60:.1f} min. {len(trials)} of {planned} trials were made; "
        f"{sum(wrong.values())} ended wrong: with a traceback, a signal, a hang, a write outside, "
        "another result, or an error that names no file. "
        f"{came} calls failed. "
        + ", ".join(f"{kind}: {n} ended {how}" for (kind, how), n in sorted(ends.items()))
        + ".\n\n| harm | job | trials | wrong |\n| --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for kind in HARMS:
        parser.add_argument(f"--{kind}s", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="cases")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trial after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write PATH.json and PATH.md")
    options = parser.parse_args()
    campaign.LIMIT = 300
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["SIMSIAM_CACHE"] = str(cache())
    os.environ["SIMSIAM_DATA"] = str(campaign.ROOT / "data")
    begin, work = time.monotonic(), campaign.ROOT / "work"
    earlier = (
        campaign.read_earlier(Path(f"{options.out}.json"), options.seed) if options.out else {}
    )
    report: dict[str, Any] = {
        "command": "python tests/stress/adversary.py " + " ".join(sys.argv[1:]),
        "seed": options.seed,
        "started": earlier.get("started", utc_now()),
        "environment": collect_environment(Compute(torch.device("cpu"), "float32")),
        "trials": [t for t in earlier.get("trials", []) if not t["wrong"]],
    }
    prepare(work)
    chosen = {}
    for name, case in cases().items():
        if not options.only or name in options.only:
            chosen[name] = observe(case, work)
            print(
                f"{name:<20}{len(chosen[name].places):4} places, {chosen[name].counts}", flush=True
            )
    # In turns, so that an interrupted campaign has some of each.
    todo = sorted(
        (i / vars(options)[f"{kind}s"], kind, i)
        for kind in HARMS
        for i in range(vars(options)[f"{kind}s"])
    )
    made = {t["trial"] for t in report["trials"]}
    for _, kind, i in todo:
        trial, name = f"{kind} {i}", list(chosen)[i % len(chosen)]
        if trial in made or time.monotonic() - begin > 60 * options.minutes:
            continue
        start(chosen[name].case, work)
        done, wrong = HARMS[kind](chosen[name], work, random.Random(f"{options.seed} {trial}"))
        facts = {"trial": trial, "kind": kind, "case": name, "done": done, "wrong": wrong}
        report["trials"].append(facts | {"commit": report["environment"]["commit"]})
        print(f"{kind:<6}{name:<20}{done}{'   WRONG: ' + wrong if wrong else ''}", flush=True)
        clear(work)
        report["seconds"] = round(time.monotonic() - begin + earlier.get("seconds", 0.0), 1)
        if options.out:
            texts = {
                "json": json.dumps(report, indent=1) + "\n",
                "md": page(options, report, len(todo)),
            }
            for ending, text in texts.items():
                with atomic_write(Path(f"{options.out}.{ending}")) as part:
                    part.write_text(text)
    report.setdefault("seconds", 0.0)
    print(page(options, report, len(todo)))
    return any(t["wrong"] for t in report["trials"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="adversary-") as root:
        campaign.ROOT = Path(root).resolve()
        sys.exit(main())
