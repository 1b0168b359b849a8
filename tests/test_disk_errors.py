"""Disks that fail or are full, small limits, plain terminals, and what other programs read."""

import csv
import errno
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, flags
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.embeddings.probe import read_labels
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import WorkFailed
from simsiam.sources import catalog
from simsiam.utils.files import atomic_folder, atomic_write, write_csv

HERE = Path(__file__).parent
ERRORS = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return simsiam.pretrain("shapes", out=folder / "run", **QUICK | {"device": "cpu"})


def write_photos(folder: Path, names: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name, "PNG")
    return folder


def simsiam_command(*words: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simsiam", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


# --- disks ---


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """The library that makes calls fail."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("library") / "faults.so"
    source = HERE / "stress" / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def with_fault(library, folder, kind, n, error, words, *, lasting=True):
    """Run a command of which the n-th call of a kind in a folder fails, and all later ones."""
    number = ("open", "read", "write", "fsync", "rename", "mkdir").index(kind)
    code = (
        "import ctypes, sys; from simsiam.commands.main import main\n"
        f"library = ctypes.CDLL({str(library)!r})\n"
        f"library.fault_arm({os.fsencode(folder)!r}, b'', {number}, ctypes.c_long({n}), "
        f"{getattr(errno, error)}, {int(lasting)})\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.mark.parametrize(("kind", "error"), [("mkdir", "EIO"), ("write", "ENOSPC")])
def test_a_cache_that_cannot_be_written_does_not_stop_inspect(kind, error, faults, tmp_path):
    photos, cache = write_photos(tmp_path / "photos", ["a.png", "b.png"]), tmp_path / "cache"
    os.environ["SIMSIAM_CACHE"] = str(cache)  # a fixture restores it
    done = with_fault(faults, cache, kind, 1, error, ["inspect", photos])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "2" in done.stdout


@pytest.mark.parametrize("error", ["EIO"])
def test_a_disk_that_fails_under_tensorboard_does_not_end_a_run(error, faults, tmp_path):
    run = tmp_path / "run"
    words = ["pretrain", "shapes", "--out", run, *flags(**QUICK), "--device", "cpu"]
    (tmp_path / "x").mkdir()
    done = with_fault(faults, run / "tensorboard", "write", 1, error, words)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ERRORS[error] in done.stderr and "the run goes on without tensorboard" in done.stderr
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", ["fsync", "rename"])
def test_a_disk_that_fails_under_a_run_is_one_line_that_names_the_file(kind, faults, tmp_path):
    run = tmp_path / "run"
    words = ["pretrain", "shapes", "--out", run, *flags(**QUICK), "--device", "cpu"]
    done = with_fault(faults, run, kind, 3, "EIO", words)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert line.startswith("simsiam: ") and "Input/output error" in line and str(run) in line


def test_the_file_before_is_there_again_if_the_second_renaming_fails(tmp_path, monkeypatch):
    """`last.pt` becomes `previous.pt` before the new one takes its place."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    last.write_text("step 2")
    previous.write_text("step 1")
    replace, calls = os.replace, []

    def failing(*paths, **words):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, "failing")
        replace(*paths, **words)

    monkeypatch.setattr(os, "replace", failing)
    with (
        pytest.raises(WorkFailed, match="what was there before is unchanged"),
        atomic_write(last, backup=previous) as part,
    ):
        part.write_text("step 3")
    assert last.read_text() == "step 2" and sorted(os.listdir(tmp_path)) == ["last.pt"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_replace(*paths, **words):
        done.append("rename")
        replace(*paths, **words)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    with atomic_folder(tmp_path / "out") as part:
        (part / "inner").mkdir()
        (part / "a.txt").write_text("a")
        (part / "inner" / "b.txt").write_text("b")
    renamed = done.index("rename")
    assert {"a.txt", "b.txt", "inner", part.name} <= set(done[:renamed])
    assert done[renamed + 1 :] == [tmp_path.name]


def test_an_error_of_a_disk_in_a_worker_is_one_line(tmp_path):
    from simsiam.utils.workers import parallel_map

    with pytest.raises(WorkFailed, match=r"No such file or directory: .*gone"):
        list(parallel_map(os.stat, [(str(tmp_path / "gone"),)] * 3))


def test_an_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "simsiam", "methods"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr and "the output" in done.stderr


def test_a_log_on_a_full_disk_ends_no_training(tmp_path):
    """As in `simsiam pretrain ... 2> log` while the disk of the log is full."""
    words = ["pretrain", "shapes", "--out", tmp_path / "run", *flags(**QUICK), "--device", "cpu"]
    command = [sys.executable, "-m", "simsiam", *map(str, words)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, check=False)
    assert done.returncode == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


# --- small limits and plain terminals ---


@pytest.mark.parametrize("workers", [0, 2])
def test_24_open_files_are_enough(workers, tmp_path):
    photos = write_photos(tmp_path / "photos", [f"{i:02}.png" for i in range(40)])
    settings = flags(**QUICK | {"limit": 40, "workers": workers, "cache_gib": 0, "image_size": 32})

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))

    for words in (
        ["pretrain", photos, "--out", tmp_path / "run", *settings, "--device", "cpu"],
        ["embed", tmp_path / "run", photos, "--out", tmp_path / "e.npy", "--device", "cpu"],
    ):
        done = simsiam_command(*words, preexec_fn=limit)
        if workers and "too many open files for the data workers" in done.stderr:
            return  # as many batches as that are not always on their way at once
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


def test_tables_are_readable_on_a_terminal_without_unicode(finished, tmp_path, monkeypatch):
    """As with PYTHONIOENCODING=ascii."""
    run = shutil.copytree(finished, tmp_path / "run")
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    words = ["--protocol", "knn", "few_label", "--device", "cpu", "--limit", "64"]
    assert main(["evaluate", str(run), *words]) == 0
    assert main(["compare", str(run), str(finished)]) == 0
    output.flush()
    text = output.buffer.getvalue().decode("ascii")
    assert "\\u" not in text and "\\x" not in text, text
    assert "tau 0." in text and "+- " in text


# --- what other programs read ---

FORMULAS = [
    "=1+1.png", "+1+1.png", "-2+3.png", "@SUM(A1).png", "\t=1.png", "＝1.png", "=cmd|' /C calc'!A0",
    "'=1.png", "''@x.png", "a;=1.png", 'a",=1.png', "-", "+",
]  # fmt: skip
PLAIN = ["a.png", "-1.png", "'a'.png", "it's.png", " x.png", "a=b.png"]
NUMBERS = ["-1", "+1", "-0.5", "-1.5e-3", "-0.9 ± 0.1", "-3 %"]


def test_texts_that_are_formulas_are_marked_and_others_are_not():
    from simsiam.utils.files import plain_text, spreadsheet_text

    assert all(spreadsheet_text(text) == f"'{text}" for text in FORMULAS if text[0] not in "a")
    assert all(spreadsheet_text(text) == text for text in [*NUMBERS, "a.png", "'a'.png", " x.png"])
    assert all(plain_text(spreadsheet_text(text)) == text for text in [*FORMULAS, *PLAIN, *NUMBERS])


def test_no_cell_of_a_table_is_a_formula_whatever_separates_cells(tmp_path):
    write_csv(tmp_path / "t.csv", ("path", "n"), [(text, -1.5) for text in (*FORMULAS, *PLAIN)])
    content = (tmp_path / "t.csv").read_bytes().decode()
    for separator in ",;\t":
        rows = csv.reader(io.StringIO(content, newline=""), delimiter=separator)
        cells = [cell for row in rows for cell in row]
        assert not [c for c in cells if c[:1] in "=+-@\t＝" and c[:1] and c != "-1.5"], separator
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    from simsiam.utils.files import plain_text

    assert [plain_text(row["path"]) for row in rows] == [*FORMULAS, *PLAIN]


def test_a_table_has_no_formulas_and_reads_back(finished, tmp_path):
    """`probe` reads the table of `embed` and of `probe`, with the true names."""
    names = [name for name in FORMULAS if "/" not in name]
    photos = write_photos(
        tmp_path / "photos", [f"{'=ab'[i % 2 :][:1]}/{n}" for i, n in enumerate(names)]
    )
    words = ["embed", finished, photos, "--out", tmp_path / "e.parquet", "--device", "cpu"]
    assert main(list(map(str, words))) == 0
    embeddings = read_embeddings(tmp_path / "e.parquet")
    labels = [Path(path).parent.name for path in embeddings.paths]
    assert set(labels) == {"=", "a"}
    write_csv(
        tmp_path / "labels.csv", ("path", "label"), zip(embeddings.paths, labels, strict=True)
    )
    assert read_labels(tmp_path / "labels.csv", embeddings) == dict(enumerate(labels))
    words = ["probe", tmp_path / "e.parquet", tmp_path / "labels.csv", "--out", tmp_path / "p.csv"]
    assert main(list(map(str, words))) == 0
    for line in (tmp_path / "p.csv").read_text("utf-8").splitlines():
        assert line[0] not in "=+-@"
    assert read_labels(tmp_path / "p.csv", embeddings) == dict(enumerate(labels))


def test_matplotlib_writes_nothing_to_the_home_folder(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "from simsiam.evaluation.finetune import plot_accuracy_curves\n"
        "plot_accuracy_curves({'a': [[1.0, 2.0]]}, 'curve.png')"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL"))}
    environment = kept | {"HOME": str(home), "SIMSIAM_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "curve.png").exists() and not list(home.rglob("*"))


def test_git_takes_no_lock_of_the_repository(tmp_path):
    """A run that starts must not disturb what the user does with git at the same moment."""
    shim = tmp_path / "bin" / "git"
    shim.parent.mkdir()
    shim.write_text('#!/bin/sh\necho "$@ $GIT_OPTIONAL_LOCKS" >> "$LOG"\necho 0123456789abcdef\n')
    shim.chmod(0o755)
    package = tmp_path / "checkout" / "src" / "simsiam"
    shutil.copytree(Path(simsiam.__file__).parent, package)
    (tmp_path / "checkout" / ".git").mkdir()
    environment = os.environ | {
        "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "PYTHONPATH": str(package.parent),
    }
    code = "from simsiam.runs.environment import git_commit; print(git_commit())"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "status" in line]
    assert all("--no-optional-locks" in line or line.endswith(" 0") for line in lines), lines


def test_a_catalog_that_cannot_be_read_again_is_one_line(tmp_path, monkeypatch, capfd):
    photos = write_photos(tmp_path / "photos", ["a.png", "b.png"])
    assert main(["shard", str(photos), "--out", str(tmp_path / "shards")]) == 0
    (tmp_path / "shards" / catalog.CATALOG_FILE).unlink()

    true = catalog.open_arrow_file

    def failing(path):
        if path.parent.name == "catalogs":  # and not a part of it
            raise OSError(errno.EIO, "failing", str(path))
        return true(path)

    monkeypatch.setattr(catalog, "open_arrow_file", failing)
    assert main(["inspect", str(tmp_path / "shards")]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("simsiam: ") and "was just written and cannot be read" in line
