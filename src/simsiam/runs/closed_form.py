"""Encoders in closed form as run folders: patches and maps, which no step has trained."""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path

import torch

from simsiam.config.recipes import Recipe, ResolvedRecipe
from simsiam.data.transform import Transform
from simsiam.distributed.process_group import rank_zero_only
from simsiam.model.patches import Patches
from simsiam.model.precision import Compute
from simsiam.monitoring.candidates import (
    Candidate,
    best_patches,
    build_encoder,
    sample_for_patches,
)
from simsiam.runs.environment import collect_environment
from simsiam.runs.run_folder import Run, write_untrained
from simsiam.sources.file_index import source_stamps, update_with_stamps
from simsiam.sources.open_source import Source, absolute_sources, open_source, source_names
from simsiam.utils.files import atomic_folder, cache_dir, file_lock

# results/six_sets: it was better on all six sets.
NETWORK_BESIDE = (
    "Beside a network of your own these patches are often better: `simsiam pretrain SOURCE "
    "--minutes 20 --out RUN`, then `simsiam adapt SOURCE --init RUN`."
)
MEASURED = ("score", "view_retrieval", "knn_top1")  # columns of the table that summary.json repeats


def write_encoder(
    path: Path,
    recipe: ResolvedRecipe,
    candidate: Candidate,
    rows: Sequence[Mapping[str, object]],
    skipped: Sequence[tuple[str, str]],
) -> None:
    """Write a run folder that holds a candidate and the table of what was tried.

    Args:
        path: The run folder; it must not exist.
        recipe: The recipe of the images: source, channels, and the input that the backbone takes.
        candidate: The candidate.
        rows: The table, for adapt.json.
        skipped: Key and reason of each image that cannot be read.
    """
    name, encoder, patches = build_encoder(candidate)
    first = next(row for row in rows if row["taken"])
    last = next(row for row in reversed(rows) if row["taken"])
    advice = NETWORK_BESIDE if isinstance(encoder.backbone, Patches) else ""
    if candidate.heads == (None,):  # only the network to start from has none
        advice = f"Unchanged is best: nothing that was tried is better than {candidate.name}."
    start, end = ({k: v for k, v in row.items() if k in MEASURED} for row in (first, last))
    changes: dict[str, object] = {"backbone": name}
    if isinstance(encoder.backbone, Patches):  # they have neither, the network to start from may
        changes |= {"width": Recipe.width, "stem": None}
    with atomic_folder(path) as part:
        run = Run.create(part, recipe.replace(**changes))
        run.write("adapt.json", {"chosen": candidate.name, "candidates": list(rows)})
        run.quarantine(skipped)
        state = encoder.backbone.state_dict()
        write_untrained(
            run,
            {f"backbone.{name}": tensor for name, tensor in state.items()},
            collect_environment(Compute(torch.device("cpu"), "float32")),
            {
                "verdict": "healthy",
                "remedy": f"The best of {len(rows)} encoders is {candidate.name}.",
                "start": start,
                "end": end,
                "advice": advice,
            },
        )
        if encoder.head_state():
            run.write_head(encoder, patches=patches)


@rank_zero_only
def fit_patches_run(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    channels: int = 3,
    *,
    splits: Sequence[str] | None = None,
    out: Path | None = None,
) -> Path:
    """Learn patches with their map from a source's own images, and write them to a run folder.

    Args:
        source: The source; labels are not used.
        channels: Channels of the images.
        splits: Which folder or shard is which split; see `open_source`.
        out: A new folder. By default it is in the cache, and reused while no image has changed.

    Returns:
        The run folder.

    Raises:
        UsageError: There are too few images.
    """
    names = source_names(source)
    opened = open_source(names, channels, no_labels=True, splits=splits)
    path = out or cache_dir("patches") / _source_digest(names, opened, channels)
    lock = path.with_name(f".{path.name}.lock")  # runs that start together learn them once
    with nullcontext() if out else file_lock(lock, wait=True):
        if not path.exists():
            sample, transform = sample_for_patches(opened.train)
            best, rows = best_patches(sample, transform, label="learning patches")
            recipe = encoder_recipe(names, channels, transform)
            write_encoder(path, recipe, best, rows, sample.skipped)
    return path


def _source_digest(names: Sequence[str | os.PathLike[str]], source: Source, channels: int) -> str:
    """Digest what changes if an image of a source does: places, names, sizes and times."""
    places = absolute_sources(names)
    splits = list(source.splits.values())
    containers, stamps = source_stamps(places, splits)
    identity = (places, containers, channels, [len(images) for images in splits])
    digest = blake2b(repr(identity).encode(), digest_size=8)
    update_with_stamps(digest, stamps)
    return digest.hexdigest()


def encoder_recipe(
    source: Sequence[str | os.PathLike[str]], channels: int, transform: Transform
) -> ResolvedRecipe:
    """Make the recipe of an encoder that no step has trained.

    Args:
        source: The names of the source.
        channels: Channels of the images.
        transform: The preprocessing of the backbone.
    """
    return (
        Recipe()
        .replace(
            source=absolute_sources(source),
            channels=channels,
            image_size=transform.size,
            mean=transform.mean,
            std=transform.std,
        )
        .resolve()
    )
