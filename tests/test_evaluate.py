"""Evaluation: what every record says is so, test labels choose nothing, and a frozen backbone stays as it was."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from scipy.stats import binomtest

import simsiam
from simsiam.commands.main import main
from simsiam.config.protocols import Settings
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.evaluation import frozen
from simsiam.evaluation import protocol_few_label as few_label
from simsiam.evaluation import protocol_linear as linear
from simsiam.evaluation.evaluate import EVALUATORS, evaluate
from simsiam.evaluation.finetune import finetune
from simsiam.evaluation.scores import score_predictions
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import cap_k, knn_scores, knn_top1
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources import shapes
from simsiam.sources.open_source import Source, open_source
from simsiam.utils.intervals import wilson_interval

CPU = torch.device("cpu")
QUICK = {
    "linear_epochs": 2,
    "labels": ("1", "25%"),
    "draws": 2,
    "device": "cpu",
    "precision": "float32",
}
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
        patch.setattr(linear, "MIN_STEPS", 2)
        patch.setattr(linear, "BATCH_SIZE", 32)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes, 12 training and 5 test images of each; one test image is broken."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, each in (("train", 12), ("test", 5)):
        pixels, labels = shapes.draw_split(split)
        for i in range(10 * each):
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
    return json.loads((run / "evaluations" / f"{protocol}.json").read_text())


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def test_every_number_says_how_it_was_obtained_and_the_same_command_gives_the_same(run, capsys):
    found = evaluate(run, **QUICK)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    first = {protocol: read(run, protocol) for protocol in EVALUATORS}
    assert [record for records in first.values() for record in records] == json.loads(
        json.dumps(found)
    )
    assert all(record.keys() >= KEYS for record in found)
    for record in found:
        assert (record["source"], record["train"], record["test"]) == ("few", "train", "test")
        assert record["unreadable"] == 1 and record["frozen"] is True and record["step"] == 3
    for protocol in ACCURACY:
        assert {record["features"] for record in first[protocol]} == {
            "h",
            "raw pixels",
            "untrained network",
        }
        assert all(
            record["n"] == 50 and 0 <= record["top1"] <= record["top5"] <= 100
            for record in first[protocol]
        )

    evaluate(run, protocols=["linear", "few_label"], **QUICK)
    for protocol, records in first.items():
        assert timeless(read(run, protocol)) == timeless(records)
        if protocol in ("knn", "label_free"):
            assert read(run, protocol) == records, "what other protocols found stays"


def test_the_run_folder_keeps_its_contract(run, shared):
    evaluate(run, **QUICK)
    checked = subprocess.run(
        [sys.executable, shared / "check_run.py", run], capture_output=True, text=True
    )
    assert checked.stdout.strip() == "contract holds", checked.stdout


def test_records_stay_beside_those_of_other_parameters_and_replace_their_own(run):
    for how in ({}, {"k": 3}, {}, {"checkpoint": "best"}, {"k": 3, "features": "z"}):
        evaluate(run, protocols=["knn"], baselines=False, device="cpu", precision="float32", **how)
    found = [(r["parameters"]["k"], r["checkpoint"], r["features"]) for r in read(run, "knn")]
    assert found == [(3, "last", "h"), (2, "last", "h"), (2, "best", "h"), (3, "last", "z")]


def test_a_quick_look_takes_few_images_and_says_how_many(run, capsys):
    full = evaluate(run, protocols=["knn"], baselines=False, **QUICK)
    few = evaluate(run, protocols=["knn"], baselines=False, limit=20, **QUICK)
    assert [(r["train_images"], r["n"] + r["unreadable"], r["train"]) for r in few] == [
        (20, 20, "20 of train")
    ]
    more = evaluate(
        run, protocols=["knn"], baselines=False, limit=100, **QUICK
    )  # than there are to test on
    assert [(r["train"], r["test"]) for r in more] == [("100 of train", "test")]
    assert full[0] in json.loads(
        (run / "evaluations" / "knn.json").read_text()
    )  # it takes nobody's place


def test_the_numbers_are_those_of_the_features(run, folder):
    """kNN of h, z, pixels and the weights before training, each computed here from the run's parts."""
    source, opened = open_source(folder), Run(run)
    model = simsiam.build(opened.recipe.method, backbone="resnet10", width=4, image_size=32)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    networks = {
        "untrained network": model.backbone,
        "raw pixels": torch.nn.Flatten(),
        "h": model.backbone,
    }
    networks["z"] = torch.nn.Sequential(model.backbone, model.projector)
    found = evaluate(run, protocols=["knn"], **QUICK) + evaluate(
        run, protocols=["knn"], features="z", **QUICK
    )
    found = {record["features"]: record for record in found}
    assert found.keys() == networks.keys()
    for kind, network in networks.items():
        model.load_state_dict(
            start if kind == "untrained network" else opened.checkpoint()["model"]
        )
        known, asked = (
            extract_features(network, images, eval_transform(opened.recipe), device=CPU)
            for images in (source.train, source.test)
        )
        labels, truth = (
            torch.from_numpy(source.train.labels),
            torch.from_numpy(source.test.labels[asked.kept_indices]),
        )
        queries = asked.matrices[0]
        top1 = knn_top1(known.matrices[0], labels, queries, truth, classes=10)
        votes = knn_scores(known.matrices[0], labels, queries, classes=10, k=cap_k(120, 10))
        five = votes.sort(dim=1, descending=True, stable=True).indices[:, :5]
        top5 = 100 * (five == truth[:, None]).any(1).float().mean().item()
        assert (found[kind]["top1"], found[kind]["top5"]) == pytest.approx((top1, top5), abs=1e-3)


def test_test_labels_choose_nothing(run, folder, monkeypatch):
    """With the test labels in another order, only scores change."""
    how = {"protocols": ACCURACY, **QUICK}
    found, source = evaluate(run, **how), open_source(folder)
    shuffled = np.random.default_rng(0).permutation(source.test.labels)
    other = Source("few", source.train, None, replace(source.test, labels=shuffled))
    monkeypatch.setattr(sys.modules["simsiam.evaluation.evaluate"], "open_source", lambda *_: other)
    again = evaluate(run, **how)
    scores = {"top1", "top5", "interval", "top1_std", "draws"} | TIMES
    without = [
        [{k: v for k, v in record.items() if k not in scores} for record in side]
        for side in (found, again)
    ]
    assert without[0] == without[1] and [r["top1"] for r in found] != [r["top1"] for r in again]
    assert all(
        record["chosen"].keys() == {"lr", "weight_decay", "held_out_top1"}
        for record in read(run, "linear")
    )


@pytest.mark.parametrize(("kind", "count"), [("paper", 1), ("sgd", 2)])
def test_training_a_layer_on_crops_leaves_the_backbone_bit_for_bit(run, kind, count, monkeypatch):
    seen = []
    monkeypatch.setattr(
        linear,
        "iter_batches",
        lambda *how: (seen.append(b.views[0]) or b for b in iter_batches(*how)),
    )
    found = evaluate(run, protocols=["linear"], linear=kind, **QUICK)
    weights = simsiam.load(run)
    assert len(found) == count and {r["backbone_sha256"] for r in found} == {
        frozen.fingerprint(weights)
    }
    assert [r["parameters"]["base_lr"] for r in found] == (
        [0.1] if kind == "paper" else [30.0, 100.0]
    )
    assert {r["parameters"]["batch_size"] for r in found} == {120}
    assert (
        len(seen) == 2 and all(x.shape == (120, 3, 32, 32) for x in seen) and not torch.equal(*seen)
    )


def test_fine_tuning_is_a_protocol_that_freezes_nothing(run, folder):
    """On the labels that few_label draws; each has a folder of its own, and the numbers are those of finetune."""
    how = {"protocols": ["finetune"], **QUICK, "finetune_epochs": 1}
    found = evaluate(run, **how | {"labels": ("25%",)}) + evaluate(
        run, **how | {"labels": None}, from_scratch=True
    )
    assert timeless(read(run, "finetune")) == timeless(json.loads(json.dumps(found)))
    few, whole = found
    assert (few["name"], few["features"], few["frozen"]) == ("25 %, 1 epochs", "pretrained", False)
    assert (whole["name"], whole["features"]) == ("all labels, 1 epochs", "from scratch")
    assert (
        len(few["draws"]) == len(few["val_top1"]) == 2
        and "interval" in whole
        and len(whole["val_top1"][0]) == 1
    )
    assert (
        len(list((run / "finetuning").iterdir())) == 3 and few["n"] == 50 and few["unreadable"] == 1
    )
    source = open_source(folder)
    rows = few_label.plan_draws(source.train, Settings(labels=("25%",), draws=2))["25 %"][1]
    where = {"device": "cpu", "precision": "float32", "out": run / "alone"}
    alone = finetune(run, source.train.take(rows), source.test, epochs=1, seed=1, **where)
    assert few["draws"][1] == alone["top1"]


def test_a_backbone_that_moves_is_noticed(run, monkeypatch):
    def moving(given, how):
        given.backbone.train()(
            torch.randn(4, 3, 32, 32)
        )  # no parameter moves, batch norm's statistics do
        yield from ()

    monkeypatch.setitem(EVALUATORS, "knn", moving)
    with pytest.raises(AssertionError, match="a frozen backbone moved"):
        evaluate(run, protocols=["knn"], **QUICK)
    assert not (run / "evaluations" / "knn.json").exists()


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (2000, 2000), (1, 3)])
def test_the_interval_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_scores_of_one_draw_and_of_several():
    ranked = [
        torch.tensor([[0, 1], [1, 0], [2, 1], [2, 0]]),
        torch.tensor([[0, 1], [0, 2], [0, 2], [1, 2]]),
    ]
    truth = np.array([0, 1, 2, 0])
    one = score_predictions(ranked[:1], truth, classes=9)
    assert (one["top1"], one["top5"], one["n"]) == (75.0, 100.0, 4) and one[
        "interval"
    ] == pytest.approx([30.064, 95.441])
    several = score_predictions(ranked, truth, classes=5)
    assert (several["top1"], several["top5"]) == (50.0, None)  # five of five classes are no feat
    assert several["draws"] == [75.0, 25.0] and several["top1_std"] == pytest.approx(35.355)


def images(labels, split="train"):
    pixels = np.zeros((60, 3, 8, 8), np.uint8)
    return from_arrays(
        split, pixels, np.arange(60) % 3 if labels else None, ("a", "b", "c") if labels else ()
    )


def test_the_split_is_the_sources_own_or_a_fixed_stratified_one():
    train, val, test, bare = images(True), images(True, "val"), images(True, "test"), images(False)
    cases = {
        ("train", "test"): Source("s", train, val, test),
        ("train", "val"): Source("s", train, val, images(False, "test")),
        ("val", "test"): Source("s", bare, val, test),  # STL-10
    }
    for expected, source in cases.items():
        learn, ask, said = frozen.split_train_test(source, require_labels=True)
        assert (said["train"], said["test"]) == expected
        assert (learn.keys[0], ask.keys[0]) == (f"{expected[0]}#0", f"{expected[1]}#0")
    learn, ask, said = frozen.split_train_test(Source("s", train), require_labels=True)
    assert said["test"] == "a fifth of train, each class in proportion" and len(learn) == 48
    assert np.bincount(ask.labels).tolist() == [4, 4, 4] and not set(learn.keys) & set(ask.keys)
    assert list(frozen.split_train_test(Source("s", train), require_labels=True)[1].keys) == list(
        ask.keys
    )
    with pytest.raises(simsiam.UsageError, match="s has no labels"):
        frozen.split_train_test(Source("s", bare), require_labels=True)
    assert len(frozen.split_train_test(Source("s", bare), require_labels=False)[1]) == 12


def test_draws_are_stratified_seeded_and_nested():
    train = images(True)
    plan = few_label.plan_draws(train, Settings(labels=("1", "5", "10%"), draws=3))
    assert list(plan) == ["1 a class", "5 a class", "10 %"]
    for name, each in (("1 a class", 1), ("5 a class", 5), ("10 %", 2)):
        assert all(np.bincount(train.labels[draw]).tolist() == [each] * 3 for draw in plan[name])
    assert len({tuple(draw) for draw in plan["5 a class"]}) == 3
    assert all(set(few) <= set(many) for few, many in zip(plan["1 a class"], plan["5 a class"]))
    again = few_label.plan_draws(train, Settings(labels=("5",), draws=3))["5 a class"]
    assert all(np.array_equal(a, b) for a, b in zip(again, plan["5 a class"]))
    other = few_label.plan_draws(train, Settings(labels=("5",), draws=3, seed=1))["5 a class"]
    assert not any(np.array_equal(a, b) for a, b in zip(other, plan["5 a class"]))
    usual = few_label.plan_draws(
        train.take(slice(30)), Settings(draws=2)
    )  # ten a class: 20 are not to be had
    assert list(usual) == ["1 a class", "5 a class", "10 a class", "1 %", "10 %"]


def test_published_lists_name_the_labeled_images(run, folder, tmp_path):
    names = [f"train_{i:03}.png" for i in range(0, 20)]
    (tmp_path / "1percent.txt").write_text(
        "\n".join([*names[:-1], f"train/{shapes.CLASSES[9]}/{names[-1]}"])
    )
    train = open_source(folder).train
    rows = few_label.read_label_list(train, tmp_path / "1percent.txt")
    assert sorted(train.keys[i][-13:] for i in rows) == names
    found = evaluate(
        run, protocols=["few_label"], few_label_list=str(tmp_path / "1percent.txt"), **QUICK
    )
    assert {(r["name"], r["parameters"]["images"]) for r in found} == {("list 1percent.txt", 20)}
    assert all("interval" in r for r in found), "one list, one draw"


def test_logistic_regression_ranks_a_class_it_never_saw_last():
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
    assert few_label.logistic_regression(x, torch.tensor([1, 3, 1]), x, classes=4).tolist() == [
        [1, 3, 0, 2],
        [3, 1, 0, 2],
        [1, 3, 0, 2],
    ]


def test_label_free_needs_no_labels(run, folder, tmp_path, capsys):
    for i, path in enumerate(sorted((folder / "train").rglob("*.png"))[:60]):
        shutil.copy(path, tmp_path / f"{i}.png")
    source = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    assert main(["evaluate", str(run), *source, "--protocol", "label_free", "--device", "cpu"]) == 0
    (record,) = read(run, "label_free")
    assert (
        record["test"] == "a fifth of train, each class in proportion"
        and record["parameters"]["images"] == 12
    )
    assert (
        1 <= record["rankme"] <= 12
        and 0 <= record["view_retrieval"] <= 100
        and record["uniformity"] < 0
    )
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
        (["nowhere"], "unknown source 'nowhere'"),
        (["--kk", "3"], "unknown argument '--kk'"),
    ],
)
def test_wrong_usage_is_one_line(run, arguments, text, capsys):
    assert main(["evaluate", str(run), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error and "\n" not in error, error
    assert not list((run / "evaluations").iterdir())


def test_a_source_without_labels_and_a_list_of_strangers(run, folder, capsys, tmp_path):
    one = str(next((folder / "train").rglob("*.png")))
    assert (
        main(["evaluate", str(run), one]) == 2
        and "has no labels to evaluate with" in capsys.readouterr().err
    )
    (tmp_path / "list").write_text("train_000.png\nstranger.png\n")
    assert main(["evaluate", str(run), "--few-label-list", str(tmp_path / "list")]) == 2
    assert "names 1 files that are no training images: 'stranger.png'" in capsys.readouterr().err
