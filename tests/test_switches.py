"""The experiment `switches`: what is recorded of a run, what is said of it, and its page."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from test_explore_browser import AXE
from test_laboratory import reproduce, small  # noqa: F401
from test_report import visit  # noqa: F401

from simsiam.config.recipes import Recipe
from simsiam.data.images import from_arrays
from simsiam.errors import WorkFailed
from simsiam.laboratory.experiments import SWITCH_CELLS
from simsiam.laboratory.scales import SCALES
from simsiam.laboratory.switches import recording
from simsiam.laboratory.switches.page import read_options, render_switches
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
        (
            "stop_gradient",
            GOOD,
            BAD._replace(knn=45),
            "of the collapsed run is about the same",
            "Neither",
        ),
        (
            "predictor",
            GOOD,
            BAD._replace(knn=45),
            "of the collapsed run is about the same",
            "Neither",
        ),
        ("stop_gradient", GOOD, BAD, "did not collapse", "of the collapsed run is about the same"),
        ("stop_gradient", GOOD, GOOD, "Neither run collapsed", "flows into both"),
        ("stop_gradient", BAD, BAD, "Both runs collapsed", "did not collapse"),
        ("stop_gradient", BAD, GOOD, "with stop-gradient collapsed, the run without it", "flows"),
        ("predictor", GOOD, BAD, "or z on one line", "Neither"),
        ("predictor", GOOD, ending(2.5, 30), "the run without it collapsed partly", "both sides"),
        ("batch_norm", GOOD, ending(7, 30, std=0.4), "this part can become large", "Yet"),
        ("batch_norm", GOOD, GOOD, "Yet the standard deviation", "this part can become large"),
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
    assert two["seeds_agree"] is True and "the same words are true" in two["sentences"][1]
    differ = say({0: GOOD, 1: GOOD}, {0: BAD, 1: GOOD})
    assert differ["seeds_agree"] is False
    assert "rank 8.0 before and 8.0 now, kNN 50 % before and 50 % now" in differ["sentences"][1]
    one = say({0: GOOD, 1: GOOD}, {0: BAD})
    assert one["seeds_agree"] is None and "one seed only" in one["sentences"][1]


def test_an_ending_is_judged_by_the_rule_of_the_verdict():
    assert describe_ending(GOOD, 10).startswith("Not collapsed: z uses 8.0 directions")
    assert "guessing gives 10 %" in describe_ending(GOOD, 10)
    assert describe_ending(BAD, None).startswith("Collapsed: z uses only 1.1")
    assert "nearly the same z" in describe_ending(BAD._replace(std=0.04), None)
    assert describe_ending(ending(2.5, 30), 10).startswith("Partly collapsed: z uses 2.5")
    similar = GOOD._replace(state="partial collapse", std=0.3)
    assert "the same for all images (standard deviation × √d: 0.30)" in describe_ending(similar, 10)
    assert describe_ending(GOOD._replace(state="diverged"), 10).startswith("Diverged")


# --- the page -------------------------------------------------------------------------------------


def drawn():
    """The content of a switches.json with drawn numbers, and its images."""
    rng = np.random.default_rng(0)
    labels = np.arange(NUM_IMAGES) % 2
    images = from_arrays(
        "test", rng.integers(0, 256, (NUM_IMAGES, 3, 32, 32), np.uint8), labels, CLASSES
    )
    runs = []
    for cell, overrides in SWITCH_CELLS.items():
        recipe = SCALES["tiny"].recipe(overrides, common={}, epochs=200, source=("shapes",))
        steps = 16 * 250 // recipe.batch_size
        fails = "no stop" in cell or "no predictor" in cell
        for seed in range(2 if cell.endswith("middle batch") else 1):
            spectrum = [0.9, 0.1, 0.0] if fails else [0.4, 0.3, 0.2]
            noise = float(rng.random() / 10)
            recorded = {
                "steps": [0, steps // 2, steps],
                "loss": [0.0, -0.3, -0.9 - noise if fails else -0.6 - noise],
                "z_std_sqrt_d": [1.0, 0.9, 0.5 if fails else 0.97],
                "z_rank": [30.0, 10.0, 1.2 + noise if fails else 6 + noise],
                "h_rank": [9.0, 8.0, 7.0],
                "knn_top1": [20.0, 30.0, 25.0 + noise if fails else 60.0 + noise],
                "spectrum": [[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], spectrum],
                "extent": 0.8,
                "points": [
                    base64.b64encode(
                        rng.integers(0, 256, (NUM_IMAGES, 2), np.uint8).tobytes()
                    ).decode()
                    for _ in range(3)
                ],
            }
            runs.append(
                {
                    "cell": cell, "seed": seed, "values": {"diverged": 0.0},
                    "recipe": recipe.to_dict(), "recording": recorded,
                    "environment": {"commit": "0" * 40, "device": "a drawn device"},
                }
            )  # fmt: skip
    command = "simsiam reproduce switches --scale tiny"
    return {"command": command, "metric": "shapes, linear top-1 (%)", "runs": runs}, images


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html)[1])


def test_every_turn_of_one_switch_is_described_from_the_recorded_values():
    metadata, images = drawn()
    data = data_of(render_switches(metadata, images))
    assert len(data["runs"]) == 24 and data["batch_sizes"] == [16, 64, 256]
    assert len(data["turns"]) == 24 * (1 + 1 + 1 + 2)
    by_options = {json.dumps(run["options"], sort_keys=True): run for run in data["runs"]}
    for run in metadata["runs"]:
        shown = by_options[json.dumps(read_options(run["recipe"]), sort_keys=True)]
        if run["seed"] == 0:
            assert shown["recording"] == run["recording"]
        else:
            assert shown["repeats"][0]["loss"] == run["recording"]["loss"]
    for name, turn in data["turns"].items():
        start, end = (data["runs"][int(i)] for i in name.split("-"))
        ranks = [run["recording"]["z_rank"][-1] for run in (start, end)]
        expected = (
            "lower"
            if ranks[1] * 1.5 <= ranks[0]
            else "higher"
            if ranks[1] >= ranks[0] * 1.5
            else "about the same"
        )
        assert turn["rank"] == expected
        back = data["turns"]["-".join(reversed(name.split("-")))]
        assert {turn["knn"], back["knn"]} in ({"about the same"}, {"lower", "higher"})
        assert len(turn["sentences"]) == 2


def test_a_page_of_other_images_or_of_no_run_is_not_written():
    metadata, images = drawn()
    with pytest.raises(WorkFailed, match="not the images that the runs"):
        render_switches(metadata, images.take(np.arange(5)))
    for run in metadata["runs"]:
        del run["recording"]
    assert render_switches(metadata, images) == ""


@pytest.fixture
def drawn_page(tmp_path):
    metadata, images = drawn()
    path = tmp_path / "switches.html"
    path.write_text(render_switches(metadata, images), encoding="utf-8")
    return path, data_of(path.read_text(encoding="utf-8"))


def turn(tab, switch, value):
    tab.locator(f"input[name={switch}][value='{value}']").check()


def test_a_reader_predicts_turns_a_switch_and_sees_that_run(visit, drawn_page):  # noqa: F811
    path, data = drawn_page
    tab = visit(path)
    assert tab.locator(".ending").inner_text().startswith("Not collapsed: z uses 6.0")
    assert (
        tab.locator("#position")
        .get_attribute("aria-valuetext")
        .endswith("62 of 62, 3,968 images seen")
    )
    turn(tab, "stop_gradient", "off")
    answer = tab.locator("#answer")
    assert "Predict: stop-gradient off" in answer.inner_text()
    assert tab.locator(".ending").inner_text().startswith("Not collapsed")  # not before the turn
    assert "stop-gradient on, predictor on" in tab.locator("#run .head").first.inner_text()
    tab.get_by_label("fewer directions").check()
    tab.get_by_label("higher", exact=True).check()
    tab.get_by_role("button", name="Turn the switch").click()
    text = answer.inner_text()
    assert "rank of z: lower" in text and "As you expected" in text
    assert "kNN accuracy of h: lower" in text and "You expected: higher" in text
    assert "flows into both sides" in text and "another seed, the same words are true" in text
    assert tab.evaluate("document.activeElement.id") == "answer"
    wanted = {"stop_gradient": "off", "predictor": "on", "batch_norm": "on", "batch_size": 64}
    run = next(run for run in data["runs"] if run["options"] == wanted)
    assert tab.locator(".ending").inner_text() == run["ending"]
    assert "stop-gradient off, predictor on" in tab.locator("#run .head").first.inner_text()
    assert tab.evaluate("switchPage.run.options") == wanted
    # the slider: all parts show that record
    tab.locator("#position").fill("1")
    assert "step 31 of 62, 1,984 images seen" in tab.locator(".player output").inner_text()
    assert "20.0 % of the variance" in tab.locator("#spectrum").inner_text()
    values = [b.inner_text() for b in tab.locator(".chart .legend b").all()]
    assert values[0] == "-0.3" and len(values) == 4 * 3  # this run, second seed, before
    assert "at step 31" in tab.locator(".feature-map canvas").get_attribute("aria-label")
    goal = np.frombuffer(base64.b64decode(run["recording"]["points"][1]), np.uint8) / 127.5 - 1
    tab.wait_for_timeout(600)
    assert tab.evaluate("[...switchPage.map.place]") == pytest.approx(goal, abs=1e-5)
    tab.get_by_role("button", name="Play").click()
    tab.get_by_role("button", name="Pause").wait_for()
    tab.get_by_role("button", name="Play").wait_for()  # at the end it stops
    assert tab.evaluate("switchPage.position") == 2


def test_a_turn_can_be_left_alone_and_needs_no_prediction(visit, drawn_page):  # noqa: F811
    path, _ = drawn_page
    tab = visit(path)
    turn(tab, "batch_norm", "off")
    tab.get_by_role("button", name="Leave it as it is").click()
    assert tab.locator("input[name=batch_norm][value=on]").is_checked()
    turn(tab, "batch_norm", "off")
    turn(tab, "batch_size", "16")  # one switch at a time: the first one goes back
    assert tab.locator("input[name=batch_norm][value=on]").is_checked()
    tab.get_by_label("Ask me for a prediction").uncheck()
    turn(tab, "batch_size", "256")
    assert "15 instead of 62" in tab.locator("#answer").inner_text()
    assert "expected" not in tab.locator("#answer").inner_text()
    # by keyboard
    tab.locator("input[name=predictor][value=on]").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("switchPage.run.options.predictor") == "off"
    tab.locator("#position").focus()
    tab.keyboard.press("Home")
    assert tab.evaluate("switchPage.position") == 0


@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_the_page_of_switches_fits_and_has_names_roles_and_contrast(visit, drawn_page, width):  # noqa: F811
    tab = visit(drawn_page[0], width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1024:
        return
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        turn(tab, "predictor", "off" if scheme == "light" else "on")
        for step in ("ask", "answer"):
            found = tab.evaluate("axe.run().then((result) => result.violations)")
            assert not found, (
                scheme,
                step,
                [(v["id"], v["nodes"][0]["html"][:160]) for v in found],
            )
            if step == "ask":
                tab.get_by_role("button", name="Turn the switch").click()


def test_terms_lead_to_the_glossary(visit, drawn_page):  # noqa: F811
    tab = visit(drawn_page[0])
    links = {a.get_attribute("href") for a in tab.locator("main a").all()}
    terms = "feature view encoder projector predictor stop-gradient collapse knn"
    terms += " linear-evaluation representation-rank batch-norm spectrum"
    assert links == {f"../../glossary.html#{term}" for term in terms.split()}
    glossary = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text("utf-8")
    headings = {line.strip("# ").lower() for line in glossary.splitlines() if line[:3] == "###"}
    assert {term.replace("-", " ") for term in terms.split()} <= {
        heading.replace("-", " ") for heading in headings
    }


def test_the_experiment_writes_its_page_from_runs_or_from_its_json_alone(small):  # noqa: F811
    cell = "stop-gradient, predictor, batch norm, small batch"
    arguments = ["switches", "--only", cell, "--seeds", 1, "--epochs", 1, *small]
    assert reproduce(*arguments) == 0
    page, table = Path("results/tiny/switches.html"), Path("results/tiny/switches.json")
    data, runs = data_of(page.read_text(encoding="utf-8")), json.loads(table.read_text())["runs"]
    recorded = [run["recording"] for run in runs if run["cell"] == cell]
    assert [run["recording"] for run in data["runs"]] == recorded
    assert data["batch_sizes"] == [16] and recorded[0]["steps"][-1] == 8
    before = {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    shutil.rmtree("runs")
    assert reproduce(*arguments) == 0 and not Path("runs").exists()
    assert before == {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}


def test_without_labels_the_page_asks_only_about_the_spectrum(visit, tmp_path):  # noqa: F811
    metadata, images = drawn()
    for run in metadata["runs"]:
        run["recording"]["knn_top1"] = [None] * 3
    path = tmp_path / "switches.html"
    unlabeled = from_arrays("test", images.pixels)
    path.write_text(render_switches(metadata, unlabeled), encoding="utf-8")
    tab = visit(path)
    assert "kNN" not in tab.locator(".ending").inner_text()
    turn(tab, "predictor", "off")
    tab.get_by_role("button", name="Turn the switch").click()
    assert "kNN" not in tab.locator("#answer").inner_text()
    assert tab.locator(".charts .chart").count() == 4  # the spectrum, and three curves
