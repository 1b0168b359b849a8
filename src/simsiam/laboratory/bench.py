"""Speed compared with a standard implementation of the same work, in one process.

The variants of a case take turns, and a ratio is the median over rounds of two times measured right
after each other, so a machine that slows down slows both. Images are generated, so no case needs
data, and other libraries (kornia, lightly) take part where they are installed.
"""

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from math import isnan
from pathlib import Path
from statistics import median
from typing import TypedDict

import torch
from rich.console import Console
from rich.table import Table
from typing_extensions import NotRequired

from simsiam.errors import UsageError, unknown_name
from simsiam.laboratory.bench_cases import CASES, BenchContext, Case, Comparison, is_installed
from simsiam.laboratory.time_to_accuracy.race import NAME, time_to_accuracy
from simsiam.model.precision import Compute
from simsiam.runs.environment import collect_environment
from simsiam.utils import system
from simsiam.utils.files import write_text
from simsiam.utils.workers import CPU_CORES

ROUNDS = 5


class VariantResult(TypedDict):
    """The measurements of one variant; numbers have four digits."""

    seconds: float  # the median over rounds
    rate: float  # items per second
    ratio: float  # the standard variant's time over this one's, the median over rounds
    ratios: list[float]  # of all rounds, sorted
    peak_mib: float | None  # memory above the start; None if it is unknown


class Limit(TypedDict):
    """What arithmetic or memory limits a case to."""

    of: str  # what is counted
    machine: float  # what the machine reaches
    achieved: float  # what simsiam reaches


class CaseResult(TypedDict):
    """The measurements of a case."""

    what: str
    unit: str
    threads: int
    ways: dict[str, VariantResult]
    limit: NotRequired[Limit]


def bench(
    *,
    device: str = "auto",
    out: str | None = None,
    only: Sequence[str] = (),
    source: str = "cifar10",
    epochs: int = 12,
    seeds: int = 3,
) -> dict[str, object]:
    """Measure cases and print a table for each.

    Args:
        device: "auto", "cpu", "cuda", ...
        out: A JSON file for all measurements; None writes none.
        only: Names of CASES; by default all that are meant for the device. Or "time_to_accuracy",
            which takes hours: see `simsiam.laboratory.time_to_accuracy`.
        source: Images for "time_to_accuracy".
        epochs: Passes over them.
        seeds: Number of times that each contestant is trained there.

    Returns:
        The measurements, and the machine and versions that they were made with.

    Raises:
        UsageError: If a case is unknown or the file cannot be written.
    """
    for name in only:
        if name not in (*CASES, NAME):
            raise unknown_name("case", name, [*CASES, NAME])
    if NAME in only and len(only) > 1:
        raise UsageError(f"{NAME} takes hours: measure it alone, and the other cases without it")
    if out is not None and not Path(out).parent.is_dir():
        raise UsageError(f"{Path(out).parent} is not a folder: choose another --out")
    if NAME in only:
        return time_to_accuracy(source, out=out, epochs=epochs, seeds=seeds, device=device)
    compute = Compute.pick(device)
    console = Console(highlight=False)
    names = only or [n for n, c in CASES.items() if c.device in (None, compute.device.type)]
    results: dict[str, CaseResult] = {}
    for name in names:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder, torch_threads(case.threads):
            context = BenchContext(compute=compute, folder=Path(folder))
            results[name] = measure_case(case, case.prepare(context), compute.device)
        console.print(result_table(name, results[name]))
    report = collect_environment(compute)
    for key in ("command", "processes"):
        report.pop(key, None)
    report["cores"] = CPU_CORES
    report["peers"] = {
        name: importlib.metadata.version(name)
        for name in ("kornia", "lightly")
        if is_installed(name)
    }
    report |= {"rounds": ROUNDS, "cases": results}
    if out is not None:
        write_text(Path(out), json.dumps(report, indent=1) + "\n")
    return report


def measure_case(case: Case, comparison: Comparison, device: torch.device) -> CaseResult:
    """Time the variants of a case.

    Args:
        case: The case.
        comparison: Its variants.
        device: The device that they run on.

    Returns:
        The measurements of each variant, and the limit if the comparison has one.
    """
    seconds, peaks = time_interleaved(comparison.variants, device)
    standard, ways = next(iter(seconds.values())), dict[str, VariantResult]()
    for name, times in seconds.items():
        ratios = sorted(s / t for s, t in zip(standard, times, strict=True))
        unknown = any(map(isnan, peaks[name]))
        ways[name] = {
            "seconds": round_to_four_digits(median(times)),
            "rate": round_to_four_digits(comparison.num_items / median(times)),
            "ratio": round_to_four_digits(median(ratios)),
            "ratios": [round_to_four_digits(ratio) for ratio in ratios],
            "peak_mib": None if unknown else round_to_four_digits(max(peaks[name])),
        }
    result: CaseResult = {
        "what": case.description,
        "unit": case.unit,
        "threads": torch.get_num_threads(),
        "ways": ways,
    }
    fastest = min(median(times) for name, times in seconds.items() if name.startswith("simsiam"))
    if comparison.flops:
        result["limit"] = {
            "of": f"FLOP/s of a {comparison.precision} product",
            "machine": matmul_throughput(device, comparison.precision),
            "achieved": round_to_four_digits(comparison.flops / fastest),
        }
    elif comparison.bytes_moved:
        result["limit"] = {
            "of": "bytes/s of a copy",
            "machine": copy_bandwidth(device),
            "achieved": round_to_four_digits(comparison.bytes_moved / fastest),
        }
    return result


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Call functions in turns, and measure each call.

    Args:
        variants: The functions by name.
        device: The device that they run on.
        rounds: How often each is measured, after one round that warms up.

    Returns:
        Seconds of each call by name; and by how many MiB the memory peaked above its start, nan if
        the system does not report it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, function in variants.items():
            before = peak_memory_mib(device, reset=True)
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
            peaks[name].append(peak_memory_mib(device) - before)
    return {k: v[1:] for k, v in seconds.items()}, {k: v[1:] for k, v in peaks.items()}


def peak_memory_mib(device: torch.device, reset: bool = False) -> float:
    """Read the peak memory of this process, without its worker processes.

    Args:
        device: A GPU for its memory, the CPU for main memory.
        reset: Whether to set the peak to the current use first.

    Returns:
        MiB; nan if the system does not report it (on a CPU only Linux does).
    """
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    return system.peak_memory(reset=reset)


@cache
def matmul_throughput(device: torch.device, precision: str) -> float:
    """Measure the speed of a large matrix product.

    Args:
        device: The device.
        precision: "float32" or "bfloat16".

    Returns:
        FLOP/s.
    """
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds, _ = time_interleaved({"product": lambda: x @ x}, device)
    return round_to_four_digits(2 * n**3 / min(seconds["product"]))


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure the speed of a large copy.

    Args:
        device: The device.

    Returns:
        Bytes/s, read and written together.
    """
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    seconds, _ = time_interleaved({"copy": lambda: y.copy_(x)}, device)
    return round_to_four_digits(2 * x.nbytes / min(seconds["copy"]))


def round_to_four_digits(x: float) -> float:
    """Round to four significant digits; more would be noise.

    Args:
        x: A number.

    Returns:
        The rounded number.
    """
    return float(f"{x:.4g}")


@contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Limit torch to a number of threads.

    Args:
        num_threads: The number; None leaves it as it is.

    Yields:
        Nothing; the number is restored afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def result_table(name: str, result: CaseResult) -> Table:
    """Format a case in at most 80 columns.

    Args:
        name: The name of the case.
        result: What `measure_case` returns.

    Returns:
        The table.
    """
    table = Table(title=f"{name}: {result['what']}", title_justify="left", width=80)
    if limit := result.get("limit"):
        share = f"{limit['achieved'] / limit['machine']:.0%}"
        maximum = f"{limit['machine']:.2g} {limit['of']}"
        table.caption = f"simsiam reaches {share} of the machine's {maximum}"
        table.caption_justify = "left"
    table.add_column(f"threads: {result['threads']}")
    for heading in ("seconds", result["unit"], "ratio", "MiB more"):
        table.add_column(heading, justify="right")
    for variant, numbers in result["ways"].items():
        rate, peak = numbers["rate"], numbers["peak_mib"]
        table.add_row(
            variant,
            f"{numbers['seconds']:.3g}",
            f"{rate:,.0f}" if rate >= 100 else f"{rate:,.2f}",
            f"{numbers['ratio']:.2f}",
            "" if peak is None else f"{peak:.0f}",
        )
    return table
