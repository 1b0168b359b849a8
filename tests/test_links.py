"""Folders of strangers and users: no link is followed, no pipe opened, no other file lost."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import QUICK, flags
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.errors import UsageError
from simsiam.evaluation import protocol_finetune
from simsiam.utils.files import atomic_write, file_lock

SECONDS = 60  # after which a command counts as hanging
SMALL = [*flags(**QUICK), "--device", "cpu"]
EVALUATE = ["--device", "cpu", "--limit", "32"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps on four classes of drawn images."""
    folder = tmp_path_factory.mktemp("finished")
    run = simsiam.pretrain("shapes", out=folder / "run", **QUICK | {"device": "cpu"})
    assert main(["evaluate", str(run), "--protocol", "knn", "label_free", *EVALUATE]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def outside(tmp_path):
    """A folder with a file, neither of which is part of a run."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear reader")
    return folder


@pytest.fixture(autouse=True)
def no_command_hangs():
    """A command that waits for a pipe is ended."""

    def stop(*_):
        raise AssertionError(f"still waiting after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, hidden ones too; the bytes of files."""
    paths = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


def last_line(capsys, *words: object) -> str:
    """Run a command that must end well or with one line; return the line, or ""."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    if code == 0:
        return ""
    assert code in (1, 2) and lines[-1].startswith("simsiam: "), (code, lines[-1:])
    return lines[-1]


def refused(capsys, *words: object) -> str:
    """Run a command that must end with one line; return the line."""
    said = last_line(capsys, *words)
    assert said, words
    return said


# --- links ---


def put_link(path: Path, target: Path) -> None:
    """Put a link in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


FINETUNE = "finetuning/all-labels-pretrained-1-epochs-seed-0-e3b0c442"  # the digest of nothing


@pytest.mark.parametrize(
    ("place", "target", "command"),
    [
        ("evaluations/.lock", "letter.txt", ["evaluate", "--protocol", "knn"]),
        ("evaluations/.lock", "new.txt", ["evaluate", "--protocol", "knn"]),
        ("evaluations/knn.json", "letter.txt", ["evaluate", "--protocol", "knn"]),
        (f"{FINETUNE}/.lock", "letter.txt", ["evaluate", "--protocol", "finetune"]),
        (FINETUNE, "", ["evaluate", "--protocol", "finetune"]),
        (FINETUNE, "new", ["evaluate", "--protocol", "finetune"]),
        (f"{FINETUNE}/last.pt", "new.pt", ["evaluate", "--protocol", "finetune"]),
        ("checkpoints/last.pt", "letter.txt", ["resume"]),
        ("checkpoints/previous.pt", "letter.txt", ["resume"]),
        (".lock", "letter.txt", ["resume"]),
    ],
)
def test_nothing_is_written_or_locked_through_a_link(
    place, target, command, run, outside, capsys, monkeypatch
):
    monkeypatch.setattr(protocol_finetune, "sha256", lambda _: sha256(b""))
    before = content(outside)
    put_link(run / place, outside / target)
    verb, *rest = command
    # Others are replaced, or not needed: `previous.pt` takes the place of a bad `last.pt`.
    refused_places = ("evaluations/.lock", f"{FINETUNE}/.lock", FINETUNE, ".lock")
    rest += [*EVALUATE, "--finetune-epochs", "1"] if verb == "evaluate" else []
    said = last_line(capsys, verb, run, *rest)
    assert content(outside) == before
    if said or place in refused_places:
        assert "is a link" in said and Path(place).name in said
    else:
        assert not (run / place).is_symlink()


def test_links_of_loggers_are_not_followed(run, outside, capfd):
    before = content(outside)
    put_link(run / "tensorboard" / "events.out.tfevents.1.host.1", outside / "letter.txt")
    assert main(["resume", str(run), "--epochs", "3", "--logger", "tensorboard"]) in (0, 2)
    put_link(run / "tensorboard", outside)
    assert main(["resume", str(run)]) == 2
    assert content(outside) == before


@pytest.mark.parametrize("place", ["", ".lock", ".simsiam-lock", "job.json", "whole"])
@pytest.mark.parametrize("verb", ["shard", "embed"])
def test_parts_are_not_written_through_a_link(verb, place, run, photos, outside, capsys):
    before, out = content(outside), photos.parent / ("out" if verb == "shard" else "out.parquet")
    put_link(photos.parent / f"{out.name}.parts" / place, outside / ("" if not place else "a.txt"))
    words = ["shard", photos] if verb == "shard" else ["embed", run, photos, "--device", "cpu"]
    refused(capsys, *words, "--out", out)
    assert content(outside) == before and not out.exists()


def test_a_lock_with_a_second_name_is_locked_and_not_written(tmp_path, outside):
    os.link(outside / "letter.txt", tmp_path / ".lock")
    with file_lock(tmp_path / ".lock") as locked:
        assert locked
    assert (outside / "letter.txt").read_text() == "dear reader"


def test_a_run_folder_may_itself_be_a_link_and_lie_behind_one(run, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(run)
    for path in (tmp_path / "a" / "run", tmp_path / "b"):
        assert main(["evaluate", str(path), "--protocol", "label_free", *EVALUATE]) == 0


def test_a_file_in_a_guarded_folder_is_written_at_every_depth_but_behind_no_link(tmp_path, outside):
    from simsiam.utils.system import guard_folder

    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    guard_folder(root)
    with atomic_write(root / "a" / "b" / "c.txt") as part:
        part.write_text("c")
    (root / "a" / "link").symlink_to(outside)
    (root / "a" / "b" / "link").symlink_to(root / "a")
    for place in ("a/link/x.txt", "a/b/link/x.txt", "a/link/deep/x.txt"):
        with pytest.raises(UsageError, match="link is a link"), atomic_write(root / place):
            pass
        with pytest.raises(UsageError, match="link is a link"), file_lock(root / place):
            pass
    assert os.listdir(outside) == ["letter.txt"]
    assert sorted(os.listdir(root / "a" / "b")) == ["c.txt", "link"]


def test_links_are_refused_as_if_on_windows(tmp_path, outside):
    """It has no folder descriptors."""
    code = (
        "import sys, pathlib\n"
        "from simsiam.utils.files import atomic_write, file_lock, make_folder\n"
        "from simsiam.utils.system import check_no_link, guard_folder\n"
        "root = pathlib.Path(sys.argv[1]); guard_folder(root)\n"
        "def locked(path):\n"
        "    with file_lock(path): pass\n"
        "def written(path):\n"
        "    with atomic_write(path): pass\n"
        "for use in (locked, written, make_folder):\n"
        "    for place in ('a/link/x', 'a/link/b/x', 'a/file')[:3 if use is locked else 2]:\n"
        "        try:\n"
        "            use(root / place)\n"
        "        except ValueError as error:\n"
        "            assert 'is a link' in str(error)\n"
        "        else:\n"
        "            raise AssertionError(place)\n"
        "written(root / 'a/b.txt')"
    )
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "link").symlink_to(outside)
    (tmp_path / "root" / "a" / "file").symlink_to(outside / "letter.txt")
    environment = os.environ | {
        "SIMSIAM_TEST_SYSTEM": "win32",
        "PYTHONPATH": os.pathsep.join(
            [
                str(Path(__file__).parent / "other_system"),
                *os.environ.get("PYTHONPATH", "").split(os.pathsep),
            ]
        ),
    }
    command = [sys.executable, "-c", code, tmp_path / "root"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert content(outside) == {str(outside / "letter.txt"): b"dear reader"}


def test_a_junction_of_windows_is_a_link():
    from simsiam.utils.system import check_no_link

    status = SimpleNamespace(st_mode=stat.S_IFDIR | 0o777, st_reparse_tag=0xA0000003)
    with pytest.raises(UsageError, match="is a link"):
        check_no_link("folder", status)


# --- files of users ---


def dead_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("verb", ["pretrain", "convert", "shard", "adapt", "export", "embed"])
def test_a_folder_that_exists_is_left_as_it_is(verb, run, photos, tmp_path, capsys):
    out, pid = tmp_path / "mine", dead_process()
    (out / f"film.{pid}.part").mkdir(parents=True)
    (out / f"film.{pid}.part" / "scene").write_text("one")
    (out / f"thesis.{pid}.part").write_text("chapter one")
    (tmp_path / f"mine.{pid}.part").write_text("beside it")
    before = content(out)
    words = {
        "pretrain": ["pretrain", photos, *SMALL],
        "convert": ["convert", run / "checkpoints" / "last.pt"],
        "shard": ["shard", photos],
        "adapt": ["adapt", photos, "--minutes", "1", "--device", "cpu"],
        "export": ["export", run, "--format", "safetensors"],
        "embed": ["embed", run, photos],
    }[verb]
    said = refused(capsys, *words, "--out", out)
    assert "mine" in said or verb == "adapt"  # which needs more images first
    assert content(out) == before
    assert [path.read_text() for path in tmp_path.glob("mine.*.part")] == ["beside it"]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("verb", "out"), [("shard", "album"), ("embed", "e.npy"), ("embed", "e")])
def test_a_folder_of_parts_of_another_program_is_kept(
    verb, out, full, run, photos, tmp_path, capsys
):
    mine = tmp_path / f"{out}.parts"
    mine.mkdir()
    if full:
        (mine / "wheel.step").write_text("round")
        (mine / ".lock").write_text("of another program")
        (mine / "drawings").mkdir()
    before, words = content(tmp_path), ["shard"] if verb == "shard" else ["embed", run]
    said = refused(capsys, *words, photos, "--out", tmp_path / out)
    assert "parts" in said and "choose another --out" in said
    assert content(tmp_path) == before


def test_what_a_kill_between_renaming_and_cleaning_up_left_goes_the_next_time(
    photos, tmp_path, capsys, monkeypatch
):
    """The parts of a finished output; they are ours, and of no use."""

    def killed_at_the_end(delete):
        def checked(path, *words, **options):
            if (tmp_path / "out").exists() and "out.parts" in (path.name, path.parent.name):
                raise KeyboardInterrupt
            delete(path, *words, **options)

        return checked

    monkeypatch.setattr(Path, "unlink", killed_at_the_end(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", killed_at_the_end(shutil.rmtree))
    assert main(["shard", str(photos), "--out", str(tmp_path / "out")]) == 130
    assert (tmp_path / "out").is_dir() and (tmp_path / "out.parts").is_dir()
    monkeypatch.undo()
    assert "exists and is not" in refused(capsys, "shard", photos, "--out", tmp_path / "out")
    assert not (tmp_path / "out.parts").exists()


def test_a_table_that_appeared_meanwhile_is_not_overwritten(run, photos, tmp_path, capsys):
    """`embed --out e.npy` writes e.csv too."""
    (tmp_path / "e.csv").write_text("mine")
    assert "e.csv exists" in refused(capsys, "embed", run, photos, "--out", tmp_path / "e.npy")

    (tmp_path / "e.csv").unlink()
    words = ["embed", str(run), str(photos), "--out", str(tmp_path / "e.npy"), "--device", "cpu"]
    assert main(words) == 0
    (tmp_path / "e.npy").unlink()  # as if the process had been killed before this was there
    table = (tmp_path / "e.csv").read_bytes()
    work = tmp_path / "e.npy.parts"
    work.mkdir()
    (work / ".simsiam-lock").touch()
    assert main(words) == 0 and (tmp_path / "e.csv").read_bytes() == table
    (tmp_path / "e.npy").unlink()
    work.mkdir()
    (work / ".simsiam-lock").touch()
    (tmp_path / "e.csv").write_text("mine")
    assert "e.csv exists" in refused(capsys, *words)
    assert (tmp_path / "e.csv").read_text() == "mine"


# --- pipes and devices ---


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    server.bind(path.name)
    os.chdir(here)
    server.close()


READERS = {
    "recipe.yaml": ["report", "compare", "resume"],
    "environment.json": ["compare", "report", "resume"],
    "metrics.jsonl": ["compare", "report", "resume"],
    "summary.json": ["compare", "report"],
    "loggers.json": ["resume"],
    "quarantine.txt": ["report"],
    "backbone.safetensors": ["embed", "export"],
    "head.safetensors": ["embed"],
    "origin.json": ["export"],
    ".lock": ["resume"],
    "checkpoints/last.pt": ["resume", "evaluate"],
    "checkpoints/previous.pt": [],
    "evaluations/knn.json": ["compare", "report", "evaluate"],
    "evaluations/.lock": ["evaluate"],
}


@pytest.mark.parametrize("make", [make_pipe, make_link_to_pipe, make_device, make_socket])
@pytest.mark.parametrize("place", READERS)
def test_a_pipe_or_device_in_a_run_is_one_line(place, make, run, photos, tmp_path, capsys):
    (run / place).unlink(missing_ok=True)
    make(run / place)
    for verb in READERS[place]:
        words = {
            "compare": ["compare", run, run],
            "embed": ["embed", run, photos, "--out", tmp_path / "e.parquet"],
            "evaluate": ["evaluate", run, "--protocol", "knn", *EVALUATE],
            "export": ["export", run, "--format", "huggingface", "--out", tmp_path / "exported"],
            "report": ["report", run, "--limit", "8"],
        }.get(verb, [verb, run])
        said = last_line(capsys, *words)
        if said or place not in ("recipe.yaml", "checkpoints/last.pt"):
            # Of a folder without a recipe the weights are taken; `previous.pt` is a checkpoint too.
            assert Path(place).name in said or "is a link" in said or "recipe.yaml" in said


@pytest.mark.parametrize("make", [make_pipe, make_link_to_pipe])
def test_other_files_that_users_name_are_no_pipes(make, run, photos, tmp_path, capsys):
    make(tmp_path / "x.pt")
    refused(capsys, "convert", tmp_path / "x.pt", "--out", tmp_path / "out")
    make_pipe(tmp_path / "recipe.yaml")
    refused(capsys, "pretrain", photos, "--recipe", tmp_path / "recipe.yaml")
    make_pipe(tmp_path / "out.json")
    refused(capsys, "plan", photos, "--bench", tmp_path / "out.json")
