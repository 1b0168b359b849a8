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

from simsiam.config.recipes import WORDS, stem_for
from simsiam.config.settings import convert
from simsiam.detection import pictures, scenes
from simsiam.detection.annotations import Annotated, AnnotatedSource, open_annotated, with_masks
from simsiam.detection.detector import detector, to_detectron2
from simsiam.detection.metrics import coco_api, measure
from simsiam.detection.schedules import SCHEDULES, Schedule, chosen
from simsiam.detection.train_detector import Where, detect, train
from simsiam.distributed.process_group import by_first, count, rank, together
from simsiam.errors import UsageError, WorkFailed, unknown
from simsiam.model.backbones import RESNETS
from simsiam.model.precision import pick_device, pick_precision
from simsiam.runs.convert import beside
from simsiam.runs.encoder import bare_backbone, fingerprint, initialize, load
from simsiam.runs.environment import environment, now
from simsiam.runs.published_weights import locate
from simsiam.runs.run_folder import Run
from simsiam.utils.files import locked, whole

TASKS = ("detection", "segmentation")
FEW = 20  # training images; with fewer there is nothing to keep out
METRICS = {"voc_box": "VOC boxes", "coco_box": "COCO boxes", "coco_mask": "COCO masks"}


class Parts(NamedTuple):
    """Who is learned from, who chooses the lr, who is tested on; and in words."""

    learn: Annotated  # what the final detector learns from
    search: Annotated  # what the lr search learns from ...
    val: Annotated  # ... and what it is judged on
    test: Annotated
    words: dict[str, str]


@together
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
    **words: Any,
) -> dict[str, Any]:
    """Fine-tune the run's backbone as a detector on annotated images; returns the record, and prints it as a table.

    `init` starts from other weights for the same network: a run folder, a checkpoint, published ones; `from_scratch`
    from none. `schedule` is one of SCHEDULES or auto, by the number of images; `words` are fields of `Schedule`. The
    record goes into RUN/transfers/TASK.json, a picture and the training beside it. Stopped, it goes on when called
    again; under torchrun all processes make one detector. Raises UsageError for a wrong request, WorkFailed where no
    image can be used or every lr diverges, Stopped.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if init and from_scratch:
        raise UsageError("init and from_scratch contradict each other: give one of them")
    if seed < 0:
        raise UsageError(f"seed is {seed}; it is at least 0")
    Schedule.of(words)  # refuses now what would not be a schedule ...
    coco_api()  # ... and what could not be measured after an hour
    folder = Run(run)
    on = pick_device(device)
    where = Where(on, pick_precision(convert(precision, WORDS["precision"], "precision"), on))
    opened, masks = open_source(source, folder.recipe.channels), task == "segmentation"
    opened = with_masks(opened) if masks else opened
    parts = divide(opened)
    stem = folder.recipe.stem or stem_for(folder.recipe.image_size or 224)
    how, why = pick(schedule, parts.learn, words, stem, masks)
    start = Start(folder, init, from_scratch)
    about = {
        "task": task, "source": opened.name, **parts.words, "classes": list(parts.learn.classes),
        "train_images": len(parts.learn), "test_images": len(parts.test), "init": start.words, "seed": seed,
        "network": start.network, "precision": where.precision, "processes": count(),
    }  # fmt: skip
    here = environment(on, where.precision)  # now: hours later the commit may be another than the code that ran
    console = Console(stderr=True, highlight=False, quiet=rank() != 0)
    for line in told(opened, parts, how, why, start):
        console.print(line, soft_wrap=True, markup=False)

    def settings(lr: float, images: int) -> dict[str, Any]:
        """What determines the bits of one fine-tuning."""
        return json.loads(json.dumps(about | how.to_dict() | {"lr": lr, "train_images": images}))

    def tuned(part: Annotated, lr: float, out: Path) -> tuple[GeneralizedRCNN, dict[str, Any]]:
        model, fixed = start.detector(len(part.classes), how, masks=masks, seed=seed), settings(lr, len(part))
        return model, train(model, part, how, out=out, lr=lr, seed=seed, masks=masks, where=where, settings=fixed)

    out = folder.path / "transfers" / name_of(about | how.to_dict(), opened.name, start.kind)
    searched: dict[str, Any] = {}
    if len(how.lr) > 1:
        for lr in how.lr:
            console.print(f"lr       {lr:g}, judged on {parts.words['val']}", soft_wrap=True)
            try:
                tried, _ = tuned(parts.search, lr, out / f"lr-{lr:g}")
            except WorkFailed as error:
                console.print(f"         {error}", soft_wrap=True)
                searched[f"{lr:g}"] = None
            else:
                searched[f"{lr:g}"] = judged(tried, parts.val, task, where)
    best = max(how.lr, key=lambda lr: searched.get(f"{lr:g}") or 0.0)
    if searched and not any(value is not None for value in searched.values()):
        raise WorkFailed(f"diverged with every lr of {', '.join(searched)}: give smaller ones")
    model, spent = tuned(parts.learn, best, out)
    found, kept, skipped = detect(model, parts.test, where)

    @by_first
    def recorded() -> dict[str, Any]:
        results = measure(found, [parts.test.objects[i] for i in kept], parts.test.classes, task)
        pictures.draw(parts.test, kept, found, out / "picture.png")
        if how.architecture == "c4" and folder.recipe.backbone in ("resnet50", "resnet101"):
            with whole(out / "detectron2.pth") as part:  # its loader reads this as it is
                torch.save(
                    {"model": to_detectron2(model, how), "__author__": "simsiam", "matching_heuristics": False}, part
                )
        if opened.faults.lines:
            with whole(out / "faults.txt") as part:
                part.write_text("".join(f"{line}\n" for line in sorted(opened.faults.lines)), encoding="utf-8")
        record = {
            "protocol": f"{task}, {how.architecture}, {how.steps} steps", **about,
            "parameters": how.to_dict() | {"epochs": round(spent["epochs"], 2)},
            "chosen": {"lr": best, "judged_on": parts.words["val"], "searched": searched} if searched else {"lr": best},
            "tested_by": "voc_box" if opened.metric == "voc" else "coco_mask" if masks else "coco_box",
            "metrics": results, "n": len(kept), "unreadable": len({*spent["unreadable"], *skipped}),
            "faults": dict(opened.faults.counts), "folder": out.name, "picture": f"{out.name}/picture.png",
            "asked": {
                "source": [os.fspath(one) for one in ([source] if isinstance(source, str | os.PathLike) else source)],
                "schedule": schedule, "init": init, "from_scratch": from_scratch, "words": words,
            },
            "environment": {k: here[k] for k in ("commit", "device", "threads")} | {"torch": here["versions"]["torch"]},
            "measured": now(), "training_seconds": spent["seconds"],
        }  # fmt: skip
        record = json.loads(json.dumps(record))  # as it reads back
        keep(folder, task, record)
        show([record])
        return record

    return recorded()


def open_source(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], channels: int) -> AnnotatedSource:
    """The annotated images; "shapes" is the embedded set."""
    given = [source] if isinstance(source, str | os.PathLike) else list(source)
    if [os.fspath(one) for one in given] == ["shapes"]:
        return replace(open_annotated(by_first(scenes.written)(), channels), name="shapes")
    return open_annotated(given, channels)


def pick(schedule: str, part: Annotated, words: Mapping[str, Any], stem: str, masks: bool) -> tuple[Schedule, str]:
    """The schedule for a part to learn from and a network with this stem, and why this one; `words` win."""
    if schedule in SCHEDULES:
        return Schedule.of(SCHEDULES[schedule]() | dict(words)), f"{schedule}, by name"
    if schedule != "auto":
        raise unknown("schedule", schedule, [*SCHEDULES, "auto"])
    side = int(np.median([min(o.size) for o in part.objects]))
    sides = np.sqrt(np.concatenate([(o.boxes[:, 2:] - o.boxes[:, :2]).prod(1) for o in part.objects]))
    low, high = (float(q) for q in np.quantile(sides, [0.05, 0.95]))
    base, why = chosen(len(part), side, (low, high), stem, masks)
    if words.get("architecture") == "fpn":
        for word in ("anchors", "stride"):
            base.pop(word, None)
    return Schedule.of(base | dict(words)), why


def divide(source: AnnotatedSource) -> Parts:
    """The test split if there is one, and then val chooses the lr and is learned from at last (VOC's trainval).

    Otherwise val is the test, or else a fifth of the training images; a tenth of the training images, kept out of the
    search alone, chooses the lr. Raises UsageError for a set too small to divide.
    """
    splits = source.splits
    train = splits["train"]
    if "test" in splits and "val" in splits:
        learn, search, val = train.join(splits["val"]), train, splits["val"]
        words = {"train": "train and val", "test": "test", "val": "val"}
        return Parts(learn.learnable(), search.learnable(), val, splits["test"], words)
    if len(train) < FEW:
        raise UsageError(f"{source.name} has {len(train)} images to learn from; it takes {FEW} to keep some out")
    test = splits.get("test", splits.get("val"))
    words = {"train": "train", "test": "test" if "test" in splits else "val", "val": "a tenth of train"}
    if test is None:
        train, test = train.hold_out(len(train) // 5)
        words |= {"train": "four fifths of train", "test": "a fifth of train"}
    search, val = train.hold_out(max(1, len(train) // 10))
    return Parts(train.learnable(), search.learnable(), val, test, words)


class Start:
    """Where the backbone's weights come from, and the preprocessing that belongs to them. Raises UsageError."""

    def __init__(self, run: Run, init: str | None, from_scratch: bool):
        recipe = run.recipe
        self.run, self.recipe, self.init, self.from_scratch = run, recipe, init, from_scratch
        assert recipe.mean and recipe.std
        if recipe.backbone not in RESNETS:
            raise UsageError(f"a detector is built on {', '.join(RESNETS)}; {run.path} has {recipe.backbone}")
        self.mean, self.std = recipe.mean, recipe.std
        self.network = f"{recipe.backbone}, width {recipe.width}"
        self.kind = "scratch" if from_scratch else "init" if init else "run"
        self.words: dict[str, Any] = {"from": "random weights" if from_scratch else init or "the run's backbone"}
        if init:
            path, release = by_first(locate)(init)
            known = release.words if release else beside(path)
            self.mean, self.std = known.get("mean", self.mean), known.get("std", self.std)
        if not from_scratch:
            self.words["backbone_sha256"] = fingerprint(self.backbone())[:16]

    def backbone(self) -> nn.Module:
        if self.init:
            model = bare_backbone(self.recipe)
            initialize(model, replace(self.recipe, init=self.init))
            return model
        return bare_backbone(self.recipe) if self.from_scratch else load(self.run.path)

    def detector(self, classes: int, how: Schedule, *, masks: bool, seed: int) -> GeneralizedRCNN:
        """What is new in it depends on the seed alone: the same for every start. So does a backbone from scratch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.backbone()
            torch.manual_seed(seed + 1)
            return detector(network, classes, how, mean=self.mean, std=self.std, masks=masks)


def judged(model: nn.Module, val: Annotated, task: str, where: Where) -> float:
    """COCO's AP of a detector, of masks where masks are learned."""
    found, kept, _ = detect(model, val, where)
    results = measure(found, [val.objects[i] for i in kept], val.classes, task)
    return results["coco_mask" if task == "segmentation" else "coco_box"]["AP"]


def name_of(words: Mapping[str, Any], source: str, start: str) -> str:
    """The folder of a fine-tuning: one for each combination of everything that determines it."""
    text = json.dumps(words, sort_keys=True, default=str)
    return f"{words['task']}-{source}-{start}-{digest_of(text.encode()).hexdigest()[:8]}"


def keep(run: Run, task: str, record: dict[str, Any]) -> None:
    """Add the record to the task's file, in the place of one of the same fine-tuning."""
    name = f"transfers/{task}.json"
    with locked(run.path / "transfers" / ".lock", wait=True):  # two may end at once
        others = [one for one in run.listed(name) if one.get("folder") != record["folder"]]
        run.write(name, json.dumps([*others, record], indent=2) + "\n")


def told(source: AnnotatedSource, parts: Parts, how: Schedule, why: str, start: Start) -> list[str]:
    """What is about to happen."""
    learned, seen = sum(map(len, parts.learn.objects)), sum(map(len, parts.test.objects))
    lines = [
        f"source   {source.name}: learns from {parts.words['train']}, {len(parts.learn):,} images with {learned:,} "
        f"objects; tested on {parts.words['test']}, {len(parts.test):,} with {seen:,}",
        f"init     {start.words['from']}",
        f"schedule {why}",
        f"         {how.steps:,} steps of {how.batch_size}, shorter side {how.test_side}, anchors "
        f"{' '.join(map(str, how.anchors))}",
    ]
    if source.faults.counts:
        lines.append("faults   " + ", ".join(f"{kind}: {count}" for kind, count in source.faults.counts.items()))
        lines += [f"         {line.replace(chr(9), ': ')}" for line in source.faults.lines[:3]]
    return lines


def show(records: Sequence[dict[str, Any]]) -> None:
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
            table.add_row(r["protocol"], r["init"]["from"], METRICS[metric], *cells, str(r["n"]), style=style)
    console = Console(highlight=False)
    console.print(table)
    for r in records:
        of_class = r["metrics"][r["tested_by"]]["AP50_of_class"]
        said = ", ".join(f"{name} {value:.1f}" for name, value in list(of_class.items())[:10])
        console.print(f"AP50 of {said}{' ...' if len(of_class) > 10 else ''}")
