"""Measure the profile of a step, and write the tables and the figure of docs/performance.md.

simsiam bench --out results/bench.json       # a second run of it: bench_again.json
simsiam bench --only CASE --out results/bench_CASE.json
python benchmarks/performance.py profile     # writes results/profile.json
python benchmarks/performance.py page        # writes the tables and docs/performance.svg
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
GROUPS = {  # operations, by the beginning of their names
    "convolution, backward": ("aten::convolution_backward", "aten::mkldnn_convolution_backward"),
    "convolution, forward": ("aten::mkldnn_convolution", "aten::_slow_conv", "aten::thnn_conv"),
    "batch norm": ("aten::native_batch_norm", "aten::batch_norm"),
    "matrix products": ("aten::mm", "aten::addmm"),
    "ReLU": ("aten::threshold_backward", "aten::clamp_min"),
    "optimizer": ("aten::_fused_sgd", "aten::_foreach", "Optimizer"),
}


def profile(batch_size: int = 128) -> dict[str, Any]:
    """Shares of a step's time by operation: SimSiam, ResNet-18 for 32 px, d = 2048."""
    from simsiam.model.precision import Compute
    from simsiam.runs.environment import collect_environment
    from simsiam.utils.system import keep_freed_memory

    keep_freed_memory()
    compute = Compute.pick("cpu")
    steps = {
        "plain": shares(batch_size, "float32", fast=False),
        "simsiam": shares(batch_size, compute.precision, fast=True),
    }
    environment = collect_environment(compute)
    return {
        "batch_size": batch_size,
        "steps": steps,
        "environment": {k: environment[k] for k in environment if k != "command"},
    }


def shares(batch_size: int, precision: str, *, fast: bool) -> dict[str, Any]:
    """Seconds of one step, and each group's share of them."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from simsiam.config.recipes import CHANNEL_STATISTICS, Recipe, cifar_recipe
    from simsiam.training.prepare import build_training_setup

    mean, std = CHANNEL_STATISTICS["cifar10"]
    settings = {
        "batch_size": batch_size,
        "mean": mean,
        "std": std,
        "precision": precision,
        "device": "cpu",
    }
    recipe = Recipe().replace(**cifar_recipe() | settings).resolve()
    model, optimizer, compute = build_training_setup(recipe)
    form = torch.channels_last if fast else torch.contiguous_format
    model.to(memory_format=form)  # type: ignore[call-overload]
    x = [torch.randn(batch_size, 3, 32, 32).to(memory_format=form) for _ in range(2)]

    def step() -> None:
        with compute.autocast():
            loss = model(*x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    with profiler(activities=[ProfilerActivity.CPU]) as result:
        step()
    times = {event.key: event.self_cpu_time_total for event in result.key_averages()}
    total, result_shares = sum(times.values()), {}
    for group, starts in GROUPS.items():
        result_shares[group] = (
            sum(times.pop(key) for key in [k for k in times if k.startswith(starts)]) / total
        )
    result_shares["all else"] = sum(times.values()) / total
    return {
        "seconds": round(total / 1e6, 3),
        "shares": {k: round(v, 3) for k, v in result_shares.items()},
    }


def measured() -> tuple[dict[str, Any], dict[str, Any]]:
    """All reports by name, and those of second runs."""
    reports = {
        path.stem: read(path.stem) for path in sorted((ROOT / "results").glob("bench*.json"))
    }
    return (
        {name: report for name, report in reports.items() if not name.endswith("_again")},
        {name: report for name, report in reports.items() if name.endswith("_again")},
    )


def cases(reports: dict[str, Any]) -> dict[str, Any]:
    """All cases by name; those of a GPU end in -gpu."""
    return {
        name + "-gpu" * (report["device_type"] == "cuda"): case
        for report in reports.values()
        for name, case in report["cases"].items()
    }


def tables(
    reports: dict[str, Any], again: dict[str, Any], profile: dict[str, Any]
) -> dict[str, str]:
    """Make each generated part of the page, by its name."""

    def rows(heads: list[str], body: list[list[str]]) -> str:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    parts = {}
    seconds = cases(again)
    for name, case in cases(reports).items():
        second = seconds.get(name, {"ways": {}})["ways"]
        body = []
        for way, v in case["ways"].items():
            ratios = f"{min(v['ratios']):.2f} to {max(v['ratios']):.2f}"
            repeated = f"{second[way]['ratio']:.2f}" if way in second else "–"
            rate = f"{v['rate']:,.{0 if v['rate'] >= 100 else 2}f}"
            body.append([way, rate, f"{v['ratio']:.2f}", ratios, repeated])
        heads = [
            f"{name}: {case['what']}, {case['threads']} threads",
            case["unit"],
            "ratio",
            "rounds",
            "second run",
        ]
        parts[name] = rows(heads, body)
        if limit := case.get("limit"):
            share = f"{limit['achieved'] / limit['machine']:.0%}"
            parts[name] += (
                f"\n\nOurs reaches {share} of the machine's {limit['machine']:.2g} {limit['of']}."
            )
    steps = profile["steps"]
    body = [
        [g, *(f"{s['seconds'] * s['shares'][g]:.2f}" for s in steps.values())]
        for g in steps["plain"]["shares"]
    ]
    body.append(["together", *(f"{s['seconds']:.2f}" for s in steps.values())])
    parts["profile"] = rows([f"seconds of a step of {profile['batch_size']} images", *steps], body)
    variants = read("gpu_step")["variants"]
    body = [
        [n, *(f"{v[k]:,}" for k in ("images_s", "step_ms", "step_alone_ms", "views_alone_ms"))]
        for n, v in variants.items()
    ]
    parts["gpu-step"] = rows(
        ["", "images/s", "ms a step", "gradients and SGD alone", "two views alone"], body
    )
    body = []
    for precision in ("float32", "bfloat16"):
        runs = [run for run in read("precision")["runs"] if run["precision"] == precision]
        knn = [run["knn_top1"]["last"] for run in runs]
        rate = mean(run["images_per_second"] for run in runs)
        body.append(
            [precision, f"{mean(knn):.1f} ± {stdev(knn):.1f}", f"{len(knn)}", f"{rate:,.0f}"]
        )
    parts["precision"] = rows(["precision", "kNN, %", "seeds", "images/s"], body)
    machines = sorted(
        {
            f"{r['device']}, {r['precision']}, torch {r['versions']['torch']}"
            for r in reports.values()
        }
    )
    commits = [f"`{name}` at commit {str(r['commit'])[:12]}" for name, r in reports.items()]
    peers = sorted(
        {f"{peer} {version}" for r in reports.values() for peer, version in r["peers"].items()}
    )
    rounds = {r["rounds"] for r in reports.values()}
    parts["machine"] = (
        f"{'; '.join(machines)}: {', '.join(commits)}; peers: {', '.join(peers) or 'none'}. "
        f"A ratio is the median of {' or '.join(map(str, rounds))} rounds; the columns after it "
        "are the lowest and highest round, and the ratio of a second run."
    )
    return parts


def page(text: str, parts: dict[str, str]) -> str:
    """The page with every part between its markers, <!-- NAME --> and <!-- / -->, written anew."""
    for name, part in parts.items():
        block = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- / -->)"
        text = re.sub(
            block, lambda m, part=part: f"{m[1]}\n{part}\n\n{m[2]}", text, flags=re.DOTALL
        )
    return text


def draw(reports: dict[str, Any], path: Path) -> None:
    """Ratios of every case's ways to its plain one, with the lowest and highest round."""
    from matplotlib.figure import Figure

    bars = [
        (f"{name}: {way}", v["ratio"], v["ratios"])
        for name, case in cases(reports).items()
        if name != "start" and not name.endswith("-gpu")
        for way, v in list(case["ways"].items())[1:]
    ]
    figure = Figure(figsize=(9, 0.6 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (label, ratio, ratios) in enumerate(bars):
        axes.barh(y, ratio, color="#0072B2" if "simsiam" in label else "#999999")
        axes.plot([min(ratios), max(ratios)], [y, y], color="black", linewidth=1)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        yticks=range(len(bars)),
        yticklabels=[label for label, *_ in bars],
        ylim=(len(bars) - 0.5, -0.5),
    )
    axes.set_xlabel("times as fast as the plain way (dotted)")
    figure.savefig(path, metadata={"Date": None})


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    if sys.argv[1:] == ["profile"]:
        (ROOT / "results" / "profile.json").write_text(json.dumps(profile(), indent=1) + "\n")
    elif sys.argv[1:] == ["page"]:
        first, again = measured()
        PAGE.write_text(page(PAGE.read_text(), tables(first, again, read("profile"))))
        draw(first, PAGE.with_suffix(".svg"))
    else:
        sys.exit(__doc__)
