"""With --no-labels the names of folders are not labels, whatever reads the source."""

import json

import pyarrow.parquet as pq
import pytest
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.laboratory.experiments import EXPERIMENTS
from simsiam.laboratory.measure import measure_run, predictor_cosines
from simsiam.laboratory.scales import SCALES
from simsiam.runs.compose import compose_recipe
from simsiam.runs.run_folder import Run
from simsiam.sources import shapes
from simsiam.sources.open_source import open_source


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    """Two classes of 40 images, and a test split."""
    root = tmp_path_factory.mktemp("data") / "few"
    pixels, labels = shapes.draw_split("test")
    for split, start in (("train", 0), ("test", 40)):
        for c in range(2):
            for i in (labels == c).nonzero()[0][start : start + 40]:
                path = root / split / shapes.CLASSES[c] / f"{i:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[i].transpose(1, 2, 0)).save(path)
    return root


@pytest.fixture(scope="module")
def run(labeled, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = QUICK | {"holdout": None, "knn_every": 1, "steps": None, "epochs": 1}
    return Run(simsiam.pretrain(labeled, out=out, **settings, no_labels=True))


def test_every_split_loses_its_labels_and_nothing_else(labeled):
    with_labels, without = open_source(labeled), open_source(labeled, no_labels=True)
    assert with_labels.splits.keys() == without.splits.keys() == {"train", "test"}
    for split, images in without.splits.items():
        assert with_labels.splits[split].labels is not None and len(images.classes) == 0
        assert images.labels is None and [*images.keys] == [*with_labels.splits[split].keys]
    assert open_source("shapes", no_labels=True).train.labels is None


def test_a_run_trains_on_all_images_and_measures_no_accuracy(run):
    assert run.recipe.no_labels and run.checkpoint()["images"] == 64  # none is held out
    assert not [line for line in run.metrics() if "knn_top1" in line]
    assert [line for line in run.metrics() if "view_retrieval" in line]
    assert "knn_top1" not in run.json("summary.json")


def test_resume_keeps_it(run):
    simsiam.resume(run.path, epochs=2)
    assert Run(run.path).recipe.no_labels and run.json("summary.json")["epochs"] == 2
    assert "knn_top1" not in run.json("summary.json")


def test_an_experiment_measures_no_accuracy(run):
    measured = measure_run(run, SCALES["tiny"], EXPERIMENTS["figure_d1"])
    assert not {"knn", "linear", "above_chance"} & measured["values"].keys()
    assert measured["values"]["z_rank"] > 1 and measured["curves"]["linear"] == []
    assert -1 <= predictor_cosines(run)["cos_p_mean"] <= 1
    assert not list(run.path.glob("evaluations/knn.json"))


def test_protocols_that_need_labels_are_refused_in_one_line(run, labeled, capsys):
    """The run's own source is opened as in training; a named one only if --no-labels is given."""
    for given, reason in (
        ([], "the run was trained with --no-labels"),
        ([str(labeled), "--no-labels"], "--no-labels was given"),
    ):
        assert main(["evaluate", str(run.path), *given]) == 2
        error = capsys.readouterr().err
        assert f"{reason}, and knn, linear, few_label need labels: use --protocol" in error
    (record,) = simsiam.evaluate(run.path, protocols=["label_free"])
    assert record["classes"] == 0
    (record,) = simsiam.evaluate(run.path, labeled, protocols=["knn"], baselines=False, limit=32)
    assert record["classes"] == 2


def test_labels_cannot_be_the_target(labeled, tmp_path, capsys):
    code = main(["pretrain", str(labeled), "--method", "supervised", "--no-labels"])
    assert code == 2 and "few has no labels" in capsys.readouterr().err


def test_shards_and_facts_have_none(labeled, tmp_path, monkeypatch):
    out, facts = tmp_path / "shards", tmp_path / "facts.json"
    command = ["shard", str(labeled), "--out", str(out), "--format", "parquet", "--no-labels"]
    assert main(command) == 0
    assert pq.read_schema(next(out.glob("train*"))).names == ["image"]
    # Measuring the time that training takes is not what this is about.
    monkeypatch.setattr("simsiam.training.inspect.estimate_duration", lambda *_: {"unknown": ""})
    assert main(["inspect", str(labeled), "--no-labels", "--out", str(facts)]) == 0
    assert json.loads(facts.read_text())["labels"] == {}


@pytest.mark.parametrize("recipe", [None, simsiam.Recipe(no_labels=True)])
def test_pretrain_plan_and_preview_take_it_from_the_flag_or_the_recipe(labeled, recipe):
    flag = {} if recipe else {"no_labels": True}
    complete, source, _ = compose_recipe(labeled, recipe, flag)
    assert complete.no_labels and source.train.labels is None
    assert compose_recipe(labeled, recipe, {"no_labels": False})[1].train.labels is not None
