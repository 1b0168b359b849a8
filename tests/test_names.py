"""Files hold the true names of images; only terminals and pages show some characters escaped."""

import csv
import json
import os
import unicodedata
from pathlib import Path, PureWindowsPath

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import QUICK
from test_decode import encode, picture
from test_report import page_data
from test_sources import same, tree

import simsiam
from simsiam.commands.main import main
from simsiam.detection.annotations import Faults
from simsiam.embeddings.embed import embed
from simsiam.embeddings.table import read_embeddings
from simsiam.errors import UsageError, printable
from simsiam.evaluation.protocol_few_label import read_label_list
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.sources.write_shards import write_shards

SCREENSHOT = "Screenshot 2025-01-01 at 1.00.00\u202fPM.png"  # as macOS names it
DECOMPOSED = unicodedata.normalize("NFD", "Café ü.png")  # as macOS stores it
TRUE_NAMES = [  # printed as they are
    SCREENSHOT,
    DECOMPOSED,
    "Sni\u0301mek\u00a0obrazovky.png",
    "画面\u3000写真.png",
    "zero\u200bwidth.png",
    "family \U0001f468\u200d\U0001f469.png",
]
ESCAPED = {  # what a terminal shows
    "tab\there.png": r"tab\there.png",
    "two\nlines.png": r"two\nlines.png",
    "red \x1b[31m.png": r"red \x1b[31m.png",
    "right \u202egnp.png": r"right \u202egnp.png",
}
NOT_UTF8 = os.fsdecode(b"caf\xe9.png")
NAMES = [*TRUE_NAMES, *ESCAPED, NOT_UTF8]
CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tree(tmp_path_factory.mktemp("names") / "shots", *NAMES, size=(16, 16))
    (root / "broken\u202f.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simsiam.pretrain("shapes", out=tmp_path_factory.mktemp("runs") / "run", **QUICK)


@pytest.fixture(scope="module")
def file(run, folder, tmp_path_factory):
    return embed(run, folder, out=tmp_path_factory.mktemp("embedded") / "shots.parquet", **CPU)


def test_what_a_terminal_shows():
    for name in TRUE_NAMES:
        assert printable(name) == name
    for name, shown in ESCAPED.items():
        assert printable(name) == shown
    assert printable(NOT_UTF8) == r"caf\udce9.png"
    assert printable("\u2028\x85\x7f\u2066") == r"\u2028\x85\x7f\u2066"


def test_an_embedding_holds_the_names_that_open_the_files(file, folder):
    images = read_embeddings(file)
    assert set(images.paths) == {*TRUE_NAMES, *ESCAPED, r"caf\udce9.png"}
    assert images.metadata["unreadable"][0][0] == "broken\u202f.png"
    there = [path for path in images.paths if (folder / path).is_file()]
    assert len(there) == len(NAMES) - 1  # a text in UTF-8 cannot hold the bytes of the last


@pytest.mark.parametrize("verb", ["outliers", "cluster", "probe"])
def test_tables_hold_the_names_that_open_the_files(file, folder, tmp_path, verb):
    labels, out = tmp_path / "labels.csv", tmp_path / "out.csv"
    with open(labels, "w", newline="", encoding="utf-8") as to:
        rows = [(name, "ab"[i % 2]) for i, name in enumerate([*TRUE_NAMES, *ESCAPED])]
        csv.writer(to).writerows([("path", "label"), *rows])
    given = {"probe": [str(labels)], "cluster": ["--clusters", "2"], "outliers": []}[verb]
    assert main([verb, str(file), *given, "--out", str(out)]) == 0
    with open(out, newline="", encoding="utf-8") as table:
        paths = [row["path"] for row in csv.DictReader(table)]
    assert sum((folder / path).is_file() for path in paths) == len(NAMES) - 1 == len(paths) - 1


def test_the_table_beside_npy_holds_them(run, folder, tmp_path):
    embed(run, folder, out=tmp_path / "x.npy", **CPU)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as table:
        assert {row["path"] for row in csv.DictReader(table)} >= {*TRUE_NAMES, *ESCAPED}


def test_a_name_is_found_as_a_user_types_it(file):
    images = read_embeddings(file)
    typed = {
        SCREENSHOT.replace("\u202f", " "): SCREENSHOT,
        "Café ü.png": DECOMPOSED,
        "Snímek obrazovky.png": TRUE_NAMES[2],
        "画面 写真.png": TRUE_NAMES[3],
        NOT_UTF8: r"caf\udce9.png",
    }
    for name, path in (typed | {name: name for name in TRUE_NAMES}).items():
        assert images.paths[images.find(name)] == path


def test_of_equal_spellings_the_exact_one_is_found(run, tmp_path):
    composed = unicodedata.normalize("NFC", DECOMPOSED)
    source = tree(tmp_path / "x", composed, DECOMPOSED, "\uff43afe ü.png", "cafe\u00a0ü.png")
    images = read_embeddings(embed(run, source, out=tmp_path / "x.parquet", **CPU))
    assert images.paths[images.find(composed)] == composed
    assert images.paths[images.find(DECOMPOSED)] == DECOMPOSED
    with pytest.raises(UsageError, match=r"2 images are named cafe ü.png: give the whole path"):
        images.find("cafe ü.png")


def test_terminals_and_pages_show_control_characters_escaped(file, tmp_path, capsys):
    page = tmp_path / "near.html"
    for command in (
        ["neighbors", str(file), SCREENSHOT, "--k", "99"],
        ["outliers", str(file)],
    ):
        assert main([*command, "--html", str(page)]) == 0
        for text in (capsys.readouterr().out, page.read_text(encoding="utf-8")):
            assert all(shown in text and name not in text for name, shown in ESCAPED.items())
            assert all(name in text for name in TRUE_NAMES[1:])
    assert main(["neighbors", str(file), "no\nsuch.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"no image no\nsuch.png" in line


def test_search_finds_and_lists_true_names(run, folder):
    for query in (SCREENSHOT.replace("\u202f", " "), str(folder / SCREENSHOT), DECOMPOSED):
        found = simsiam.search(folder, query, encoder=run, k=99, **CPU)
        names = {image.path for image in found}
        assert len(names) == len(NAMES) - 1  # all but the query
        assert names < {*TRUE_NAMES, *ESCAPED, r"caf\udce9.png"}


@pytest.mark.parametrize("format", ["tar", "parquet"])
def test_shards_hold_true_names_and_classes(tmp_path, format):
    classes = ["Bobby\u202fcat", unicodedata.normalize("NFD", "Hündin")]
    names = [f"{name}/{SCREENSHOT}" for name in classes] + [f"{classes[0]}/{DECOMPOSED}"]
    source = tree(tmp_path / "pets", *names)
    (source / classes[0] / "bad\u202f\t.png").write_bytes(b"\x89PNG")
    (source / classes[0] / os.fsdecode(b"bad\xe9.png")).write_bytes(b"\x89PNG")
    shards = write_shards(source, out=tmp_path / "shards", format=format)
    images = open_source(shards).train
    assert set(images.classes) == set(classes)
    if format == "tar":
        assert sorted(images.keys) == sorted(names)
    else:
        (path,) = shards.glob("*.parquet")
        column = pq.read_table(path)["image"].to_pylist()
        assert sorted(row["path"] for row in column) == sorted(names)
    lines = (shards / "left_out.txt").read_bytes().split(b"\n")[:-1]
    expected = [
        os.fsencode(f"{classes[0]}/bad\u202f\\t.png"),
        f"{classes[0]}/bad".encode() + b"\xe9.png",
    ]
    assert sorted(line.split(b"\t")[0] for line in lines) == sorted(expected)


def test_quarantine_holds_true_names(run, tmp_path, monkeypatch):
    folder = Run(run)
    monkeypatch.setattr(folder, "path", tmp_path)
    names = [SCREENSHOT, NOT_UTF8, "two\nlines.png", "\u2028.png", "\x85.png"]
    folder.quarantine([(name, "an empty\nfile") for name in names])
    folder.quarantine([(SCREENSHOT, "an empty file")])  # each one once
    expected = [name.replace("\n", r"\n") + "\tan empty file" for name in names]
    assert sorted(folder.read_quarantine()) == sorted(expected)
    assert b"caf\xe9.png\t" in (tmp_path / "quarantine.txt").read_bytes()


def test_faults_of_annotations_hold_true_names():
    faults = Faults()
    faults.add("image left out", SCREENSHOT, "not\nthere")
    assert faults.lines == [f"{SCREENSHOT}\tnot there"]


def test_facts_hold_true_names_and_the_text_is_escaped(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simsiam.training.inspect.estimate_duration", lambda *_: {"unknown": ""})
    assert main(["inspect", str(folder), "--out", str(tmp_path / "facts.json")]) == 0
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["unreadable"]["files"][0][0] == "broken\u202f.png"
    assert "broken\u202f.png: " in capsys.readouterr().out


def test_the_map_lists_names_that_are_a_source_again(file, tmp_path):
    data = page_data(simsiam.report(file, out=tmp_path / "page.html"))
    assert set(data["galleries"][0]["names"]) == {*TRUE_NAMES, *ESCAPED, r"caf\udce9.png"}


def test_a_list_of_labeled_images_may_have_spaces_and_another_spelling(tmp_path):
    names = [SCREENSHOT, DECOMPOSED, "a b.png", "c.png"]
    train = open_source(tree(tmp_path / "x", *[f"{i % 2}/{n}" for i, n in enumerate(names)])).train
    listed = tmp_path / "few.txt"
    listed.write_text("a b.png\n1/Café ü.png\nScreenshot 2025-01-01 at 1.00.00 PM.png\n")
    rows = read_label_list(train, listed)
    assert sorted(train.keys[i].rpartition("/")[2] for i in rows) == sorted(names[:3])
    listed.write_text("b.png\n")
    with pytest.raises(UsageError, match=r"names 1 files that are not training images: 'b.png'"):
        read_label_list(train, listed)


@pytest.mark.parametrize("parent", ["Été", "plain"])
def test_a_list_may_spell_names_in_another_normal_form(tmp_path, parent):
    for written, stored in (("NFC", "NFD"), ("NFD", "NFC")):
        root = tmp_path / written
        path = f"{unicodedata.normalize(stored, parent)}/{unicodedata.normalize(stored, 'ü.png')}"
        tree(root, path, "a.png")
        (root / "l.txt").write_text(unicodedata.normalize(written, f"{parent}/ü.png\na.png\n"))
        images = open_source(root / "l.txt").train
        assert same(images.read(0), picture(0)) and same(images.read(1), picture(1))
        assert (images.storage.file_stats() > 0).all()
    assert encode(images.read(0)) == encode(picture(0)) and np.all(images.labels is None)


def test_lists_tables_and_queries_of_windows_name_the_same_files(run, tmp_path):
    """A backslash separates folders, unless a file has it in its name."""
    names = ["cats/Zoë/a.png", "cats/b.png", "dogs/a.png"]
    root = tree(tmp_path / "photos", *names, size=(16, 16))
    there = [str(PureWindowsPath(name)) for name in names]
    (root / "list.txt").write_bytes("".join(f"{n}\t{n[:4]}\r\n" for n in there).encode("utf-16"))
    source = open_source(root / "list.txt").train
    assert all(same(source.read(i), picture(i, 16, 16)) for i in range(3))
    assert list(source.classes) == ["cats", "dogs"] and (source.storage.file_stats() > 0).all()

    (root / "few.txt").write_text(f"{there[0]}\n{there[2]}\n", "utf-8")
    tree(root, *names, size=(16, 16))
    photos = open_source(root).train
    rows = read_label_list(photos, root / "few.txt")
    assert [photos.keys[i] for i in rows] == [names[0], names[2]]

    embeddings = read_embeddings(embed(run, root, out=tmp_path / "x.parquet", **CPU))
    assert [embeddings.find(name) for name in there] == [embeddings.find(name) for name in names]
    labels = "path,label\n" + "".join(f"{name},{name[:4]}\n" for name in there)
    (tmp_path / "labels.csv").write_text(labels, "utf-8")
    assert (
        len(
            simsiam.probe(
                tmp_path / "x.parquet", tmp_path / "labels.csv", out=tmp_path / "y.csv"
            ).labels
        )
        == 3
    )


@pytest.mark.skipif(os.sep == "\\", reason="a name on Windows has no backslash")
def test_a_name_with_a_backslash_is_still_found(tmp_path):
    root = tree(tmp_path / "x", "a/b.png", size=(16, 16))
    (root / "a\\b.png").write_bytes(encode(picture(7)))
    (root / "list.txt").write_text("a\\b.png\n")
    assert same(open_source(root / "list.txt").train.read(0), picture(7))
    assert not Path(root, "a", "a\\b.png").exists()
