"""The laboratory: claims are t intervals, cells are recipes, and interrupted work continues."""

import csv
import importlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK
from PIL import Image
from scipy import stats
from torch import nn

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import from_arrays
from simsiam.evaluation import protocol_linear as linear
from simsiam.evaluation.evaluate import evaluate
from simsiam.laboratory import measure, scales
from simsiam.laboratory.claims import (
    DOES_NOT_HOLD,
    HOLDS,
    WITHIN_NOISE,
    Claim,
    claim_false,
    claim_greater,
    claim_similar,
    claim_true,
)
from simsiam.laboratory.experiment_page import PAPER_RESULTS
from simsiam.laboratory.experiments import EXPERIMENTS
from simsiam.laboratory.jobs import FINISHED, plan_jobs, recipe_digest, unique_jobs
from simsiam.laboratory.scales import SCALES
from simsiam.model.siamese import Siamese
from simsiam.runs.run_folder import Run
from simsiam.training.prepare import build_training_setup

METRICS = {
    "linear", "knn", "knn_mean", "above_chance", "loss", "loss_swing", "z_std_sqrt_d", "z_rank",
    "collapsed", "diverged", "h_gain", "ap50",
}  # fmt: skip


def cells(**numbers):
    """Values of one metric from a list for each cell; None is a run without the metric."""
    return {cell: {i: {"linear": x} for i, x in enumerate(xs)} for cell, xs in numbers.items()}


def test_a_claim_is_a_paired_t_interval():
    rng = np.random.default_rng(0)
    seed = rng.normal(70, 5, 6)  # the effect of a seed on both cells; pairing removes it
    a, b = seed + 3 + rng.normal(0, 0.5, 6), seed + rng.normal(0, 0.5, 6)
    result = claim_greater("", "a", "b", margin=1).evaluate(cells(a=a, b=b))
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert result.interval == pytest.approx((reference.low, reference.high)) and result.n == 6
    assert result.verdict == HOLDS and reference.low > 1
    gain = Claim(statement="", weights={"a": 2.0, "b": -1.0}, low=0).evaluate(cells(a=a, b=b))
    assert gain.interval == pytest.approx(
        stats.t.interval(0.95, 5, (2 * a - b).mean(), stats.sem(2 * a - b))
    )


@pytest.mark.parametrize(
    ("claim", "a", "b", "verdict"),
    [
        (claim_greater("", "a", "b"), [5, 6, 7], [1, 2, 3.5], HOLDS),
        (claim_greater("", "a", "b"), [1, 2, 3.5], [5, 6, 7], DOES_NOT_HOLD),
        (claim_greater("", "a", "b"), [5, 1, 7], [1, 2, 3], WITHIN_NOISE),
        (claim_greater("", "a", "b"), [5, 5, 5], [5, 5, 5], DOES_NOT_HOLD),  # equal is not greater
        (claim_greater("", "a", "b", margin=5), [5, 6, 7], [1, 2.5, 3], DOES_NOT_HOLD),
        (claim_similar("", "a", "b", 2), [5, 6, 7], [5.1, 6, 7.1], HOLDS),
        (claim_similar("", "a", "b", 2), [9, 9, 9], [5, 5.1, 5.2], DOES_NOT_HOLD),
        (claim_similar("", "a", "b", 2), [9, 5, 1], [5, 5, 5], WITHIN_NOISE),
        (claim_true("", "a", "linear"), [1, 1], [], HOLDS),
        (claim_true("", "a", "linear"), [0, 0], [], DOES_NOT_HOLD),
        (claim_true("", "a", "linear"), [1, 1, 0], [], WITHIN_NOISE),
        (claim_false("", "a", "linear"), [0, 0], [], HOLDS),
        (claim_greater("", "a", "b"), [5], [1], WITHIN_NOISE),  # one seed has no interval
        (claim_greater("", "a", "b"), [5, None, 5], [1, 1, None], WITHIN_NOISE),  # one pair is left
        (claim_greater("", "a", "b"), [], [1, 2], WITHIN_NOISE),
        (claim_true("", "c", "linear"), [1], [1], WITHIN_NOISE),  # nothing holds by default
    ],
)
def test_a_claim_holds_or_not_or_is_within_noise(claim, a, b, verdict):
    assert claim.evaluate(cells(a=a, b=b)).verdict == verdict


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_cell_is_a_model_and_every_claim_is_of_its_cells(scale, tmp_path):
    class Backbone(nn.Module):
        dim = 8

    for name, experiment in EXPERIMENTS.items():
        for seeds in plan_jobs(experiment, scale, tmp_path, 2, None).values():
            assert [job.recipe.seed for job in seeds.values()] == [0, 1]
            with torch.device("meta"):
                Siamese(Backbone(), seeds[0].recipe.method)
        for claim in experiment.claims:
            assert claim.weights.keys() <= experiment.cells.keys(), (name, claim)
            assert claim.metric in METRICS, (name, claim)
        for epochs in (1, 3):  # the user's --epochs
            plan_jobs(experiment, scale, tmp_path, 1, epochs)


def test_imagenet_is_the_paper():
    def recipe(name, cell):
        e = EXPERIMENTS[name]
        return SCALES["imagenet"].recipe(e.cells[cell], common=e.common, epochs=e.epochs)

    baseline = Recipe().replace(backbone="resnet50", image_size=224, output_bn_affine=True)
    default = recipe("table3", "(c) default")
    assert replace(default, knn_every=1, save_every=100) == baseline
    assert (default.epochs, default.batch_size, default.peak_lr) == (100, 512, 0.1)
    large = recipe("table2", "batch 4096")
    assert (large.batch_size, large.method.warmup_epochs) == (4096, 10)
    assert large.method.optimizer == "sgd"
    assert [recipe("table4", f"simsiam {n}").batch_size for n in (100, 800)] == [256, 256]
    byol = [recipe("table4", f"byol {n}") for n in (100, 200, 400, 800)]
    assert {r.batch_size for r in byol} == {4096}
    optimization = [
        (r.epochs, r.method.base_lr, r.method.weight_decay, r.method.decay) for r in byol
    ]
    assert optimization == [
        (100, 0.45, 1e-6, 0.99),
        (200, 0.3, 1e-6, 0.99),
        (400, 0.3, 1e-6, 0.99),
        (800, 0.2, 1.5e-6, 0.996),
    ]
    assert recipe("alternation", "100 steps").method.target_steps == 100
    assert recipe("byol_without_momentum", "byol").epochs == 300


def test_tiny_maps_the_papers_settings():
    def recipe(name, cell):
        e = EXPERIMENTS[name]
        return SCALES["tiny"].recipe(e.cells[cell], common=e.common, epochs=e.epochs)

    batches = [recipe("table2", cell).batch_size for cell in EXPERIMENTS["table2"].cells]
    assert batches == [16, 32, 64, 128, 256, 512, 1024, 1024]
    assert [recipe("table4", f"swav {n}").epochs for n in (100, 200, 400, 800)] == [2, 4, 8, 16]
    steps = [recipe("alternation", cell).method.target_steps for cell in ("10 steps", "100 steps")]
    assert 1 < steps[0] < steps[1] < 31
    assert recipe("alternation", "1 epoch").method.target_steps == 0
    optimal = recipe("optimal_recipe", "optimal").method
    assert (optimal.base_lr, optimal.weight_decay) == (7.0, 1e-5)
    simsiam = recipe("table4", "simsiam 400")
    for row in ("simclr", "moco_v2_plus", "byol", "swav"):  # with SimSiam's views, batch and SGD
        other = recipe("table4", f"{row} 400")
        assert (other.method.views, other.batch_size) == (simsiam.method.views, simsiam.batch_size)
        assert other.method.optimizer == "sgd"


def test_experiments_share_equal_runs_and_only_those(tmp_path):
    tiny = SCALES["tiny"]
    plans = {name: plan_jobs(e, tiny, tmp_path, 1, None) for name, e in EXPERIMENTS.items()}
    assert plans["figure2"]["with stop-gradient"][0].path == plans["table1"]["baseline"][0].path
    assert plans["table1"]["(c) lr not decayed"][0].path == plans["table3"]["(c) default"][0].path
    recipes = {path: job.recipe for path, job in unique_jobs(plans.values()).items()}
    # Runs that are recorded are apart: others with the same recipe lack the recording.
    listed = [
        (EXPERIMENTS[name].record_steps, job.recipe.to_dict())
        for name, plan in plans.items()
        for seeds in plan.values()
        for job in seeds.values()
    ]
    assert len(recipes) == len({json.dumps(r) for r in listed}) < len(listed)
    recipe = next(iter(recipes.values()))
    assert recipe_digest(recipe) == recipe_digest(recipe.replace(seed=5, device="cpu"))
    changes = ({}, {"base_lr": 0.1}, {"limit": 9}, {"flip": 0.1}, {"crop_min": 0.1})
    assert len({recipe_digest(recipe.replace(**change)) for change in changes}) == len(changes)


def test_the_papers_numbers_are_those_of_the_reference(shared):
    reference = json.loads((shared / "reference/paper.json").read_text())

    def numbers(name):
        return [c["top1"] for c in PAPER_RESULTS[name]["cells"].values()]

    def table(key):
        rows = [v for k, v in reference[key].items() if k != "note"]
        rows = [v for v in rows if not isinstance(v, (str, list))]
        return [v["top1"] if isinstance(v, dict) else v for v in rows]

    assert numbers("figure2") == table("figure2")
    assert numbers("table1") == table("table1_predictor")
    assert numbers("table2") == table("table2_batch_size")
    assert numbers("table3") == table("table3_batch_norm")
    assert numbers("similarity") == table("section4_5_similarity")
    assert numbers("symmetrization") == table("section4_6_symmetrization")
    assert numbers("alternation") == table("section5_2_alternation")
    assert numbers("output_dim")[:4] == table("appendixB_output_dim")
    assert numbers("simclr_ablation") == table("section6_2_simclr")
    assert numbers("figure_d1") == table("appendixD_cifar10")
    table4 = PAPER_RESULTS["table4"]["cells"]
    for row, results in reference["table4_comparison"].items():
        if isinstance(results, dict):
            name = row.removesuffix("_plus") if row != "moco_v2_plus" else row
            top1 = [table4[f"{name} {n}"]["top1"] for n in (100, 200, 400, 800)]
            assert top1 == results["top1"]
    table5, columns = reference["table5_transfer"], PAPER_RESULTS["table5"]["columns"]
    assert columns == table5["columns"]
    rows = [v for v in table5.values() if isinstance(v[0], list)]
    for cell, row in zip(PAPER_RESULTS["table5"]["cells"].values(), rows):
        assert list(cell.values()) == row and list(cell) == columns
    for name, results in PAPER_RESULTS.items():
        assert name == "source" or results["cells"].keys() <= EXPERIMENTS[name].cells.keys()


# --- real runs of a network with a few thousand parameters on a few dozen images ------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Make scale tiny smaller; returns the flag for the images."""
    tiny = SCALES["tiny"]
    base = tiny.base | {
        "width": 4,
        "dim": 16,
        "pred_dim": 4,
        "proj_hidden": 16,
        "batch_size": 16,
        "log_every": 1,
    }
    monkeypatch.setitem(scales.SCALES, "tiny", replace(tiny, base=base, epochs=1))
    monkeypatch.setattr(linear, "MIN_STEPS", 1)  # the default of a thousand takes too long
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 10)):
        for label in range(2):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 128 + 127 * label, (32, 32, 3), np.uint8)).save(
                    folder / f"{i}.png"
                )
    return ["--source", str(tmp_path / "images")]


def reproduce(*arguments):
    return main(["reproduce", *map(str, arguments)])


def test_an_interrupted_campaign_repeats_nothing_and_gives_the_same_table(
    small, monkeypatch, capfd
):
    arguments = ["figure2", "--seeds", 1, *small]
    assert reproduce(*arguments, "--out", "whole") == 0
    os.rename("runs", "finished")
    module = importlib.import_module("simsiam.training.pretrain")
    compute_gauges, calls = module.compute_gauges, []
    finished = Run(all_runs("finished")[0])
    steps = len([line for line in finished.metrics() if "loss" in line])

    def gauges(output):
        calls.append(1)
        if len(calls) == steps + 2:  # the second step of the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_gauges(output)

    monkeypatch.setattr(module, "compute_gauges", gauges)
    assert reproduce(*arguments, "--out", "half") == 128 + signal.SIGTERM
    summaries = [run / "summary.json" for run in all_runs("runs")]
    done = {path: path.stat().st_mtime_ns for path in summaries}
    assert len(done) == 2
    assert reproduce(*arguments, "--out", "half") == 0
    assert "2 runs, 1 finished, 1 to continue" in capfd.readouterr().out
    first = min(done, key=done.get)
    assert first.stat().st_mtime_ns == done[first] and len(all_runs("runs")) == 2
    for kind in ("csv", "svg"):
        assert Path(f"whole/figure2.{kind}").read_text() == Path(f"half/figure2.{kind}").read_text()
    calls.clear()
    table1 = ["table1", "--only", "baseline", "--seeds", 1, *small]
    assert reproduce(*table1) == 0 and not calls  # the run is shared with figure2
    rows = list(csv.reader(Path("results/tiny/table1.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == list(EXPERIMENTS["table1"].cells)
    assert rows[1][1] != "–" and {row[1] for row in rows[2:]} == {"–"}
    assert "paper: ImageNet" in rows[0][-1] and rows[0][1].startswith("ours: shapes from images, ")
    assert "a reading" not in Path("results/tiny/README.md").read_text()
    Path("results/tiny/table1.reading.md").write_text("a reading\n")
    assert reproduce(*table1) == 0
    index = Path("results/tiny/README.md").read_text()
    assert "without a predictor it collapses: **within noise**" in index
    # Once for table 1 and once for all experiments.
    assert "a reading" in index and index.count("7 claims: within noise 7") == 2
    figure2 = json.loads(Path("half/figure2.json").read_text())
    assert {run["state"] for run in figure2["runs"]} == {FINISHED}
    assert figure2["runs"][0]["environment"]["device"]


def test_pages_replace_runs_whose_folders_were_deleted(small, capfd):
    """Pages alone give the same pages, and a run is repeated if an experiment needs more of it."""
    cells = ["with stop-gradient", "without stop-gradient", "simsiam"]
    arguments = ["figure2", "expectation", "--only", *cells, "--seeds", 1, *small]
    assert reproduce(*arguments) == 0
    pages = {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    shutil.rmtree("runs")
    assert reproduce(*arguments) == 0
    assert not Path("runs").exists() and "3 runs, 0 to do" in capfd.readouterr().out
    assert pages == {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    page = Path("results/tiny/expectation.json")
    content = json.loads(page.read_text())
    del content["runs"][0]["values"]["h_gain"]
    page.write_text(json.dumps(content))
    expectation = ["expectation", "--only", "simsiam", "--seeds", 1, *small]
    assert reproduce(*expectation) == 0 and len(all_runs("runs")) == 1
    repeated = json.loads(page.read_text())["runs"][0]["values"]
    assert repeated["h_gain"] is not None

    earlier = content["runs"][0]
    earlier["environment"]["start"], earlier["values"]["linear"] = "2000-01-01T00:00:00+00:00", -1.0
    Path("results/tiny/zzz.json").write_text(json.dumps({"runs": [earlier]}))
    shutil.rmtree("runs")
    assert reproduce(*expectation) == 0 and not Path("runs").exists()
    # Of a run that was made twice, the later one counts.
    assert json.loads(page.read_text())["runs"][0]["values"] == repeated


def all_runs(folder):
    return sorted(path.parent for path in Path(folder).rglob("recipe.yaml"))


def test_evaluations_of_the_user_do_not_change_what_pages_show(small):
    """With other settings, before the laboratory measures the run or afterwards."""
    run, file = Run(simsiam.pretrain(small[1], **QUICK)), "evaluations/knn.json"
    for _ in range(2):
        evaluate(run.path, protocols=["knn"], k=80, baselines=False)
        run.write(file, [record | {"top1": -1.0} for record in run.read_records(file)])
        assert measure.measure_top1(run, "knn", SCALES["tiny"]) > 0


def test_a_failing_run_is_reported_and_the_others_continue(small, capsys):
    code = reproduce("table2", "--only", "batch 512", "batch 4096", "--seeds", 1, *small)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and "1 runs failed" in error
    assert "batch_size is 1024 and there are only" in error
    page = Path("results/tiny/table2.md").read_text()
    assert "| batch 512 |" in page and "not finished: batch 4096, seed 0: UsageError" in page


def test_what_h_predicts_is_measured_on_other_views(small, monkeypatch):
    """cos(p1, E[z]) against a loop over images and views."""
    assert reproduce("expectation", "--only", "simsiam", "--seeds", 1, *small) == 0
    (run,) = map(Run, all_runs("runs"))
    cosines = run.json("laboratory.json")
    model, _, (device, _) = build_training_setup(run.recipe)
    model.load_state_dict(run.checkpoint()["model"])
    model.eval()
    paths = [p for label in "01" for p in sorted((Path(small[1]) / "test" / label).iterdir())]
    pixels = np.stack([np.asarray(Image.open(p)).transpose(2, 0, 1) for p in paths])
    views = make_training_views(
        from_arrays("test", pixels),
        np.arange(20),
        run.recipe,
        measure.VIEW_STEP,
        device,
        view_count=33,
    )
    cos_p, cos_z = [], []
    with torch.no_grad():
        for i in range(20):
            z = [model.f(x[i : i + 1])[0] for x in views]
            mean = sum(v / v.norm() for v in z[1:]) / 32
            cos_p.append(F.cosine_similarity(model.predictor(z[0][None])[0], mean, dim=0).item())
            cos_z.append(F.cosine_similarity(z[0], mean, dim=0).item())
    assert cosines["cos_p_mean"] == pytest.approx(np.mean(cos_p), abs=1e-4)
    assert cosines["cos_z_mean"] == pytest.approx(np.mean(cos_z), abs=1e-4)


def test_table5_fine_tunes_every_run_and_shows_the_papers_numbers(small, monkeypatch, tmp_path):
    """Detectors from scratch and from a run share the run, and nothing is measured twice."""
    pytest.importorskip("pycocotools")
    from simsiam.detection import scenes
    from simsiam.laboratory import detector_cells as detectors

    scenes.write_scenes(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(scenes, "prepare_scenes", lambda: tmp_path / "set")
    brief = {"steps": 2, "batch_size": 2, "regions": 8, "proposals": 20, "precise_bn": 0}
    (shapes,) = detectors.list_detector_settings(["shapes"])
    short = shapes._replace(overrides=brief)
    monkeypatch.setattr(detectors, "list_detector_settings", lambda annotated: [short])
    transfer, calls = detectors.transfer, []

    def counted(*arguments, **settings):
        calls.append(settings["from_scratch"])
        return transfer(*arguments, **settings)

    monkeypatch.setattr(detectors, "transfer", counted)
    only = ["--only", "scratch", "simsiam, base", "--seeds", 1, *small]
    assert reproduce("table5", *only) == 0
    assert sorted(calls) == [False, True] and len(all_runs("runs")) == 1
    rows = list(csv.reader(Path("results/tiny/table5.csv").read_text().splitlines()))
    assert rows[0][1] == "ours: shapes detection, AP50 / AP / AP75"
    assert rows[0][-1] == "paper: COCO instance segmentation"
    row_of = {row[0]: row for row in rows[1:]}
    assert list(row_of) == list(EXPERIMENTS["table5"].cells)
    assert row_of["scratch"][-4] == "35.9 / 16.8 / 13.0"
    assert row_of["simsiam, base"][1].count("/") == 2 and row_of["byol"][1] == "– / – / –"
    assert reproduce("table5", *only) == 0 and len(calls) == 2
    pages = {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    shutil.rmtree("runs")
    # Pages alone are enough ...
    assert reproduce("table5", *only) == 0 and len(calls) == 2 and not Path("runs").exists()
    assert pages == {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    other = short._replace(columns={"other": "coco_box"})
    monkeypatch.setattr(detectors, "list_detector_settings", lambda annotated: [other])
    assert reproduce("table5", *only) == 0 and len(calls) == 4  # ... but not for other columns


def test_annotated_sets_are_the_papers_columns(tmp_path):
    from simsiam.laboratory.detector_cells import list_detector_settings

    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "VOCdevkit" / year / "Annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("{}")
    settings = list_detector_settings([str(tmp_path / "VOCdevkit"), str(tmp_path / "coco")])
    columns = {
        column: (setting.schedule, metric)
        for setting in settings
        for column, metric in setting.columns.items()
    }
    assert columns == {
        "VOC07 detection": ("voc07", "voc_box"), "VOC07+12 detection": ("voc0712", "voc_box"),
        "COCO detection": ("coco", "coco_box"), "COCO instance segmentation": ("coco", "coco_mask"),
    }  # fmt: skip
    assert list(columns) == PAPER_RESULTS["table5"]["columns"]
    assert settings[1].source[1].endswith("VOC2012:train")


def test_a_page_names_every_flag_that_made_it_and_no_place():
    from simsiam.laboratory.reproduce import open_campaign

    counts = {"seeds": 2, "epochs": None}
    images = ["/my home/photos", "https://me:key@host/x.tar?k=1"]
    campaign = open_campaign("tiny", "out", ["shapes"], counts, True, images, ["lr 0.1", "base"])
    words = "--scale tiny --seeds 2 --source photos x.tar --only 'lr 0.1' base --no-labels"
    assert campaign.flags == f" {words}"
    Path("mine/voc/VOC2007/Annotations").mkdir(parents=True)
    campaign = open_campaign("tiny", "out", ["mine/voc", "shapes"], {}, False, [], [])
    assert campaign.flags == " --scale tiny --annotated voc shapes"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["table5", "--annotated", "nowhere"], "there is no folder"),
        (["tabel1"], "unknown experiment 'tabel1': did you mean 'table1'?"),
        (["table1", "--scale", "tinyy"], "unknown scale 'tinyy': did you mean 'tiny'?"),
        (["table1", "--only", "basline"], "unknown cell 'basline': did you mean 'baseline'?"),
        (["table1", "--seeds", "0"], "seeds is 0; it is at least 1"),
        (["table1", "--source", "nowhere"], "no such file or folder: "),
        (["figure2", "--scale", "imagenet"], "scale imagenet needs the data: --source FOLDER"),
    ],
)
def test_wrong_usage_is_one_line(arguments, text, capsys):
    assert reproduce(*arguments) == 2
    out, error = capsys.readouterr()
    assert text in error and error.count("\n") == 1 and not os.listdir()
    assert "GPU-hours" in out or "imagenet" not in arguments


def test_a_foreign_readme_is_not_overwritten(capsys):
    page = Path("results/tiny/README.md")
    page.parent.mkdir(parents=True)
    page.write_text("mine\n")
    assert reproduce("figure3") == 2
    assert "results/tiny/README.md is not an index of experiments" in capsys.readouterr().err
    assert page.read_text() == "mine\n" and os.listdir(page.parent) == [page.name]
    assert reproduce("figure3", "--out", "elsewhere") == 0


def test_figure3_is_drawn_from_methods(capsys):
    assert reproduce("figure3") == 0
    assert Path("results/tiny/figure3.svg").read_text().startswith("<svg")
    assert not os.path.exists("runs")
