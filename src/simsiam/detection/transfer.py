"""simsiam transfer: a run's backbone fine-tuned end to end as a detector, and what that detector is worth.

Table 5's protocol is in schedules.py as data. No test annotation chooses anything: of several learning rates the best
on val is taken, and the test set is looked at once.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256 as digest_of
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from simsiam.config.recipes import default_stem
from simsiam.detection import pictures, scenes
from simsiam.detection.annotations import (
    AnnotatedSource,
    DetectionDataset,
    keep_masked_objects,
    open_annotated,
)
from simsiam.detection.detector import build_detector, to_detectron2
from simsiam.detection.metrics import compute_metrics, import_pycocotools
from simsiam.detection.schedules import SCHEDULES, Schedule, auto_schedule
from simsiam.detection.train_detector import detect_objects, train_detector
from simsiam.distributed.process_group import (
    distributed_entry_point,
    rank,
    rank_zero_only,
    world_size,
)
from simsiam.errors import UsageError, WorkFailed, unknown_name
from simsiam.model.backbones import RESNETS
from simsiam.model.precision import Compute
from simsiam.runs.convert import sibling_recipe_settings
from simsiam.runs.encoder import build_backbone, load, load_init_weights, weights_sha256
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.published_weights import resolve_checkpoint
from simsiam.runs.run_folder import Run
from simsiam.utils.files import atomic_write, file_lock

TASKS = ("detection", "segmentation")
MIN_TRAIN_IMAGES = 20  # training images; with fewer there is nothing to keep out
METRIC_LABELS = {"voc_box": "VOC boxes", "coco_box": "COCO boxes", "coco_mask": "COCO masks"}


class TransferSplits(NamedTuple):
    """Who is learned from, who chooses the lr, who is tested on; and in words."""

    train: DetectionDataset  # what the final detector learns from
    search_train: DetectionDataset  # what the lr search learns from ...
    val: DetectionDataset  # ... and what it is judged on
    test: DetectionDataset
    descriptions: dict[str, str]


@distributed_entry_point
def transfer(
    run: str | os.PathLike[str],
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    task: Literal["detection", "segmentation"] = "detection",
    schedule: str = "auto",
    init: str | None = None,
    from_scratch: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    **overrides: Any,
) -> dict[str, Any]:
    """Fine-tune the run's backbone as a detector on annotated images; returns the record, and prints it as a table.

    `init` starts from other weights for the same network: a run folder, a checkpoint, published ones; `from_scratch`
    from none. `schedule` is one of SCHEDULES or auto, by the number of images; `words` are fields of `Schedule`. The
    record goes into RUN/transfers/TASK.json, a picture and the training beside it. Stopped, it goes on when called
    again; under torchrun all processes make one detector. Raises UsageError for a wrong request, WorkFailed where no
    image can be used or every lr diverges, Stopped.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if init and from_scratch:
        raise UsageError("init and from_scratch contradict each other: give one of them")
    if seed < 0:
        raise UsageError(f"seed is {seed}; it is at least 0")
    Schedule.from_settings(overrides)  # refuses now what would not be a schedule ...
    import_pycocotools()  # ... and what could not be measured after an hour
    folder = Run(run)
    compute = Compute.pick(device, precision)
    opened, masks = open_transfer_source(source, folder.recipe.channels), task == "segmentation"
    opened = keep_masked_objects(opened) if masks else opened
    parts = split_source(opened)
    stem = folder.recipe.stem or default_stem(folder.recipe.image_size or 224)
    how, why = select_schedule(schedule, parts.train, overrides, stem, masks)
    start = Initialization(folder, init, from_scratch)
    about = {
        "task": task, "source": opened.name, **parts.descriptions, "classes": list(parts.train.classes),
        "train_images": len(parts.train), "test_images": len(parts.test), "init": start.description, "seed": seed,
        "network": start.network, "precision": compute.precision, "processes": world_size(),
    }  # fmt: skip
    here = collect_environment(
        compute
    )  # now: hours later the commit may be another than the code that ran
    console = Console(stderr=True, highlight=False, quiet=rank() != 0)
    for line in format_summary(opened, parts, how, why, start):
        console.print(line, soft_wrap=True, markup=False)

    def settings(lr: float, images: int) -> dict[str, Any]:
        """What determines the bits of one fine-tuning."""
        return json.loads(json.dumps(about | how.to_dict() | {"lr": lr, "train_images": images}))

    def tuned(
        part: DetectionDataset, lr: float, out: Path
    ) -> tuple[GeneralizedRCNN, dict[str, Any]]:
        model, fixed = (
            start.build_model(len(part.classes), how, masks=masks, seed=seed),
            settings(lr, len(part)),
        )
        return model, train_detector(
            model,
            part,
            how,
            out=out,
            lr=lr,
            seed=seed,
            masks=masks,
            compute=compute,
            settings=fixed,
        )

    out = (
        folder.path / "transfers" / fine_tuning_name(about | how.to_dict(), opened.name, start.kind)
    )
    searched: dict[str, Any] = {}
    if len(how.lr) > 1:
        for lr in how.lr:
            console.print(f"lr       {lr:g}, judged on {parts.descriptions['val']}", soft_wrap=True)
            try:
                tried, _ = tuned(parts.search_train, lr, out / f"lr-{lr:g}")
            except WorkFailed as error:
                console.print(f"         {error}", soft_wrap=True)
                searched[f"{lr:g}"] = None
            else:
                searched[f"{lr:g}"] = validation_ap(tried, parts.val, task, compute)
    best = max(how.lr, key=lambda lr: searched.get(f"{lr:g}") or 0.0)
    if searched and not any(value is not None for value in searched.values()):
        raise WorkFailed(f"diverged with every lr of {', '.join(searched)}: give smaller ones")
    model, spent = tuned(parts.train, best, out)
    found, kept, skipped = detect_objects(model, parts.test, compute)

    @rank_zero_only
    def recorded() -> dict[str, Any]:
        results = compute_metrics(
            found, [parts.test.objects[i] for i in kept], parts.test.classes, task
        )
        pictures.draw_detections(parts.test, kept, found, out / "picture.png")
        if how.architecture == "c4" and folder.recipe.backbone in ("resnet50", "resnet101"):
            with atomic_write(out / "detectron2.pth") as part:  # its loader reads this as it is
                torch.save(
                    {
                        "model": to_detectron2(model, how),
                        "__author__": "simsiam",
                        "matching_heuristics": False,
                    },
                    part,
                )
        if opened.faults.lines:
            with atomic_write(out / "faults.txt") as part:
                part.write_text(
                    "".join(f"{line}\n" for line in sorted(opened.faults.lines)), encoding="utf-8"
                )
        record = {
            "protocol": f"{task}, {how.architecture}, {how.steps} steps", **about,
            "parameters": how.to_dict() | {"epochs": round(spent["epochs"], 2)},
            "chosen": {"lr": best, "judged_on": parts.descriptions["val"], "searched": searched} if searched else {"lr": best},
            "tested_by": "voc_box" if opened.metric == "voc" else "coco_mask" if masks else "coco_box",
            "metrics": results, "n": len(kept), "unreadable": len({*spent["unreadable"], *skipped}),
            "faults": dict(opened.faults.counts), "folder": out.name, "picture": f"{out.name}/picture.png",
            "asked": {
                "source": [os.fspath(one) for one in ([source] if isinstance(source, str | os.PathLike) else source)],
                "schedule": schedule, "init": init, "from_scratch": from_scratch, "words": overrides,
            },
            "environment": {k: here[k] for k in ("commit", "device", "threads")} | {"torch": here["versions"]["torch"]},
            "measured": utc_now(), "training_seconds": spent["seconds"],
        }  # fmt: skip
        record = json.loads(json.dumps(record))  # as it reads back
        save_record(folder, task, record)
        print_records([record])
        return record

    return recorded()


def open_transfer_source(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int
) -> AnnotatedSource:
    """The annotated images; "shapes" is the embedded set."""
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    if [os.fspath(one) for one in given] == ["shapes"]:
        return replace(
            open_annotated(rank_zero_only(scenes.prepare_scenes)(), channels), name="shapes"
        )
    return open_annotated(given, channels)


def select_schedule(
    schedule: str, dataset: DetectionDataset, overrides: Mapping[str, Any], stem: str, masks: bool
) -> tuple[Schedule, str]:
    """The schedule for a part to learn from and a network with this stem, and why this one; `words` win."""
    if schedule in SCHEDULES:
        return Schedule.from_settings(
            SCHEDULES[schedule]() | dict(overrides)
        ), f"{schedule}, by name"
    if schedule != "auto":
        raise unknown_name("schedule", schedule, [*SCHEDULES, "auto"])
    side = int(np.median([min(o.size) for o in dataset.objects]))
    sides = np.sqrt(
        np.concatenate([(o.boxes[:, 2:] - o.boxes[:, :2]).prod(1) for o in dataset.objects])
    )
    low, high = (float(q) for q in np.quantile(sides, [0.05, 0.95]))
    base, why = auto_schedule(len(dataset), side, (low, high), stem, masks)
    if overrides.get("architecture") == "fpn":
        for word in ("anchors", "stride"):
            base.pop(word, None)
    return Schedule.from_settings(base | dict(overrides)), why


def split_source(source: AnnotatedSource) -> TransferSplits:
    """The test split if there is one, and then val chooses the lr and is learned from at last (VOC's trainval).

    Otherwise val is the test, or else a fifth of the training images; a tenth of the training images, kept out of the
    search alone, chooses the lr. Raises UsageError for a set too small to divide.
    """
    splits = source.splits
    train = splits["train"]
    if "test" in splits and "val" in splits:
        learn, search, val = train.concat(splits["val"]), train, splits["val"]
        words = {"train": "train and val", "test": "test", "val": "val"}
        return TransferSplits(
            learn.trainable_subset(), search.trainable_subset(), val, splits["test"], words
        )
    if len(train) < MIN_TRAIN_IMAGES:
        raise UsageError(
            f"{source.name} has {len(train)} images to learn from; it takes {MIN_TRAIN_IMAGES} to keep some out"
        )
    test = splits.get("test", splits.get("val"))
    words = {
        "train": "train",
        "test": "test" if "test" in splits else "val",
        "val": "a tenth of train",
    }
    if test is None:
        train, test = train.hold_out(len(train) // 5)
        words |= {"train": "four fifths of train", "test": "a fifth of train"}
    search, val = train.hold_out(max(1, len(train) // 10))
    return TransferSplits(train.trainable_subset(), search.trainable_subset(), val, test, words)


class Initialization:
    """Where the backbone's weights come from, and the preprocessing that belongs to them. Raises UsageError."""

    def __init__(self, run: Run, init: str | None, from_scratch: bool):
        recipe = run.recipe
        self.run, self.recipe, self.init, self.from_scratch = run, recipe, init, from_scratch
        if recipe.backbone not in RESNETS:
            raise UsageError(
                f"a detector is built on {', '.join(RESNETS)}; {run.path} has {recipe.backbone}"
            )
        self.mean, self.std = recipe.mean, recipe.std
        self.network = f"{recipe.backbone}, width {recipe.width}"
        self.kind = "scratch" if from_scratch else "init" if init else "run"
        self.description: dict[str, Any] = {
            "from": "random weights" if from_scratch else init or "the run's backbone"
        }
        if init:
            path, release = rank_zero_only(resolve_checkpoint)(init)
            known = release.settings if release else sibling_recipe_settings(path)
            self.mean, self.std = known.get("mean", self.mean), known.get("std", self.std)
        if not from_scratch:
            self.description["backbone_sha256"] = weights_sha256(self.build_backbone())[:16]

    def build_backbone(self) -> nn.Module:
        if self.init:
            model = build_backbone(self.recipe)
            load_init_weights(model, replace(self.recipe, init=self.init))
            return model
        return build_backbone(self.recipe) if self.from_scratch else load(self.run.path)

    def build_model(
        self, num_classes: int, schedule: Schedule, *, masks: bool, seed: int
    ) -> GeneralizedRCNN:
        """What is new in it depends on the seed alone: the same for every start. So does a backbone from scratch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build_backbone()
            torch.manual_seed(seed + 1)
            return build_detector(
                network, num_classes, schedule, mean=self.mean, std=self.std, masks=masks
            )


def validation_ap(model: nn.Module, val: DetectionDataset, task: str, compute: Compute) -> float:
    """COCO's AP of a detector, of masks where masks are learned."""
    found, kept, _ = detect_objects(model, val, compute)
    results = compute_metrics(found, [val.objects[i] for i in kept], val.classes, task)
    return results["coco_mask" if task == "segmentation" else "coco_box"]["AP"]


def fine_tuning_name(settings: Mapping[str, Any], source: str, init_kind: str) -> str:
    """The folder of a fine-tuning: one for each combination of everything that determines it."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{settings['task']}-{source}-{init_kind}-{digest_of(text.encode()).hexdigest()[:8]}"


def save_record(run: Run, task: str, record: dict[str, Any]) -> None:
    """Add the record to the task's file, in the place of one of the same fine-tuning."""
    name = f"transfers/{task}.json"
    with file_lock(run.path / "transfers" / ".lock", wait=True):  # two may end at once
        others = [one for one in run.read_records(name) if one.get("folder") != record["folder"]]
        run.write(name, json.dumps([*others, record], indent=2) + "\n")


def format_summary(
    source: AnnotatedSource,
    splits: TransferSplits,
    schedule: Schedule,
    reason: str,
    initialization: Initialization,
) -> list[str]:
    """What is about to happen."""
    learned, seen = sum(map(len, splits.train.objects)), sum(map(len, splits.test.objects))
    lines = [
        f"source   {source.name}: learns from {splits.descriptions['train']}, {len(splits.train):,} images with {learned:,} "
        f"objects; tested on {splits.descriptions['test']}, {len(splits.test):,} with {seen:,}",
        f"init     {initialization.description['from']}",
        f"schedule {reason}",
        f"         {schedule.steps:,} steps of {schedule.batch_size}, shorter side {schedule.test_side}, anchors "
        f"{' '.join(map(str, schedule.anchors))}",
    ]
    if source.faults.counts:
        lines.append(
            "faults   "
            + ", ".join(f"{kind}: {count}" for kind, count in source.faults.counts.items())
        )
        lines += [f"         {line.replace(chr(9), ': ')}" for line in source.faults.lines[:3]]
    return lines


def print_records(records: Sequence[dict[str, Any]]) -> None:
    """The records as one table of 80 columns."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("protocol", "from", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("AP50", "AP", "AP75", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        for metric, values in r["metrics"].items():
            cells = (f"{values[key]:.1f}" for key in ("AP50", "AP", "AP75"))
            style = "bold" if metric == r["tested_by"] else None
            table.add_row(
                r["protocol"],
                r["init"]["from"],
                METRIC_LABELS[metric],
                *cells,
                str(r["n"]),
                style=style,
            )
    console = Console(highlight=False)
    console.print(table)
    for r in records:
        of_class = r["metrics"][r["tested_by"]]["AP50_of_class"]
        said = ", ".join(f"{name} {value:.1f}" for name, value in list(of_class.items())[:10])
        console.print(f"AP50 of {said}{' ...' if len(of_class) > 10 else ''}")
