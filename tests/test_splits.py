"""Names decide what images are for; a line says what they decided, and --splits overrides it."""

import json
import ntpath
import os

import pytest
from test_decode import encode, picture
from test_sources import parquet, refused, tarred, tree, zipped

import simsiam
from simsiam.commands.main import main
from simsiam.runs.compose import compose_recipe, open_run_source
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.sources.splits import parse_splits

PNG = encode(picture(0, 8, 8))


def counts(source):
    return {name: len(images) for name, images in source.splits.items()}


def tars(root, *names):
    """Write tars of two labeled images each."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tarred(root / name, {"1.png": PNG, "1.cls": b"cat", "2.png": PNG, "2.cls": b"dog"})
    return root


# Folders


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_outside_of_the_splits_are_counted_and_their_folders_named(tmp_path, kind, capsys):
    names = [f"{c}/{i}.png" for c in ("airplane", "bus", "train") for i in range(2)]
    source = tree(tmp_path / "vehicles", *names, "bus/2.png", "readme.png")
    if kind == "zip":
        source = zipped(
            tmp_path / "vehicles.zip", dict.fromkeys([*names, "bus/2.png", "readme.png"], PNG)
        )
    opened = open_source(source)
    assert counts(opened) == {"train": 2}
    assert opened.notes == (
        "images in no split, which are left out: 6 (3 in bus/, 2 in airplane/, 1 in no folder); "
        "--splits says which folder is what, --splits train=. takes all",
    )
    assert capsys.readouterr().err == f"vehicles: {opened.notes[0]}\n"
    everything = open_source(source, splits=["train=."])
    assert counts(everything) == {"train": 8} and everything.notes == ()


def test_a_class_called_train_is_a_class_if_the_user_says_so(tmp_path):
    source = tree(tmp_path, "bus/1.png", "train/1.png", "train/2.png")
    images = open_source(source, splits=["train=."]).train
    assert images.classes == ("bus", "train") and images.labels.tolist() == [0, 1, 1]


def test_other_words_for_train_val_and_test(tmp_path):
    tree(tmp_path, "Training/1.png", "testing/1.png", "dev/1.png", "validation/1.png")
    source = open_source(tmp_path)
    assert list(source.train.keys) == ["Training/1.png"]
    assert list(source.val.keys) == ["dev/1.png", "validation/1.png"]
    assert list(source.test.keys) == ["testing/1.png"] and source.notes == ()


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ["train2017/1.png", "val2017/1.png"],
            "train2017, val2017; --splits train=train2017 val=val2017 makes them splits, "
            "--no-labels ignores the names",
        ),
        (
            ["a/test/1.png", "a/train/1.png", "b/test/1.png", "b/train/1.png"],
            "a/test, a/train, b/test, b/train; --splits 'train=*/train' 'test=*/test' "
            "makes them splits",
        ),
        (
            ["ILSVRC/Data/train/1.png", "ILSVRC/Data/val/1.png"],
            "ILSVRC/Data/train, ILSVRC/Data/val; --splits train=ILSVRC/Data/train "
            "val=ILSVRC/Data/val makes them splits",
        ),
        (
            ["cat/1.png", "test_images/1.png"],
            "test_images; --splits train=FOLDER test=test_images makes them splits, "
            "--no-labels ignores the names",
        ),
    ],
)
def test_folders_with_names_like_splits_that_are_none_are_named(tmp_path, names, note):
    notes = open_source(tree(tmp_path, *names)).notes
    assert notes[0] == f"folders with names like splits that are not taken as splits: {note}"


def test_classes_with_a_word_of_a_split_in_their_name_are_no_splits(tmp_path):
    (note,) = open_source(
        tree(tmp_path, "bullet train/1.png", "valley/1.png", "contest/1.png")
    ).notes
    assert note.startswith("the names of 3 folders are used as labels: bullet train, contest, ")


def test_folder_names_as_labels_are_said_and_no_labels_named(tmp_path, capsys):
    albums = tree(tmp_path / "albums", "2019/1.png", "Trip to Rome/1.png")
    (note,) = open_source(albums).notes
    assert note == (
        "the names of 2 folders are used as labels: 2019, Trip to Rome; --no-labels ignores them"
    )
    more = tree(tmp_path / "more", "2020/1.png")
    assert open_source([albums, more]).notes[0].startswith("the names of 3 folders are used as ")
    assert open_source(albums, no_labels=True).notes == ()
    parts = tree(tmp_path / "parts", "images/1.png", "masks/1.png")
    assert open_source(parts).notes[0].endswith("; --splits train=images takes the images alone")
    many = tree(tmp_path / "many", *[f"class {i}/1.png" for i in range(9)])
    assert "class 0, class 1, class 2, class 3, class 4 and 4 more" in open_source(many).notes[0]


def test_without_labels_a_test_split_may_have_other_folders(tmp_path):
    tree(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/test/1.png")
    assert refused(tmp_path).endswith(
        "'test': choose from cat, dog; --no-labels ignores the classes"
    )
    assert counts(open_source(tmp_path, no_labels=True)) == {"train": 2, "test": 1}


# --splits


def test_splits_say_which_folder_is_what(tmp_path):
    tree(tmp_path, "A/cat/1.png", "A/dog/1.png", "B/dog/1.png", "C/1.png", "odd (x) [y]+/cat/1.png")
    source = open_source(tmp_path, splits=["train=A/", "train=odd (x) [y]+", "test=./B"])
    assert list(source.train.keys) == ["A/cat/1.png", "A/dog/1.png", "odd (x) [y]+/cat/1.png"]
    assert source.train.classes == ("cat", "dog") and source.train.labels.tolist() == [0, 1, 0]
    assert list(source.test.keys) == ["B/dog/1.png"] and source.test.labels.tolist() == [1]
    assert source.notes[0] == "images in no split, which are left out: 1 (1 in C/)"


def test_a_star_stands_for_a_name(tmp_path):
    tree(tmp_path, "a/train/good/1.png", "a/test/bad/1.png", "b/train/good/1.png", "b/x/test/1.png")
    source = open_source(tmp_path, splits=["train=*/train", "test=*/test"])
    assert list(source.train.keys) == ["a/train/good/1.png", "b/train/good/1.png"]
    assert list(source.test.keys) == ["a/test/bad/1.png"]
    assert source.notes == ("images in no split, which are left out: 1 (1 in b/)",)


def test_splits_of_an_archive_are_below_its_outer_folder(tmp_path):
    names = ["photos/A/cat/1.png", "photos/A/dog/1.png", "photos/B/1.png"]
    archive = zipped(tmp_path / "p.zip", dict.fromkeys(names, PNG))
    source = open_source(archive, splits=["train=A", "val=B"])
    assert list(source.train.keys) == names[:2] and source.train.classes == ("cat", "dog")
    assert list(source.val.keys) == names[2:]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["trian=A"], "unknown split in --splits 'trian': did you mean 'train'?"),
        (["test=A"], "--splits has no train=FOLDER: say which images are for training"),
        (
            ["train=C"],
            "--splits train=C: the source has no image in this folder; its folders of images are "
            "A, B",
        ),
        (["train=A", "test=A"], "--splits names A/1.png twice: an image is in one split only"),
        (["train"], "--splits train: after = comes a folder inside of the source"),
        (["train=/A"], "--splits train=/A: after = comes a folder inside of the source"),
        (["train=../A"], "--splits train=../A: after = comes a folder inside of the source"),
        ([], "--splits has no train=FOLDER"),
    ],
)  # fmt: skip
def test_wrong_splits_are_one_line(tmp_path, values, line):
    assert refused(tree(tmp_path, "A/1.png", "B/1.png"), splits=values).startswith(line)


def test_splits_may_have_backslashes_on_windows(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "sep", "\\")
        patch.setattr(os, "path", ntpath)
        places = [given.place for given in parse_splits([r"train=a\b", "test=c/d/", "val=."])]
    assert places == ["a/b", "c/d", "."]


def test_splits_need_one_source_with_folders_or_shards(tmp_path):
    tree(tmp_path, "A/1.png", "B/1.png")
    (tmp_path / "list.txt").write_text("A/1.png\n")
    for source in ("shapes", [tmp_path / "A", tmp_path / "B"], tmp_path / "list.txt"):
        line = refused(source, splits=["train=A"])
        assert line == "--splits needs one folder, archive or set of shards as SOURCE"


def test_a_run_keeps_its_splits(tmp_path):
    source = tree(tmp_path / "photos", *[f"{f}/{i}.png" for f in "AB" for i in range(20)])
    recipe, opened, _ = compose_recipe(source, None, {"splits": ["train=A", "test=B"]})
    assert counts(opened) == {"train": 20, "test": 20}
    run = Run.create(tmp_path / "run", recipe)
    stored = read_recipe(run.path / "recipe.yaml")
    assert stored.splits == recipe.splits == ("train=A", "test=B")
    assert counts(open_run_source(run, command=list)) == {"train": 20, "test": 20}
    assert counts(open_run_source(run, place=source, command=list)) == {"train": 20, "test": 20}
    # Named anew: names decide.
    assert counts(open_run_source(run, source, command=list)) == {"train": 40}
    assert counts(compose_recipe(None, stored, {})[1]) == {"train": 20, "test": 20}
    assert simsiam.Recipe().replace(splits="none").splits is None


def test_verbs_take_splits_and_inspect_writes_the_notes(tmp_path, monkeypatch, capsys):
    source = tree(tmp_path / "photos", "A/1.png", "B/1.png", "C/1.png")
    splits = ["--splits", "train=A", "test=B"]
    out = tmp_path / "shards"
    assert main(["shard", str(source), "--out", str(out), *splits]) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "test-000000.tar",
        "train-000000.tar",
    ]
    monkeypatch.setattr("simsiam.training.inspect.estimate_duration", lambda *_: {"unknown": ""})
    facts = tmp_path / "facts.json"
    assert main(["inspect", str(source), *splits, "--out", str(facts)]) == 0
    facts = json.loads(facts.read_text())
    assert facts["images"]["splits"] == {"train": 1, "test": 1}
    assert facts["notes"] == ["images in no split, which are left out: 1 (1 in C/)"]
    # Once in a process, and not for each command that opens the source.
    assert capsys.readouterr().err.count("left out: 1 (1 in C/)") == 1


# Shards


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["imagenet1k-train-0.tar", "imagenet1k-validation-00.tar"], {"train": 2, "val": 2}),
        (["training-1.tar", "testing-1.tar", "dev-1.tar"], {"train": 2, "val": 2, "test": 2}),
        (["cc3m_TRAIN_0.tar", "cc3m.val2017.tar"], {"train": 2, "val": 2}),
        (["default/train/0000.tar", "default/test/0000.tar"], {"train": 2, "test": 2}),
        (["test/c/train-0.tar", "test/c/valid-0.tar"], {"train": 2, "val": 2}),
        (["a.tar", "b.tar"], {"train": 4}),
    ],
)
def test_a_word_anywhere_in_the_name_of_a_shard_is_its_split(tmp_path, names, expected):
    source = open_source(tars(tmp_path, *names))
    assert counts(source) == expected and source.notes == ()
    assert source.train.classes == ("cat", "dog")


def test_parquet_by_words_and_by_folders(tmp_path):
    for name in ("training-0.parquet", "testing-0.parquet", "testing-1.parquet"):
        parquet(tmp_path / "flat" / name, [picture(0, 8, 8)])
    assert counts(open_source(tmp_path / "flat")) == {"train": 1, "test": 2}
    for name in ("train/0000.parquet", "partial-test/0000.parquet"):
        parquet(tmp_path / "hub" / "default" / name, [picture(0, 8, 8)])
    for folder in ("hub", "hub/default"):
        source = open_source(tmp_path / folder)
        assert counts(source) == {"train": 1, "test": 1}
    assert list(source.test.keys) == ["test#0"]


@pytest.mark.parametrize(
    ("names", "expected", "note"),
    [
        (
            ["train-0.tar", "extra.tar"],
            {"train": 4},
            "shards whose names have no word of a split, and which are for training: extra.tar; "
            "--splits says which shard is what",
        ),
        (
            ["val-0.tar", "test-0.tar"],
            {"train": 4},
            "no shard is named train, so the shards of val and test are for training; "
            "--splits says which shard is what",
        ),
        (
            ["train-0.tar", "freight-train-val-0.tar"],
            {"train": 4},
            "shards whose names have words of several splits, of which the first is taken: "
            "freight-train-val-0.tar; --splits says which shard is what",
        ),
    ],
)
def test_what_the_names_of_shards_leave_open_is_said(tmp_path, names, expected, note):
    source = open_source(tars(tmp_path, *names))
    assert counts(source) == expected and source.notes == (note,)


def test_one_shard_is_for_training_whatever_its_name(tmp_path):
    parquet(tmp_path / "test-0.parquet", [picture(0, 8, 8)])
    source = open_source(tmp_path / "test-0.parquet")
    assert counts(source) == {"train": 1} and source.notes == ()


def test_splits_say_which_shard_is_what(tmp_path):
    tars(tmp_path, "a-0.tar", "a-1.tar", "b.tar", "c.tar")
    source = open_source(tmp_path, splits=["train=a-*", "test=b.tar"])
    assert counts(source) == {"train": 4, "test": 2}
    assert source.notes == ("shards in no split, which are left out: c.tar",)
    line = "--splits train=d: no shard has this name; there are a-0.tar, a-1.tar, b.tar, c.tar"
    assert refused(tmp_path, splits=["train=d"]) == line
    line = "--splits names b.tar twice: a shard is in one split only"
    assert refused(tmp_path, splits=["train=*", "test=b.tar"]) in (
        line,
        line.replace("b.tar", "a-0.tar"),
    )
    nested = tars(tmp_path / "nested", "x/0.tar", "y/0.tar")
    assert list(open_source(nested).train.keys)[1:3] == ["x/0.tar/2.png", "y/0.tar/1.png"]
    assert counts(open_source(nested, splits=["train=y", "val=x"])) == {"train": 2, "val": 2}


def test_folders_in_tars_with_names_of_splits_are_named(tmp_path):
    for name in "ab":
        tarred(tmp_path / f"{name}.tar", {"train/1.png": PNG, "val/2.png": PNG})
    (note,) = open_source(tmp_path).notes
    assert note.startswith("the names of 2 folders are used as labels: train, val; --no-labels")


def test_images_win_over_shards_below(tmp_path):
    tree(tmp_path, "photos/1.png")
    tars(tmp_path, "archive/train-0.tar")
    assert list(open_source(tmp_path).train.keys) == ["photos/1.png"]
