"""The benchmark measures fairly and records what it measured; speed itself is not tested."""

import json
import runpy
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from simsiam.commands.main import main
from simsiam.config.methods import METHODS
from simsiam.laboratory import bench
from simsiam.laboratory.bench import measure_case, result_table, time_interleaved
from simsiam.laboratory.bench_cases import CASES, Case, Comparison, make_photographs
from simsiam.model.precision import Compute
from simsiam.model.siamese import build

CPU = torch.device("cpu")


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
