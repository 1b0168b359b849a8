"""The laboratory: claims are Student's, cells are recipes, and a campaign killed anywhere gives the same tables."""

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
from PIL import Image
from scipy import stats
from torch import nn

from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import from_arrays
from simsiam.evaluation import protocol_linear as linear
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
    "linear", "knn", "knn_mean", "above_chance", "loss", "loss_swing", "z_std_sqrt_d", "z_rank", "collapsed",
    "diverged", "h_gain", "ap50",
}  # fmt: skip


def cells(**numbers):
    """Values of one metric, from a list a cell; None is a run without it."""
    return {cell: {i: {"linear": x} for i, x in enumerate(xs)} for cell, xs in numbers.items()}


def test_a_claim_is_a_paired_t_interval():
    rng = np.random.default_rng(0)
    seed = rng.normal(70, 5, 6)  # what a seed does to both cells: pairing removes it
    a, b = seed + 3 + rng.normal(0, 0.5, 6), seed + rng.normal(0, 0.5, 6)
    ruling = claim_greater("", "a", "b", margin=1).evaluate(cells(a=a, b=b))
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert ruling.interval == pytest.approx((reference.low, reference.high)) and ruling.n == 6
    assert ruling.verdict == HOLDS and reference.low > 1
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
        (claim_greater("", "a", "b"), [5, 5, 5], [5, 5, 5], DOES_NOT_HOLD),  # equal is not above
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
    assert claim.judge(cells(a=a, b=b)).verdict == verdict


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
            assert claim.weights.keys() <= experiment.cells.keys() and claim.metric in METRICS, (
                name,
                claim,
            )
        for one in (1, 3):  # whatever the user says of epochs
            plan_jobs(experiment, scale, tmp_path, 1, one)


def test_imagenet_is_the_paper():
    def recipe(name, cell):
        e = EXPERIMENTS[name]
        return SCALES["imagenet"].recipe(e.cells[cell], common=e.common, epochs=e.epochs)

    baseline = Recipe().replace(backbone="resnet50", image_size=224, output_bn_affine=True)
    default = recipe("table3", "(c) default")
    assert replace(default, knn_every=1, save_every=100) == baseline
    assert (default.epochs, default.batch_size, default.peak_lr) == (100, 512, 0.1)
    large = recipe("table2", "batch 4096")
    assert (large.batch_size, large.method.warmup_epochs, large.method.optimizer) == (
        4096,
        10,
        "sgd",
    )
    assert [recipe("table4", f"simsiam {n}").batch_size for n in (100, 800)] == [256, 256]
    byol = [recipe("table4", f"byol {n}") for n in (100, 200, 400, 800)]
    assert [(r.epochs, r.batch_size, r.method.base_lr, r.method.weight_decay, r.method.decay) for r in byol] == [
        (100, 4096, 0.45, 1e-6, 0.99), (200, 4096, 0.3, 1e-6, 0.99), (400, 4096, 0.3, 1e-6, 0.99),
        (800, 4096, 0.2, 1.5e-6, 0.996),
    ]  # fmt: skip
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
    assert (
        1 < steps[0] < steps[1] < 31 and recipe("alternation", "1 epoch").method.target_steps == 0
    )
    optimal = recipe("optimal_recipe", "optimal").method
    assert (optimal.base_lr, optimal.weight_decay) == (7.0, 1e-5)
    for row in (
        "simclr",
        "moco_v2_plus",
        "byol",
        "swav",
    ):  # on SimSiam's views, batch and optimizer
        one, simsiam = recipe("table4", f"{row} 400"), recipe("table4", "simsiam 400")
        assert (one.method.views, one.batch_size) == (simsiam.method.views, simsiam.batch_size)
        assert one.method.optimizer == "sgd"


def test_experiments_share_equal_runs_and_only_those(tmp_path):
    tiny = SCALES["tiny"]
    plans = {name: plan_jobs(e, tiny, tmp_path, 1, None) for name, e in EXPERIMENTS.items()}
    assert plans["figure2"]["with stop-gradient"][0].path == plans["table1"]["baseline"][0].path
    assert plans["table1"]["(c) lr not decayed"][0].path == plans["table3"]["(c) default"][0].path
    recipes = {path: job.recipe for path, job in unique_jobs(plans.values()).items()}
    listed = [
        job.recipe.to_dict()
        for plan in plans.values()
        for seeds in plan.values()
        for job in seeds.values()
    ]
    assert len(recipes) == len({json.dumps(r) for r in listed}) < len(listed)
    recipe = next(iter(recipes.values()))
    assert recipe_digest(recipe) == recipe_digest(recipe.replace(seed=5, device="cpu"))
    assert (
        len(
            {
                recipe_digest(r)
                for r in (recipe, recipe.replace(base_lr=0.1), recipe.replace(limit=9))
            }
        )
        == 3
    )
    assert (
        len(
            {
                recipe_digest(r)
                for r in (recipe, recipe.replace(flip=0.1), recipe.replace(crop_min=0.1))
            }
        )
        == 3
    )


def test_the_papers_numbers_are_those_of_the_reference(shared):
    reference = json.loads((shared / "reference/paper.json").read_text())

    def numbers(name):
        return [c["top1"] for c in PAPER_RESULTS[name]["cells"].values()]

    def table(key, *leave):
        found = [v for k, v in reference[key].items() if k not in ("note", *leave)]
        return [
            v["top1"] if isinstance(v, dict) else v for v in found if not isinstance(v, (str, list))
        ]

    assert numbers("figure2") == table("figure2") and numbers("table1") == table("table1_predictor")
    assert numbers("table2") == table("table2_batch_size") and numbers("table3") == table(
        "table3_batch_norm"
    )
    assert numbers("similarity") == table("section4_5_similarity")
    assert numbers("symmetrization") == table("section4_6_symmetrization")
    assert numbers("alternation") == table("section5_2_alternation")
    assert numbers("output_dim")[:4] == table("appendixB_output_dim")
    assert numbers("simclr_ablation") == table("section6_2_simclr")
    assert numbers("figure_d1") == table("appendixD_cifar10")
    for row, known in reference["table4_comparison"].items():
        if isinstance(known, dict):
            name = row.removesuffix("_plus") if row != "moco_v2_plus" else row
            assert [
                PAPER_RESULTS["table4"]["cells"][f"{name} {n}"]["top1"]
                for n in (100, 200, 400, 800)
            ] == known["top1"]
    five = reference["table5_transfer"]
    assert PAPER_RESULTS["table5"]["columns"] == five["columns"]
    for cell, row in zip(
        PAPER_RESULTS["table5"]["cells"].values(),
        [v for k, v in five.items() if isinstance(v[0], list)],
    ):
        assert list(cell.values()) == row and list(cell) == five["columns"]
    for name, known in PAPER_RESULTS.items():
        assert name == "source" or known["cells"].keys() <= EXPERIMENTS[name].cells.keys()


# --- real runs, of a network of a few thousand parameters on a few dozen images ---------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Scale tiny, smaller; returns the flag that gives the images."""
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
    monkeypatch.setattr(linear, "MIN_STEPS", 1)  # a thousand are for sets that deserve them
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


def test_killed_and_started_again_it_repeats_nothing_and_gives_the_same_table(
    small, monkeypatch, capfd
):
    plan = ["figure2", "--seeds", 1, *small]
    assert reproduce(*plan, "--out", "whole") == 0
    os.rename("runs", "finished")
    module = importlib.import_module("simsiam.training.pretrain")
    real, seen = module.compute_gauges, []
    strike = (
        len([line for line in Run(next(iter(every_run("finished")))).metrics() if "loss" in line])
        + 2
    )

    def gauges(output):
        seen.append(1)
        if len(seen) == strike:  # the second step of the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return real(output)

    monkeypatch.setattr(module, "compute_gauges", gauges)
    assert reproduce(*plan, "--out", "half") == 128 + signal.SIGTERM
    done = {
        run / "summary.json": (run / "summary.json").stat().st_mtime_ns for run in every_run("runs")
    }
    assert len(done) == 2
    assert reproduce(*plan, "--out", "half") == 0
    assert "2 runs, 1 finished, 1 to continue" in capfd.readouterr().out
    first = min(done, key=done.get)
    assert first.stat().st_mtime_ns == done[first] and len(every_run("runs")) == 2
    for kind in ("csv", "svg"):
        assert Path(f"whole/figure2.{kind}").read_text() == Path(f"half/figure2.{kind}").read_text()
    seen.clear()
    assert (
        reproduce("table1", "--only", "baseline", "--seeds", 1, *small) == 0 and not seen
    )  # shared with figure2
    rows = list(csv.reader(Path("results/tiny/table1.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == list(EXPERIMENTS["table1"].cells)
    assert rows[1][1] != "–" and {row[1] for row in rows[2:]} == {"–"}
    assert "paper: ImageNet" in rows[0][-1] and rows[0][1].startswith("ours: shapes from images, ")
    assert "it is so" not in Path("results/tiny/README.md").read_text()
    Path("results/tiny/table1.reading.md").write_text("it is so\n")
    assert reproduce("table1", "--only", "baseline", "--seeds", 1, *small) == 0
    index = Path("results/tiny/README.md").read_text()
    assert "without a predictor it collapses: **within noise**" in index
    assert (
        "it is so" in index and index.count("7 claims: within noise 7") == 2
    )  # table 1's, and in all
    about = json.loads(Path("half/figure2.json").read_text())
    assert {run["state"] for run in about["runs"]} == {FINISHED} and about["runs"][0][
        "environment"
    ]["device"]


def test_a_run_whose_folder_is_gone_lives_on_in_the_page(small, capfd):
    """Pages alone give the same pages, and an experiment that asks for more of a run repeats it."""
    plan = [
        "figure2",
        "expectation",
        "--only",
        "with stop-gradient",
        "without stop-gradient",
        "simsiam",
        "--seeds",
        1,
    ]
    assert reproduce(*plan, *small) == 0
    pages = {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    shutil.rmtree("runs")
    assert reproduce(*plan, *small) == 0
    assert not Path("runs").exists() and "3 runs, 0 to do" in capfd.readouterr().out
    assert pages == {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    page = Path("results/tiny/expectation.json")
    about = json.loads(page.read_text())
    del about["runs"][0]["values"]["h_gain"]
    page.write_text(json.dumps(about))
    assert (
        reproduce("expectation", "--only", "simsiam", "--seeds", 1, *small) == 0
        and len(every_run("runs")) == 1
    )
    again = json.loads(page.read_text())["runs"][0]["values"]
    assert again["h_gain"] is not None

    earlier = about["runs"][0]
    earlier["environment"]["start"], earlier["values"]["linear"] = "2000-01-01T00:00:00+00:00", -1.0
    Path("results/tiny/zzz.json").write_text(json.dumps({"runs": [earlier]}))
    shutil.rmtree("runs")
    assert (
        reproduce("expectation", "--only", "simsiam", "--seeds", 1, *small) == 0
        and not Path("runs").exists()
    )
    assert json.loads(page.read_text())["runs"][0]["values"] == again, (
        "of a run made twice the later one counts"
    )


def every_run(folder):
    return sorted(path.parent for path in Path(folder).rglob("recipe.yaml"))


def test_a_failing_run_is_told_and_survived(small, capsys):
    code = reproduce("table2", "--only", "batch 512", "batch 4096", "--seeds", 1, *small)
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        code == 1 and "1 runs failed" in error and "batch_size is 1024 and there are only" in error
    )
    page = Path("results/tiny/table2.md").read_text()
    assert "| batch 512 |" in page and "not finished: batch 4096, seed 0: UsageError" in page


def test_what_h_predicts_is_measured_on_other_views(small, monkeypatch):
    """cos(p1, E[z]) against a loop over images and views."""
    assert reproduce("expectation", "--only", "simsiam", "--seeds", 1, *small) == 0
    (run,) = map(Run, every_run("runs"))
    found = run.json("laboratory.json")
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
    of_p, of_z = [], []
    with torch.no_grad():
        for i in range(20):
            z = [model.f(x[i : i + 1])[0] for x in views]
            mean = sum(v / v.norm() for v in z[1:]) / 32
            of_p.append(F.cosine_similarity(model.predictor(z[0][None])[0], mean, dim=0).item())
            of_z.append(F.cosine_similarity(z[0], mean, dim=0).item())
    assert found["cos_p_mean"] == pytest.approx(np.mean(of_p), abs=1e-4)
    assert found["cos_z_mean"] == pytest.approx(np.mean(of_z), abs=1e-4)


def test_table5_fine_tunes_every_run_and_prints_the_papers_beside(small, monkeypatch, tmp_path):
    """Detectors from scratch and from a run share the run; what was measured is not measured again."""
    pytest.importorskip("pycocotools")
    from simsiam.detection import scenes
    from simsiam.laboratory import detector_cells as detectors

    scenes.write_scenes(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(scenes, "prepare_scenes", lambda: tmp_path / "set")
    brief = {"steps": 2, "batch_size": 2, "regions": 8, "proposals": 20, "precise_bn": 0}
    (embedded,) = detectors.list_fine_tunings(["shapes"])
    monkeypatch.setattr(
        detectors, "list_fine_tunings", lambda annotated: [embedded._replace(words=brief)]
    )
    real, seen = detectors.transfer, []

    def counted(*arguments, **words):
        seen.append(words["from_scratch"])
        return real(*arguments, **words)

    monkeypatch.setattr(detectors, "transfer", counted)
    only = ["--only", "scratch", "simsiam, base", "--seeds", 1, *small]
    assert (
        reproduce("table5", *only) == 0
        and sorted(seen) == [False, True]
        and len(every_run("runs")) == 1
    )
    rows = list(csv.reader(Path("results/tiny/table5.csv").read_text().splitlines()))
    assert (
        rows[0][1] == "ours: shapes detection, AP50 / AP / AP75"
        and rows[0][-1] == "paper: COCO instance segmentation"
    )
    found = {row[0]: row for row in rows[1:]}
    assert (
        list(found) == list(EXPERIMENTS["table5"].cells)
        and found["scratch"][-4] == "35.9 / 16.8 / 13.0"
    )
    assert found["simsiam, base"][1].count("/") == 2 and found["byol"][1] == "– / – / –"
    assert reproduce("table5", *only) == 0 and len(seen) == 2
    pages = {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    shutil.rmtree("runs")
    assert reproduce("table5", *only) == 0 and len(seen) == 2 and not Path("runs").exists(), (
        "pages alone will do"
    )
    assert pages == {path.name: path.read_bytes() for path in Path("results/tiny").iterdir()}
    moved = embedded._replace(words=brief, columns={"other": "coco_box"})
    monkeypatch.setattr(detectors, "list_fine_tunings", lambda annotated: [moved])
    assert reproduce("table5", *only) == 0 and len(seen) == 4, "but not for other columns"


def test_annotated_sets_are_the_papers_columns(tmp_path):
    from simsiam.laboratory.detector_cells import list_fine_tunings

    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "VOCdevkit" / year / "Annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text("{}")
    found = list_fine_tunings([str(tmp_path / "VOCdevkit"), str(tmp_path / "coco")])
    columns = {
        column: (one.schedule, metric) for one in found for column, metric in one.columns.items()
    }
    assert columns == {
        "VOC07 detection": ("voc07", "voc_box"), "VOC07+12 detection": ("voc0712", "voc_box"),
        "COCO detection": ("coco", "coco_box"), "COCO instance segmentation": ("coco", "coco_mask"),
    }  # fmt: skip
    assert list(columns) == PAPER_RESULTS["table5"]["columns"] and found[1].source[1].endswith(
        "VOC2012:train"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["table5", "--annotated", "nowhere"], "there is no folder"),
        (["tabel1"], "unknown experiment 'tabel1': did you mean 'table1'?"),
        (["table1", "--scale", "tinyy"], "unknown scale 'tinyy': did you mean 'tiny'?"),
        (["table1", "--only", "basline"], "unknown cell 'basline': did you mean 'baseline'?"),
        (["table1", "--seeds", "0"], "seeds is 0; it is at least 1"),
        (["table1", "--source", "nowhere"], "unknown source"),
        (["figure2", "--scale", "imagenet"], "scale imagenet needs the data: --source FOLDER"),
    ],
)
def test_wrong_usage_is_one_line(arguments, text, capsys):
    assert reproduce(*arguments) == 2
    out, error = capsys.readouterr()
    assert text in error and error.count("\n") == 1 and not os.listdir()
    assert "GPU-hours" in out or "imagenet" not in arguments


def test_a_page_of_somebody_else_is_not_written_over(capsys):
    page = Path("results/tiny/README.md")
    page.parent.mkdir(parents=True)
    page.write_text("mine\n")
    assert (
        reproduce("figure3") == 2
        and "results/tiny/README.md is not ours" in capsys.readouterr().err
    )
    assert page.read_text() == "mine\n" and os.listdir(page.parent) == [page.name]
    assert reproduce("figure3", "--out", "elsewhere") == 0


def test_figure3_is_drawn_from_methods(capsys):
    assert reproduce("figure3") == 0
    assert Path("results/tiny/figure3.svg").read_text().startswith("<svg") and not os.path.exists(
        "runs"
    )
