"""A place that a run names is opened only if the user has named it: in this command or before."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import socket
import stat
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.runs import run_folder
from simsiam.runs.run_folder import write_recipe

MARKS_FILE, KEY_FILE = "own_marks.txt", "run_key.txt"
# Places in the network, of every kind that a source may have; {} is the port of a server here.
ADDRESSES = [
    "ftp://127.0.0.1:{}/photos/",
    "ftp://127.0.0.1:{}/a.parquet",
    "hf://datasets/somebody/something",
    "simplecache::ftp://127.0.0.1:{}/a.tar",
    "cifar10",
]
# Words of a run folder's own settings, which no command here may follow.
COMMANDS = {
    "embed": "embed RUN --out e.parquet",
    "evaluate": "evaluate RUN --protocol label_free",
    "resume": "resume RUN",
    "report": "report RUN",
    "pretrain": "pretrain --recipe RUN/recipe.yaml --out new",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine") / "photos"
    folder.mkdir()
    for i in range(64):
        shade = np.full((12, 12, 3), 3 * i, np.uint8)
        Image.fromarray(shade).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory, photos):
    """A run of the user who runs these commands."""
    out = tmp_path_factory.mktemp("own") / "run"
    return simsiam.pretrain(str(photos), out=out, **QUICK | {"steps": 2})


@pytest.fixture
def connections(monkeypatch):
    """The connections and look-ups of names that were asked for; none is made."""
    asked = []
    # A logger of another test may still call a server that does not answer.
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def refuse(*arguments):
        if threading.get_ident() not in others:
            asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def as_a_strangers(run: Path, folder: Path, **settings) -> Path:
    """Copy a run as somebody else might send it, with settings of theirs."""
    copy = Path(shutil.copytree(run, folder / "run"))
    path = copy / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))
    return copy


def run_line(capsys, command: str, run: Path) -> tuple[int, str]:
    """Run a command; return its exit code and what it printed."""
    code = main(command.replace("RUN", str(run)).split())
    printed = capsys.readouterr()
    return code, printed.err + printed.out


def command_in(text: str) -> list[str]:
    """The words of the command that a line gives, after `simsiam`."""
    found = re.search("`simsiam (.*?)`", text)
    assert found, text
    return shlex.split(found[1])


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_a_run_of_a_stranger_is_not_asked(
    verb, address, own, tmp_path, capsys, connections
):
    place = address.format(21)
    run = as_a_strangers(own, tmp_path, source=[place])
    code, text = run_line(capsys, COMMANDS[verb], run)
    assert not connections
    assert code == (0 if verb == "report" else 2)
    assert "no mark of yours" in text and "Traceback" not in text
    assert place in command_in(text) and command_in(text)[0] == verb


@pytest.mark.parametrize("verb", COMMANDS)
def test_pictures_of_this_machine_are_shown_only_if_they_are_named(
    verb, own, photos, tmp_path, capsys
):
    """A run of a stranger that names /your/pictures does not put them on a page."""
    run = as_a_strangers(own, tmp_path, source=[str(photos.parent)])
    code, text = run_line(capsys, COMMANDS[verb], run)
    assert code == (0 if verb == "report" else 2) and "no mark of yours" in text
    if verb == "report":
        page = (run / "report.html").read_text()
        assert '"views":null' in page and "no mark of yours" in page


@pytest.mark.parametrize("verb", COMMANDS)
def test_ones_own_run_asks_nothing(verb, own, tmp_path, capsys):
    run = Path(shutil.copytree(own, tmp_path / "run"))  # it may be moved
    code, text = run_line(capsys, COMMANDS[verb], run)
    assert code == 0 and "mark" not in text and "simsiam_state" not in text.lower()


@pytest.mark.parametrize("verb", COMMANDS)
@pytest.mark.parametrize("lacks", ["marks", "key"])
def test_the_line_gives_the_command_to_type(verb, lacks, own, tmp_path, capsys, monkeypatch):
    """For older runs, and homes without a key."""
    run = Path(shutil.copytree(own, tmp_path / "run"))
    if lacks == "marks":
        (run / MARKS_FILE).unlink()
    else:
        monkeypatch.setenv("SIMSIAM_STATE", str(tmp_path / "state"))
    _, text = run_line(capsys, COMMANDS[verb], run)
    command = command_in(text)
    code = main(command)
    assert code == 0 and "no mark of yours" not in capsys.readouterr().err
    if verb == "resume":  # now they have been named
        assert run_line(capsys, COMMANDS["embed"], run)[0] == 0


def test_a_changed_place_is_not_marked(own, tmp_path, capsys):
    run = as_a_strangers(own, tmp_path, source=[str(tmp_path)])
    assert (run / MARKS_FILE).exists()  # those of another place
    assert run_line(capsys, COMMANDS["embed"], run)[0] == 2
    run = as_a_strangers(own, tmp_path / "again", epochs=3)  # other settings may be changed
    assert run_line(capsys, COMMANDS["embed"], run)[0] == 0


def test_initial_weights_of_a_stranger_are_not_downloaded(own, tmp_path, capsys, connections):
    run = as_a_strangers(own, tmp_path, source=["shapes"], init="hf-hub:somebody/something")
    for verb in ("embed", "evaluate"):  # they need none
        assert run_line(capsys, COMMANDS[verb], run)[0] == 0
    assert run_line(capsys, COMMANDS["resume"], run)[0] == 2  # other images
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    for verb in ("resume", "pretrain"):
        code, text = run_line(capsys, COMMANDS[verb], run)
        assert code == 2 and "initial weights are only opened" in text
        command = command_in(text)
        assert command[0] == "pretrain" and command[-2:] == ["--init", "hf-hub:somebody/something"]
    for verb in ("preview shapes --out p.png --recipe", "plan shapes --recipe"):
        assert run_line(capsys, f"{verb} RUN/recipe.yaml", run)[0] == 2
    assert not connections


def test_loggers_of_a_stranger_get_nothing(own, tmp_path, capsys, connections):
    pytest.importorskip("wandb")
    run = as_a_strangers(own, tmp_path, source=["shapes"])
    (run / "loggers.json").write_text(json.dumps({"loggers": ["wandb"], "id": "0" * 32}))
    code, text = run_line(capsys, COMMANDS["resume"], run)
    assert code == 2 and not connections
    assert command_in(text) == ["resume", str(run), "--logger", "wandb"]


def test_an_embedding_of_a_stranger_names_no_place_either(own, tmp_path, capsys, connections):
    file = simsiam.embed(own, out=tmp_path / "mine.parquet")
    assert main(["duplicates", str(file)]) == 0
    assert "read again" not in capsys.readouterr().err
    table = pq.read_table(file)
    metadata = json.loads(table.schema.metadata[b"simsiam"])
    metadata["sources"] = ["ftp://127.0.0.1:21/"]
    theirs = tmp_path / "theirs.parquet"
    pq.write_table(table.replace_schema_metadata({"simsiam": json.dumps(metadata)}), theirs)
    assert main(["duplicates", str(theirs)]) == 0  # by thumbnails
    error = capsys.readouterr().err
    assert not connections and "no mark of yours" in error
    assert command_in(error)[-1] == "ftp://127.0.0.1:21/"
    source = simsiam.runs.run_folder.Run(own).recipe.source
    assert main(["duplicates", str(theirs), "--source", *source]) == 0
    assert "read again" not in capsys.readouterr().err


def test_what_a_strangers_path_says_stays_one_word(own, tmp_path, capsys):
    place = "/x; rm -rf ~ `id` $(id)\n\x1b[2J"
    run = as_a_strangers(own, tmp_path, source=[place])
    code, text = run_line(capsys, COMMANDS["embed"], run)
    note, line = text.splitlines()
    assert code == 2 and "\x1b" not in text and "recipe.yaml was changed after" in note
    assert "'/x; rm -rf ~ `id` $(id)\\n\\x1b[2J'" in line


def test_only_its_user_can_read_the_key(own):
    path = Path(os.environ["SIMSIAM_STATE"], KEY_FILE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() not in (own / MARKS_FILE).read_text()


def test_processes_that_start_together_make_one_key(tmp_path, monkeypatch):
    from simsiam.sources.own_marks import make_mark

    monkeypatch.setenv("SIMSIAM_STATE", str(tmp_path / "new"))
    with multiprocessing.get_context("fork").Pool(8) as pool:
        marks = pool.starmap(make_mark, [("source", ("/a",))] * 32)
    assert len(set(marks)) == 1 and len(marks[0]) == 64
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


@pytest.mark.parametrize("content", ["", "00", "zz" * 32, "00" * 31])
def test_a_damaged_key_is_replaced(content, tmp_path, monkeypatch):
    from simsiam.sources.own_marks import is_mark_of, make_mark

    monkeypatch.setenv("SIMSIAM_STATE", str(tmp_path))
    (tmp_path / KEY_FILE).write_text(content)
    mark = make_mark("source", ["/a"])
    assert is_mark_of(mark, "source", ["/a"])
    assert not is_mark_of(mark, "source", ["/b"])
    assert not is_mark_of(mark, "init", ["/a"])
    assert not is_mark_of("", "source", ["/a"])


def test_where_no_key_can_be_kept_a_run_is_made(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIMSIAM_STATE", str(tmp_path / "file" / "state"))
    simsiam.errors.say_once.cache_clear()
    run = simsiam.pretrain(str(photos), out=tmp_path / "run", **QUICK | {"steps": 1})
    assert capsys.readouterr().err.count("no key can be kept") == 1
    assert run_line(capsys, COMMANDS["embed"], run)[0] == 2
    assert main(["embed", str(run), str(photos), "--out", "e.parquet"]) == 0


def test_a_file_of_marks_may_hold_anything(own, tmp_path, capsys):
    run = as_a_strangers(own, tmp_path)
    for content in (b"\xff\xfe", b"source \xc3\xa9\n", b"source\n" * 5000, b"source " + b"0" * 64):
        (run / MARKS_FILE).write_bytes(content)
        code, text = run_line(capsys, COMMANDS["embed"], run)
        assert code == 2 and "no mark of yours" in text


def test_a_teacher_of_a_stranger_is_not_loaded(tmp_path, monkeypatch):
    """A recipe may name a network to learn from; it is one more place."""
    monkeypatch.setattr("simsiam.runs.compose.open_weights", lambda *a, **k: pytest.fail("opened"))
    recipe = simsiam.Recipe().replace(method="distillation", teacher="hf-hub:a/b").to_dict()
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(recipe | {"image_size": 32, "mean": [0.5] * 3, "std": [1.0] * 3})
    )
    words = "Its teacher are only opened if you name them"
    with pytest.raises(simsiam.UsageError, match=words) as error:
        simsiam.pretrain("shapes", recipe=str(file), out=tmp_path / "run")
    assert "--teacher hf-hub:a/b" in str(error.value)


@pytest.mark.parametrize("written", [False, True], ids=["before the recipe", "after it"])
def test_a_run_that_is_killed_while_its_folder_is_made_is_its_users(photos, monkeypatch, written):
    """Whatever there is after the kill: the same command, or `resume`, goes on."""

    def write_and_die(*arguments):
        if written:
            write_recipe(*arguments)
        raise SystemExit("killed")

    settings = QUICK | {"steps": 2, "out": "run"}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_recipe", write_and_die)
        with pytest.raises(SystemExit, match="killed"):
            simsiam.pretrain(str(photos), **settings)
    if written:
        simsiam.resume("run")
    else:
        simsiam.pretrain(str(photos), **settings)
    assert simsiam.Run("run").json("summary.json")["steps"] == 2
