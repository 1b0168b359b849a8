"""Measure a training step on a GPU, with one change after the other.

    python benchmarks/gpu_step.py

Writes results/gpu_step.json, with the share of a compiled step's time on the device that
convolutions take, measured by torch's profiler.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from simsiam.config.recipes import Recipe, cifar_recipe
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.laboratory.bench_cases import MEAN, STD
from simsiam.model.precision import Compute, pick_device
from simsiam.runs.environment import collect_environment
from simsiam.training.prepare import build_training_setup
from simsiam.training.step import GradientStep, build_gradient_step
from simsiam.utils.files import write_text

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu_step.json"
STEPS = 40
VARIANTS: dict[str, dict[str, bool]] = {
    "eager": {"graph": False},
    "graph": {},
    "graph, benchmark": {"benchmark": True},
    "compiled": {"compile": True},
    "compiled, benchmark": {"compile": True, "benchmark": True},
    "compiled, deterministic": {"compile": True, "deterministic": True},
    "graph, deterministic": {"deterministic": True},
}


def main() -> None:
    images = from_arrays(
        "train", np.random.default_rng(0).integers(0, 256, (50_000, 3, 32, 32), dtype=np.uint8)
    )
    device, variants, share = pick_device("cuda"), dict[str, Any](), 0.0

    def variant(
        *,
        graph: bool = True,
        compile: bool = False,
        benchmark: bool = False,
        deterministic: bool = False,
    ):
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = (
            benchmark,
            deterministic,
        )
        recipe = (
            Recipe()
            .replace(
                **cifar_recipe() | {"mean": MEAN, "std": STD, "device": "cuda", "compile": compile}
            )
            .resolve()
        )
        model, optimizer, _ = setup = build_training_setup(recipe)
        torch.backends.cudnn.deterministic = deterministic  # as in every run
        gradients = build_gradient_step(recipe, setup)
        if not graph:
            gradients.warmup_calls_left = -1

        def steps(start: int, stop: int) -> Iterator[None]:
            for batch in iter_batches(images, recipe, start, stop, device):
                model.after_step(
                    gradients(batch.views, batch.index.to(device)), batch.step, batch.index
                )
                optimizer.step()
                yield

        def alone(count: int) -> Iterator[None]:
            batch = next(iter_batches(images, recipe, 0, 1, device))
            for _ in range(count):
                gradients(batch.views, batch.index.to(device))
                optimizer.step()
                yield

        seconds(steps(0, 8))
        full = seconds(steps(8, 8 + STEPS)) / STEPS
        rates = {"images_s": round(recipe.batch_size / full), "step_ms": ms(full)}
        rates["step_alone_ms"] = ms(seconds(alone(STEPS)) / STEPS)
        rates["views_alone_ms"] = ms(
            seconds(iter_batches(images, recipe, 0, STEPS, device)) / STEPS
        )
        return rates, gradients

    for name, options in VARIANTS.items():
        variants[name], gradients = variant(**options)
        print(name, variants[name])
        if name == "compiled":
            share = convolutions(gradients)
    environment = {
        k: v for k, v in collect_environment(Compute(device, "bfloat16")).items() if k != "command"
    }
    description = "a step of SimSiam: ResNet-18 for 32 px, d = 2048, batch 512, bfloat16"
    report = {
        "what": description,
        "steps": STEPS,
        "environment": environment,
        "variants": variants,
        "convolutions": round(share, 2),
    }
    write_text(RESULT, json.dumps(report, indent=1) + "\n")


def seconds(work: Iterator[Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in work:
        pass
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ms(duration: float) -> float:
    return round(1e3 * duration, 2)


def convolutions(gradients: GradientStep) -> float:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        gradients.compute_gradients(*gradients.static_inputs, 1.0)
        torch.cuda.synchronize()
    events = profiler.key_averages()
    convolution_time = sum(
        e.self_device_time_total
        for e in events
        if e.key.startswith(("aten::cudnn_conv", "aten::convolution_b"))
    )
    return convolution_time / sum(
        e.self_device_time_total for e in events if e.key.startswith(("aten::", "triton"))
    )


if __name__ == "__main__":
    main()
