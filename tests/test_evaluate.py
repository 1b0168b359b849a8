"""Evaluation: correct records; test labels choose nothing; a frozen backbone does not change."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from scipy.stats import binomtest

import simsiam
from simsiam.commands.main import main
from simsiam.config.protocols import FROZEN_PROTOCOLS, Settings
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.evaluation import protocol_knn, protocol_linear
from simsiam.evaluation.evaluate import evaluate
from simsiam.evaluation.evaluation_record import EvaluationRecord, save_records
from simsiam.evaluation.finetune import finetune, line_styles
from simsiam.evaluation.frozen import split_beside_training, split_train_test
from simsiam.evaluation.protocol_few_label import (
    logistic_regression,
    plan_draws,
    read_label_list,
)
from simsiam.evaluation.scores import score_predictions
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import cap_k, knn_scores, knn_top1
from simsiam.runs.encoder import eval_transform, weights_sha256
from simsiam.runs.run_folder import Run
from simsiam.sources import shapes
from simsiam.sources.open_source import Source, open_source
from simsiam.training.prepare import prepare_data
from simsiam.utils.intervals import wilson_interval

CPU = Compute(torch.device("cpu"), "float32")
ON_CPU = {"device": "cpu", "precision": "float32"}
FEW = {"labels": ("1", "25%"), "draws": 2} | ON_CPU
QUICK = {"linear_epochs": 2} | FEW
TIMES = {"measured", "seconds"}
KEYS = {
    "protocol",
    "name",
    "features",
    "parameters",
    "checkpoint",
    "step",
    "source",
    "train",
    "test",
    "environment",
}
ACCURACY = ("knn", "linear", "few_label")


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol_linear, "MIN_STEPS", 2)
        patch.setattr(protocol_linear, "BATCH_SIZE", 32)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes, 12 training and 5 test images of each; one more test image is broken."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, per_class in (("train", 12), ("test", 5)):
        pixels, labels = shapes.draw_split(split)
        for i in range(10 * per_class):
            path = root / split / shapes.CLASSES[labels[i]] / f"{split}_{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i].transpose(1, 2, 0)).save(path)
    (root / "test" / "star" / "broken.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return simsiam.pretrain(folder, out=out, **TINY | {"steps": 3, "precision": "float32"})


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def read(run, protocol: str) -> list[dict]:
    return Run(run).read_records(f"evaluations/{protocol}.json")


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def test_records_are_complete_and_repeated_evaluations_are_equal(run, capsys):
    records = evaluate(run, **QUICK)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    first = {protocol: read(run, protocol) for protocol in FROZEN_PROTOCOLS}
    assert [record for part in first.values() for record in part] == records
    assert all(record.keys() >= KEYS for record in records)
    for record in records:
        assert (record["source"], record["train"], record["test"]) == ("few", "train", "test")
        assert record["unreadable"] == 1 and record["frozen"] is True and record["step"] == 3
    for protocol in ACCURACY:
        kinds = {record["features"] for record in first[protocol]}
        assert kinds == {"h", "raw pixels", "untrained network"}
        for record in first[protocol]:
            assert record["n"] == 50 and 0 <= record["top1"] <= record["top5"] <= 100

    evaluate(run, protocols=["linear", "few_label"], **QUICK)
    for protocol, part in first.items():
        assert timeless(read(run, protocol)) == timeless(part)
        if protocol in ("knn", "label_free"):
            assert read(run, protocol) == part, "records of other protocols stay"


def test_a_record_has_the_keys_of_the_file_in_order_and_reads_back(run):
    (record,) = evaluate(run, protocols=["knn"], baselines=False, **ON_CPU)
    assert list(record) == [
        *("protocol", "name", "features", "parameters", "chosen", "top1", "top5", "n", "interval"),
        *("checkpoint", "step", "backbone_sha256", "source", "train", "test", "train_images"),
        *("classes", "unreadable", "frozen", "environment", "measured", "seconds"),
    ]
    assert EvaluationRecord.from_dict(record).to_dict() == record
    assert list(EvaluationRecord.from_dict(record).to_dict()) == list(record)


def test_records_of_older_files_are_kept(run):
    old = {"protocol": "knn", "top1": 50.0, "remark": "an old record, with few keys"}
    Run(run).write("evaluations/knn.json", json.dumps([old]))
    assert EvaluationRecord.from_dict(old).metrics == {"top1": 50.0, "remark": old["remark"]}
    record = EvaluationRecord(protocol="knn", name="k 1", metrics={"top1": 60.0}, source="few")
    save_records(Run(run), "knn", [record])
    save_records(Run(run), "knn", [record])
    assert read(run, "knn") == [old, record.to_dict()]


TOY_PROTOCOL = """
from simsiam.evaluation.frozen import ProtocolResult

def evaluate_frozen(frozen, settings):
    metrics = {"length": frozen.features("h").test_features.norm(dim=1).mean().item()}
    yield ProtocolResult(name="toy", features="h", parameters={}, metrics=metrics)
"""


def test_a_protocol_is_added_by_one_module(run, tmp_path):
    """A copy of the package with protocol_toy.py has the protocol toy, and no other change."""
    package = shutil.copytree(Path(simsiam.__file__).parent, tmp_path / "src" / "simsiam")
    (package / "evaluation" / "protocol_toy.py").write_text(TOY_PROTOCOL)

    def simsiam_evaluate(*arguments):
        command = [sys.executable, "-m", "simsiam", "evaluate", *arguments]
        environment = os.environ | {"PYTHONPATH": str(package.parent)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert "label_free, toy; without labels" in " ".join(simsiam_evaluate("--help").stdout.split())
    assert "length" in simsiam_evaluate(run, "--protocol", "toy", "--device", "cpu").stdout
    (record,) = read(run, "toy")
    assert (record["protocol"], record["name"]) == ("toy", "toy") and record["length"] > 0


def test_records_replace_those_of_the_same_parameters_only(run):
    common = {"baselines": False, "device": "cpu", "precision": "float32"}
    for settings in ({}, {"k": 3}, {}, {"checkpoint": "best"}, {"k": 3, "features": "z"}):
        evaluate(run, protocols=["knn"], **common, **settings)
    records = [(r["parameters"]["k"], r["checkpoint"], r["features"]) for r in read(run, "knn")]
    assert records == [(3, "last", "h"), (2, "last", "h"), (2, "best", "h"), (3, "last", "z")]


def test_with_a_limit_records_say_how_many_images_were_used(run):
    settings = {"protocols": ["knn"], "baselines": False, **ON_CPU}
    full = evaluate(run, **settings)
    few = evaluate(run, limit=20, **settings)
    assert [(r["train_images"], r["n"] + r["unreadable"], r["train"]) for r in few] == [
        (20, 20, "20 of train")
    ]
    more = evaluate(run, limit=100, **settings)  # there are fewer test images
    assert [(r["train"], r["test"]) for r in more] == [("100 of train", "test")]
    assert full[0] in read(run, "knn"), "it is not replaced"


def test_the_numbers_are_those_of_the_features(run, folder):
    """Compare kNN of h, z, pixels and initial weights with kNN of features computed here."""
    source, opened = open_source(folder), Run(run)
    model = simsiam.build(opened.recipe.method, backbone="resnet10", width=4, image_size=32)
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    networks = {
        "untrained network": model.backbone,
        "raw pixels": torch.nn.Flatten(),
        "h": model.backbone,
        "z": torch.nn.Sequential(model.backbone, model.projector),
    }
    records = evaluate(run, protocols=["knn"], **ON_CPU)
    records += evaluate(run, protocols=["knn"], features="z", **ON_CPU)
    record_of = {record["features"]: record for record in records}
    assert record_of.keys() == networks.keys()
    for kind, network in networks.items():
        untrained = kind == "untrained network"
        model.load_state_dict(initial if untrained else opened.checkpoint()["model"])
        bank, queries = (
            extract_features(network, images, eval_transform(opened.recipe), compute=CPU)
            for images in (source.train, source.test)
        )
        labels = torch.from_numpy(source.train.labels)
        query_labels = torch.from_numpy(source.test.labels[queries.kept_indices])
        x, q = bank.matrices[0], queries.matrices[0]
        top1 = knn_top1(x, labels, q, query_labels, classes=10)
        votes = knn_scores(x, labels, q, classes=10, k=cap_k(120, 10))
        ranked = votes.sort(dim=1, descending=True, stable=True).indices[:, :5]
        top5 = 100 * (ranked == query_labels[:, None]).any(1).float().mean().item()
        accuracies = (record_of[kind]["top1"], record_of[kind]["top5"])
        assert accuracies == pytest.approx((top1, top5), abs=1e-3)


def test_test_labels_choose_nothing(run, folder, monkeypatch):
    """With shuffled test labels, only the scores change."""
    settings = {"protocols": ACCURACY, **QUICK}
    records, source = evaluate(run, **settings), open_source(folder)
    shuffled = np.random.default_rng(0).permutation(source.test.labels)
    other = Source("few", source.train, None, replace(source.test, labels=shuffled))
    monkeypatch.setattr(
        sys.modules["simsiam.evaluation.evaluate"], "open_run_source", lambda *_, **__: other
    )
    again = evaluate(run, **settings)
    scores = {"top1", "top5", "interval", "top1_std", "draws"} | TIMES
    without = [
        [{k: v for k, v in record.items() if k not in scores} for record in part]
        for part in (records, again)
    ]
    assert without[0] == without[1]
    assert [r["top1"] for r in records] != [r["top1"] for r in again]
    for record in read(run, "linear"):
        assert record["chosen"].keys() == {"lr", "weight_decay", "held_out_top1"}


@pytest.mark.parametrize(("kind", "count"), [("paper", 1), ("sgd", 2)])
def test_training_a_layer_on_crops_leaves_the_backbone_bit_for_bit(
    folder, tmp_path, kind, count, monkeypatch
):
    """The crops are as large as test images, also of a run that was trained on smaller views."""
    words = TINY | {"steps": 1, "view_ratio": 0.5, "precision": "float32"}
    run, views = simsiam.pretrain(folder, out=tmp_path / "run", **words), []

    def recording(*arguments):
        for batch in iter_batches(*arguments):
            views.append(batch.views[0])
            yield batch

    monkeypatch.setattr(protocol_linear, "iter_batches", recording)
    records = evaluate(run, protocols=["linear"], linear=kind, linear_epochs=2, **ON_CPU)
    weights = weights_sha256(simsiam.load(run))
    assert len(records) == count and {r["backbone_sha256"] for r in records} == {weights}
    base_lrs = [r["parameters"]["base_lr"] for r in records]
    assert base_lrs == ([0.1] if kind == "paper" else [30.0, 100.0])
    assert {r["parameters"]["batch_size"] for r in records} == {120}
    assert len(views) == 2 and all(x.shape == (120, 3, 32, 32) for x in views)
    assert not torch.equal(*views)


def test_finetune_records_are_those_of_finetune_on_the_labels_of_few_label(run, folder):
    """Each draw of labels is fine-tuned in a folder of its own; the backbone is not frozen."""
    settings = {"protocols": ["finetune"], **FEW, "finetune_epochs": 1}
    (few,) = evaluate(run, **settings | {"labels": ("25%",)})
    (full,) = evaluate(run, **settings | {"labels": None}, from_scratch=True)
    assert timeless(read(run, "finetune")) == timeless([few, full])
    assert (few["name"], few["features"], few["frozen"]) == ("25 %, 1 epochs", "pretrained", False)
    assert (full["name"], full["features"]) == ("all labels, 1 epochs", "from scratch")
    assert len(few["draws"]) == len(few["val_top1"]) == 2
    assert "interval" in full and len(full["val_top1"][0]) == 1
    assert len(list((run / "finetuning").iterdir())) == 3
    assert few["n"] == 50 and few["unreadable"] == 1
    source = open_source(folder)
    rows = plan_draws(source.train, Settings(labels=("25%",), draws=2))["25 %"][1]
    options = {"device": "cpu", "precision": "float32", "out": run / "alone"}
    alone = finetune(run, source.train.take(rows), source.test, epochs=1, seed=1, **options)
    assert few["draws"][1] == alone["top1"]


def test_fine_tunings_on_other_labels_have_folders_of_their_own(run):
    """Of a seed and its draws, and of a limit; the same command trains nothing again."""
    settings = {"protocols": ["finetune"], **FEW, "finetune_epochs": 1, "labels": ("4",)}
    for changes in ({}, {"seed": 1}, {"limit": 80}, {}):
        evaluate(run, **settings | changes)
    folders = [path.name for path in (run / "finetuning").iterdir()]
    assert [sum(f"-seed-{seed}-" in name for name in folders) for seed in range(3)] == [2, 3, 1]


def test_a_backbone_that_changes_is_noticed(run, monkeypatch):
    def changing(frozen, settings):
        frozen.backbone.train()(torch.randn(4, 3, 32, 32))  # changes only statistics of batch norm
        yield from ()

    monkeypatch.setattr(protocol_knn, "evaluate_frozen", changing)
    with pytest.raises(AssertionError, match="a frozen backbone changed"):
        evaluate(run, protocols=["knn"], **ON_CPU)
    assert not (run / "evaluations" / "knn.json").exists()


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (2000, 2000), (1, 3)])
def test_the_interval_is_that_of_wilson(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_scores_of_one_draw_and_of_several():
    predictions = [
        torch.tensor([[0, 1], [1, 0], [2, 1], [2, 0]]),
        torch.tensor([[0, 1], [0, 2], [0, 2], [1, 2]]),
    ]
    labels = np.array([0, 1, 2, 0])
    one = score_predictions(predictions[:1], labels, classes=9)
    assert (one["top1"], one["top5"], one["n"]) == (75.0, 100.0, 4)
    assert one["interval"] == pytest.approx([30.064, 95.441])
    several = score_predictions(predictions, labels, classes=5)
    assert (several["top1"], several["top5"]) == (50.0, None)  # no top-5 with five classes
    assert several["draws"] == [75.0, 25.0] and several["top1_std"] == pytest.approx(35.355)


def images(labeled: bool, split: str = "train"):
    pixels = np.zeros((60, 3, 8, 8), np.uint8)
    if not labeled:
        return from_arrays(split, pixels)
    return from_arrays(split, pixels, np.arange(60) % 3, ("a", "b", "c"))


def test_the_split_is_that_of_the_source_or_a_fixed_stratified_one():
    train, val, test, bare = images(True), images(True, "val"), images(True, "test"), images(False)
    cases = {
        ("train", "test"): Source("s", train, val, test),
        ("train", "val"): Source("s", train, val, images(False, "test")),
        ("val", "test"): Source("s", bare, val, test),  # STL-10
    }
    for expected, source in cases.items():
        first, second, names = split_train_test(source, require_labels=True)
        assert (names["train"], names["test"]) == expected
        assert (first.keys[0], second.keys[0]) == (f"{expected[0]}#0", f"{expected[1]}#0")
    first, second, names = split_train_test(Source("s", train), require_labels=True)
    assert names["test"] == "a fifth of train, each class in proportion" and len(first) == 48
    assert np.bincount(second.labels).tolist() == [4, 4, 4]
    assert not set(first.keys) & set(second.keys)
    _, again, _ = split_train_test(Source("s", train), require_labels=True)
    assert list(again.keys) == list(second.keys)
    with pytest.raises(simsiam.UsageError, match="s has no labels"):
        split_train_test(Source("s", bare), require_labels=True)
    assert len(split_train_test(Source("s", bare), require_labels=False)[1]) == 12


def test_without_a_test_split_no_image_is_tested_that_was_trained_on_with_its_label(
    folder, tmp_path
):
    """Of all images, some unreadable, those are tested that training held out, or none."""
    shutil.copytree(folder / "train", tmp_path / "images")
    (tmp_path / "images" / "bar" / "train_000.png").write_bytes(b"")
    words = TINY | {"steps": 2, "method": "supervised", "dim": 10, "precision": "float32"}
    run = simsiam.pretrain(tmp_path / "images", out=tmp_path / "run", **words)
    source, recipe = open_source(tmp_path / "images"), Run(run).recipe
    held_out = prepare_data(recipe, source).held_out
    train, test, _ = split_beside_training(source, recipe, "last")
    assert set(test.keys) == set(held_out.keys) and len(test) == len(held_out) > 9
    assert len(train) + len(test) == len(source.train) and not set(train.keys) & set(test.keys)
    settings = {"protocols": ["knn"], "baselines": False, "device": "cpu"}
    for place in (None, tmp_path / "images"):
        (record,) = evaluate(run, place, **settings)
        assert record["test"] == "the images of train that training held out"
        assert record["n"] == len(test) and record["unreadable"] == 1
    (record,) = evaluate(run, folder, **settings)
    assert record["test"] == "test"
    none = simsiam.pretrain(tmp_path / "images", out=tmp_path / "none", **words | {"holdout": 0})
    with pytest.raises(simsiam.UsageError, match="with the labels of all images of images: to"):
        evaluate(none, **settings)


def test_a_record_says_how_many_test_images_chose_the_checkpoint(folder, tmp_path):
    words = TINY | {"steps": 2, "precision": "float32"}
    run = simsiam.pretrain(folder / "train", out=tmp_path / "run", **words)
    settings = {"protocols": ["knn"], "baselines": False, "device": "cpu"}
    last, best = (evaluate(run, checkpoint=c, **settings)[0]["test"] for c in ("last", "best"))
    assert last == "a fifth of train, each class in proportion"
    source = open_source(folder / "train")
    test = split_train_test(source, require_labels=True)[1]
    count = len(set(test.keys) & set(prepare_data(Run(run).recipe, source).held_out.keys))
    assert best == f"{last} ({count} of its 24 images chose the checkpoint)" and count > 0


def test_draws_are_stratified_seeded_and_nested():
    train = images(True)
    plan = plan_draws(train, Settings(labels=("1", "5", "10%"), draws=3))
    assert list(plan) == ["1 a class", "5 a class", "10 %"]
    for name, per_class in (("1 a class", 1), ("5 a class", 5), ("10 %", 2)):
        for draw in plan[name]:
            assert np.bincount(train.labels[draw]).tolist() == [per_class] * 3
    assert len({tuple(draw) for draw in plan["5 a class"]}) == 3
    assert all(set(few) <= set(many) for few, many in zip(plan["1 a class"], plan["5 a class"]))
    again = plan_draws(train, Settings(labels=("5",), draws=3))["5 a class"]
    assert all(np.array_equal(a, b) for a, b in zip(again, plan["5 a class"]))
    other = plan_draws(train, Settings(labels=("5",), draws=3, seed=1))["5 a class"]
    assert not any(np.array_equal(a, b) for a, b in zip(other, plan["5 a class"]))
    default = plan_draws(train.take(slice(30)), Settings(draws=2))  # ten a class: 20 is left out
    assert list(default) == ["1 a class", "5 a class", "10 a class", "1 %", "10 %"]


def test_published_lists_name_the_labeled_images(run, folder, tmp_path):
    names = [f"train_{i:03}.png" for i in range(0, 20)]
    path = tmp_path / "1percent.txt"
    path.write_text("\n".join([*names[:-1], f"train/{shapes.CLASSES[9]}/{names[-1]}"]))
    train = open_source(folder).train
    rows = read_label_list(train, path)
    assert sorted(train.keys[i][-13:] for i in rows) == names
    records = evaluate(run, protocols=["few_label"], few_label_list=str(path), **FEW)
    assert {(r["name"], r["parameters"]["images"]) for r in records} == {("list 1percent.txt", 20)}
    assert all("interval" in r for r in records), "one list is one draw"


def test_logistic_regression_ranks_a_class_without_labels_last():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
    ranked = logistic_regression(x, torch.tensor([1, 3, 1]), x, classes=4)
    assert ranked.tolist() == [[1, 3, 0, 2], [3, 1, 0, 2], [1, 3, 0, 2]]


def test_label_free_needs_no_labels(run, folder, tmp_path, capsys):
    for i, path in enumerate(sorted((folder / "train").rglob("*.png"))[:60]):
        shutil.copy(path, tmp_path / f"{i}.png")
    source = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    assert main(["evaluate", str(run), *source, "--protocol", "label_free", "--device", "cpu"]) == 0
    (record,) = read(run, "label_free")
    assert record["test"] == "a fifth of train, each class in proportion"
    assert record["parameters"]["images"] == 12
    assert 1 <= record["rankme"] <= 12 and 0 <= record["view_retrieval"] <= 100
    assert record["uniformity"] < 0
    assert "rankme" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--protocol", "knm"], "unknown protocol 'knm': did you mean 'knn'?"),
        (["--checkpoint", "epoch-0100"], "unknown checkpoint 'epoch-0100': choose from best, last"),
        (["--checkpoint", "../checkpoints/last"], "unknown checkpoint '../checkpoints/last'"),
        (["--labels", "13"], "labels asks for 13 and class 'bar' has 12"),
        (["--labels", "half"], "labels has 'half'; it takes whole numbers"),
        (["--few-label-list", "nowhere.txt"], "few_label_list nowhere.txt cannot be read"),
        (["--linear", "laper"], "unknown linear 'laper': did you mean 'paper'?"),
        (["--features", "p"], "unknown features 'p'"),
        (
            ["--protocol", "finetune", "--checkpoint", "best"],
            "finetune starts from the run's backbone",
        ),
        (["--limit", "0"], "limit is 0; it is at least 1"),
        (["--k", "0"], "k is 0; it is at least 1"),
        (["--precision", "float16"], "unknown precision 'float16'"),
        (["nowhere"], "no such file or folder: nowhere"),
        (["--kk", "3"], "unknown argument '--kk'"),
        (["--base-lr", "5"], "base_lr has no effect with linear cached"),
        (
            ["--protocol", "knn", "--labels", "10"],
            "labels has no effect here: it belongs to protocol few_label and finetune, not to knn",
        ),
        (["--from-scratch"], "from_scratch has no effect here"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments, text, capsys):
    assert main(["evaluate", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error, error
    assert not list((run / "evaluations").iterdir())


def test_a_source_without_labels_and_a_list_of_other_files(run, folder, capsys, tmp_path):
    one, two = map(str, sorted((folder / "train").rglob("*.png"))[:2])
    assert main(["evaluate", str(run), one, two, "--protocol", "knn"]) == 2
    assert "has no labels to evaluate with" in capsys.readouterr().err
    assert main(["evaluate", str(run), one]) == 2
    assert "has one image: evaluation compares at least two" in capsys.readouterr().err
    assert main(["evaluate", str(run), one, two]) == 2
    assert "label_free compares images, and there is one test image" in capsys.readouterr().err
    more = map(str, sorted((folder / "train").rglob("*.png"))[:10])
    assert main(["evaluate", str(run), *more]) == 0
    assert "has no labels: only label_free is measured" in capsys.readouterr().out
    (tmp_path / "list").write_text("train_000.png\nstranger.png\n")
    assert main(["evaluate", str(run), "--few-label-list", str(tmp_path / "list")]) == 2
    assert "names 1 files that are not training images: 'stranger.png'" in capsys.readouterr().err


def test_the_lines_of_a_figure_differ():
    pairs = list(islice(line_styles(), 35))
    assert len(set(pairs)) == 35
    assert len({color for color, _ in pairs[:7]}) == 7
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(pairs[:7]))
