"""The benchmark measures fairly and says what it measured; how fast anything is, no test asks."""

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from simsiam import bench
from simsiam.bench import CASES, Case, Contest, measure, photographs, table, take_turns
from simsiam.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the contestants move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def spend(clock, seconds):
    clock[0] += next(seconds)


def test_contestants_take_turns_and_the_first_round_is_not_told():
    calls = []
    ways = {name: partial(calls.append, name) for name in "abc"}
    seconds, peaks = take_turns(ways, CPU, rounds=3)
    assert "".join(calls) == "abc" * 4
    assert all(len(v) == 3 for found in (seconds, peaks) for v in found.values())


def test_a_ratio_is_the_median_of_times_next_to_each_other(clock):
    """Here the machine is ten times slower for two rounds. The ratio of the medians is 1.5."""
    plain, ours = iter([99, 2, 20, 20, 2, 3]), iter([99, 1, 10, 10, 1, 2])
    contest = Contest(count=6, ways={"plain": partial(spend, clock, plain), "simsiam": partial(spend, clock, ours)})
    found = measure(Case(what="it", unit="images/s", prepare=lambda scene: contest), contest, CPU)
    assert found["ways"]["simsiam"] | {"peak_mib": 0} == {
        "seconds": 2, "rate": 3, "ratio": 2, "ratios": [1.5, 2, 2, 2, 2], "peak_mib": 0,
    }  # fmt: skip
    assert found["ways"]["plain"]["ratio"] == 1


def test_the_share_of_the_limit_is_work_over_time(clock, monkeypatch):
    monkeypatch.setattr(bench, "products", lambda device, precision: 100.0)
    ways = {"plain": partial(spend, clock, iter([4] * 6)), "simsiam": partial(spend, clock, iter([2] * 6))}
    contest = Contest(count=1, ways=ways, flops=50.0, precision="bfloat16")
    found = measure(Case(what="it", unit="images/s", prepare=lambda scene: contest), contest, CPU)
    assert found["limit"] == {"of": "FLOP/s of a bfloat16 product", "machine": 100, "achieved": 25}
    console = Console(width=200, record=True)
    console.print(table("case", found))
    text = console.export_text()
    assert "25% of" in text and max(map(len, text.splitlines())) <= 80


def test_bench_writes_what_it_measured(monkeypatch, capsys):
    ways = {"plain": lambda: time.sleep(0.002), "simsiam": lambda: None}
    tiny = Case(what="it", unit="images/s", prepare=lambda scene: Contest(count=1, ways=ways), threads=1)
    monkeypatch.setitem(CASES, "tiny", tiny)
    assert main(["bench", "--only", "tiny", "--device", "cpu", "--out", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    assert found["cases"].keys() == {"tiny"} and found["cases"]["tiny"]["threads"] == 1
    assert (
        found["cases"]["tiny"]["ways"]["simsiam"]["ratio"] > 1 and found["versions"]["torch"] and "command" not in found
    )
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize("wrong, word", [(["--only", "knm"], "'knn'"), (["--out", "no/where.json"], "not a folder")])
def test_wrong_requests_are_refused_before_any_work(wrong, word, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    assert main(["bench", *wrong]) == 2
    assert word in capsys.readouterr().err


def test_photographs_are_the_same_everywhere_and_weigh_as_much_as_photographs():
    files = photographs(3, 95, 115)
    assert files == photographs(3, 95, 115) and len(set(files)) == 3
    assert 1 < 8 * len(files[0]) / (95 * 115) < 4  # bits a pixel
