"""Worth: features of a run beside simpler ones, on the same images, and the verdict on them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import simsiam
from simsiam.config.recipes import Recipe
from simsiam.data.transform import Transform
from simsiam.errors import Stopped
from simsiam.exports.model_card import model_card
from simsiam.model.precision import Compute
from simsiam.monitoring import worth
from simsiam.monitoring.candidates import Candidate
from simsiam.monitoring.verdict import (
    UNCERTAIN,
    Verdict,
    advise_features,
    early_warning,
    features_table,
    judge_worth,
)
from simsiam.monitoring.worth import (
    COLOR,
    END,
    PIXELS,
    START,
    ColorHistogram,
    Pixels,
    best_features,
    goes_beside_patches,
    is_better,
    measure_end,
    measure_start,
    not_beaten,
    table_row,
    worse_than,
)
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training.pretrain import Pretraining

FLOAT32 = Compute(torch.device("cpu"), "float32")
RECIPE = Recipe().replace(image_size=32, mean=[0.5] * 3, std=[0.5] * 3).resolve()
IMAGENET = Transform(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
TINY = {"backbone": "resnet10", "width": 8, "dim": 32, "proj_hidden": 32}


@pytest.fixture(scope="module")
def images():
    return open_source("shapes").train.take(slice(400))


def fake(name, hits=None, score=0.5):
    """An encoder whose images all have one score, and are classified as given."""
    agreement = torch.full((2, 200), score) + 1e-3 * torch.rand(2, 200)
    return Candidate(name, (), (), agreement, 10.0, None if hits is None else torch.tensor(hits))


# --- simple features ------------------------------------------------------------------------------


def test_pixels_are_block_means_of_the_image_itself(images):
    pixels = np.stack([images.read(i) for i in range(5)]).astype(np.float64) / 255
    x = IMAGENET.normalize(torch.from_numpy((255 * pixels).astype(np.uint8)).movedim(-1, 1))
    blocks = pixels.reshape(5, 16, 2, 16, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(5, -1)
    np.testing.assert_allclose(Pixels(IMAGENET)(x).numpy(), blocks, atol=1e-6)


def test_the_color_histogram_is_that_of_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    x = IMAGENET.normalize(torch.from_numpy(pixels).movedim(-1, 1))
    edges = [[0, 0.25, 0.5, 0.75, 1.01]] * 3
    for row, image in zip(ColorHistogram(IMAGENET)(x), pixels / 255, strict=True):
        counts, _ = np.histogramdd(image.reshape(-1, 3), edges)
        got = row.view(4, 4, 4).permute(2, 1, 0)
        np.testing.assert_allclose(got.numpy(), counts / 32**2, atol=3 / 32**2)  # rounding
        assert got.sum().item() == pytest.approx(1)


# --- what is better -------------------------------------------------------------------------------


def test_labels_decide_where_there_are_labels_and_the_score_where_there_are_none():
    good, bad = [True] * 150 + [False] * 50, [True] * 60 + [False] * 140
    assert is_better(fake("a", good, score=0.1), fake("b", bad, score=0.9))
    assert not is_better(fake("a", bad, score=0.9), fake("b", good, score=0.1))
    assert is_better(fake("a", score=0.9), fake("b", good, score=0.1))


def test_a_difference_within_noise_is_none():
    """Paired: one image of difference decides nothing, ten that go one way do."""
    base = [True, False] * 100
    for extra, better in ((1, False), (10, True)):
        hits = base.copy()
        hits[1 : 2 * extra : 2] = [True] * extra
        assert is_better(fake("a", hits), fake("b", base)) is better


def test_the_best_features_are_the_preferred_ones_among_equals():
    same, more = [True, False] * 100, [True] * 200
    candidates = [fake("end", same), fake("patches/32 + map", same), fake("start", same)]
    assert best_features(candidates).name == "end"
    assert best_features([*candidates, fake("pixels", more)]).name == "pixels"
    assert not_beaten([*candidates, fake("pixels", [False] * 200)], "end") == ["start"]


def test_a_network_that_training_made_worse_is_said_to_be_worse():
    same, more = [True, False] * 100, [True] * 200
    lost = [fake("end", same), fake("start", more)]
    assert worse_than(lost, "end", "start") == "kNN 50.0 % instead of kNN 100.0 %"
    assert worse_than(lost, "start", "end") == ""
    assert worse_than([fake("end", same), fake("start", same)], "end", "start") == ""
    assert worse_than(lost[:1], "end", "start") == ""


# --- the verdict ----------------------------------------------------------------------------------


def test_only_a_healthy_run_can_have_learned_little():
    for word in ("diverged", "too early", "collapsed", "not converging", "partial collapse"):
        verdict = Verdict(word, "mend it")
        assert judge_worth(verdict, [START], init=None, steps=500) is verdict
    healthy = Verdict("healthy", "nothing")
    assert judge_worth(healthy, [], init=None, steps=500) is healthy
    little = judge_worth(healthy, [START, COLOR], init=None, steps=500)
    assert little.verdict == "learned little"
    assert "the untrained network or a color histogram" in little.remedy
    assert "20 times as many epochs" in little.remedy  # 10,000 steps
    worse = judge_worth(healthy, [START], init="lite0", steps=500)
    assert "divide --base-lr by 10" in worse.remedy and "epochs" not in worse.remedy


def test_the_advice_names_the_command_that_uses_the_features():
    for name, command in {
        "end": "simsiam embed`",
        "end + map": "simsiam embed`",
        "patches/24 + map": "simsiam adapt SOURCE`",
        START: "simsiam adapt SOURCE`",
        PIXELS: "simsiam adapt SOURCE`",
    }.items():
        assert command in advise_features(name, "kNN 50.0 %", init=None)
    assert "simsiam embed lite0`" in advise_features(START, "kNN 50.0 %", init="lite0")


def test_a_bad_beginning_is_warned_of_once_and_a_good_one_never():
    good = [
        {"step": s, "loss": -0.2, "z_std_sqrt_d": 0.98, "z_rank": 12.0} for s in range(10, 200, 10)
    ]
    bad = [record | {"z_rank": 1.6} for record in good]
    assert not any(early_warning(good[:n]) for n in range(len(good)))
    first = next(n for n in range(len(bad)) if early_warning(bad[:n]))
    assert bad[first - 1]["step"] == 40  # the third record from step 20 on
    assert "effective rank 1.6" in early_warning(bad[:first])
    warned = [*bad[: first - 1], bad[first - 1] | {"warning": "x"}, *bad[first:]]
    assert not any(early_warning(warned[:n]) for n in range(first, len(warned)))
    one_bad_batch = [*good[:5], bad[5], *good[6:]]
    assert not any(early_warning(one_bad_batch[:n]) for n in range(len(good)))


def test_a_run_without_stop_gradient_is_warned_of_in_the_terminal_and_in_its_metrics(
    tmp_path, capsys
):
    settings = TINY | {"steps": 60, "limit": 600, "log_every": 5, "knn_every": 100}
    for stop in (True, False):
        out = tmp_path / str(stop)
        run = Run(
            simsiam.pretrain("shapes", out=out, stop_gradient=stop, batch_size=64, **settings)
        )
        warnings = [line["warning"] for line in run.metrics() if "warning" in line]
        printed = capsys.readouterr().err
        assert len(warnings) == (not stop) and ("warning  the outputs z" in printed) == (not stop)


# --- runs -----------------------------------------------------------------------------------------


def test_a_network_that_does_not_change_is_worth_what_it_was(images):
    network = simsiam.build("simsiam", backbone="resnet10", width=8, image_size=32).backbone
    start = measure_start(network, images, RECIPE, IMAGENET, 1000, compute=FLOAT32)
    own, others = measure_end(start, network, images, RECIPE, IMAGENET, 1000, 1, compute=FLOAT32)
    before = next(other for other in others if other.name == START)
    assert table_row(own[0]) == table_row(before) | {"features": END}
    assert not_beaten([own[0], *others], END) == not_beaten([own[0], before, *others], END)
    assert START in not_beaten([own[0], *others], END) and network.training
    assert [other.name for other in others] == [START, PIXELS, COLOR]  # too short for patches
    assert start["size"] == 400 and len(start["hits"]) == 133


def test_files_that_cannot_be_read_do_not_take_the_comparison_away(tmp_path, monkeypatch):
    """The same images are read at the end as at the start, whichever are damaged."""
    monkeypatch.setattr(worth, "sample_size", lambda samples: 200)
    pixels = np.random.default_rng(0).integers(256, size=(250, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        if i % 10 == 0:
            (tmp_path / f"{i}.png").write_bytes(b"damaged")
    images = open_source(tmp_path).train
    network = simsiam.build("simsiam", backbone="resnet10", width=8, image_size=32).backbone
    start = measure_start(network, images, RECIPE, IMAGENET, 1000, compute=FLOAT32)
    assert 150 < start["size"] < 200
    _, others = measure_end(start, network, images, RECIPE, IMAGENET, 1000, 1, compute=FLOAT32)
    assert START in [other.name for other in others]


def test_patches_are_learned_where_training_took_a_minute_or_more(images, monkeypatch):
    small = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    monkeypatch.setattr(worth, "learn_patches", lambda *a: {f"p/{s}": small for s in a[2]})
    start = {"agreement": torch.zeros(2, 133), "retrieval": 0.0, "hits": None, "size": 400}
    for seconds, count in ((59, 0), (61, 1), (601, 4)):
        arguments = (start, small, images, RECIPE, IMAGENET, 1000, seconds)
        _, others = measure_end(*arguments, compute=FLOAT32)
        assert sum(other.name.startswith("p/") for other in others) == count


def test_a_network_goes_beside_patches_if_it_was_trained_without_labels_from_random_weights():
    """And with 200 steps or more, up to 2 million images: up to there it was measured."""
    batch, converted = RECIPE.batch_size, replace(RECIPE.method, name="none")
    cases = {
        (RECIPE, 199): False,
        (RECIPE, 200): True,
        (RECIPE, 2_000_000 // batch): True,
        (RECIPE, 2_000_000 // batch + 1): False,
        (RECIPE.replace(init="lite0"), 1000): False,
        (replace(RECIPE, method=converted), 1000): False,
        (RECIPE.replace(method="supervised"), 1000): False,
        (RECIPE.replace(method="simclr"), 1000): True,
    }
    for (recipe, steps), expected in cases.items():
        assert goes_beside_patches(recipe, steps) is expected, (recipe.method.name, steps)


def test_beside_patches_a_network_is_preferred_by_rule_unless_labels_say_otherwise(
    images, monkeypatch
):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    monkeypatch.setattr(worth, "learn_patches", lambda *a: {"p/32": network})
    start = {"agreement": torch.zeros(2, 133), "retrieval": 0.0, "hits": None, "size": 400}
    for steps, count in ((100, 0), (1000, 1)):
        arguments = (start, network, images, RECIPE, IMAGENET, steps, 61)
        _, others = measure_end(*arguments, compute=FLOAT32)
        assert sum(other.by_rule for other in others) == count
    joined = replace(fake("end beside p/32", score=0.1), by_rule=True)
    assert best_features([fake("end", score=0.9), joined, fake("p/32")]) is joined
    labeled = replace(fake("end beside p/32", [False] * 200), by_rule=True)
    assert best_features([fake("end", [True] * 200), labeled]).name == "end"
    assert "`simsiam adapt SOURCE --init RUN`" in advise_features(joined.name, "", init=None)


def test_a_run_says_the_same_everywhere_and_resumes_to_the_same(tmp_path, monkeypatch):
    """Stopped in the middle: the start is that of the checkpoint, and all files end equal."""
    settings = TINY | {"steps": 200, "batch_size": 8, "limit": 300, "base_lr": 1e-9}
    settings["no_labels"] = True
    whole = Run(simsiam.pretrain("shapes", out=tmp_path / "whole", **settings))
    step = Pretraining.train_step

    def stopping_step(training, batch):
        if training.step == 120:
            raise Stopped("enough", 2)
        return step(training, batch)

    monkeypatch.setattr(Pretraining, "train_step", stopping_step)
    with pytest.raises(Stopped):
        simsiam.pretrain("shapes", out=tmp_path / "half", save_seconds=0, **settings)
    monkeypatch.undo()
    half = Run(simsiam.resume(tmp_path / "half"))
    one, other = (run.json("summary.json") for run in (whole, half))
    for name in ("start", "end", "features", "verdict", "remedy", "advice"):
        assert one[name] == other[name]
    table, card = features_table(one), model_card(whole)
    assert len(table) >= 5 and all(cell in card for row in table for cell in row)
    assert one["advice"] in card and UNCERTAIN in one["advice"]
    assert str(tmp_path) not in json.dumps(one)


def test_a_run_that_is_too_short_for_a_verdict_is_not_measured(tmp_path):
    run = Run(
        simsiam.pretrain("shapes", out=tmp_path / "run", steps=3, batch_size=8, limit=60, **TINY)
    )
    summary = run.json("summary.json")
    assert summary["verdict"] == "too early" and not {"start", "end", "features"} & summary.keys()
