"""The experiment `switches`: what is recorded of a run, what is said of it, and its page."""

import base64
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from test_explore_browser import AXE
from test_laboratory import reproduce, small  # noqa: F401
from test_report import visit  # noqa: F401

from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.data.images import from_arrays
from simsiam.errors import WorkFailed
from simsiam.laboratory.experiments import SWITCH_CELLS
from simsiam.laboratory.scales import SCALES
from simsiam.laboratory.switches import recording
from simsiam.laboratory.switches.page import collect_turns, read_options, render_switches
from simsiam.laboratory.switches.recording import (
    RecordedPretraining,
    align,
    collect_recording,
    read_records,
    steps_to_record,
)
from simsiam.laboratory.switches.sentences import Ending, describe_ending, describe_turn
from simsiam.model.siamese import build
from simsiam.runs.run_folder import Run
from simsiam.training.launch import pretrain, resume

NUM_IMAGES, CLASSES = 12, ("square", "circle")


# --- recording ------------------------------------------------------------------------------------


def test_steps_are_recorded_at_the_same_shares_of_runs_of_all_lengths():
    assert steps_to_record(60) == [0, 1, 2, 3, 4, 6, 8, 12, 18, 27, 40, 60]
    lists = [steps_to_record(steps) for steps in (60, 248, 1000, 100_000)]
    assert {len(steps) for steps in lists} == {12}
    for steps in lists:
        shares = np.array(steps) / steps[-1]
        assert np.abs(shares - np.array(lists[-1]) / 100_000).max() < 1 / 60
    assert steps_to_record(3) == [0, 1, 2, 3]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "NUM_IMAGES", 40)
        patch.setattr(recording, "NUM_VOTERS", 60)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_images):
    """A run of three steps, recorded at all of them."""
    out = tmp_path_factory.mktemp("recorded") / "run"
    pretrain("shapes", out=out, **QUICK, training_class=RecordedPretraining)
    return Run(out)


def test_recorded_numbers_are_those_of_an_independent_computation(run, monkeypatch):
    captured = []

    def keep(h, z):
        captured.append((h.double().numpy(), z.double().numpy()))
        return describe(h, z)

    describe = recording.describe_outputs
    monkeypatch.setattr(recording, "describe_outputs", keep)
    pretrain("shapes", out="again", **QUICK, training_class=RecordedPretraining)
    records, found = read_records(Run("again")), collect_recording(Run("again"))
    assert [record["step"] for record in records] == [0, 1, 2, 3] == found["steps"]
    assert len(captured) == 4
    for i, (h, z) in enumerate(captured):
        spectrum = np.linalg.eigvalsh(np.cov(z.T))[::-1]
        spectrum = spectrum / spectrum.sum()
        kept = np.array(found["spectrum"][i])
        assert kept == pytest.approx(spectrum[: len(kept)], rel=0.01, abs=1e-6)
        positive = spectrum[spectrum > 1e-12]
        rank = np.exp(-(positive * np.log(positive)).sum())
        assert found["z_rank"][i] == pytest.approx(rank, rel=1e-3)
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        std = unit.std(0).mean() * z.shape[1] ** 0.5
        assert found["z_std_sqrt_d"][i] == pytest.approx(std, abs=1e-4)
        unit = h / np.linalg.norm(h, axis=1, keepdims=True)
        unit = unit - unit.mean(0)
        u, s, _ = np.linalg.svd(unit, full_matrices=False)
        expected, points = (u * s)[:, :2], np.array(records[i]["points"])
        assert distances(points) == pytest.approx(distances(expected), abs=1e-4)
        drawn = np.frombuffer(base64.b64decode(found["points"][i]), np.uint8).reshape(-1, 2)
        drawn = (drawn / 127.5 - 1) * found["extent"]
        assert distances(drawn) == pytest.approx(distances(points), abs=0.02 * found["extent"])


def distances(points):
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_recording_changes_nothing_of_the_run(run):
    pretrain("shapes", out="plain", **QUICK)
    a, b = (r.checkpoint()["model"] for r in (run, Run("plain")))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_goes_on_records_what_it_lacks(run, monkeypatch):
    record = RecordedPretraining.record

    def stop(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return record(self)

    monkeypatch.setattr(RecordedPretraining, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain("shapes", out="half", **QUICK, training_class=RecordedPretraining)
    monkeypatch.setattr(RecordedPretraining, "record", record)
    resume("half", training_class=RecordedPretraining)
    assert read_records(Run("half")) == read_records(run)


def test_alignment_only_turns_and_mirrors():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(20, 2)) for _ in range(3)]
    turned = maps[0] @ np.array([[0, 1], [1, 0]]) * 1.1  # mirrored, and larger
    aligned = align([*maps, turned])
    for before, after in zip([*maps, turned], aligned):
        assert distances(after) == pytest.approx(distances(before))
    assert align([maps[0], turned])[1] == pytest.approx(maps[0] * 1.1)


# --- what is said ---------------------------------------------------------------------------------


def ending(rank, knn, *, loss=-0.5, std=0.97, steps=100):
    state = "collapsed" if rank <= 2 or std < 0.1 else "partial collapse" if rank <= 3 else "spread"
    return Ending(steps, loss, std, rank, knn, state)


def test_the_stop_gradient_without_a_predictor_halves_the_gradient():
    """What the page says where there is no predictor (section 4.2)."""
    torch.manual_seed(0)
    views, gradients = [torch.randn(8, 3, 32, 32) for _ in range(2)], []
    for stop in (True, False):
        recipe = Recipe().replace(
            predictor="none", stop_gradient=stop, dim=8, proj_hidden=8, pred_dim=4
        )
        model = build(recipe.method, backbone="resnet10", width=4, image_size=32)
        model(*views).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(2 * gradients[0], gradients[1], atol=1e-6)


GOOD, BAD = ending(8, 50), ending(1.1, 20, loss=-0.99, std=0.3)


@pytest.mark.parametrize(
    ("switch", "on", "off", "said", "not_said"),
    [
        ("stop_gradient", GOOD, BAD, "a low loss alone", "Neither"),
        ("stop_gradient", GOOD, BAD._replace(loss=-0.4), "did not collapse", "a low loss alone"),
        ("stop_gradient", GOOD, GOOD, "Neither run collapsed", "flows into both"),
        ("stop_gradient", BAD, BAD, "Both runs collapsed", "did not collapse"),
        ("stop_gradient", BAD, GOOD, "with stop-gradient collapsed, the one without", "flows"),
        ("predictor", GOOD, BAD, "With a predictor the two sides differ", "Neither"),
        ("predictor", GOOD, ending(2.5, 30), "the one without collapsed partly", "both sides"),
        ("batch_norm", GOOD, ending(7, 30, std=0.4), "is free to grow", "Yet"),
        ("batch_norm", GOOD, GOOD, "Yet the standard deviation", "free to grow"),
    ],
)
def test_a_reason_is_given_only_where_the_values_have_its_effect(switch, on, off, said, not_said):
    for turned_on in (True, False):
        before, after = (off, on) if turned_on else (on, off)
        turn = describe_turn(switch, {0: before}, {0: after}, turned_on=turned_on, predictor=True)
        assert said in turn["sentences"][0] and not_said not in turn["sentences"][0]


def test_batch_sizes_are_compared_by_their_steps():
    few, many = ending(9, 30, loss=-0.2, steps=60), ending(6, 50, steps=1000)

    def say(before, after):
        turn = describe_turn("batch_size", {0: before}, {0: after}, turned_on=False, predictor=True)
        return turn["rank"], turn["knn"], turn["sentences"][0]

    rank, knn, text = say(many, few)
    assert (rank, knn) == ("higher", "lower") and "60 instead of 1,000" in text
    assert "its higher loss shows (-0.20 against -0.50)" in text
    rank, knn, text = say(few, many)
    assert (rank, knn) == ("lower", "higher") and "1,000 instead of 60" in text
    assert "its higher loss" not in say(many._replace(loss=-0.1), few)[2]
    assert "about the same" in say(many, few._replace(knn=45))[2]
    assert "do not say" in say(many, few._replace(knn=60))[2]
    assert "Only the run of 60 steps collapsed" in say(many, few._replace(state="collapsed"))[2]


def test_seeds_that_disagree_are_shown():
    def say(before, after):
        return describe_turn("predictor", before, after, turned_on=False, predictor=True)

    two = say({0: GOOD, 1: GOOD}, {0: BAD, 1: BAD})
    assert two["seeds_agree"] is True and "in the same way" in two["sentences"][1]
    differ = say({0: GOOD, 1: GOOD}, {0: BAD, 1: GOOD})
    assert differ["seeds_agree"] is False
    assert "rank 8.0 before and 8.0 now, kNN 50 % before and 50 % now" in differ["sentences"][1]
    one = say({0: GOOD, 1: GOOD}, {0: BAD})
    assert one["seeds_agree"] is None and "one seed only" in one["sentences"][1]


def test_an_ending_is_judged_by_the_rule_of_the_verdict():
    assert describe_ending(GOOD, 10).startswith("Not collapsed: z uses 8.0 directions")
    assert "guessing gives 10 %" in describe_ending(GOOD, 10)
    assert describe_ending(BAD, None).startswith("Collapsed: z uses 1.1")
    assert describe_ending(ending(2.5, 30), 10).startswith("Partly collapsed")
    assert describe_ending(GOOD._replace(state="diverged"), 10).startswith("Diverged")
