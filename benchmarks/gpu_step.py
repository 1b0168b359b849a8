"""A step on a GPU, one change after the other: python benchmarks/gpu_step.py writes results/gpu_step.json.

Also the share of a compiled step's time on the device that convolutions take, by torch's profiler.
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
from simsiam.laboratory.bench import MEAN, STD
from simsiam.model.precision import pick_device
from simsiam.runs.environment import collect_environment
from simsiam.training.prepare import build_training_setup
from simsiam.training.step import GradientStep, build_gradient_step
from simsiam.utils.files import atomic_write

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
        recipe = Recipe().replace(
            **cifar_recipe() | {"mean": MEAN, "std": STD, "device": "cuda", "compile": compile}
        )
        model, optimizer, _, _ = parts = build_training_setup(recipe)
        torch.backends.cudnn.deterministic = deterministic  # which a run always is
        gradients = build_gradient_step(recipe, parts)
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
        told = {"images_s": round(recipe.batch_size / full), "step_ms": ms(full)}
        told["step_alone_ms"] = ms(seconds(alone(STEPS)) / STEPS)
        told["views_alone_ms"] = ms(seconds(iter_batches(images, recipe, 0, STEPS, device)) / STEPS)
        return told, gradients

    for name, words in VARIANTS.items():
        variants[name], gradients = variant(**words)
        print(name, variants[name])
        if name == "compiled":
            share = convolutions(gradients)
    here = {k: v for k, v in collect_environment(device, "bfloat16").items() if k != "command"}
    what = "a step of SimSiam: ResNet-18 for 32 px, d = 2048, batch 512, bfloat16"
    report = {
        "what": what,
        "steps": STEPS,
        "environment": here,
        "variants": variants,
        "convolutions": round(share, 2),
    }
    with atomic_write(RESULT) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")


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
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        gradients.compute_gradients(*gradients.static_inputs, 1.0)
        torch.cuda.synchronize()
    events = seen.key_averages()
    mine = sum(
        e.self_device_time_total
        for e in events
        if e.key.startswith(("aten::cudnn_conv", "aten::convolution_b"))
    )
    return mine / sum(
        e.self_device_time_total for e in events if e.key.startswith(("aten::", "triton"))
    )


if __name__ == "__main__":
    main()
