"""The verb `convert`: make a run folder, which every verb can use, from another checkpoint."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from simsiam.config.methods import METHODS
from simsiam.config.recipes import UNKNOWN_SOURCE, Recipe, ResolvedRecipe
from simsiam.errors import UsageError, printable, truncate
from simsiam.model.backbones import TIMM_PREFIX, timm_config
from simsiam.model.precision import Compute
from simsiam.runs.checkpoints.foreign_checkpoints import (
    BackboneSettings,
    ConvertedCheckpoint,
    convert_state_dict,
    fit_backbone,
)
from simsiam.runs.checkpoints.own_files import convert_own_checkpoint, own_recipe, own_settings
from simsiam.runs.checkpoints.published_weights import (
    HUB_PREFIX,
    IMAGENET_PREPROCESSING,
    Release,
    card_license,
    resolve_checkpoint,
)
from simsiam.runs.checkpoints.timm_weights import load_named_weights, timm_preprocessing
from simsiam.runs.encoder import build_backbone, load
from simsiam.runs.environment import collect_environment
from simsiam.runs.records import Record
from simsiam.runs.run_folder import (
    BACKBONE_FILE,
    HEAD_FILE,
    ORIGIN_FILE,
    Run,
    TrainingFolder,
    check_vacant,
    write_untrained,
)
from simsiam.runs.weight_files import read_weight_file, tensors_sha256
from simsiam.utils.checksums import file_sha256
from simsiam.utils.files import atomic_folder, atomic_write
from simsiam.utils.read_files import open_regular

NO_HEADS = "only a backbone: there is no z"  # a note in converted.json


class Conversion(NamedTuple):
    """A checkpoint as the content of a run folder.

    Attributes:
        recipe: The recipe.
        state: The state dict of the model.
        report: The content of converted.json.
        origin: The content of origin.json.
        head: The file of the head that belongs to the backbone; None if there is none.
    """

    recipe: ResolvedRecipe
    state: Mapping[str, Tensor]
    report: Record
    origin: Record
    head: Path | None = None


def convert(
    checkpoint: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    backbone: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Path:
    """Make a run folder from a checkpoint or from published weights.

    What the checkpoint does not say about its images is assumed to be as on ImageNet (with 32 px
    for a small stem). converted.json in the run folder lists what became of each tensor, and
    origin.json where the weights come from.

    Args:
        checkpoint: A file, a run folder, or a published name.
        out: The run folder to make; it must not exist.
        backbone: The name of the network; needed for a file if it is no ResNet.
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
    given = {"image_size": image_size, "mean": mean, "std": std}
    options: Record = {name: value for name, value in given.items() if value is not None}
    if image_size is not None:
        options["eval_resize"] = None  # that of the weights is for their size
    made = _from_named_weights(os.fspath(checkpoint), options)
    made = made or _from_file(checkpoint, backbone, options)
    with atomic_folder(Path(out)) as part:
        write_run(part, made)
        load(part)  # fails if the run folder cannot be used
    return Path(out)


def _from_named_weights(name: str, options: Record) -> Conversion | None:
    """Convert the weights of a name for which there is a network of timm."""
    weights = load_named_weights(name)
    if weights is None:
        return None
    method = replace(METHODS["simsiam"], name="none")
    try:
        recipe = Recipe(method=method, source=UNKNOWN_SOURCE).replace(**weights.settings | options)
        complete = recipe.resolve()
        with torch.device("meta"):
            expected = build_backbone(complete).state_dict()
        network, size = complete.backbone, complete.image_size
        tensors, notes = fit_backbone(network, weights.state, expected, size, complete.channels)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    digest = tensors_sha256(weights.state)
    report = {
        "checkpoint": name,
        "url": None,
        "sha256": digest,
        "layout": "timm",
        "parts": ["backbone"],
        "placed": len(weights.state),
        "absorbed": [],
        "left_over": weights.left_over,
        "set_aside": [],
        "assumed": [],
        "notes": [*weights.notes, *notes, NO_HEADS],
    }
    origin = {
        "weights": name,
        "origin": weights.origin,
        "license": weights.license,
        "sha256": digest,
    }
    state = {f"backbone.{key}": tensor for key, tensor in tensors.items()}
    return Conversion(complete, state, report, origin)


def _from_file(
    checkpoint: str | os.PathLike[str], backbone: str | None, options: Record
) -> Conversion:
    """Convert a file, that of a release, or that of a run folder."""
    path, release = resolve_checkpoint(checkpoint)
    content = read_weight_file(path)
    try:
        known: Record = dict(release.settings) if release else own_settings(path, content)
        network = backbone or known.get("backbone")
        size, own = options.get("image_size"), own_recipe(content)
        if own is not None:
            converted = convert_own_checkpoint(content, own, size)
        else:
            size, channels = (known | options).get("image_size"), known.get("channels")
            converted = convert_state_dict(
                content.tensors, network, image_size=size, channels=channels
            )
        if network not in (None, converted.settings["backbone"]):
            raise UsageError(f"its backbone is {converted.settings['backbone']}, not {network}")
        stated = known | converted.settings | {"channels": converted.channels} | options
        if converted.image_size is not None:
            stated["image_size"] = converted.image_size
        assumed = assumed_preprocessing(converted.settings, stated)
        recipe = Recipe(method=converted.method, source=UNKNOWN_SOURCE).replace(**stated | assumed)
    except UsageError as error:
        types = ", ".join(content.wrong_types)
        aside = f"; set aside because of their types: {printable(truncate(types))}" if types else ""
        raise UsageError(f"{path}: {error}{aside}") from None
    digest = file_sha256(path)
    notes = conversion_notes(converted, assumed, release, own=bool(known) and not release)
    if content.not_loaded:
        notes.append(f"objects of other programs, not loaded: {', '.join(content.not_loaded)}")
    report = {
        "checkpoint": str(checkpoint) if release else str(path.resolve()),
        "url": release.url if release else None,
        "sha256": digest,
        "layout": converted.layout.program,
        "parts": ["backbone", *converted.layout.heads],
        "placed": len(content.tensors) - len(converted.unused_keys),
        "absorbed": converted.absorbed_biases,
        "left_over": converted.unused_keys,
        "set_aside": content.set_aside,
        "assumed": list(assumed),
        "notes": notes,
    }
    origin = describe_origin(checkpoint, path, release) | {"sha256": digest}
    head = path.with_name(HEAD_FILE)
    has_head = path.name == BACKBONE_FILE and head.is_file()
    return Conversion(
        recipe.resolve(), converted.model_state, report, origin, head if has_head else None
    )


def describe_origin(
    checkpoint: str | os.PathLike[str], path: Path, release: Release | None
) -> Record:
    """Say where the weights of a file come from, and under which license.

    Args:
        checkpoint: What the user named.
        path: The file.
        release: The published weights, if it is from there.

    Returns:
        The content of origin.json, without the digest. Of paths, only the last part.
    """
    name = os.fspath(checkpoint)
    if release:
        return {"weights": name, "origin": release.url, "license": release.license}
    origin = Path(name).name
    if name.startswith(HUB_PREFIX):
        origin = name
    before, license = path.with_name(ORIGIN_FILE), card_license(path.parent)
    if path.name == BACKBONE_FILE and before.is_file():
        earlier = TrainingFolder(path.parent).json(ORIGIN_FILE)
        origin += f", from {earlier.get('origin')}"
        license = license or earlier.get("license")
    return {"weights": origin, "origin": origin, "license": license or "unknown"}


def assumed_preprocessing(
    settings: BackboneSettings, stated: Mapping[str, object]
) -> dict[str, object]:
    """Choose the preprocessing of weights that do not say theirs.

    Args:
        settings: The settings of the backbone.
        stated: The settings that are known.

    Returns:
        What is not known: timm's for a network of timm, else ImageNet's, with 32 px for a small
        stem.

    Raises:
        UsageError: Neither is known for this number of channels.
    """
    values = IMAGENET_PREPROCESSING | ({"image_size": 32} if settings["stem"] == "small" else {})
    if settings["backbone"].startswith(TIMM_PREFIX):
        values = timm_preprocessing(timm_config(settings["backbone"]).to_dict())[0]
    if stated["channels"] != 3 and not {"mean", "std"} <= stated.keys():
        raise UsageError(
            f"nothing says the mean and standard deviation of its {stated['channels']} channels: "
            "`simsiam convert` takes them as --mean and --std"
        )
    if stated.get("image_size", values["image_size"]) != values["image_size"]:
        values = values | {"eval_resize": None}  # that of another size
    return {name: value for name, value in values.items() if name not in stated}


def write_run(folder: Path, made: Conversion) -> None:
    """Write the files of a run that was not trained here.

    Args:
        folder: The run folder.
        made: Its content.
    """
    run = Run.create(folder, made.recipe)
    run.write("converted.json", made.report)
    run.write(ORIGIN_FILE, made.origin)
    summary = {
        "verdict": "too early",
        "remedy": "Converted, not trained here: use `simsiam evaluate` with labeled images to "
        "measure it.",
        "epochs": 0.0,
        "training_seconds": 0.0,
        "unreadable": 0,
    }
    env = collect_environment(Compute(torch.device("cpu"), "float32"))
    write_untrained(run, made.state, env, summary)
    if made.head is not None:
        with atomic_write(run.path / HEAD_FILE) as part, open_regular(made.head) as head:
            part.write_bytes(head.read())


def conversion_notes(
    converted: ConvertedCheckpoint,
    assumed: Mapping[str, object],
    release: Release | None = None,
    *,
    own: bool = False,
) -> list[str]:
    """List what the tensors do not say, and what was assumed instead.

    Args:
        converted: The converted checkpoint.
        assumed: Settings that were assumed, by name.
        release: The published weights, if it is from there.
        own: Whether this program wrote the file.

    Returns:
        Lines for converted.json.
    """
    notes = [*([release.note] if release else []), *converted.notes]
    if assumed:
        values = ", ".join(f"{name} {value}" for name, value in assumed.items())
        notes.append(f"assumed, because no flag says otherwise: {values}")
    if converted.settings["stem"] == "small" and not own:
        notes.append("the 3x3 stem is assumed to be appendix D's: stride 1, padding 1, no pooling")
        if converted.layout.program.startswith("solo-learn"):
            notes.append(
                "solo-learn pads this stem by 2 on CIFAR, so features differ from those there"
            )
    if converted.layout.method == "moco_v2":
        notes.append(
            "only the query encoder: without key encoder and queue, MoCo's training cannot continue"
        )
    if not converted.layout.heads:
        notes.append(NO_HEADS)
    return notes


def format_conversion(run: Path) -> str:
    """Format converted.json as lines to print.

    Args:
        run: The run folder.
    """
    folder = Run(run)
    report, origin, recipe = folder.json("converted.json"), folder.json(ORIGIN_FILE), folder.recipe
    method, stem = recipe.method, f", {recipe.stem} stem" if recipe.stem else ""
    heads = (
        f"projector of {method.proj_layers} layers, d = {method.dim}; predictor: {method.predictor}"
    )
    lines = {
        "layout": report["layout"],
        "backbone": f"{recipe.backbone}, width {recipe.width}{stem}",
        "heads": heads if "projector" in report["parts"] else "none",
        "placed": f"{report['placed']} tensors, of which {len(report['absorbed'])} are biases that "
        "were absorbed into batch norms",
        "left over": format_name_groups(report["left_over"]) or "none",
        "set aside": ", ".join(report["set_aside"]) or "nothing",
        **{f"note {i}": note for i, note in enumerate(report["notes"], 1)},
        "sha256": report["sha256"],
        "origin": f"{origin.get('origin')}; license: {origin.get('license')}",
        "run": str(run),
    }
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def format_unused(run: Path) -> list[str]:
    """Say what was left over of weights, and what was assumed about them.

    Args:
        run: The run folder.

    Returns:
        Lines.
    """
    report = Run(run).json("converted.json")
    left_over = [f"tensors that are not used: {format_name_groups(report['left_over'])}"]
    notes = [note for note in report["notes"] if note != NO_HEADS]
    return [*(left_over if report["left_over"] else []), *notes]


def format_name_groups(names: Sequence[str]) -> str:
    """Format names of tensors, with the names of one module counted.

    Args:
        names: The names.

    Returns:
        For example "encoder_k.* (318), queue".
    """
    count = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part}.* ({n})" if n > 1 else part for part, n in count.items())
