"""The verb `adapt`: the best features for a source's images, in steps that each have to be better.

Encoders in closed form are compared first: published weights unchanged, centered and with the map
of view noise; patches at several sizes; both side by side. Where there is time left, SimSiam trains
on top of the best one. Whatever is tried, images that nothing was fitted on decide, without labels
(`simsiam.monitoring.candidates`); "unchanged is best" is a normal result. Only a network that this
program has trained from random weights is put beside patches by rule: they cannot be compared so.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from torch import nn

from simsiam.config.recipes import Recipe
from simsiam.data.images import sample
from simsiam.data.transform import Transform
from simsiam.distributed.process_group import world_size
from simsiam.errors import Stopped, UsageError
from simsiam.model.patches import Patches
from simsiam.model.precision import Compute
from simsiam.monitoring.candidates import (
    MARGIN,
    PATCH_WEIGHTS,
    Branch,
    Candidate,
    Sample,
    backbone_candidates,
    beside_patches,
    choose,
    join_candidates,
    learn_patches,
    measure,
    patch_candidates,
    read_sample,
    sample_for_patches,
)
from simsiam.monitoring.worth import goes_beside_patches
from simsiam.runs.closed_form import encoder_recipe, write_encoder
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run, reserved_run_path
from simsiam.runs.weights import open_weights
from simsiam.sources.open_source import absolute_sources, open_source, source_names
from simsiam.training.adaptation.layers import trained_candidates
from simsiam.training.progress import print_labeled

TRIAL_IMAGES = 60  # images that the time of a measurement is estimated from
SMALL_SAMPLE = 150  # images that are measured if there is no time for more
FULL_SAMPLE_SHARE = 0.8  # of the time that is left, after which a small sample is measured
RESERVE_SECONDS = 12  # for starting the program, choosing, and writing the run folder


def adapt(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    init: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    minutes: float | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    channels: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Find the best features for the images of a source, and write them as a run folder.

    Args:
        source: The images.
        init: A run folder or the name of weights to start from; by default nothing but the images
            is used.
        backbone: The network, if `init` is a file of weights.
        minutes: Time limit; what does not fit is left out, which is printed.
        no_labels: Whether to ignore labels. They are never used to choose.
        splits: Which folder or shard is which split; see `open_source`.
        out: The run folder; it must not exist.
        channels: Channels of the images; by default those that `init` takes, else 3.
        limit: Use only this many images.
        seed: Seed of the sample and of training.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "bfloat16" or "float32", of the backbone.

    Returns:
        The path of the run folder; its adapt.json has the table of what was tried.

    Raises:
        UsageError: If the request is wrong, or there are too few images.
        WorkFailed: If weights cannot be downloaded.
        Stopped: If a signal arrived during training; the best of what was tried is written.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes - RESERVE_SECONDS
    if world_size() > 1:
        raise UsageError("adapt runs in one process: start it without torchrun")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"minutes is {minutes}: give a number above 0")
    names = source_names(source)
    own = {"splits": splits, "seed": seed, "no_labels": no_labels, "limit": None}
    Recipe().replace(**own | {"limit": limit})  # checks them
    start, channels = open_init(init, backbone, names, channels, splits)
    opened = open_source(names, channels, no_labels=no_labels, splits=splits)
    images = sample(opened.train, limit)
    compute = Compute.pick(device, precision)
    network, by_rule = None, False
    if start is None:
        chosen, transform = sample_for_patches(images, seed=seed)
        recipe = encoder_recipe(names, channels, transform).replace(**own)
    else:
        run = Run(start)
        before = run.json("adapt.json").get("candidates", [])
        by_rule = goes_beside_patches(run.recipe, run.json("summary.json").get("steps", 0))
        by_rule = by_rule or any(row.get("by_rule") for row in before)
        recipe = run.recipe.replace(source=absolute_sources(names), **own)
        network, transform = load(run.path, head=False), eval_transform(recipe)
        chosen = read_sample(images, transform.resize, seed=seed)
    with reserved_run_path(out, f"{opened.name}-adapt", recipe) as path:
        print_labeled(
            "images", f"{len(chosen.pixels)} of {len(images)}, {chosen.fit_size} to fit on"
        )
        backbones: dict[str, nn.Module] = {**learn_patches(chosen, transform)}
        if network is not None:
            backbones = {recipe.backbone: network} | {
                name: learned for name, learned in backbones.items() if name != recipe.backbone
            }
        backbones = affordable(backbones, transform, chosen, compute, deadline)
        branches, chosen = measure_in_time(backbones, transform, chosen, compute, deadline)
        margin = 0.0 if recipe.method.name == "none" else MARGIN
        candidates = closed_form_candidates(
            branches, chosen, start=network is not None, margin=margin, by_rule=by_rule
        )
        trainable = network is not None and not by_rule and not isinstance(network, Patches)
        if trainable and deadline is not None:
            candidates = chain(
                candidates,
                trained_candidates(branches[0], recipe, transform, chosen, compute, deadline),
            )
        tried, stop = list[Candidate](), None
        try:
            tried.extend(print_candidates(candidates))
        except Stopped as error:
            stop = error
        best, rows = choose(tried)
        write_encoder(path, recipe, best, rows, chosen.skipped)
        print_labeled("chosen", best.name)
        if advice := Run(path).json("summary.json").get("advice"):
            print_labeled("advice", str(advice))
        if stop is not None:
            raise stop
    return path


def open_init(
    init: str | os.PathLike[str] | None,
    backbone: str | None,
    names: Sequence[str | os.PathLike[str]],
    channels: int | None,
    splits: Sequence[str] | None,
) -> tuple[Path | None, int]:
    """Open the weights to start from, and choose the channels of the images by them.

    Args:
        init: A run folder or the name of weights, if there are any.
        backbone: The network, if `init` is a file of weights.
        names: The source.
        channels: The number of channels that was asked for, if it was.
        splits: Which folder or shard is which split; see `open_source`.

    Returns:
        The run folder of the weights, or None; the number of channels.

    Raises:
        UsageError: There are no such weights, or they take another number of channels.
    """
    if init is None:
        return None, channels or 3
    folder = open_weights(
        init, backbone=backbone, source=names, channels=channels or 3, splits=splits
    )
    needed = Run(folder).recipe.channels
    if channels not in (None, needed):
        raise UsageError(
            f"init {init} does not fit --channels {channels}: the weights have channels {needed}; "
            "leave --channels out"
        )
    return folder, needed


def affordable(
    backbones: Mapping[str, nn.Module],
    transform: Transform,
    images: Sample,
    compute: Compute,
    deadline: float | None,
) -> dict[str, nn.Module]:
    """Leave out backbones that cannot be measured in time.

    Args:
        backbones: The backbones by their names, the most important first.
        transform: Their preprocessing.
        images: The sample.
        compute: Where to compute.
        deadline: The end, in seconds of `time.monotonic`; None for no limit.

    Returns:
        At least the first one.
    """
    kept: dict[str, nn.Module] = {}
    few = images.reduce(TRIAL_IMAGES)

    def seconds(names: Sequence[str]) -> float:
        """Of measuring the sample; views are made once, whatever the number of backbones."""
        start = time.monotonic()
        measure({name: backbones[name] for name in names}, transform, few, compute)
        return (time.monotonic() - start) * len(images.pixels) / len(few.pixels)

    seconds(list(backbones))  # the first calls are slower than all others
    total = views = seconds([])
    for name in backbones:
        total += max(seconds([name]) - views, 0)
        if kept and deadline is not None and time.monotonic() + total > deadline:
            left_out = ", ".join(name for name in backbones if name not in kept)
            print_labeled("left out", f"{left_out}: no time to measure these")
            break
        kept[name] = backbones[name]
    return kept


def measure_in_time(
    backbones: Mapping[str, nn.Module],
    transform: Transform,
    images: Sample,
    compute: Compute,
    deadline: float | None,
) -> tuple[list[Branch], Sample]:
    """Measure backbones on the sample, or on a small one if the machine is too slow.

    Args:
        backbones: The backbones by their names.
        transform: Their preprocessing.
        images: The sample.
        compute: Where to compute.
        deadline: The end, in seconds of `time.monotonic`; None for no limit.

    Returns:
        What was measured, and the sample that it was measured on.
    """
    now = time.monotonic()
    limit = None if deadline is None else now + FULL_SAMPLE_SHARE * (deadline - now)
    try:
        return measure(
            backbones, transform, images, compute, label="measuring", deadline=limit
        ), images
    except TimeoutError:
        small = images.reduce(SMALL_SAMPLE)
        print_labeled(
            "slow", f"{len(images.pixels)} images take too long: {len(small.pixels)} are measured"
        )
        return measure(backbones, transform, small, compute, label="measuring"), small


def closed_form_candidates(
    branches: Sequence[Branch],
    images: Sample,
    *,
    start: bool,
    margin: float = 0.0,
    by_rule: bool = False,
) -> Iterator[Candidate]:
    """Make the candidates that need no training.

    Args:
        branches: The network to start from, if there is one, and patches.
        images: The sample.
        start: Whether the first branch is the network to start from.
        margin: Of its changes; see `backbone_candidates`.
        by_rule: Whether it goes beside patches by rule; see `beside_patches`.

    Yields:
        The network unchanged, centered and with its map; patches; the best of both side by side.
    """
    network, patches = (branches[0], branches[1:]) if start else (None, branches)
    if network is not None:
        own = list(backbone_candidates(network, images, margin=margin))
        yield from own
    learned = list(patch_candidates(patches, images))
    yield from learned
    if network is not None and learned and not isinstance(network.backbone, Patches):
        best = choose(learned)[0]
        if by_rule:
            yield beside_patches(network, best, images)
        else:
            yield join_candidates(own[-1], best, images, PATCH_WEIGHTS)


def print_candidates(candidates: Iterator[Candidate]) -> Iterator[Candidate]:
    """Print each candidate and what was measured of it.

    Args:
        candidates: The candidates.

    Yields:
        The same ones.
    """
    for candidate in candidates:
        accuracy = "" if candidate.knn_top1 is None else f", kNN {candidate.knn_top1:.1f}"
        numbers = f"score {candidate.score:.3f}, views {candidate.retrieval:.0f}%{accuracy}"
        print_labeled("tried", f"{candidate.name}: {numbers}")
        if candidate.by_rule:
            print_labeled("rule", "this is taken whatever its score, and nothing is trained on it:")
            print_labeled("", "docs/closed_form.md says why")
        yield candidate
