"""The verb `evaluate`: run protocols on a backbone, score them, and write their records.

A protocol is a function of a frozen network and of settings, and yields predictions. It is not
given test labels. Predictions are compared with the test labels here, and only here are records
made, written and printed.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import NamedTuple

import numpy as np
from typing_extensions import Unpack

from simsiam.config.keyword_settings import EvaluationSettings
from simsiam.config.protocols import FROZEN_PROTOCOLS, PROTOCOLS, Settings
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images, load_into_memory, sample
from simsiam.distributed.process_group import distributed_entry_point, rank
from simsiam.errors import UsageError, printable, truncate, unknown_name
from simsiam.evaluation.evaluation_record import EvaluationRecord, print_records, save_records
from simsiam.evaluation.frozen import (
    FrozenNetwork,
    ProtocolResult,
    split_beside_training,
    split_train_test,
)
from simsiam.evaluation.protocol_few_label import plan_draws
from simsiam.evaluation.protocol_finetune import evaluate_finetune
from simsiam.evaluation.scores import score_predictions
from simsiam.model.precision import Compute
from simsiam.runs.compose import open_run_source, source_flags
from simsiam.runs.encoder import weights_sha256
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.run_folder import HEAD_FILE, Run
from simsiam.runs.weights import open_weights, run_folder_of
from simsiam.sources.open_source import absolute_sources

FrozenProtocol = Callable[[FrozenNetwork, Settings], Iterator[ProtocolResult]]


class EvaluationData(NamedTuple):
    """The images of an evaluation.

    Attributes:
        source: The name of the source.
        train: The images to learn from; labeled, unless only label_free is evaluated.
        test: The images to classify, with their labels.
        split: What records say about `train` and `test`.
        num_unreadable: How many images could not be read while they were loaded into memory.
    """

    source: str
    train: Images
    test: Images
    split: dict[str, str]
    num_unreadable: int


@distributed_entry_point
def evaluate(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    protocols: Sequence[str] | None = None,
    checkpoint: str = "last",
    device: str = "auto",
    precision: str = "auto",
    limit: int | None = None,
    no_labels: bool = False,
    splits: Sequence[str] | None = None,
    backbone: str | None = None,
    **overrides: Unpack[EvaluationSettings],
) -> list[dict[str, object]]:
    """Measure a run's backbone, write the records to RUN/evaluations, and print them as a table.

    Args:
        run: A run folder, or weights (see `simsiam.runs.weights.open_weights`), whose records
            are then in the cache.
        source: The images; by default the run's own source.
        protocols: Names of protocols; by default all that leave the backbone as it is and that
            the labels allow. What is left out is printed.
        checkpoint: "last", "best" or "epoch-NNNN".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", of the backbone.
        limit: Use only so many training and so many test images, evenly spaced.
        no_labels: Whether to ignore the labels of the source; then only the protocol label_free
            can be used.
        splits: Which folder or shard is which split; see `open_source`.
        backbone: The network of a file of weights.
        **overrides: Fields of `simsiam.config.protocols.Settings`.

    Returns:
        The records, as they stand in RUN/evaluations/PROTOCOL.json.

    Raises:
        UsageError: If an argument is wrong or has no effect, or a protocol needs labels that the
            source does not have or that are ignored.
        WorkFailed: If no image can be read, or a record cannot be written.
        Stopped: After SIGINT or SIGTERM while a classifier was trained on crops.
    """
    settings = Settings.from_dict(overrides)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it is at least 1")
    for protocol in protocols or ():
        if protocol not in PROTOCOLS:
            raise unknown_name("protocol", protocol, PROTOCOLS)
    settings.check_effects(FROZEN_PROTOCOLS if protocols is None else protocols)
    folder = Run(open_weights(run, backbone=backbone, source=source, splits=splits))
    folder.evaluations()  # an error in these files comes before the work
    opened = open_run_source(
        folder,
        source,
        command=lambda names: ["evaluate", str(folder.path), *names, *source_flags(folder.recipe)],
        no_labels=no_labels,
        splits=splits,
    )
    ignored = no_labels or (not source and folder.recipe.no_labels)
    labeled = ignored or any(images.labels is not None for images in opened.splits.values())
    left_out, asked = [], protocols is not None
    if protocols is None and opened.only_class:
        raise UsageError(
            f"{opened.name} has one class, {truncate(opened.only_class, repr)}, so there is no "
            "accuracy to measure: use --protocol label_free"
        )
    if protocols is None:
        protocols = FROZEN_PROTOCOLS if labeled else ("label_free",)
        left_out = [] if labeled else [f"{opened.name} has no labels: only label_free is measured"]
    require_labels = set(protocols) != {"label_free"}
    if require_labels and ignored:
        given = "--no-labels was given" if no_labels else "the run was trained with --no-labels"
        option = "" if no_labels else ", or name a SOURCE whose labels may be used"
        names = ", ".join(name for name in protocols if name != "label_free")
        raise UsageError(f"{given}, and {names} need labels: use --protocol label_free{option}")
    adapted, recipe = bool(folder.json("adapt.json")), folder.recipe
    if require_labels and not adapted and _are_of_training(recipe, source, splits):
        split = split_beside_training(opened, recipe, checkpoint)
    else:
        split = split_train_test(opened, require_labels=require_labels)
        if adapted and recipe.method.target == "labels":
            split[2]["test"] += ", whose labels may have trained the weights that were adapted"
    data = _load_data(folder, opened.name, split, limit)
    compute = Compute.pick(device, precision)
    frozen = FrozenNetwork(
        folder, checkpoint, data.train, replace(data.test, labels=None), compute=compute
    )
    if folder.has_head and frozen.encoder is None and rank() == 0:
        print(f"checkpoint {checkpoint}: {HEAD_FILE} was fitted for other weights and is left out")
    if {"few_label", "finetune"} & set(protocols):
        try:
            plan_draws(data.train, settings)  # refuse impossible draws now, not after an hour
        except UsageError as error:
            if asked or settings.labels or settings.few_label_list:
                raise
            protocols = [name for name in protocols if name != "few_label"]
            left_out.append(f"few_label is left out: {error}")
    environment = _describe_environment(compute)
    records = list[EvaluationRecord]()
    for protocol in protocols:
        try:
            new_records = _run_protocol(protocol, frozen, folder, data, settings, environment)
        except UsageError as error:  # there are too few images for it
            if asked or (protocol == protocols[-1] and not records):
                raise
            left_out.append(f"{protocol} is left out: {error}")
            continue
        save_records(folder, protocol, new_records)
        records += new_records
    for line in left_out if rank() == 0 else ():
        print(printable(line))
    train, test = data.split["train"], data.split["test"]
    print_records(
        records, f"{data.source}: classifiers learn from {train} and are tested on {test}"
    )
    if run_folder_of(run) is None and rank() == 0:
        print(f"the records are in {printable(str(folder.path / 'evaluations'))}")
    return [record.to_dict() for record in records]


def _are_of_training(
    recipe: ResolvedRecipe,
    source: str | os.PathLike[str] | Sequence[str] | None,
    splits: Sequence[str] | None,
) -> bool:
    """Whether images are those of training, in the same splits."""
    if not source:
        return splits is None or tuple(splits) == recipe.splits
    names = tuple(absolute_sources(source))
    return names == recipe.source and tuple(splits or ()) == (recipe.splits or ())


def _load_data(
    run: Run, source: str, chosen: tuple[Images, Images, dict[str, str]], limit: int | None
) -> EvaluationData:
    train, test, split = chosen
    for name, images in {"train": train, "test": test}.items():
        if limit is not None and limit < len(images):
            split[name] = f"{limit} of {split[name]}"
    max_bytes = int(run.recipe.cache_gib * 2**30)
    train, unreadable_train = load_into_memory(sample(train, limit), max_bytes)
    test, unreadable_test = load_into_memory(sample(test, limit), max_bytes)
    num_unreadable = len(unreadable_train) + len(unreadable_test)
    return EvaluationData(source, train, test, split, num_unreadable)


def load_protocol(name: str) -> FrozenProtocol:
    """Import a protocol that leaves the backbone as it is.

    Args:
        name: The name of the protocol.

    Returns:
        The function `evaluate_frozen` of the module `protocol_NAME`.
    """
    return import_module(f"simsiam.evaluation.protocol_{name}").evaluate_frozen


def _describe_environment(compute: Compute) -> dict[str, object]:
    environment = collect_environment(compute)
    names = ("commit", "device", "precision", "threads")
    return {name: environment[name] for name in names} | {"torch": environment["versions"]["torch"]}


def _run_protocol(
    protocol: str,
    frozen: FrozenNetwork,
    run: Run,
    data: EvaluationData,
    settings: Settings,
    environment: dict[str, object],
) -> list[EvaluationRecord]:
    """Run one protocol and score its predictions."""
    started = time.monotonic()
    if protocol == "finetune":  # the only protocol that is given test labels
        results = evaluate_finetune(
            run, frozen.checkpoint, data.train, data.test, settings, compute=frozen.compute
        )
    else:
        results = load_protocol(protocol)(frozen, settings)
    scored = [(result, _score(result, frozen, data.test.labels)) for result in results]
    assert weights_sha256(frozen.backbone) == frozen.backbone_sha256, "a frozen backbone changed"
    make_record = partial(
        EvaluationRecord,
        protocol=protocol,
        checkpoint=frozen.checkpoint,
        step=frozen.step,
        backbone_sha256=frozen.backbone_sha256,
        source=data.source,
        train=data.split["train"],
        test=data.split["test"],
        train_images=len(data.train),
        classes=len(data.train.classes),
        frozen=protocol != "finetune",
        environment=environment,
        measured=utc_now(),
        seconds=round(time.monotonic() - started, 1),
    )
    num_unreadable = data.num_unreadable + len(frozen.unreadable)
    return [
        make_record(
            name=result.name,
            features=result.features,
            parameters=result.parameters,
            chosen=result.selected,
            metrics=metrics,
            unreadable=num_unreadable + int(str(metrics.get("unreadable", 0))),
        )
        for result, metrics in scored
    ]


def _score(
    result: ProtocolResult, frozen: FrozenNetwork, test_labels: np.ndarray | None
) -> dict[str, object]:
    """The metrics of a protocol, or the accuracy of its predictions."""
    if result.metrics:
        return result.metrics
    assert test_labels is not None, "a protocol that predicts classes needs labels"
    labels = test_labels[frozen.test_indices]
    return score_predictions(result.predictions, labels, len(frozen.train.classes))
