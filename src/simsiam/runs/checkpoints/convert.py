"""The verb `convert`: make a run folder, which every verb can use, from another checkpoint."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.errors import UsageError
from simsiam.model.precision import Compute
from simsiam.runs.checkpoints.foreign_checkpoints import ConvertedCheckpoint, convert_state_dict
from simsiam.runs.checkpoints.published_weights import (
    IMAGENET_PREPROCESSING,
    Release,
    resolve_checkpoint,
)
from simsiam.runs.encoder import load
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.records import Record
from simsiam.runs.run_folder import Run, check_vacant, new_state
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
    """Make a run folder from a checkpoint.

    What the checkpoint does not say about its images is assumed to be as on ImageNet (with 32 px
    for a small stem). converted.json in the run folder lists what became of each tensor.

    Args:
        checkpoint: A file, a run folder, or a published name.
        out: The run folder to make; it must not exist.
        backbone: The name of the network; needed if it is no ResNet.
        image_size: Side of the network's input images in pixels.
        mean: Mean of each channel of the input images, in 0..1.
        std: Standard deviation of each channel, in 0..1.

    Returns:
        The path of the run folder.

    Raises:
        UsageError: A tensor of the checkpoint is missing, extra, or of the wrong shape.
        WorkFailed: A download failed.
    """
    check_vacant(out)
    path, release = resolve_checkpoint(checkpoint)
    tensors, set_aside = read_state_dict(path)
    known = dict(release.settings) if release else sibling_recipe_settings(path)
    network = backbone or known.get("backbone")
    try:
        converted = convert_state_dict(tensors, str(network) if network else None)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    options = {"image_size": image_size, "mean": mean, "std": std}
    options = {name: value for name, value in options.items() if value is not None}
    default_size = {"image_size": 32} if converted.settings["stem"] == "small" else {}
    assumed = {
        name: value
        for name, value in (IMAGENET_PREPROCESSING | default_size).items()
        if name not in known | options
    }
    recipe = Recipe(method=converted.method, source=("unknown",)).replace(
        **known | converted.settings | assumed | options
    )
    resolved = recipe.resolve()
    with atomic_folder(Path(out)) as part:
        report = {
            "checkpoint": str(checkpoint) if release else str(path.resolve()),
            "url": release.url if release else None,
            "sha256": file_sha256(path),
            "layout": converted.layout.program,
            "placed": len(tensors) - len(converted.unused_keys),
            "absorbed": converted.absorbed_biases,
            "left_over": converted.unused_keys,
            "set_aside": set_aside,
            "notes": conversion_notes(converted, assumed, release),
        }
        write_run(part, resolved, converted, report)
        load(part)  # fails if the run folder cannot be used
    return Path(out)


def write_run(
    folder: Path, recipe: ResolvedRecipe, converted: ConvertedCheckpoint, report: Record
) -> None:
    """Write the files of a run that was not trained here.

    Args:
        folder: The run folder.
        recipe: Its recipe.
        converted: The converted checkpoint.
        report: The content of converted.json.
    """
    run = Run.create(folder, recipe)
    env = collect_environment(Compute(torch.device("cpu"), "float32"))
    run.write("environment.json", env | {"seed": recipe.seed, "start": utc_now(), "end": None})
    run.write("converted.json", report)
    # No step was taken here, and nothing was measured.
    metrics = {"step": 0, "epoch": 0.0, **dict.fromkeys(METRIC_NAMES)}
    run.write("metrics.jsonl", json.dumps(metrics) + "\n")
    state = converted.model_state
    run.save("last", {**new_state(env, num_images=0), "model": state})
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    summary = {
        "verdict": "too early",
        "remedy": "Converted, not trained here: use `simsiam evaluate` with labeled images to "
        "measure it.",
        "steps": 0,
        "epochs": 0.0,
        "images_per_second": 0.0,
        "training_seconds": 0.0,
        "unreadable": 0,
    }
    run.finish(backbone, summary)


def sibling_recipe_settings(path: Path) -> Record:
    """Read the settings of the backbone from the recipe next to it.

    Args:
        path: A file of weights.

    Returns:
        The settings if the file is the backbone of a run folder, else {}.

    Raises:
        UsageError: The recipe is wrong.
    """
    recipe_path = path.with_name("recipe.yaml")
    if path.name != "backbone.safetensors" or not recipe_path.is_file():
        return {}
    recipe = read_recipe(recipe_path)
    names = ("backbone", "image_size", "mean", "std", "channels")
    return {name: getattr(recipe, name) for name in names}


def conversion_notes(
    converted: ConvertedCheckpoint, assumed: Mapping[str, object], release: Release | None = None
) -> list[str]:
    """List what the tensors do not say, and what was assumed instead.

    Args:
        converted: The converted checkpoint.
        assumed: Settings that were assumed, by name.
        release: The published weights, if it is from there.

    Returns:
        Lines for converted.json.
    """
    notes = [release.note] if release else []
    if assumed:
        values = ", ".join(f"{name} {value}" for name, value in assumed.items())
        notes.append(f"assumed, because no flag says otherwise: {values}")
    if converted.settings["stem"] == "small":
        notes.append("the 3x3 stem is assumed to be appendix D's: stride 1, padding 1, no pooling")
        if converted.layout.program == "solo-learn":
            notes.append(
                "solo-learn pads this stem by 2 on CIFAR, so features differ from those there"
            )
    if converted.layout.method == "moco_v2":
        notes.append(
            "only the query encoder: without key encoder and queue, MoCo's training cannot continue"
        )
    if not converted.layout.heads:
        notes.append("only a backbone: there is no z")
    return notes


def format_conversion(run: Path) -> str:
    """Format converted.json as lines to print.

    Args:
        run: The run folder.
    """
    report, recipe = Run(run).json("converted.json"), Run(run).recipe
    method, stem = recipe.method, f", {recipe.stem} stem" if recipe.stem else ""
    heads = (
        f"projector of {method.proj_layers} layers, d = {method.dim}; predictor: {method.predictor}"
    )
    lines = {
        "layout": report["layout"],
        "backbone": f"{recipe.backbone}, width {recipe.width}{stem}",
        "heads": "none" if method.name == "none" else heads,
        "placed": f"{report['placed']} tensors, of which {len(report['absorbed'])} are biases that "
        "were absorbed into batch norms",
        "left over": format_name_groups(report["left_over"]) or "none",
        "set aside": ", ".join(report["set_aside"]) or "nothing",
        **{f"note {i}": note for i, note in enumerate(report["notes"], 1)},
        "sha256": report["sha256"],
        "run": str(run),
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def format_name_groups(names: Sequence[str]) -> str:
    """Format names of tensors, with the names of one module counted.

    Args:
        names: The names.

    Returns:
        For example "encoder_k.* (318), queue".
    """
    count = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part}.* ({n})" if n > 1 else part for part, n in count.items())
