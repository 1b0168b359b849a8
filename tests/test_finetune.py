"""Fine-tuning: its start, its steps, resuming bit for bit, and no influence of test images."""

import json
import os
import shutil
import signal
from dataclasses import replace
from math import cos, pi

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.data.batches import batch_indices, make_training_views
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.evaluation import finetune as module
from simsiam.evaluation.finetune import finetune, plot_accuracy_curves, split_train_val
from simsiam.runs.encoder import build_backbone
from simsiam.runs.recipe_file import write_recipe
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source

EPOCHS, STEPS, BATCH = 4, 12, 32
SETTINGS = {
    "epochs": EPOCHS,
    "labels": 120,  # 108 for training, 12 for validation
    "batch_size": BATCH,
    "device": "cpu",
    "precision": "float32",
}


@pytest.fixture(scope="module")
def data():
    source = open_source("shapes")
    return source.train, source.test.take(slice(200))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simsiam.pretrain(
        "shapes", out=tmp_path_factory.mktemp("pretrained") / "run", workers=0, **QUICK
    )


@pytest.fixture(scope="module")
def finished(run, data, tmp_path_factory):
    """A finished fine-tuning and its result; tests only read them."""
    out = tmp_path_factory.mktemp("finished") / "finetune"
    return out, finetune(run, *data, out=out, **SETTINGS)


def last(out):
    return torch.load(out / "last.pt", weights_only=True)


def backbone(weights) -> dict[str, torch.Tensor]:
    return {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}


def read_curve(out) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_it_is_cross_entropy_and_sgd_with_a_cosine_lr_for_backbone_and_head_each(
    run, data, finished
):
    """Repeat it with other tools: torch's schedule, one optimizer per part, plain operations."""
    out, result = finished
    encoder = simsiam.load(run).requires_grad_(True)
    head = module.build_classifier(Run(run), 10, seed=0, from_scratch=True).head
    model = torch.nn.Sequential(encoder, head).to(memory_format=torch.channels_last).train()
    train, val = split_train_val(*data, None, 120, 0)
    recipe = Run(run).recipe.replace(batch_size=BATCH, jitter_p=0.0, gray=0.0, blur=0.0)
    optimizers = [
        torch.optim.SGD(
            part.parameters(), lr=peak * BATCH / 256, momentum=0.9, weight_decay=5e-4, foreach=False
        )
        for part, peak in ((encoder, 0.1), (head, 1.0))
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: (1 + cos(pi * t / STEPS)) / 2)
        for o in optimizers
    ]
    losses = []
    for step in range(STEPS):
        index = batch_indices(step, recipe, train)
        logits = model(make_training_views(train, index, recipe, step, torch.device("cpu"))[0])
        loss = -logits.log_softmax(1)[range(BATCH), train.labels[index]].mean()
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in (*optimizers, *schedules):
            o.step()
        losses.append(loss.item())
    for part, name in ((encoder, "backbone"), (head, "head")):
        for k, v in part.state_dict().items():
            torch.testing.assert_close(last(out)["model"][f"{name}.{k}"], v, rtol=1e-3, atol=1e-5)
    means = np.reshape(losses, (EPOCHS, -1)).mean(axis=1)
    assert [row["loss"] for row in read_curve(out)] == pytest.approx(means, rel=1e-4)
    with torch.no_grad():
        logits = model.eval()(encoder.transform([val.read(i) for i in range(len(val))]))
    top1 = 100 * (logits.argmax(1).numpy() == val.labels).mean()
    assert result["val_top1"][-1] == pytest.approx(top1, abs=1e-3)


def test_pretrained_starts_from_the_run_and_from_scratch_from_its_initialization(
    run, data, tmp_path
):
    """With lr 0 the weights keep their initial values; the head is the same in both."""
    constant = SETTINGS | {"base_lr": 0.0, "head_lr": 0.0, "epochs": 1}
    models = {}
    for from_scratch in (False, True):
        out = tmp_path / str(from_scratch)
        finetune(run, *data, out=out, from_scratch=from_scratch, **constant)
        models[from_scratch] = last(out)["model"]
    initial = simsiam.build(
        Run(run).recipe.method, backbone="resnet10", width=4, image_size=32, seed=0
    ).backbone
    for weights, expected in ((models[False], simsiam.load(run)), (models[True], initial)):
        parameters = dict(expected.named_parameters())
        assert_equal({name: backbone(weights)[name] for name in parameters}, parameters)
    first_layer = "backbone.conv1.weight"
    assert not torch.equal(models[False][first_layer], models[True][first_layer])
    head = models[False]["head.weight"]
    assert torch.equal(head, models[True]["head.weight"])
    assert head.std() == pytest.approx(0.01, rel=0.2) and not models[False]["head.bias"].any()


def test_fine_tuning_sees_views_as_large_as_images(data, tmp_path, monkeypatch):
    """Also of a run that was trained on smaller views."""
    small = simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK | {"view_ratio": 0.5})
    shapes, iter_batches = [], module.iter_batches

    def recording(*arguments):
        for batch in iter_batches(*arguments):
            shapes.append(tuple(batch.views[0].shape))
            yield batch

    monkeypatch.setattr(module, "iter_batches", recording)
    finetune(small, *data, out=tmp_path / "finetune", **SETTINGS | {"epochs": 1})
    assert shapes == [(BATCH, 3, 32, 32)] * 3


def test_from_scratch_a_network_begins_at_zero_beside_the_patches_of_the_run(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    write_recipe(path, Run(run).recipe.replace(backbone="patches/24+resnet10"))
    trained = build_backbone(Run(path).recipe)
    for weights in trained.parameters():
        torch.nn.init.normal_(weights)
    Run(path).finish(trained.state_dict(), {"verdict": "healthy", "steps": 1})
    new = module.build_classifier(Run(path), 10, seed=0, from_scratch=True).backbone
    assert not new.gate.weight.any()
    for name in ("patches", "map"):
        assert_equal(*(network.get_submodule(name).state_dict() for network in (new, trained)))


def test_the_curve_has_a_line_per_epoch_with_the_lr_of_its_last_step(finished):
    out, result = finished
    rows = read_curve(out)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and rows[-1]["step"] == STEPS
    assert [row["val_top1"] for row in rows] == result["val_top1"]
    for row in rows:
        factor = (1 + cos(pi * (row["step"] - 1) / STEPS)) / 2 * BATCH / 256
        assert (row["lr"], row["lr_head"]) == pytest.approx((0.1 * factor, 1.0 * factor))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_within_an_epoch_it_continues_bit_for_bit(
    precision, run, data, finished, tmp_path, monkeypatch
):
    settings = SETTINGS | {"precision": precision, "from_scratch": precision == "bfloat16"}
    full, result = finished if precision == "float32" else (tmp_path / "full", None)
    result = result or finetune(run, *data, out=full, **settings)
    set_lr = module.set_lr

    def stopping(optimizer, step, **options):
        if step == 6:  # the first of the three steps of the third epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return set_lr(optimizer, step, **options)

    half = tmp_path / "half"
    monkeypatch.setattr(module, "set_lr", stopping)
    with pytest.raises(Stopped, match="stopped at step 7 of 12"):
        finetune(run, *data, out=half, **settings)
    assert last(half)["step"] == 7 and not (half / "curve.png").exists()
    monkeypatch.setattr(module, "set_lr", set_lr)
    torch.manual_seed(1)
    again = finetune(run, *data, out=half, **settings)

    one, other = last(full), last(half)
    assert_equal(one["model"], other["model"])
    momentum = [
        [state["momentum_buffer"] for state in part["optimizer"]["state"].values()]
        for part in (one, other)
    ]
    assert len(momentum[0]) == len(momentum[1]) and all(map(torch.equal, *momentum))
    assert (full / "curve.jsonl").read_bytes() == (half / "curve.jsonl").read_bytes()
    assert again | {"seconds": 0} == result | {"seconds": 0}


def test_a_finished_one_is_not_repeated(run, data, finished, monkeypatch):
    monkeypatch.setattr(module, "set_lr", None)
    assert finetune(run, *data, out=finished[0], **SETTINGS) == finished[1]


def test_a_training_on_other_images_is_not_taken_for_one_on_these(run, data, finished):
    """Also a finished one, whose weights would be tested as if they came from these images."""
    train, test = data
    with pytest.raises(UsageError, match="holds a training with train_digest"):
        finetune(run, train.take(np.arange(len(train))[::-1]), test, out=finished[0], **SETTINGS)


def test_test_images_are_used_once_at_the_end_and_change_nothing_else(
    run, data, finished, tmp_path, monkeypatch
):
    train, test = data
    measured, extract_features = [], module.extract_features

    def recording(model, images, *arguments, **options):
        measured.append(images)
        return extract_features(model, images, *arguments, **options)

    monkeypatch.setattr(module, "extract_features", recording)
    wrong = replace(test, labels=(test.labels + 1) % 10)
    result = finetune(run, train, wrong, out=tmp_path, **SETTINGS)
    assert [images is wrong for images in measured] == [False] * EPOCHS + [True]
    assert {len(images) for images in measured[:-1]} == {12}
    assert not any(key.startswith("test") for key in measured[0].keys)
    assert_equal(last(tmp_path)["model"], last(finished[0])["model"])
    assert result["val_top1"] == finished[1]["val_top1"] and result["top1"] != finished[1]["top1"]
    assert (result["n"], result["parameters"]["epoch"]) == (200, "last")


def test_top1_and_top5_are_those_of_the_weights_in_last_pt(run, data, finished):
    encoder, weights, test = simsiam.load(run), last(finished[0])["model"], data[1]
    encoder.load_state_dict(backbone(weights))
    with torch.no_grad():
        h = encoder(encoder.transform([test.read(i) for i in range(200)]))
    logits = h @ weights["head.weight"].T + weights["head.bias"]
    matches = logits.argsort(dim=1, descending=True).numpy() == test.labels[:, None]
    top1, top5 = 100 * matches[:, 0].mean(), 100 * matches[:, :5].any(axis=1).mean()
    assert (finished[1]["top1"], finished[1]["top5"]) == pytest.approx((top1, top5))
    assert top1 < top5 < 100


def test_labels_are_drawn_from_each_class_equally_and_some_are_held_out(data):
    train, test = data
    used, val = split_train_val(train, test, None, 200, 0)
    assert np.bincount(used.labels).tolist() == [18] * 10
    assert np.bincount(val.labels).tolist() == [2] * 10
    assert not set(used.keys) & set(val.keys) and set(used.keys) | set(val.keys) <= set(train.keys)
    again, other = (split_train_val(train, test, None, 200, seed)[0] for seed in (0, 1))
    assert list(again.keys) == list(used.keys) != list(other.keys)
    few, same = split_train_val(train, test, val, 30, 0)
    assert np.bincount(few.labels).tolist() == [3] * 10 and same is val
    assert [len(part) for part in split_train_val(train, test, None, None, 0)] == [3600, 400]


def test_files_of_many_sizes_are_streamed_and_an_unreadable_one_is_counted(run, tmp_path):
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32 + i, 40), 100 * (i % 2)).save(path)
    images = open_source(tmp_path / "images").train
    path.write_bytes(path.read_bytes()[:40])
    settings = SETTINGS | {"labels": 24}
    result = finetune(run, images, images, val=images.take(slice(12)), out=tmp_path, **settings)
    assert result["unreadable"] == 1 and result["n"] == 23
    assert result["parameters"]["batch_size"] == 24
    assert result["top5"] == 100  # there are two classes


def test_a_wrong_request_is_an_error_of_one_line(run, data, finished, tmp_path):
    train, test = data
    wrong = [
        ({"base_lr": 0.2}, "holds a training with base_lr 0.1, not 0.2"),
        (
            {"from_scratch": True},
            "with start backbone.safetensors [0-9a-f]{16}, not random, seed 0",
        ),
        ({"labels": 9}, "labels is 9; it lies between 10, one per class, and 4000"),
        ({"labels": 19}, "too few to hold some out for the curve: take 20 labels or more"),
        ({"head_lr": float("nan")}, "head_lr is nan"),
        ({"base_lr": -1.0}, "base_lr is -1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
    ]
    for changes, message in wrong:
        with pytest.raises(UsageError, match=message):
            finetune(run, train, test, out=finished[0], **SETTINGS | changes)
    for images, message in (
        (replace(test, labels=None), "the test images have none"),
        (replace(test, classes=tuple("abcdefghij")), "the test images have other classes"),
    ):
        with pytest.raises(UsageError, match=message):
            finetune(run, train, images, out=tmp_path, **SETTINGS)
    (tmp_path / "last.pt").write_bytes((finished[0] / "last.pt").read_bytes()[:999])
    with pytest.raises(UsageError, match=r"is damaged: .*delete it") as error:
        finetune(run, train, test, out=tmp_path, **SETTINGS)
    assert "\n" not in str(error.value)
    with pytest.raises(WorkFailed, match="diverged in epoch 1: take a base_lr smaller than 1e"):
        finetune(run, train, test, out=tmp_path / "new", **SETTINGS | {"base_lr": 1e25})


def test_curves_are_drawn_as_thin_lines_and_their_mean_as_a_thick_line(finished, tmp_path):
    assert Image.open(finished[0] / "curve.png").size == (1400, 900)
    rising = [[30.0 + 10 * seed + 0.2 * epoch for epoch in range(200)] for seed in (-1, 0, 1)]
    falling = [[100 - value for value in curve] for curve in rising]
    plot_accuracy_curves(
        {"pretrained": rising, "from scratch": falling},
        tmp_path / "two.png",
        title="shapes, 120 labels",
    )
    page = np.asarray(Image.open(tmp_path / "two.png").convert("RGB")).astype(int)
    assert page.shape == (900, 1400, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        color = np.array(color)
        bold, pale = (abs(page - c).sum(2) < 12 for c in (color, 255 - 0.4 * (255 - color)))
        columns = bold[:, 300:900].any(axis=0)  # left of the legend: the mean crosses the picture
        assert columns.mean() > 0.5 and bold.sum() > 2000 and pale.sum() > 800
    with pytest.raises(UsageError, match=r"the curves of 'a' differ in epochs: \[1, 2\]"):
        plot_accuracy_curves({"a": [[1.0], [1.0, 2.0]]}, tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()
