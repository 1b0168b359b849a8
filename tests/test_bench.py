"""The benchmark measures fairly and records what it measured; speed itself is not tested."""

import argparse
import json
import re
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from simsiam.commands.main import main
from simsiam.config.methods import METHODS
from simsiam.config.recipes import Recipe
from simsiam.data.images import sample
from simsiam.laboratory import bench, demo
from simsiam.laboratory.bench import measure_case, result_table, time_interleaved
from simsiam.laboratory.bench_cases import CASES, Case, Comparison, make_photographs
from simsiam.laboratory.time_to_accuracy import plain_loop, race
from simsiam.model import patches
from simsiam.model.losses import negative_cosine
from simsiam.model.precision import Compute
from simsiam.model.siamese import build
from simsiam.runs.compose import compose_recipe
from simsiam.runs.encoder import build_backbone, eval_transform
from simsiam.sources.open_source import Source, open_source

CPU = torch.device("cpu")
SMALL = {"backbone": "resnet10", "width": 4, "image_size": 16}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the variants move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def spend(clock, seconds):
    clock[0] += next(seconds)


def case_of(comparison):
    return Case(description="it", unit="images/s", prepare=lambda context: comparison)


def test_variants_take_turns_and_the_first_round_does_not_count():
    calls = []
    variants = {name: partial(calls.append, name) for name in "abc"}
    seconds, peaks = time_interleaved(variants, CPU, rounds=3)
    assert "".join(calls) == "abc" * 4
    assert all(len(v) == 3 for numbers in (seconds, peaks) for v in numbers.values())


def test_a_ratio_is_the_median_of_times_next_to_each_other(clock):
    """The machine is ten times slower for two rounds, so the ratio of the medians would be 1.5."""
    plain, ours = iter([99, 2, 20, 20, 2, 3]), iter([99, 1, 10, 10, 1, 2])
    comparison = Comparison(
        num_items=6,
        variants={"plain": partial(spend, clock, plain), "simsiam": partial(spend, clock, ours)},
    )
    result = measure_case(case_of(comparison), comparison, CPU)
    assert result["ways"]["simsiam"] | {"peak_mib": 0} == {
        "seconds": 2, "rate": 3, "ratio": 2, "ratios": [1.5, 2, 2, 2, 2], "peak_mib": 0,
    }  # fmt: skip
    assert result["ways"]["plain"]["ratio"] == 1


def test_the_share_of_the_limit_is_work_over_time(clock, monkeypatch):
    monkeypatch.setattr(bench, "matmul_throughput", lambda device, precision: 100.0)
    variants = {
        "plain": partial(spend, clock, iter([4] * 6)),
        "simsiam": partial(spend, clock, iter([2] * 6)),
    }
    comparison = Comparison(num_items=1, variants=variants, flops=50.0, precision="bfloat16")
    result = measure_case(case_of(comparison), comparison, CPU)
    limit = {"of": "FLOP/s of a bfloat16 product", "machine": 100, "achieved": 25}
    assert result["limit"] == limit
    console = Console(width=200, record=True)
    console.print(result_table("case", result))
    text = console.export_text()
    assert "25% of" in text and max(map(len, text.splitlines())) <= 80


def test_bench_writes_what_it_measured(monkeypatch, capsys):
    variants = {"plain": lambda: time.sleep(0.002), "simsiam": lambda: None}
    tiny = replace(case_of(Comparison(num_items=1, variants=variants)), threads=1)
    monkeypatch.setitem(CASES, "tiny", tiny)
    assert main(["bench", "--only", "tiny", "--device", "cpu", "--out", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    assert report["cases"].keys() == {"tiny"} and report["cases"]["tiny"]["threads"] == 1
    assert report["cases"]["tiny"]["ways"]["simsiam"]["ratio"] > 1
    assert report["versions"]["torch"] and "command" not in report
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text", [(["--only", "knm"], "'knn'"), (["--out", "no/where.json"], "not a folder")]
)
def test_wrong_requests_are_refused_before_any_work(arguments, text, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_case", None)
    assert main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_photographs_are_reproducible_and_as_large_as_real_ones():
    files = make_photographs(3, 95, 115)
    assert files == make_photographs(3, 95, 115) and len(set(files)) == 3
    assert 1 < 8 * len(files[0]) / (95 * 115) < 4  # bits per pixel


def test_the_page_on_performance_shows_what_was_measured():
    root = Path(__file__).parents[1]
    page = runpy.run_path(str(root / "benchmarks" / "performance.py"))
    parts = page["tables"](*page["measured"](), page["read"]("profile"))
    text = page["PAGE"].read_text()
    assert page["page"](text, parts) == text
    assert all(f"<!-- {name} -->\n\n{part}" in text for name, part in parts.items())


def test_the_fast_step_equals_the_plain_one():
    """Channels last and compiled steps differ by summation order, bfloat16 by its rounding."""
    x1, x2 = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def step(wrap, memory_format, precision):
        method = replace(METHODS["simsiam"], dim=32, proj_hidden=32, pred_dim=8)
        model = build(method, backbone="resnet10", image_size=32, width=8).to(
            memory_format=memory_format
        )
        with Compute(CPU, precision).autocast():
            loss = wrap(model)(
                x1.to(memory_format=memory_format), x2.to(memory_format=memory_format)
            ).loss
        loss.backward()
        return loss.detach(), torch.cat([w.grad.flatten() for w in model.parameters()])

    plain = step(lambda model: model, torch.contiguous_format, "float32")
    for wrap in (lambda model: model, partial(torch.compile, backend="aot_eager")):
        got = step(wrap, torch.channels_last, "float32")
        torch.testing.assert_close(got[0], plain[0], rtol=0, atol=1e-5)
        assert (got[1] - plain[1]).norm() < 1e-3 * plain[1].norm()
    loss, gradient = step(lambda model: model, torch.channels_last, "bfloat16")
    assert abs(loss - plain[0]) < 0.02
    assert torch.nn.functional.cosine_similarity(gradient, plain[1], dim=0) > 0.9


# Time to accuracy.


def test_minutes_to_a_level_are_those_of_the_first_measurement_that_reaches_it():
    curves = [[(0.0, 10.0), (60.0, 49.9), (120.0, 50.0), (180.0, 60.0)], [(600.0, 20.0)]]
    assert race.minutes_to(50, curves) == [2.0, None]
    assert race.mean_and_spread([1.0, 3.0]) == "2 ± 1.4" and race.mean_and_spread([5.0]) == "5"


def test_time_to_accuracy_goes_on_where_it_was_stopped(monkeypatch, capsys):
    """Each contestant and seed is trained once; the table says who never reached a level."""
    trained = []

    def contestants(source, opened, epochs, seed, compute):
        def train(name, end, measure, place):
            trained.append((name, seed))
            return [(6.0, 41.0), (60.0 * (seed + 1), end)]

        slow = partial(train, "slow", 45.0)
        return {"plain loop": slow, "fast": partial(train, "fast", 50.0 + seed)}

    monkeypatch.setattr(race, "contestants", contestants)
    monkeypatch.setattr(race, "MODULES", "lightly 1.6.0")
    words = ["bench", "--only", "time_to_accuracy", "--source", "shapes", "--device", "cpu"]
    assert main([*words, "--seeds", "1", "--out", "race.json"]) == 0
    assert trained == [("slow", 0), ("fast", 0)]
    assert main([*words, "--seeds", "2", "--out", "race.json"]) == 0
    assert trained[2:] == [("slow", 1), ("fast", 1)]
    report = json.loads(Path("race.json").read_text())
    assert report["minutes_to"]["fast"] == {
        "40": [0.1, 0.1], "50": [1.0, 2.0], "60": [None, None], "70": [None, None],
        "80": [None, None], "90": [None, None],
    }  # fmt: skip
    text = capsys.readouterr().out
    assert re.search(r" 50 +│ +1.5 ± 0.71 ", text) and "never" in text and "60" not in text
    assert Path("race.png").stat().st_size > 1000 and Path("race.svg").exists()
    assert report["threads"]["plain loop"] == dict.fromkeys("01", torch.get_num_threads())
    assert "threads" not in text
    monkeypatch.setattr(race, "MODULES", "other modules, which no loop was measured with")
    file = Path("race.runs/fast, seed 1.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 64}))
    assert main([*words, "--seeds", "2", "--out", "race.json"]) == 0
    text = capsys.readouterr().out
    assert f"fast, threads: {torch.get_num_threads()} or 64" in text
    report = json.loads(Path("race.json").read_text())
    assert report["plain loop"] == "lightly 1.6.0" and "modules of lightly 1.6.0." in text


def test_the_race_measures_a_network_beside_patches_as_adapt_puts_it(monkeypatch, tmp_path):
    """The features that are measured have the mean of both cosines; patches take time."""
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    network.dim = 12
    monkeypatch.setattr(patches, "FIT_PATCHES", 3000)
    monkeypatch.setattr(patches, "CENTERS", 40)
    monkeypatch.setattr(race, "read_sample", partial(race.read_sample, limit=100))
    monkeypatch.setattr(race, "own_run", lambda *a: [(60.0, a[3](None, network))])
    source = open_source("shapes")
    recipe = compose_recipe("shapes", None, {})[0]

    def measure(transform, encoder):
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        h, p, joined = network(x), encoder.patches_head(encoder.patches(x)), encoder(x)
        cosines = [torch.cosine_similarity(y[:1], y) for y in (h, p, joined)]
        torch.testing.assert_close((cosines[0] + cosines[1]) / 2, cosines[2])
        return 50.0

    ((seconds, accuracy),) = race.run_beside_patches("shapes", recipe, source, measure, tmp_path)
    assert seconds > 60 and accuracy == 50


def test_the_race_measures_a_copy_of_a_network_on_its_device(monkeypatch):
    """Built on the CPU, it comes to where the images are; the plain loop keeps its format."""
    placed = []
    monkeypatch.setattr(Compute, "place", lambda self, item: placed.append(item) or item)
    images = sample(open_source("shapes").train, 40)
    recipe = compose_recipe("shapes", None, {"backbone": "resnet10", "width": 4})[0]
    network = build_backbone(recipe)
    compute = Compute(CPU, "float32")
    assert 0 <= race.knn(images, images, compute, eval_transform(recipe), network) <= 100
    assert any(isinstance(item, torch.nn.Module) for item in placed)
    assert all(item is not network for item in placed)


def test_labels_belong_to_their_images_where_others_cannot_be_read(tmp_path, program):
    """In the race, the demo and six_sets: dark and bright images, of which the first is broken."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "images" / ("dark", "bright")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (32, 32, 3), np.uint8) + i % 2 * np.uint8(150)
        Image.fromarray(pixels).save(path)
    images, first = open_source(tmp_path / "images").train, tmp_path / "images/bright/01.png"
    first.write_bytes(first.read_bytes()[:50])
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    recipe = compose_recipe("shapes", None, {})[0]
    compute, transform = Compute(CPU, "float32"), eval_transform(recipe)
    source = Source("images", images, test=images)
    assert race.knn(images, images, compute, transform, network) == 100
    assert demo.knn_test_accuracy(network, source, recipe.replace(device="cpu")) == 100
    six_sets = program("six_sets")
    found = six_sets["split_features"](network, images, images, transform, compute)
    row = six_sets["accuracy_row"](*found)
    assert row["n"] == 59 and row["knn_top1"] == 100


@pytest.mark.parametrize(
    "words, text",
    [
        (["time_to_accuracy"], "give --out FILE.json"),
        (["time_to_accuracy", "knn", "--out", "x.json"], "measure it alone"),
        (["time_to_accuracy", "--out", "x.json", "--source", "folder"], "needs labels and a test"),
    ],
)
def test_wrong_races_are_refused(words, text, capsys):
    Path("folder").mkdir()
    Image.new("RGB", (32, 32)).save("folder/a.png")
    assert main(["bench", "--only", *words]) == 2
    assert text in capsys.readouterr().err


def test_the_plain_loop_is_simsiam_and_continues_after_the_last_epoch(tmp_path, monkeypatch):
    """Its loss is D of the paper; stopped and continued, it ends with the same weights."""
    words = {"backbone": "resnet10", "width": 4, "epochs": 3, "limit": 40}
    recipe, source, _ = compose_recipe("shapes", None, words)
    images, compute = sample(source.train, 40), Compute.pick("cpu", "float32")
    model = plain_loop.PlainSimSiam(build("simsiam", **SMALL).backbone)
    x = torch.randn(2, 8, 3, 16, 16)
    (z0, _), (_, p1) = model(x[0]), model(x[1])
    assert not z0.requires_grad
    torch.testing.assert_close(plain_loop.plain_criterion()(z0, p1), negative_cosine(p1, z0))
    monkeypatch.setattr(plain_loop, "CPU_CORES", 0)
    monkeypatch.setattr(plain_loop, "BATCH_SIZE", 16)

    def train(name, stop=99):
        weights = []

        def measure(backbone):
            if len(weights) == stop:
                raise KeyboardInterrupt
            weights.append(backbone.conv1.weight.detach().clone())
            return float(len(weights))

        arguments = {"compute": compute, "fast": False}
        try:
            curve = plain_loop.train_plain_loop(
                recipe, images, measure, tmp_path / name, **arguments
            )
        except KeyboardInterrupt:
            curve = None
        return curve, weights

    whole, weights = train("a.pt")
    assert [accuracy for _, accuracy in whole] == [1.0, 2.0, 3.0, 4.0]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert train("b.pt", stop=3)[0] is None
    curve, continued = train("b.pt")
    assert len(curve) == 4 and len(continued) == 2  # the untrained network, and the last epoch
    assert torch.equal(continued[-1], weights[-1])


# The programs for long measurements.


@pytest.fixture
def program(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return lambda name: runpy.run_path(str(folder / f"{name}.py"))


def test_a_cell_is_measured_once_and_a_page_ends_with_its_reading(program, tmp_path):
    cells, calls = program("cells"), []
    for _ in range(2):
        content = cells["measure_once"](
            tmp_path / "cells" / "a.json", lambda: calls.append(1) or {"knn": 50.0}
        )
        assert content.keys() == {"knn", "seconds", "threads"} and content["knn"] == 50
    assert len(calls) == 1
    (tmp_path / "README.reading.md").write_text("It learns.\n")
    cells["write_page"](tmp_path, ["# Cells"])
    assert (tmp_path / "README.md").read_text() == "# Cells\n\nIt learns.\n"


def test_the_gains_are_the_eigenvalues_of_a_predictor_that_is_aligned(program):
    z = torch.randn(500, 6) * torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    gains = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.2, 0.1])
    _, _, v = torch.linalg.svd(z - z.mean(0), full_matrices=False)
    found = program("plateau")["spectra"](z, z @ (v.T * gains) @ v, z)
    torch.testing.assert_close(torch.tensor(found["gain"]), gains, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(found["alignment"]), torch.ones(6))
    torch.testing.assert_close(torch.tensor(found["agreement"]), torch.ones(6))
    assert sum(found["share"]) == pytest.approx(1, abs=1e-3)


def test_probes_find_what_features_hold_and_nothing_else(program):
    rng = np.random.default_rng(0)
    fit, test = rng.normal(size=(600, 4)), rng.normal(size=(300, 4))

    def factors(x):
        kinds = (x[:, 0] > 0).astype(int)
        others = dict.fromkeys(("brightness", "x", "y"), rng.normal(size=len(x)))
        return {"kind": kinds, "number": x[:, 1], "size": x[:, 1] + x[:, 2], **others}

    found = program("plateau")["hold"](fit, test, factors(fit), factors(test))
    assert found["kind linear"] > 90 and found["number linear"] > 99 and found["size linear"] > 99
    assert found["brightness linear"] < 5 and found["x knn"] < 5 and found["number knn"] > 50


def test_cells_are_compared_with_simsiam_seed_by_seed(program):
    plateau = program("plateau")

    def content(h, agreement):
        measured = {"kind knn": h, "kind linear": h}
        point = {"step": 8, "h": measured, "z": measured, "h_rank": 2.0, "z_rank": 3.0}
        return {"points": [{"step": 0}, point | {"spectra": {"agreement": agreement}}]}

    cells = {
        "simsiam": {0: content(10.0, [0.9, 0.4]), 1: content(50.0, [0.9, 0.6])},
        "simclr": {1: content(53.0, [0.6, 0.6]), 0: content(12.0, [0.6, 0.7]), 2: content(9.0, [])},
    }
    header, _, base, other = (
        [field.strip() for field in line.split("|")[1:-1]] for line in plateau["make_table"](cells)
    )
    column = header.index("h against simsiam")
    # The differences are 2 and 3, so their standard error is 0.5, and t (1 degree) is 12.706.
    assert base[column] == "" and other[column] == "2.5 ± 6.4"
    assert base[header.index("agreeing")].startswith("1.5") and other[header.index("n")] == "3"


def test_the_search_tries_what_is_possible_at_equal_cost_and_keeps_what_gains_a_point(
    program, tmp_path, monkeypatch
):
    sprint = program("sprint")
    for best in ({}, {"method": 1}, {"method": 4, "lr": 2}):
        for cell in sprint["CELLS"]:
            for choice in sprint["alternatives"](best, cell):
                settings = sprint["NETWORK"] | sprint["settings_of"](choice)
                Recipe(image_size=32).replace(**settings)
                changed = {name for name in sprint["CELLS"] if choice.get(name) != best.get(name)}
                assert changed == {cell}
    cost = sprint["cost"]
    assert cost(Recipe(image_size=28)) == 1
    assert cost(Recipe(image_size=28).replace(num_views=4)) == 2
    fixed, small = sprint["FIXED_COST"], Recipe(image_size=28).replace(small_crops=4)
    assert cost(small.replace(small_crop_size=14)) == pytest.approx(1.5 + fixed * 1.5)
    assert cost(Recipe(image_size=28, view_ratio=0.5)) == pytest.approx(0.25 + fixed * 0.75)
    momentum = Recipe(image_size=28).replace(target="momentum")
    assert cost(momentum) == pytest.approx(4 / 3 - fixed / 3)
    gains = {("lr", 1): 0.9, ("lr", 2): 1.2, ("lr", 3): 1.1, ("crops", 2): 5.0, ("batch", 1): -9}
    names = sprint["search"].__globals__
    monkeypatch.setitem(names, "try_choice", lambda _, x: sum(gains.get(i, 0) for i in x.items()))
    monkeypatch.setitem(names, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    options = argparse.Namespace(jobs=1, epochs=1, out=tmp_path)
    assert sprint["search"](options) == {"lr": 2, "crops": 2}
    page = (tmp_path / "README.md").read_text()
    assert "| lr | base_lr 0.8 | 1.2 | kept |" in page and "| lr | base_lr 1.6 | 1.1 |  |" in page


def test_the_queue_has_the_spread_of_seeds_and_says_which_never_reach_the_target(program):
    """The standard deviation of a sample, as everywhere."""
    summary = program("explore_queue")["summary"]
    text = summary([0.5, 0.7], [60, 200], 1)
    assert "60.0 % ± 14.1;" in text and "(1 of 2 seeds stop at 200 without it)" in text
    assert "stop" not in summary([0.5, 0.7], [60, 40], 0)
