"""simsiam convert: other people's checkpoint in, a run folder out, on which every verb works."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simsiam.config.recipes import Recipe
from simsiam.errors import UsageError
from simsiam.model.precision import Compute
from simsiam.runs.encoder import load
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.foreign_checkpoints import ConvertedCheckpoint, convert_state_dict
from simsiam.runs.published_weights import IMAGENET_PREPROCESSING, resolve_checkpoint
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.run_folder import Run, check_vacant
from simsiam.runs.weight_files import file_sha256, read_state_dict
from simsiam.utils.files import atomic_folder

METRIC_NAMES = ("loss", "lr", "z_std", "z_std_sqrt_d", "z_rank", "images_per_second")


def convert(
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    backbone: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """A run folder from a checkpoint file or a published name; returns its path.

    `backbone` names a network that is no ResNet. What a checkpoint does not say of its images is taken to be ImageNet's
    (32 px behind a small stem) unless given. converted.json tells what became of each tensor. Raises UsageError for a
    checkpoint that does not fit as a whole, WorkFailed where a published one cannot be fetched.
    """
    check_vacant(out)
    path, release = resolve_checkpoint(checkpoint)
    tensors, aside = read_state_dict(path)
    known = dict(release.settings) if release else sibling_recipe_settings(path)
    try:
        found = convert_state_dict(tensors, backbone or known.get("backbone"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    given = {
        k: v
        for k, v in {"image_size": image_size, "mean": mean, "std": std}.items()
        if v is not None
    }
    assumed = IMAGENET_PREPROCESSING | (
        {"image_size": 32} if found.settings["stem"] == "small" else {}
    )
    assumed = {k: v for k, v in assumed.items() if k not in known | given}
    recipe = Recipe(method=found.method, source=("unknown",)).replace(
        **known | found.settings | assumed | given
    ).resolve()

    with atomic_folder(Path(out)) as part:
        run = Run.create(part, recipe)
        here = collect_environment(Compute(torch.device("cpu"), "float32"))
        run.write("environment.json", here | {"seed": recipe.seed, "start": utc_now(), "end": None})
        run.write("converted.json", {
            "checkpoint": str(checkpoint) if release else str(path.resolve()),
            "url": release.url if release else None,
            "sha256": file_sha256(path),
            "layout": found.layout.program,
            "placed": len(tensors) - len(found.unused_keys),
            "absorbed": found.absorbed_biases,
            "left_over": found.unused_keys,
            "set_aside": aside,
            "notes": ([release.note] if release else []) + conversion_notes(found, assumed),
        })  # fmt: skip
        # No step was taken here and nothing measured.
        run.write(
            "metrics.jsonl",
            json.dumps({"step": 0, "epoch": 0.0, **dict.fromkeys(METRIC_NAMES)}) + "\n",
        )
        fresh: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "knn": {},
            "images": 0,
            "environment": here,
        }
        run.save("last", fresh | {"model": found.model_state})
        parts = {
            k.removeprefix("backbone."): v
            for k, v in found.model_state.items()
            if k.startswith("backbone.")
        }
        remedy = "Converted, not trained here: `simsiam evaluate` with labeled images says what it is worth."
        summary = {"verdict": "too early", "remedy": remedy, "steps": 0, "epochs": 0.0}
        run.finish(
            parts, summary | {"images_per_second": 0.0, "training_seconds": 0.0, "unreadable": 0}
        )
        load(part)  # the proof
    return Path(out)


def sibling_recipe_settings(path: Path) -> dict[str, Any]:
    """What the recipe in a run folder says of the backbone there; {} of a file that lies elsewhere."""
    if path.name != "backbone.safetensors" or not path.with_name("recipe.yaml").is_file():
        return {}
    recipe = read_recipe(path.with_name("recipe.yaml"))
    return {
        name: getattr(recipe, name)
        for name in ("backbone", "image_size", "mean", "std", "channels")
    }


def conversion_notes(converted: ConvertedCheckpoint, assumed: dict[str, Any]) -> list[str]:
    """What the tensors do not say, and what was taken for it."""
    said = []
    if assumed:
        said.append(
            "taken, for want of a flag: " + ", ".join(f"{k} {v}" for k, v in assumed.items())
        )
    if converted.settings["stem"] == "small":
        said.append("the 3x3 stem is taken to be appendix D's: stride 1, padding 1, no pooling")
        if converted.layout.program == "solo-learn":
            said.append(
                "solo-learn pads this stem by 2 on CIFAR, so features differ from those it had there"
            )
    if converted.layout.method == "moco_v2":
        said.append(
            "the query encoder alone: without key encoder and queue MoCo's training cannot go on"
        )
    if not converted.layout.heads:
        said.append("a backbone alone: there is no z")
    return said


def format_conversion(run: Path) -> str:
    """converted.json in lines to print."""
    said, recipe = Run(run).json("converted.json"), Run(run).recipe
    method, stem = recipe.method, f", {recipe.stem} stem" if recipe.stem else ""
    heads = (
        f"projector of {method.proj_layers} layers, d = {method.dim}; predictor: {method.predictor}"
    )
    lines = {
        "layout": said["layout"],
        "backbone": f"{recipe.backbone}, width {recipe.width}{stem}",
        "heads": "none" if method.name == "none" else heads,
        "placed": f"{said['placed']} tensors, {len(said['absorbed'])} of them biases that batch norms took in",
        "left over": format_name_groups(said["left_over"]) or "none",
        "set aside": ", ".join(said["set_aside"]) or "nothing",
        **{f"note {i}": note for i, note in enumerate(said["notes"], 1)},
        "sha256": said["sha256"],
        "run": str(run),
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def format_name_groups(names: Sequence[str]) -> str:
    """Names, those of one part counted: "encoder_k.* (318), queue"."""
    count = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part}.* ({n})" if n > 1 else part for part, n in count.items())
