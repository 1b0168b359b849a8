"""Adapting: candidates are taken only beyond noise, and the run folder holds the best one."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import simsiam
from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.data.transform import Transform
from simsiam.errors import UsageError
from simsiam.model import patches as patches_module
from simsiam.model.precision import Compute
from simsiam.model.view_noise import center
from simsiam.monitoring.candidates import (
    MIN_IMAGES,
    Candidate,
    backbone_candidates,
    build_encoder,
    choose,
    join_candidates,
    learn_patches,
    make_candidate,
    map_candidate,
    measure,
    read_sample,
)
from simsiam.runs.closed_form import encoder_recipe, write_encoder
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.open_source import open_source
from simsiam.training.adaptation import adapt as module
from simsiam.training.adaptation.layers import LayerTraining, late_parameters, simsiam_method
from simsiam.training.finish import Worth, write_head
from simsiam.training.loop import run_training

FLOAT32 = Compute(torch.device("cpu"), "float32")
UNIT = Transform(size=32, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture(scope="module", autouse=True)
def few_patches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches_module, "FIT_PATCHES", 3000)
        patch.setattr(patches_module, "CENTERS", 40)
        yield


@pytest.fixture(scope="module")
def sample():
    return read_sample(open_source("shapes").train.take(slice(300)), 32)


@pytest.fixture(scope="module")
def branches(sample):
    return measure(learn_patches(sample, UNIT), UNIT, sample, FLOAT32)


def fake(agreement: torch.Tensor, name: str = "fake") -> Candidate:
    return Candidate(name, (), (), agreement, 0.0, None)


def test_a_candidate_is_taken_only_if_it_is_better_by_more_than_noise():
    generator = torch.Generator().manual_seed(0)
    base = 0.5 + 0.3 * torch.rand(2, 400, generator=generator)
    noise = 0.3 * torch.randn(2, 400, generator=generator)
    equal = fake(base + 0.005 + noise - noise.mean(1, keepdim=True), "equal")
    better, worse = fake(1.02 * base, "better"), fake(0.98 * base, "worse")
    best, rows = choose([fake(base, "first"), equal, better, worse])
    assert best is better
    assert [row["taken"] for row in rows] == [True, False, True, False]
    assert rows[3]["than"] == "better" and rows[3]["gain"] == pytest.approx(
        math.log(0.98 / 1.02), abs=1e-3
    )


def test_the_error_of_a_gain_is_that_of_repeated_draws():
    """The standard error by the delta method, against the spread over 400 new sets of images."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        base = 1 + torch.rand(2, 200, generator=generator)
        return fake(base + 0.4 * torch.rand(2, 200, generator=generator)), fake(base)

    gains = [one.gain(other) for one, other in (draw() for _ in range(400))]
    spread = np.std([gain for gain, _ in gains])
    assert np.mean([error for _, error in gains]) == pytest.approx(spread, rel=0.15)


def test_the_interval_of_a_score_near_0_is_small():
    """Where the neighborhood is not kept at all, the mean that the score is divided by is 0."""
    generator = torch.Generator().manual_seed(0)
    nearness = torch.randn(400, generator=generator)
    recognition = 0.01 * torch.rand(400, generator=generator)
    low, high = fake(torch.stack([recognition, nearness - nearness.mean()])).score_interval()
    assert low == 0 and 0 < high < 0.05


def test_a_candidate_with_a_margin_is_taken_only_beyond_it():
    """What is fitted to views raises a score of views anyway."""
    base = 0.5 + 0.3 * torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    above, below = (replace(fake(f * base, str(f)), margin=0.2) for f in (1.25, 1.2))
    assert math.log(1.2) < 0.2 < math.log(1.25)
    assert choose([fake(base), below])[0].name == "fake"
    assert choose([fake(base), above])[0] is above


def test_a_candidate_that_is_taken_by_rule_is_taken_whatever_its_score():
    base = 0.5 + 0.3 * torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    worse = replace(fake(0.5 * base, "worse"), by_rule=True)
    best, rows = choose([fake(base), worse])
    assert best is worse and rows[1]["by_rule"] and rows[1]["gain"] < 0


def test_a_trained_network_goes_beside_patches_and_again_if_that_is_adapted(tmp_path):
    """h as it is, and patches with their map; the cosine is the mean of both."""
    settings = {"backbone": "resnet10", "width": 8, "steps": 200, "batch_size": 8, "limit": 64}
    path = simsiam.pretrain("shapes", out=tmp_path / "run", dim=32, proj_hidden=32, **settings)
    for name in ("first", "second"):
        path = simsiam.adapt("shapes", init=path, limit=300, minutes=60, out=tmp_path / name)
        table = Run(path).json("adapt.json")
        last = table["candidates"][-1]
        assert table["chosen"] == last["candidate"] and last["by_rule"]
        assert last["candidate"].startswith("resnet10 beside patches/")
    encoder = simsiam.load(path)
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    h, p = encoder.backbone(x), encoder.patches_head(encoder.patches(x))
    expected = torch.cosine_similarity(h[:1], h) + torch.cosine_similarity(p[:1], p)
    features = encoder(x)
    torch.testing.assert_close(torch.cosine_similarity(features[:1], features), expected / 2)
    records = simsiam.evaluate(path, protocols=["knn"], baselines=False, limit=60)
    assert [record["features"] for record in records] == ["h", "h beside patches"]


def test_fitting_never_sees_the_images_held_out(sample):
    """Other images held out change no dictionary, no mean and no noise."""
    pixels = sample.pixels.clone()
    pixels[sample.fit_size :] = 255 - pixels[sample.fit_size :]
    other = sample._replace(pixels=pixels)
    pairs = zip(
        *(measure(learn_patches(s, UNIT), UNIT, s, FLOAT32) for s in (sample, other)), strict=True
    )
    for one, changed in pairs:
        assert torch.equal(one.mean, changed.mean) and torch.equal(one.noise, changed.noise)
        assert not torch.equal(one.held_out, changed.held_out)


def test_labels_are_not_used_to_choose(sample, branches):
    shuffled = sample._replace(labels=sample.labels.flip(0))
    for branch in branches:
        one, other = (map_candidate(branch, s) for s in (sample, shuffled))
        assert torch.equal(one.agreement, other.agreement) and one.knn_top1 != other.knn_top1


@pytest.mark.parametrize("kind", ["unchanged", "map", "two sizes", "network and patches"])
def test_the_encoder_of_a_candidate_computes_its_features(kind, sample, branches):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    network.dim = 7
    (branch,) = measure({"net": network}, UNIT, sample, FLOAT32)
    first, second = branches
    candidate = {
        "unchanged": lambda: make_candidate("", [branch], [None], sample),
        "map": lambda: map_candidate(first, sample),
        "two sizes": lambda: join_candidates(
            map_candidate(first, sample), map_candidate(second, sample), sample
        ),
        "network and patches": lambda: join_candidates(
            make_candidate("", [branch], [center(branch.mean)], sample),
            map_candidate(second, sample),
            sample,
        ),
    }[kind]()
    name, encoder, second_name = build_encoder(candidate)
    assert (name, second_name) == {
        "unchanged": ("net", None),
        "map": ("patches/32", None),
        "two sizes": ("patches/32+24", None),
        "network and patches": ("net", "patches/24"),
    }[kind]
    parts = [
        b.h if head is None else head(b.h)
        for b, head in zip(candidate.branches, candidate.heads, strict=True)
    ]
    with torch.no_grad():
        h = encoder.eval()(UNIT.normalize(sample.pixels))
    torch.testing.assert_close(h, torch.cat(parts, dim=1), rtol=1e-3, atol=1e-3)


def test_side_by_side_a_weight_of_1_gives_both_the_same_view_noise(sample, branches):
    joined = join_candidates(*(map_candidate(b, sample) for b in branches), sample, weights=(1.0,))
    noise = [
        torch.einsum("ij,jk,ik->", head.weight.double(), branch.noise, head.weight.double())
        for branch, head in zip(joined.branches, joined.heads, strict=True)
    ]
    assert noise[0].item() == pytest.approx(1, rel=1e-4)
    assert noise[1].item() == pytest.approx(1, rel=1e-4)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return simsiam.adapt("shapes", limit=300, out=tmp_path_factory.mktemp("adapt") / "run")


def test_the_run_folder_holds_the_best_candidate(adapted):
    table = json.loads((adapted / "adapt.json").read_text())
    taken = [row for row in table["candidates"] if row["taken"]]
    assert table["chosen"] == taken[-1]["candidate"] and "map" in table["chosen"]
    encoder = simsiam.load(adapted)
    h = encoder(encoder.transform(Image.new("RGB", (40, 32), "red")))
    assert h.shape == (1, encoder.dim)
    summary = Run(adapted).json("summary.json")
    assert summary["verdict"] == "healthy" and summary["end"]["score"] > summary["start"]["score"]


def test_an_adapted_run_is_evaluated_embedded_and_searched(adapted, tmp_path):
    simsiam.evaluate(adapted, protocols=["knn"])
    rows = Run(adapted).evaluations()
    assert {"h", "h after the map"} <= {row["features"] for row in rows}
    path = simsiam.embed(adapted, "shapes", out=tmp_path / "e.parquet", limit=60)
    assert len(simsiam.neighbors(path, "train#0", k=3)) == 3


def test_patches_have_no_steps_to_take(adapted, tmp_path):
    for call in (
        lambda: simsiam.resume(adapted),
        lambda: simsiam.pretrain("shapes", backbone="patches/32", out=tmp_path / "run"),
    ):
        with pytest.raises(UsageError, match="closed form, not by steps: `simsiam adapt SOURCE`"):
            call()


def test_with_little_time_backbones_are_left_out_and_named(capsys, tmp_path):
    path = simsiam.adapt("shapes", limit=200, minutes=1e-3, out=tmp_path / "run")
    assert "left out patches/24: no time to measure these" in capsys.readouterr().err
    assert Run(path).recipe.backbone == "patches/32"


def test_a_machine_that_becomes_slower_measures_fewer_images(sample, monkeypatch, capsys):
    """The limit passes in the middle: a small sample decides, and nothing is lost."""
    networks = learn_patches(sample, UNIT)
    now = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    branches, small = module.measure_in_time(networks, UNIT, sample, FLOAT32, 4.0)
    monkeypatch.undo()
    assert "300 images take too long: 150 are measured" in capsys.readouterr().err
    assert small.fit_size == 100 and len(small.pixels) == 150
    fit, held_out = small.pixels[:100], small.pixels[100:]
    assert torch.equal(fit, sample.pixels[:100])
    assert torch.equal(held_out, sample.pixels[sample.fit_size : sample.fit_size + 50])
    for branch, other in zip(branches, measure(networks, UNIT, small, FLOAT32), strict=True):
        assert torch.equal(branch.h, other.h)


def test_an_existing_run_is_a_start_that_can_stay(adapted, tmp_path, capsys):
    path = simsiam.adapt("shapes", init=adapted, limit=300, out=tmp_path / "run")
    table = json.loads((path / "adapt.json").read_text())
    assert table["candidates"][0]["candidate"].endswith("unchanged")
    kept = table["chosen"] == table["candidates"][0]["candidate"]
    advice = Run(path).json("summary.json")["advice"]
    beside = "Beside a network of your own these patches are often better"
    assert advice.startswith("Unchanged is best: nothing" if kept else beside)
    assert Run(adapted).json("summary.json")["advice"].startswith(beside)
    assert kept == ("advice   Unchanged is best" in capsys.readouterr().err)


def test_the_advice_of_an_encoder_that_is_kept_is_to_keep_it(sample, branches, tmp_path):
    """The verdict is `healthy`: nothing was trained."""
    start = make_candidate("net unchanged", [branches[0]], [None], sample)
    row = {"candidate": start.name, "score": 0.5, "taken": True}
    recipe = encoder_recipe(["shapes"], 3, UNIT)
    write_encoder(tmp_path / "run", recipe, start, [row, {"candidate": "b", "taken": False}], [])
    summary = Run(tmp_path / "run").json("summary.json")
    assert summary["verdict"] == "healthy"
    assert summary["advice"] == (
        "Unchanged is best: nothing that was tried is better than net unchanged."
    )


def test_patches_that_win_against_a_narrow_network_can_be_loaded(sample, branches, tmp_path):
    """Width and stem are those of the network to start from, and patches have neither."""
    best = make_candidate("patches", [branches[0]], [None], sample)
    recipe = encoder_recipe(["shapes"], 3, UNIT).replace(width=16, stem="large")
    write_encoder(tmp_path / "run", recipe, best, [{"candidate": "patches", "taken": True}], [])
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(simsiam.load(tmp_path / "run")(x), branches[0].backbone(x))


def test_the_fewest_images_that_are_taken_are_enough(tmp_path):
    """The trial that estimates the time has fewer images then as well."""
    path = simsiam.adapt("shapes", limit=MIN_IMAGES, out=tmp_path / "run")
    assert Run(path).json("adapt.json")["candidates"]


def test_too_few_images_are_refused_in_one_line(tmp_path):
    for i in range(5):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(UsageError, match="5 readable images: at least 24 are needed"):
        simsiam.adapt(tmp_path, out=tmp_path / "run")


def test_an_unreadable_image_is_named(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(40):
        noise = generator.integers(0, 255, (6, 6, 3), np.uint8)
        Image.fromarray(noise).resize((40, 40)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    run = Run(simsiam.adapt(folder, out=tmp_path / "run"))
    assert any("broken.png" in line for line in run.read_quarantine())


def test_a_finished_run_gets_the_map_in_a_file_of_its_own(tmp_path):
    """The backbone alone stays as it is; `load` adds the head only where it was taken."""
    settings = {"backbone": "resnet10", "width": 8, "steps": 2, "batch_size": 16, "limit": 64}
    run = Run(simsiam.pretrain("shapes", out=tmp_path / "run", dim=32, proj_hidden=32, **settings))
    assert not run.has_head  # too few steps
    before = (run.path / "backbone.safetensors").read_bytes()
    images = read_sample(open_source("shapes").train.take(slice(300)), 32)
    network = simsiam.load(run.path, head=False)
    (branch,) = measure({"end": network}, eval_transform(run.recipe), images, FLOAT32)
    unchanged, _, mapped = backbone_candidates(branch, images)
    rows = [{"candidate": "end"}]
    write_head(run, network, Worth([unchanged], rows))
    assert not run.has_head and run.json("head.json")["chosen"] == unchanged.name
    write_head(run, network, Worth([mapped, unchanged], rows))
    assert run.has_head and run.json("head.json") == {"chosen": mapped.name, "candidates": rows}
    assert (run.path / "backbone.safetensors").read_bytes() == before
    assert type(simsiam.load(run.path)).__name__ == "Encoder"
    assert torch.equal(simsiam.load(run.path).head.weight, mapped.heads[0].weight)


@pytest.fixture
def network():
    return simsiam.build("simsiam", backbone="resnet10", width=8, image_size=32).backbone


def layer_training(network, sample, share=0.5, **options):
    recipe = encoder_recipe(["shapes"], 3, UNIT).replace(backbone="resnet10", width=8)
    return LayerTraining(network, recipe, sample, FLOAT32, share, lr_scale=0.1, **options)


def test_late_layers_train_the_last_half_and_keep_the_statistics_of_batch_norm(sample, network):
    before = {name: x.clone() for name, x in network.state_dict().items()}
    training = layer_training(network, sample, steps=12)
    run_training(training)
    trained = training.model.backbone
    after = trained.state_dict()
    changed = {name for name, x in before.items() if not torch.equal(after[name], x)}
    assert not any("running" in name for name in changed)
    late = {id(p) for p in late_parameters(trained, 0.5)}
    expected = {name for name, p in trained.named_parameters() if id(p) in late}
    assert changed == expected and "conv1.weight" not in expected
    assert all(torch.equal(before[k], x) for k, x in network.state_dict().items())


def test_the_heads_are_trained_first(sample, network):
    """The backbone does not change during the first 30 % of the steps."""
    training = layer_training(network, sample, steps=10)
    weight = training.late[0].detach().clone()
    for batch in training.batches():
        training.train_step(batch)
        training.step += 1
        assert torch.equal(weight, training.late[0]) == (training.step <= 3)


def test_all_layers_are_trained_and_too_little_time_trains_none(sample, network):
    assert len(late_parameters(network, 1.0)) == len(list(network.parameters()))
    training = layer_training(network, sample, share=1.0)
    assert not training.fit_steps(0.01)
    assert training.fit_steps(1e6) and training.steps > 1000


def test_training_ends_with_its_time_where_steps_become_slower(sample, network):
    training = layer_training(network, sample, steps=1000)
    training.seconds_limit = 1.0
    for batch in training.batches():
        training.train_step(batch)
        training.step += 1
        training.seconds += 0.3
    assert training.step == 4


def test_layers_are_trained_as_simsiam_whatever_the_run_was():
    """Without `begin` and `after_step`; the run's own optimizer, views and widths are kept."""
    own = Recipe().replace(
        target="moving_average", predictor="none", pairs="single", base_lr=0.7, dim=64, gray=0.0
    )
    assert simsiam_method(own.method) == Recipe().replace(base_lr=0.7, dim=64, gray=0.0).method
    assert simsiam_method(METHODS["simclr"]) == METHODS["simsiam"]


def test_an_adapted_run_records_the_settings_of_the_command(tmp_path):
    words = {"seed": 3, "no_labels": True, "limit": 100}
    recipe = Run(simsiam.adapt("shapes", out=tmp_path / "a", **words)).recipe
    again = Run(simsiam.adapt("shapes", init=tmp_path / "a", limit=90, out=tmp_path / "b")).recipe
    assert (recipe.seed, recipe.no_labels) == (3, True)
    assert (again.seed, again.no_labels) == (0, False)
    with pytest.raises(UsageError, match="seed is -1"):
        simsiam.adapt("shapes", seed=-1)


def test_a_signal_during_training_keeps_the_best_of_what_was_tried(tmp_path, monkeypatch):
    """One Ctrl-C ends the training of layers, and the run folder is written."""
    step = LayerTraining.train_step

    def interrupted_step(training, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return step(training, batch)

    monkeypatch.setattr(LayerTraining, "train_step", interrupted_step)
    network = simsiam.pretrain(
        "shapes", out=tmp_path / "run", backbone="resnet10", width=8, steps=2, batch_size=16
    )
    with pytest.raises(simsiam.Stopped, match="the best of what was tried before is kept"):
        simsiam.adapt("shapes", init=network, minutes=60, limit=64, out=tmp_path / "adapted")
    rows = Run(tmp_path / "adapted").json("adapt.json")["candidates"]
    assert len(rows) > 3 and not any("trained" in row["candidate"] for row in rows)
    assert simsiam.load(tmp_path / "adapted") is not None


def noise_folder(folder, seed=0):
    generator = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(30):
        noise = generator.integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(noise).resize((32, 32)).save(folder / f"{i}.png")
    return folder


def test_runs_that_start_together_share_patches(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    code = "from simsiam.runs.weights import open_weights; import sys;"
    code += "print(open_weights('patches', source=sys.argv[1]))"
    command = [sys.executable, "-c", code, str(noise_folder(tmp_path / "photos"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    (one, first), (other, second) = (process.communicate() for process in processes)
    assert one == other != "", first + second


def test_patches_in_the_cache_are_learned_again_when_an_image_changes(tmp_path, monkeypatch):
    """Two folders with the same names have patches of their own, and so has a changed folder."""
    monkeypatch.setenv("SIMSIAM_CACHE", str(tmp_path / "cache"))
    runs = [
        open_weights("patches", source=noise_folder(tmp_path / name, seed))
        for seed, name in enumerate("ab")
    ]
    assert runs[0] != runs[1] and open_weights("patches", source=tmp_path / "a") == runs[0]
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "0.png")
    assert open_weights("patches", source=tmp_path / "a") not in runs
