"""simsiam transfer: fine-tune a run's backbone as a detector and measure its average precision.

The settings of Table 5 are data in schedules.py. Test annotations choose nothing: of several
learning rates the best on val is used, and the test set is evaluated once.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from rich.console import Console
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from typing_extensions import NotRequired, Unpack

from simsiam.config.keyword_settings import ScheduleSettings
from simsiam.detection import pictures
from simsiam.detection.annotations import (
    AnnotatedSource,
    DetectionDataset,
    Objects,
    keep_masked_objects,
)
from simsiam.detection.detector import to_detectron2
from simsiam.detection.initialization import Initialization
from simsiam.detection.metrics import compute_metrics, import_pycocotools
from simsiam.detection.schedules import SCHEDULES, Schedule, auto_schedule
from simsiam.detection.splits import (
    SourcePath,
    TransferSplits,
    list_sources,
    open_transfer_source,
    split_source,
)
from simsiam.detection.train_detector import DetectorTrainingSummary, detect_objects, train_detector
from simsiam.detection.transfer_record import TransferRecord, print_record, save_record
from simsiam.distributed.process_group import (
    distributed_entry_point,
    rank,
    rank_zero_only,
    world_size,
)
from simsiam.errors import UsageError, WorkFailed, printable, unknown_name
from simsiam.model.precision import Compute
from simsiam.runs.environment import collect_environment, utc_now
from simsiam.runs.run_folder import Run
from simsiam.sources.fingerprint import digest_images
from simsiam.utils.checksums import write_with_checksum
from simsiam.utils.files import atomic_write
from simsiam.utils.names import join_names

TASKS = ("detection", "segmentation")


class TransferArguments(TypedDict):
    """Arguments of `transfer` as they are recorded."""

    source: list[str]
    schedule: str
    init: str | None
    from_scratch: bool
    words: Mapping[str, object]  # the overrides
    backbone: NotRequired[str]


@distributed_entry_point
def transfer(
    run: str | os.PathLike[str],
    source: SourcePath | Sequence[SourcePath],
    *,
    task: Literal["detection", "segmentation"] = "detection",
    schedule: str = "auto",
    init: str | None = None,
    backbone: str | None = None,
    from_scratch: bool = False,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    **overrides: Unpack[ScheduleSettings],
) -> dict[str, object]:
    """Fine-tune a run's backbone as a detector, test it and print its metrics (Table 5).

    Writes RUN/transfers/TASK.json, and a folder with the training and a picture next to it. If it
    is interrupted, the same call continues. With torchrun, all processes train one detector.

    Args:
        run: The run folder.
        source: Annotated images: Pascal VOC folders, a folder in COCO format, or "shapes".
        task: "detection", or "segmentation" for masks too.
        schedule: One of SCHEDULES, or "auto" to choose by the number of images.
        init: Other weights to start from, with their network: a run folder, a checkpoint or
            published weights.
        backbone: The network of these weights, for a file of a ResNet that cannot be recognized.
        from_scratch: Whether to start from random weights.
        seed: The seed of new weights and of every training step.
        device: "auto", "cpu", "cuda", ...
        precision: "auto", "float32" or "bfloat16".
        **overrides: Fields of `Schedule`; they override the schedule's values.

    Returns:
        The record, `TransferRecord.to_dict()`.

    Raises:
        UsageError: If the request is wrong.
        WorkFailed: If the images cannot be used, or training diverges with every lr.
        Stopped: After SIGINT or SIGTERM.
    """
    check_request(task, init, from_scratch, seed, overrides)
    arguments: TransferArguments = {
        "source": [os.fspath(path) for path in list_sources(source)],
        "schedule": schedule,
        "init": init,
        "from_scratch": from_scratch,
        "words": {**overrides},
    }
    if backbone is not None:
        if init is None:
            raise UsageError("backbone names the network of --init, which is missing")
        arguments["backbone"] = backbone
    folder = Run(run)
    folder.transfers()  # an error in these files comes before the work
    plan = TransferPlan.create(
        folder, task, arguments, seed=seed, compute=Compute.pick(device, precision)
    )
    console = Console(stderr=True, highlight=False, quiet=rank() != 0)
    for line in plan.summary():
        console.print(printable(line), soft_wrap=True, markup=False)
    ap_of_lr = plan.search_lr(console)
    lr = max(plan.schedule.lr, key=lambda lr: ap_of_lr.get(f"{lr:g}") or 0.0)
    record = plan.train_and_test(lr, ap_of_lr)
    if rank() == 0:
        print_record(record)
    return record.to_dict()


def check_request(
    task: str, init: str | None, from_scratch: bool, seed: int, overrides: Mapping[str, object]
) -> None:
    """Check what can be checked without reading the run or the images.

    Args:
        task: The task.
        init: Other weights to start from.
        from_scratch: Whether to start from random weights.
        seed: The seed.
        overrides: Fields of `Schedule`.

    Raises:
        UsageError: If an argument is wrong, two contradict each other, or pycocotools is missing.
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    if init and from_scratch:
        raise UsageError("init and from_scratch contradict each other: give only one of them")
    if seed < 0:
        raise UsageError(f"seed is {seed}; it is at least 0")
    Schedule.from_settings(overrides)
    import_pycocotools()  # now, rather than after an hour of training


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Everything that determines one fine-tuning.

    Attributes:
        run: The run whose backbone is fine-tuned.
        task: "detection" or "segmentation".
        arguments: The arguments of `transfer`, for the record.
        source: The annotated images.
        splits: Which of them are used for what.
        schedule: The settings of training.
        reason: Why the schedule was chosen.
        init: The origin of the backbone's weights.
        seed: The seed of new weights and of every step.
        compute: The device and the precision.
        num_processes: The number of processes that train together.
        environment: Commit and versions at the start; hours later the commit may be a newer one.
    """

    run: Run
    task: str
    arguments: TransferArguments
    source: AnnotatedSource
    splits: TransferSplits
    schedule: Schedule
    reason: str
    init: Initialization
    seed: int
    compute: Compute
    num_processes: int
    environment: Mapping[str, Any]

    @classmethod
    def create(
        cls, run: Run, task: str, arguments: TransferArguments, *, seed: int, compute: Compute
    ) -> "TransferPlan":
        """Read the images and choose splits, schedule and weights.

        Args:
            run: The run whose backbone is fine-tuned.
            task: "detection" or "segmentation".
            arguments: The other arguments of `transfer`.
            seed: The seed of new weights and of every step.
            compute: The device and the precision.

        Returns:
            The fine-tuning, ready to run.

        Raises:
            UsageError: If source, schedule or weights cannot be used.
            WorkFailed: If too many images are lost.
        """
        init = Initialization(
            run, arguments["init"], arguments["from_scratch"], arguments.get("backbone")
        )
        recipe = init.recipe
        source = open_transfer_source(arguments["source"], recipe.channels)
        if task == "segmentation":
            source = keep_masked_objects(source)
        splits = split_source(source)
        schedule, reason = select_schedule(
            arguments["schedule"],
            splits.train,
            arguments["words"],
            stem=recipe.resnet_stem,
            masks=task == "segmentation",
        )
        return cls(
            run=run,
            task=task,
            arguments=arguments,
            source=source,
            splits=splits,
            schedule=schedule,
            reason=reason,
            init=init,
            seed=seed,
            compute=compute,
            num_processes=world_size(),  # not later: it is 1 inside of rank_zero_only
            environment=collect_environment(compute),
        )

    @property
    def masks(self) -> bool:
        """Whether masks are learned."""
        return self.task == "segmentation"

    @property
    def _description(self) -> dict[str, Any]:
        """What the record says of data, weights and computing."""
        train, test = self.splits.train, self.splits.test
        return {
            "task": self.task,
            "source": self.source.name,
            **self.splits.descriptions,
            "classes": list(train.classes),
            "train_images": len(train),
            "test_images": len(test),
            "init": self.init.description,
            "seed": self.seed,
            "network": self.init.network,
            "precision": self.compute.precision,
            "processes": self.num_processes,
        }

    @property
    def folder(self) -> Path:
        """The folder of this fine-tuning, named by everything that determines it."""
        settings = self._description | self.schedule.to_dict()
        text = json.dumps(settings, sort_keys=True, default=str)
        digest = sha256(text.encode()).hexdigest()[:8]
        name = f"{self.task}-{self.source.name}-{self.init.kind}-{digest}"
        return self.run.path / "transfers" / name

    def summary(self) -> list[str]:
        """Return the lines that are printed at the start."""
        splits, schedule, faults = self.splits, self.schedule, self.source.faults
        train_objects = sum(map(len, splits.train.objects))
        test_objects = sum(map(len, splits.test.objects))
        lines = [
            f"source   {self.source.name}: trains on {splits.descriptions['train']}, "
            f"{len(splits.train):,} images with {train_objects:,} objects; "
            f"tests on {splits.descriptions['test']}, {len(splits.test):,} with {test_objects:,}",
            f"init     {self.init.description['from']}",
            *(f"         {note}" for note in self.init.notes),
            f"schedule {self.reason}",
            f"         {schedule.steps:,} steps of {schedule.batch_size} images, "
            f"shorter side {schedule.test_side}, anchors {' '.join(map(str, schedule.anchors))}",
        ]
        if faults.counts:
            counts = ", ".join(f"{kind}: {count}" for kind, count in faults.counts.items())
            lines.append(f"faults   {counts}")
            lines += [f"         {line.replace(chr(9), ': ')}" for line in faults.lines[:3]]
        return lines

    def train(
        self, dataset: DetectionDataset, lr: float, out: Path
    ) -> tuple[GeneralizedRCNN, DetectorTrainingSummary]:
        """Train a detector, or continue its training.

        Args:
            dataset: The images to train on.
            lr: The peak learning rate.
            out: The folder of this training.

        Returns:
            The detector, and a summary of its training.
        """
        digest = digest_images(dataset.images, map(Objects.to_bytes, dataset.objects))
        own = {"lr": lr, "train_images": len(dataset), "train_digest": digest}
        settings = self._description | self.schedule.to_dict() | own
        model = self.init.build_model(
            len(dataset.classes), self.schedule, masks=self.masks, seed=self.seed
        )
        return model, train_detector(
            model,
            dataset,
            self.schedule,
            out=out,
            lr=lr,
            seed=self.seed,
            masks=self.masks,
            compute=self.compute,
            settings=json.loads(json.dumps(settings)),
        )

    def search_lr(self, console: Console) -> dict[str, float | None]:
        """Train with each learning rate of the schedule, if it has several, and test on val.

        Args:
            console: Where progress is printed.

        Returns:
            AP on val by learning rate, None if training diverged; empty for a single one.

        Raises:
            WorkFailed: If training diverges with every learning rate.
        """
        ap_of_lr: dict[str, float | None] = {}
        for lr in self.schedule.lr if len(self.schedule.lr) > 1 else ():
            judge = self.splits.descriptions["val"]
            line = printable(f"lr       {lr:g}, compared on {judge}")
            console.print(line, soft_wrap=True, markup=False)
            try:
                model, _ = self.train(self.splits.search_train, lr, self.folder / f"lr-{lr:g}")
            except WorkFailed as error:
                console.print(f"         {printable(str(error))}", soft_wrap=True, markup=False)
                ap_of_lr[f"{lr:g}"] = None
            else:
                ap_of_lr[f"{lr:g}"] = validation_ap(model, self.splits.val, self.task, self.compute)
        if ap_of_lr and all(ap is None for ap in ap_of_lr.values()):
            raise WorkFailed(
                f"training diverged with every lr of {', '.join(ap_of_lr)}: give smaller ones"
            )
        return ap_of_lr

    def train_and_test(self, lr: float, ap_of_lr: Mapping[str, float | None]) -> TransferRecord:
        """Train the final detector, test it and write its files.

        Args:
            lr: The peak learning rate.
            ap_of_lr: The result of the search for it.

        Returns:
            The record.
        """
        model, training = self.train(self.splits.train, lr, self.folder)
        test = self.splits.test
        predictions, rows, skipped = detect_objects(model, test, self.compute)
        chosen: dict[str, object] = {"lr": lr}
        if ap_of_lr:
            chosen |= {"judged_on": self.splits.descriptions["val"], "searched": ap_of_lr}

        @rank_zero_only
        def write() -> TransferRecord:
            truth = [test.objects[i] for i in rows]
            pictures.draw_detections(test, rows, predictions, self.folder / "picture.png")
            self.write_detectron2(model)
            self.write_faults()
            environment = {key: self.environment[key] for key in ("commit", "device", "threads")}
            record = TransferRecord(
                protocol=f"{self.task}, {self.schedule.architecture}, {self.schedule.steps} steps",
                **self._description,
                parameters=self.schedule.to_dict() | {"epochs": round(training.epochs, 2)},
                chosen=chosen,
                tested_by=main_metric(self.source.metric, self.task),
                metrics=compute_metrics(predictions, truth, test.classes, self.task),
                n=len(rows),
                unreadable=len({*training.unreadable, *skipped}),
                faults=dict(self.source.faults.counts),
                folder=self.folder.name,
                picture=f"{self.folder.name}/picture.png",
                asked={**self.arguments},
                environment=environment | {"torch": self.environment["versions"]["torch"]},
                measured=utc_now(),
                training_seconds=training.seconds,
            )
            save_record(self.run, record)
            return record

        return write()

    def write_detectron2(self, model: GeneralizedRCNN) -> None:
        """Write a C4 detector on ResNet-50 or 101 as a file that detectron2 loads directly.

        Args:
            model: The trained detector.
        """
        if self.schedule.architecture != "c4":
            return
        if self.init.recipe.backbone not in ("resnet50", "resnet101"):
            return
        state = to_detectron2(model, self.schedule)
        with atomic_write(self.folder / "detectron2.pth") as part:
            torch.save(
                {"model": state, "__author__": "simsiam", "matching_heuristics": False}, part
            )

    def write_faults(self) -> None:
        """Write the faults of the annotations, if there are any, as faults.txt."""
        if lines := sorted(self.source.faults.lines):
            write_with_checksum(self.folder / "faults.txt", join_names(lines))


def main_metric(source_metric: str, task: str) -> str:
    """Name the metric that is commonly reported.

    Args:
        source_metric: "voc" or "coco", of the source.
        task: "detection" or "segmentation".

    Returns:
        A key of the record's metrics.
    """
    if source_metric == "voc":
        return "voc_box"
    return "coco_mask" if task == "segmentation" else "coco_box"


def select_schedule(
    name: str,
    dataset: DetectionDataset,
    overrides: Mapping[str, object],
    *,
    stem: str,
    masks: bool,
) -> tuple[Schedule, str]:
    """Choose the schedule.

    Args:
        name: One of SCHEDULES, or "auto".
        dataset: The training images.
        overrides: Fields of `Schedule`; they override the schedule's values.
        stem: "large" or "small", the stem of the ResNet.
        masks: Whether masks are learned.

    Returns:
        The schedule, and the reason for it.

    Raises:
        UsageError: If there is no such schedule, or an override is wrong.
    """
    if name in SCHEDULES:
        return Schedule.from_settings(SCHEDULES[name]() | dict(overrides)), f"{name}, by name"
    if name != "auto":
        raise unknown_name("schedule", name, [*SCHEDULES, "auto"])
    median_side = int(np.median([min(o.size) for o in dataset.objects]))
    boxes = np.concatenate([o.boxes for o in dataset.objects])
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    low, high = (float(q) for q in np.quantile(sides, [0.05, 0.95]))
    settings, reason = auto_schedule(len(dataset), median_side, (low, high), stem, masks)
    if overrides.get("architecture") == "fpn":  # which has defaults of its own for these
        for field in ("anchors", "stride"):
            settings.pop(field, None)
    return Schedule.from_settings(settings | dict(overrides)), reason


def validation_ap(
    model: GeneralizedRCNN, val: DetectionDataset, task: str, compute: Compute
) -> float:
    """Measure COCO's AP of a detector.

    Args:
        model: The detector.
        val: The images to test on.
        task: "detection" for the AP of boxes, "segmentation" for that of masks.
        compute: The device and the precision.

    Returns:
        AP in percent.
    """
    predictions, rows, _ = detect_objects(model, val, compute)
    metrics = compute_metrics(predictions, [val.objects[i] for i in rows], val.classes, task)
    return metrics["coco_mask" if task == "segmentation" else "coco_box"]["AP"]
