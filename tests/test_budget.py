"""A time budget: the largest network whose speed lets it see enough images, and steps that fit."""

import math

import pytest

import simsiam
from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training import budget
from simsiam.training.budget import ENOUGH_IMAGES, choices, fit_to_minutes, trained_images
from simsiam.training.speed import measure_speed

COLORS = {"mean": [0.5] * 3, "std": [0.5] * 3}
PHOTOS = Recipe().replace(backbone="resnet18", image_size=160, batch_size=256, **COLORS).resolve()


@pytest.fixture
def speed(monkeypatch):
    """Images per second: half the side is four times as fast, half the width twice."""
    rates = []

    def rate(recipe, images, count, processes):
        rates.append(20 * (160 / recipe.image_size) ** 2 * 64 / recipe.width)
        return rates[-1]

    monkeypatch.setattr(budget, "measure_rate", rate)
    return rates


@pytest.fixture(scope="module")
def images():
    return open_source("shapes").train


def fit(images, minutes=10, recipe=PHOTOS, **given):
    return fit_to_minutes(recipe.replace(**given), images, given, minutes=minutes, elapsed=5)


def test_views_become_smaller_before_the_network_becomes_narrower_and_the_stem_stays():
    tried = [(r.image_size, r.width, r.stem) for r in choices(PHOTOS, {})]
    large = [(128, 64), (64, 64), (64, 32), (64, 16)]
    assert tried == [(160, 64, None), *((*pair, "large") for pair in large)]
    assert [r.image_size for r in choices(PHOTOS, {"image_size": 160})] == [160] * 3
    assert [r.width for r in choices(PHOTOS, {"width": 64})] == [64] * 3
    middle = Recipe().replace(image_size=64, backbone="resnet18", **COLORS).resolve()
    assert [(r.width, r.stem) for r in choices(middle, {})] == [
        (64, None), (64, "large"), (32, "large"), (16, "large")
    ]  # fmt: skip
    assert {r.stem for r in choices(middle.replace(stem="small"), {})} == {"small"}
    small = Recipe().replace(image_size=32, backbone="resnet18", **COLORS).resolve()
    assert [(r.image_size, r.width, r.stem) for r in choices(small, {})] == [
        (32, width, None) for width in (64, 32, 16)
    ]


def test_the_first_choice_that_sees_enough_images_is_taken(images, speed):
    for minutes, number in ((10**4, 1), (60, 3), (30, 4), (5, 5)):
        speed.clear()
        chosen, lines = fit(images, minutes)
        assert len(speed) == number
        assert sum("images/s" in line for line in lines) == number
        seen = chosen.steps * chosen.batch_size
        assert (seen >= ENOUGH_IMAGES - chosen.batch_size) == (number < 5)
        assert seen / speed[-1] < 60 * minutes - 5  # it ends in time


def test_few_images_get_a_smaller_batch_and_a_given_batch_is_kept(images, speed):
    chosen, _ = fit(images, 5)
    assert chosen.batch_size == 64 and chosen.steps > 500
    assert fit(images, 5, batch_size=256)[0].batch_size == 256
    assert fit(images, 10**4)[0].batch_size == 256


def test_the_monitors_have_their_share_of_the_time():
    """One measurement an epoch, at most five, each a sixth of the work of training on them."""
    assert trained_images(100.0, 600, 0) == 60_000 - 5 * 6000 / 6
    assert trained_images(100.0, 600, 1200) == trained_images(100.0, 600, 0) - 1000
    assert trained_images(100.0, 600, 54_000) == 60_000 - 10_000  # less than an epoch: one
    assert trained_images(100.0, 600, 24_000) == 2 * 24_000  # two, and no third


def test_what_contradicts_a_time_limit_is_one_line(images, speed):
    for given, message in (
        ({"epochs": 5}, "leave --epochs out"),
        ({"steps": 5}, "leave --steps out"),
    ):
        with pytest.raises(UsageError, match=message):
            fit(images, **given)
    with pytest.raises(UsageError, match="give a number above 0"):
        fit(images, minutes=0)
    with pytest.raises(UsageError, match="too short to train"):
        fit(images, minutes=0.3)


def test_the_choice_is_printed_and_stands_in_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_rate", lambda *_: 12.0)
    monkeypatch.setattr(budget, "FORWARD_SHARE", 0)
    monkeypatch.setattr(budget, "TRIAL_SECONDS", 0)
    small = {"backbone": "resnet10", "width": 8, "dim": 32, "proj_hidden": 32, "limit": 100}
    run = simsiam.pretrain("shapes", out=tmp_path / "run", minutes=0.6, **small)
    recipe = Run(run).recipe
    assert recipe.batch_size == 64 and 0 < recipe.steps <= 3 and recipe.width == 8
    assert f"0.6 minutes: {recipe.steps} steps of 64 images" in capsys.readouterr().err
    assert Run(run).json("summary.json")["steps"] == recipe.steps


def test_few_steps_get_a_large_learning_rate_unless_weights_or_the_user_say_otherwise(
    images, speed
):
    chosen, lines = fit(images, 10)
    assert chosen.steps < budget.FEW_STEPS and chosen.peak_lr == pytest.approx(0.25)
    assert "peak lr 0.25" in lines[0]
    assert fit(images, 10, base_lr=0.1)[0].method.base_lr == 0.1
    assert fit(images, 10**5)[0].method.base_lr == PHOTOS.method.base_lr  # many steps
    weights = fit(images, 10, recipe=PHOTOS.replace(init="lite0"))[0]
    assert weights.method.base_lr == PHOTOS.method.base_lr


@pytest.mark.parametrize("processes", [1, 4])
def test_the_time_for_the_features_of_a_teacher_is_not_used_for_steps(
    images, speed, monkeypatch, processes
):
    """200 seconds of computing, shared by the processes."""
    monkeypatch.setattr(budget, "teacher_seconds", lambda *_: 200 / len(images))
    given = {"image_size": 64, "width": 64, "batch_size": 64, "base_lr": 0.1}

    def seen(teacher):
        recipe = PHOTOS.replace(teacher=teacher, **given)
        times = {"minutes": 20, "elapsed": 5, "processes": processes}
        chosen, lines = fit_to_minutes(recipe, images, given, **times)
        assert any("seconds for the teacher" in line for line in lines) == (teacher is not None)
        return chosen.steps * 64

    assert abs(seen(None) - seen("lite0") - 200 / processes * speed[-1]) <= 64 + speed[-1]


def test_a_teacher_is_timed_without_loading_it_and_without_its_first_forward_pass(
    images, monkeypatch
):
    """It is a clock that moves by what is done: 100 s to load, 50 s once, 0.25 s an image."""
    clock = [0.0]
    extracted = []

    def load(recipe, compute):
        clock[0] += 100
        return None, None

    def extract(teacher, few, transform, compute):
        clock[0] += 0.25 * len(few) + 50 * (not extracted)
        extracted.append(len(few))

    monkeypatch.setattr(budget, "load_teacher", load)
    monkeypatch.setattr(budget, "extract_features", extract)
    monkeypatch.setattr(budget.time, "monotonic", lambda: clock[0])
    assert budget.teacher_seconds(PHOTOS.replace(teacher="lite0"), images) == 0.25


MEASURED = {"prepared": 0.0, "trained": 0.1, "gpu": False, "device": "", "load": 0.0}


def test_clusters_of_each_epoch_are_counted(images, speed, monkeypatch):
    """DeepCluster: its epochs are longer, and one that is not completed takes as long."""
    given = {"image_size": 64, "width": 64, "batch_size": 64}
    recipe = PHOTOS.replace(**given)
    free = fit_to_minutes(recipe, images, given, minutes=60, elapsed=5)[0].steps
    epoch = 60.0
    monkeypatch.setattr(budget, "epoch_seconds", lambda *_: epoch)
    steps = fit_to_minutes(recipe, images, given, minutes=60, elapsed=5)[0].steps
    taken = steps * 64 / speed[-1] + epoch * math.ceil(steps * 64 / len(images))
    assert -2 * epoch < taken - free * 64 / speed[-1] <= 0


def test_an_epoch_of_deepcluster_extracts_features_and_finds_clusters(images, monkeypatch):
    """Processes share the features and not k-means, which is images x clusters."""
    clock, fitted = [0.0], []

    def cluster(h, clusters, seed):
        fitted.append((len(h), clusters))
        clock[0] += 3

    monkeypatch.setattr(budget, "extraction_seconds", lambda *_: 0.25)
    monkeypatch.setattr(budget, "cluster_features", cluster)
    monkeypatch.setattr(budget.time, "monotonic", lambda: clock[0])
    small = {"backbone": "resnet10", "width": 4, "dim": 1000, "image_size": 32}
    recipe = Recipe().replace(method="deepcluster", **small, **COLORS).resolve()
    assert budget.epoch_seconds(recipe, images, 8000, 2) == 0.25 * 8000 / 2 + 3 * 4**2
    assert fitted == [(2000, 250)]
    assert budget.epoch_seconds(PHOTOS, images, 8000, 2) == 0


def test_eta_of_each_image_is_computed_before_the_first_step(images, speed):
    given = {"image_size": 64, "width": 64, "batch_size": 64, "base_lr": 0.1}
    recipe = PHOTOS.replace(predictor="none", **given)

    def seen(**target):
        changed = recipe.replace(**target)
        return fit_to_minutes(changed, images, given, minutes=20, elapsed=5)[0].steps * 64

    fresh = seen(target="moving_average")
    assert abs(seen(target="momentum") - fresh - len(images) / 6) <= 64
    assert seen(target="moving_average", target_fresh=False) == seen(target="momentum")


def test_processes_share_the_images_of_a_time_limit(images, monkeypatch):
    """N processes are 0.9 N times as fast as one; each is measured with its share of a batch."""
    tried = []

    def measure(recipe, few, *, resident, seconds):
        tried.append((recipe.batch_size, resident))
        return MEASURED

    monkeypatch.setattr(budget, "measure_speed", measure)
    one, four = (budget.measure_rate(PHOTOS, images, 100, n) for n in (1, 4))
    assert four == pytest.approx(0.9 * 4 * one)
    assert tried == [(256, True), (64, True)]
    split = PHOTOS.replace(method="moco_v2")
    budget.measure_rate(split, images, len(images), 64)
    assert split.method.bn == "split" and tried[-1] == (16, True)


def test_smaller_views_have_no_crop_that_belongs_to_the_size_of_the_weights():
    """Of 256 px, the central 64 would be a sixteenth of an image."""
    weights = PHOTOS.replace(image_size=224, eval_resize=256, init="x")
    sizes = [(r.image_size, r.eval_resize) for r in choices(weights, {})]
    assert sizes == [(224, 256), (128, None), (64, None)]
    given = {"eval_resize": 256}
    assert {r.eval_resize for r in choices(weights, given)} == {256}


def test_a_network_beside_patches_is_made_cheaper_like_one_alone():
    beside = PHOTOS.replace(backbone="patches/32+resnet18", init="patches")
    tried, alone = (
        [(r.image_size, r.width, r.stem) for r in choices(recipe, {})]
        for recipe in (beside, PHOTOS)
    )
    assert tried == alone and len(tried) == 5


def test_all_settings_of_a_file_are_kept_and_other_optimizers_keep_their_lr(images, speed):
    chosen, lines = fit_to_minutes(PHOTOS, images, {}, minutes=5, elapsed=5, keep_settings=True)
    assert sum("images/s" in line for line in lines) == 1
    kept = ("image_size", "width", "batch_size", "peak_lr")
    assert all(getattr(chosen, name) == getattr(PHOTOS, name) for name in kept)
    adamw = PHOTOS.replace(optimizer="adamw", base_lr=1e-3)
    assert fit(images, 10, recipe=adamw)[0].method.base_lr == 1e-3


def test_the_learning_rate_reaches_its_peak_and_falls(images, speed):
    """BYOL's 10 epochs of warm-up are a tenth of the run, or fewer."""
    byol = PHOTOS.replace(method="byol")
    short, long = (fit(images, minutes, recipe=byol)[0] for minutes in (10, 10**4))
    assert byol.method.warmup_epochs == 10 == long.method.warmup_epochs
    assert short.method.warmup_epochs <= short.steps * short.batch_size / len(images) / 10
    assert fit(images, 10, recipe=byol, warmup_epochs=1)[0].method.warmup_epochs == 1


def test_supervised_training_is_timed_with_its_labels(images):
    small = {"backbone": "resnet10", "width": 4, "image_size": 32, "batch_size": 8, "dim": 16}
    recipe = Recipe().replace(method="supervised", **small, **COLORS).resolve()
    few = images.take(slice(16))
    assert measure_speed(recipe, few, resident=True, seconds=0)["trained"] > 0


def test_under_torchrun_a_time_limit_chooses_once(tmp_path, monkeypatch):
    """Started again on a machine that is slower now, the command continues its run."""
    small = {"backbone": "resnet10", "width": 8, "dim": 32, "proj_hidden": 32, "limit": 100}
    monkeypatch.setattr(budget, "FORWARD_SHARE", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    steps = []
    for rate in (24.0, 12.0):
        monkeypatch.setattr(budget, "measure_rate", lambda *_, rate=rate: rate)
        words = {"out": tmp_path / "run", "minutes": 0.8, **small}
        steps.append(Run(simsiam.pretrain("shapes", **words)).recipe.steps)
    assert steps[0] == steps[1] > 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(UsageError, match="exists and is not written over"):
        simsiam.pretrain("shapes", **words)
