"""Fine-tuning a detector: batches as functions of (seed, step), the loop, exact averages at its end, what it finds.

Every step draws its flips, sizes and samples of anchors and regions from random numbers seeded by (seed, step), so a
run that was stopped goes on bit for bit. Several processes share a batch, its statistics and gradients; each draws for
its own images, so their number is among what a run depends on.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

from simsiam.data.batches import epoch_order, steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.transform import image_to_tensor
from simsiam.detection.annotations import DetectionDataset
from simsiam.detection.metrics import Detections, decode_masks, encode_mask
from simsiam.detection.schedules import Schedule
from simsiam.distributed.collectives import (
    all_gather_objects,
    all_reduce_mean,
    wrap_ddp,
)
from simsiam.distributed.process_group import local_slice, rank, world_size
from simsiam.distributed.sync_batch_norm import (
    BatchNorm,
    convert_sync_batchnorm,
    synchronize_replicas,
)
from simsiam.errors import UsageError, WorkFailed
from simsiam.model.precision import Compute
from simsiam.monitoring.gauges import grad_norm
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.run_folder import TrainingFolder
from simsiam.training.loop import SkippedFiles, Training, load_state, run_training, save_state
from simsiam.utils.workers import CPU_CORES

RNG_STREAM = 3  # the seed's stream for what a step draws; batches.ORDER and views have others
LOG_EVERY, SAVE_SECONDS = 20, 60.0


class DetectionBatch(NamedTuple):
    images: list[Tensor]  # each (C, H, W), of its own size
    targets: list[dict[str, Tensor]]  # boxes (K, 4), labels (K,) from 1, perhaps masks (K, H, W)
    skipped: list[tuple[str, str]]  # unreadable files met on the way: key and reason
    wait: float = 0.0  # seconds that the loop waited for them


@dataclass(frozen=True, eq=False)
class StepDataset(Dataset):
    """A step to its images and targets: what a worker does."""

    dataset: DetectionDataset
    batch_size: int
    seed: int
    masks: bool
    local_slice: slice  # this process's part of a batch

    def __getitem__(self, step: int) -> DetectionBatch | WorkFailed:
        per_epoch = steps_per_epoch(len(self.dataset), self.batch_size)
        first = step % per_epoch * self.batch_size
        rows = epoch_order(self.seed, step // per_epoch, len(self.dataset))[
            first : first + self.batch_size
        ][self.local_slice]
        skipped: list[tuple[str, str]] = []
        try:
            images, targets = zip(*(self.load_example(int(i), skipped) for i in rows), strict=True)
        except (
            WorkFailed
        ) as error:  # handed over rather than raised: a worker's exceptions arrive with a traceback
            return error
        return DetectionBatch(list(images), list(targets), skipped)

    def load_example(
        self, index: int, skipped: list[tuple[str, str]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i, or in the place of an unreadable one the next that is not."""
        for at in (row % len(self.dataset) for row in range(index, index + len(self.dataset))):
            try:
                pixels = read_image(self.dataset, at)
            except Unreadable as error:
                skipped.append((self.dataset.images.keys[at], str(error)))
                continue
            objects = self.dataset.objects[at]
            target = {
                "boxes": torch.from_numpy(objects.boxes),
                "labels": torch.from_numpy(objects.labels) + 1,
            }
            return pixels, target | (
                {"masks": torch.from_numpy(decode_masks(objects))} if self.masks else {}
            )
        raise WorkFailed(
            f"none of the {len(self.dataset)} images can be read; the first reason: {skipped[0][1]}"
        )


def read_image(dataset: DetectionDataset, index: int) -> Tensor:
    """Image i, uint8 (C, H, W). Raises Unreadable, also for an image of another size than its boxes are drawn on."""
    pixels = dataset.images.read(index)
    h, w = dataset.objects[index].size
    if pixels.shape[:2] != (h, w):
        raise Unreadable(
            f"{pixels.shape[1]} x {pixels.shape[0]} pixels upright, annotated as {w} x {h}"
        )
    return image_to_tensor(pixels)[0]


def load_batches(
    step_dataset: StepDataset, start: int, stop: int, device: torch.device
) -> Iterator[DetectionBatch]:
    """What is learned from in steps start .. stop - 1, on the device, images as floats in 0..1."""
    workers, clock = (
        CPU_CORES if device.type == "cuda" else 0,
        time.monotonic(),
    )  # on a CPU the network has all cores
    how: dict[str, Any] = {"batch_size": None, "num_workers": workers, "collate_fn": identity}
    for made in DataLoader(step_dataset, sampler=range(start, stop), **how):
        if isinstance(made, WorkFailed):
            raise made
        images = [image.to(device, non_blocking=True).float() / 255 for image in made.images]
        targets = [
            {k: v.to(device, non_blocking=True) for k, v in target.items()}
            for target in made.targets
        ]
        yield DetectionBatch(images, targets, made.skipped, time.monotonic() - clock)
        clock = time.monotonic()


def identity(batch: Any) -> Any:
    return batch


def seed_step(seed: int, step: int) -> None:
    """Seed torch's random numbers for a step of this process."""
    torch.manual_seed(
        int(
            np.random.SeedSequence([seed, RNG_STREAM, step, rank()]).generate_state(1, np.uint64)[0]
            >> 1
        )
    )


def build_optimizer(model: nn.Module, schedule: Schedule) -> Optimizer:
    """SGD; batch norms' weights and biases do not decay, as in detectron2."""
    norms = [
        p
        for m in model.modules()
        if isinstance(m, BatchNorm)
        for p in m.parameters(False)
    ]
    free = {id(p) for p in norms}
    rest = [p for p in model.parameters() if id(p) not in free]
    groups = [
        {"params": rest, "weight_decay": schedule.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return SGD(groups, lr=0.0, momentum=0.9, fused=True)


def train_detector(
    model: nn.Module,
    dataset: DetectionDataset,
    schedule: Schedule,
    *,
    out: Path,
    lr: float,
    seed: int,
    masks: bool,
    compute: Compute,
    settings: Mapping[str, object],
) -> dict[str, Any]:
    """Train a detector, and set the running averages of its batch norms at the end.

    The folder `out` gets last.pt, metrics.jsonl and TensorBoard's events. Called again with the same settings, it
    continues from last.pt bit for bit.

    Args:
        model: The detector; it is trained in place.
        dataset: The annotated images to train on.
        schedule: Steps, batch size and learning rate schedule.
        out: The folder of this training.
        lr: The peak learning rate.
        seed: Of the order of images and of what each step draws.
        masks: Whether masks are trained too.
        compute: Device and precision.
        settings: What determines the training; a saved state must have the same.

    Returns:
        The `unreadable` images with the reason, the training `seconds`, and the `epochs`.

    Raises:
        UsageError: If the folder holds a training with other settings.
        WorkFailed: If the loss diverged.
        Stopped: After SIGINT or SIGTERM; the state is saved.
    """
    compute.place(model).train()
    if world_size() > 1:
        convert_sync_batchnorm(model, compute.device)
    training = DetectorTraining(model, dataset, schedule, out, lr, seed, masks, compute, settings)
    with (
        torch.random.fork_rng(),
        MetricsLogger(TrainingFolder(out), training.step) as training.logger,
    ):
        outcome = run_training(training)
        if outcome.diverged:
            raise WorkFailed(
                f"diverged at step {outcome.step} of {outcome.steps}: take an lr smaller than {lr:g}"
            )
        if outcome.step == outcome.steps and schedule.precise_bn:
            update_bn_stats(model, training.step_dataset, schedule, compute)
            synchronize_replicas(model)
    outcome.raise_if_stopped("saved; the same command continues")
    return {
        "unreadable": sorted(training.unreadable),
        "seconds": round(training.seconds, 1),
        "epochs": schedule.steps / training.steps_per_epoch,
    }


class DetectorTraining(Training):
    """A detector's losses, as the training loop sees them. Every step seeds torch's random numbers by (seed, step)."""

    log_every = LOG_EVERY
    save_seconds = SAVE_SECONDS
    logger: MetricsLogger

    def __init__(
        self,
        model: nn.Module,
        dataset: DetectionDataset,
        schedule: Schedule,
        out: Path,
        lr: float,
        seed: int,
        masks: bool,
        compute: Compute,
        settings: Mapping[str, object],
    ):
        self.batch_size = min(schedule.batch_size, len(dataset))
        if self.batch_size < world_size():
            raise UsageError(
                f"batch_size is {self.batch_size} and there are {world_size()} processes: "
                "each needs an image"
            )
        self.steps, self.steps_per_epoch = (
            schedule.steps,
            steps_per_epoch(len(dataset), self.batch_size),
        )
        images = local_slice(self.batch_size)
        self.step_dataset = StepDataset(dataset, self.batch_size, seed, masks, images)
        self.local_batch_size = images.stop - images.start
        # Gradients are averaged over processes; this makes it the average over images.
        self.weight = self.local_batch_size * world_size() / self.batch_size
        self.model, self.network = model, wrap_ddp(model)
        self.optimizer = build_optimizer(model, schedule)
        self.schedule, self.lr, self.seed, self.compute = schedule, lr, seed, compute
        self.out, self.settings = out, settings
        state = load_state(out, settings, {"step": 0, "unreadable": [], "seconds": 0.0})
        if "model" in state:
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.unreadable = set(map(tuple, state["unreadable"]))

    def batches(self) -> Iterator[DetectionBatch]:
        return load_batches(self.step_dataset, self.step, self.steps, self.compute.device)

    def train_step(self, batch: DetectionBatch) -> Tensor:
        seed_step(self.seed, self.step)
        self.step_lr = self.lr * self.schedule.lr_factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.step_lr
        with self.compute.autocast():
            self.losses = self.network(batch.images, batch.targets)
        loss = torch.stack(list(self.losses.values())).sum()
        self.optimizer.zero_grad()
        (self.weight * loss).backward()
        self.optimizer.step()
        return loss

    def metrics(self) -> dict[str, Any]:
        losses = {
            name: all_reduce_mean(loss, self.local_batch_size).item()
            for name, loss in self.losses.items()
        }
        total = {"loss": sum(losses.values())}
        return total | losses | {"lr": self.step_lr, "grad_norm": grad_norm(self.model)}

    def log(self, record: dict[str, Any]) -> None:
        self.logger.log(record)

    def save(self, name: str) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "unreadable": sorted(self.unreadable),
            "seconds": self.seconds,
        }
        save_state(self.out, self.settings, state)

    def record_unreadable(self, files: SkippedFiles) -> None:
        self.unreadable |= set(files)


@torch.no_grad()
def update_bn_stats(
    model: nn.Module, step_dataset: StepDataset, schedule: Schedule, compute: Compute
) -> None:
    """Give every batch norm the plain mean of its statistics over `precise_bn` batches of training (PreciseBN)."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    before = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # torch's word for the plain mean
    for step, batch in enumerate(
        load_batches(step_dataset, 0, schedule.precise_bn, compute.device)
    ):
        seed_step(step_dataset.seed, step)
        with compute.autocast():
            model(batch.images, batch.targets)
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum


@torch.no_grad()
def detect_objects(
    model: nn.Module, dataset: DetectionDataset, compute: Compute
) -> tuple[list[Detections], np.ndarray, list[tuple[str, str]]]:
    """What the detector finds in each image that can be read, their positions, and key and reason of the others."""
    device, precision = compute
    model.to(device).eval()
    found, kept, skipped = list[Detections](), list[int](), list[tuple[str, str]]()
    for i in range(len(dataset))[local_slice(len(dataset))]:
        try:
            image = read_image(dataset, i).to(device).float() / 255
        except Unreadable as error:
            skipped.append((dataset.images.keys[i], str(error)))
            continue
        with compute.autocast():
            (seen,) = model([image])
        boxes, scores, labels = (
            seen[key].float().cpu().numpy() for key in ("boxes", "scores", "labels")
        )
        masks = (
            [encode_mask(mask[0] >= 0.5) for mask in seen["masks"].float().cpu().numpy()]
            if "masks" in seen
            else []
        )
        found.append(Detections(boxes, scores, labels.astype(np.int64) - 1, tuple(masks)))
        kept.append(i)
    found, kept, skipped = (
        all_gather_objects(found),
        all_gather_objects(kept),
        all_gather_objects(skipped),
    )
    if not found:
        raise WorkFailed(
            f"none of the {len(dataset)} test images can be read; the first reason: {skipped[0][1]}"
        )
    return found, np.array(kept), skipped
