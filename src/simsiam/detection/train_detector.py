"""Training a detector, and applying it to images.

Each step draws its batch, flips, sizes, and samples of anchors and regions from random numbers that
are seeded by (seed, step), so a stopped training resumes bit for bit. Several processes share a
batch, its statistics and gradients. Each process draws random numbers for its own images, so the
result depends on the number of processes.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

from simsiam.data.batches import epoch_order, steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.transform import image_to_tensor
from simsiam.detection.annotations import DetectionDataset
from simsiam.detection.detector import Target
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
from simsiam.errors import UsageError, WorkFailed, none_readable
from simsiam.model.precision import Compute
from simsiam.monitoring.gauges import grad_norm
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.run_folder import TrainingFolder
from simsiam.training.loop import (
    Metrics,
    SkippedFiles,
    Training,
    load_state,
    run_training,
    save_state,
)
from simsiam.utils.system import process_context
from simsiam.utils.workers import CPU_CORES

RNG_STREAM = 3  # of the seed; the order of images and the views of pretraining use other streams
LOG_EVERY, SAVE_SECONDS = 20, 60.0

T = TypeVar("T")


class DetectionBatch(NamedTuple):
    """This process's part of a batch."""

    images: list[Tensor]  # (C, H, W) each, of different sizes
    targets: list[Target]
    skipped: list[tuple[str, str]]  # key and reason of unreadable files
    wait: float = 0.0  # seconds that the loop waited for them


@dataclass(frozen=True, eq=False)
class StepDataset(Dataset):
    """The batches of a training by step, as data loader workers read them."""

    dataset: DetectionDataset
    batch_size: int  # of all processes together
    seed: int  # of the order of images
    masks: bool  # whether targets have masks
    local_slice: slice  # this process's part of a batch

    def __getitem__(self, step: int) -> DetectionBatch | WorkFailed:
        """Read the images of a step.

        Args:
            step: The step, from 0.

        Returns:
            The batch, uint8; or the error if no image can be read, because an exception raised in a
            worker would arrive with a traceback.
        """
        epoch, batch = divmod(step, steps_per_epoch(len(self.dataset), self.batch_size))
        order = epoch_order(self.seed, epoch, len(self.dataset))
        first = batch * self.batch_size
        rows = order[first : first + self.batch_size][self.local_slice]
        skipped: list[tuple[str, str]] = []
        try:
            images, targets = zip(*(self.load_example(int(i), skipped) for i in rows), strict=True)
        except WorkFailed as error:
            return error
        return DetectionBatch(list(images), list(targets), skipped)

    def load_example(self, index: int, skipped: list[tuple[str, str]]) -> tuple[Tensor, Target]:
        """Read an image, or the next readable one if it is unreadable.

        Args:
            index: The index of the image.
            skipped: Collects key and reason of unreadable files.

        Returns:
            The image, (C, H, W) uint8, and its objects.

        Raises:
            WorkFailed: If no image can be read.
        """
        count = len(self.dataset)
        for row in (i % count for i in range(index, index + count)):
            try:
                pixels = read_image(self.dataset, row)
            except Unreadable as error:
                skipped.append((self.dataset.images.keys[row], str(error)))
                continue
            objects = self.dataset.objects[row]
            target = {
                "boxes": torch.from_numpy(objects.boxes),
                "labels": torch.from_numpy(objects.labels) + 1,
            }
            if self.masks:
                target["masks"] = torch.from_numpy(decode_masks(objects))
            return pixels, target
        raise none_readable(count, *skipped[0])


def read_image(dataset: DetectionDataset, index: int) -> Tensor:
    """Read one image.

    Args:
        dataset: The annotated images.
        index: Which of them.

    Returns:
        (C, H, W) uint8.

    Raises:
        Unreadable: If the file cannot be read, or its size differs from its annotation.
    """
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
    """Read the batches of steps start .. stop - 1.

    Args:
        step_dataset: Reads the batch of a step.
        start: The first step.
        stop: The step after the last one.
        device: Where batches are moved.

    Yields:
        Batches on the device; images are float32 between 0 and 1.

    Raises:
        WorkFailed: If no image can be read.
    """
    workers = CPU_CORES if device.type == "cuda" else 0  # on a CPU the network needs the cores
    loader = DataLoader(
        step_dataset,
        sampler=range(start, stop),
        batch_size=None,
        num_workers=workers,
        collate_fn=identity,
        multiprocessing_context=process_context() if workers else None,
    )
    clock = time.monotonic()
    for batch in loader:
        if isinstance(batch, WorkFailed):
            raise batch
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {k: v.to(device, non_blocking=True) for k, v in target.items()}
            for target in batch.targets
        ]
        yield DetectionBatch(images, targets, batch.skipped, time.monotonic() - clock)
        clock = time.monotonic()


def identity(batch: T) -> T:
    """Return the batch; a lambda could not be sent to workers.

    Args:
        batch: A batch.

    Returns:
        The batch.
    """
    return batch


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global random numbers for a step of this process.

    Args:
        seed: The seed of the training.
        step: The step.
    """
    sequence = np.random.SeedSequence([seed, RNG_STREAM, step, rank()])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))


def build_optimizer(model: nn.Module, schedule: Schedule) -> Optimizer:
    """Build SGD with momentum, without weight decay of batch norms, as in detectron2.

    Args:
        model: The detector.
        schedule: The weight decay.

    Returns:
        The optimizer; its lr is set in every step.
    """
    norms = [p for m in model.modules() if isinstance(m, BatchNorm) for p in m.parameters(False)]
    norm_ids = {id(p) for p in norms}
    rest = [p for p in model.parameters() if id(p) not in norm_ids]
    groups = [
        {"params": rest, "weight_decay": schedule.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return SGD(groups, lr=0.0, momentum=0.9, fused=True)


class DetectorTrainingSummary(NamedTuple):
    """What is known after a training."""

    unreadable: list[tuple[str, str]]  # key and reason of unreadable files
    seconds: float
    epochs: float


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
) -> DetectorTrainingSummary:
    """Train a detector, and set the running averages of its batch norms at the end.

    Writes last.pt, metrics.jsonl and TensorBoard's events. Called again with the same settings, it
    resumes from last.pt bit for bit.

    Args:
        model: The detector; it is trained in place.
        dataset: The annotated images to train on.
        schedule: Steps, batch size and learning rate schedule.
        out: The folder of this training.
        lr: The peak learning rate.
        seed: The seed of the order of images and of each step.
        masks: Whether masks are trained too.
        compute: Device and precision.
        settings: All that determines the training; a saved state must have the same.

    Returns:
        Unreadable files, seconds and epochs.

    Raises:
        UsageError: If the folder contains a training with other settings.
        WorkFailed: If the loss diverges or no image can be read.
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
                f"diverged at step {outcome.step} of {outcome.steps}: "
                f"give an lr smaller than {lr:g}"
            )
        if outcome.step == outcome.steps and schedule.precise_bn:
            update_bn_stats(model, training.step_dataset, schedule, compute)
            synchronize_replicas(model)
    outcome.raise_if_stopped("saved; the same command continues")
    return DetectorTrainingSummary(
        unreadable=sorted(training.unreadable),
        seconds=round(training.seconds, 1),
        epochs=schedule.steps / training.steps_per_epoch,
    )


class DetectorTraining(Training[DetectionBatch]):
    """The training of a detector, for the training loop.

    Args:
        model: The detector, on its device.
        dataset: The annotated images to train on.
        schedule: Steps, batch size and learning rate schedule.
        out: The folder of this training.
        lr: The peak learning rate.
        seed: The seed of the order of images and of each step.
        masks: Whether masks are trained too.
        compute: Device and precision.
        settings: All that determines the training.
    """

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
        self.steps = schedule.steps
        self.steps_per_epoch = steps_per_epoch(len(dataset), self.batch_size)
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
        """Read the batches of the remaining steps."""
        return load_batches(self.step_dataset, self.step, self.steps, self.compute.device)

    def train_step(self, batch: DetectionBatch) -> Tensor:
        """Make one step.

        Args:
            batch: The batch.

        Returns:
            The loss of this process, a scalar.
        """
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

    def metrics(self) -> dict[str, float]:
        """Average the latest losses over processes; add lr and gradient norm."""
        losses = {
            name: all_reduce_mean(loss, self.local_batch_size).item()
            for name, loss in self.losses.items()
        }
        total = {"loss": float(sum(losses.values()))}
        return total | losses | {"lr": self.step_lr, "grad_norm": grad_norm(self.model)}

    def log(self, record: Metrics) -> None:
        """Write a record to metrics.jsonl.

        Args:
            record: The record.
        """
        self.logger.log(record)

    def save(self, name: str) -> None:
        """Save the state as last.pt.

        Args:
            name: Always "last", because a schedule keeps no other checkpoints.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "unreadable": sorted(self.unreadable),
            "seconds": self.seconds,
        }
        save_state(self.out, self.settings, state)

    def record_unreadable(self, files: SkippedFiles) -> None:
        """Remember unreadable files.

        Args:
            files: Their keys and reasons.
        """
        self.unreadable |= set(files)


@torch.no_grad()
def update_bn_stats(
    model: nn.Module, step_dataset: StepDataset, schedule: Schedule, compute: Compute
) -> None:
    """Set the statistics of every batch norm to their mean over training batches (PreciseBN).

    Args:
        model: The detector, in training mode; its weights do not change.
        step_dataset: Reads the batch of a step.
        schedule: The number of batches, `precise_bn`.
        compute: Device and precision.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # selects the plain mean in torch
    for step, batch in enumerate(
        load_batches(step_dataset, 0, schedule.precise_bn, compute.device)
    ):
        seed_step(step_dataset.seed, step)
        with compute.autocast():
            model(batch.images, batch.targets)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


@torch.no_grad()
def detect_objects(
    model: nn.Module, dataset: DetectionDataset, compute: Compute
) -> tuple[list[Detections], np.ndarray, list[tuple[str, str]]]:
    """Apply a detector to images; several processes share them.

    Args:
        model: The detector.
        dataset: The images.
        compute: Device and precision.

    Returns:
        The detections in each readable image, the indices of these images (int64), and key and
        reason of the unreadable ones.

    Raises:
        WorkFailed: If no image can be read.
    """
    device = compute.device
    model.to(device).eval()
    detections, rows, skipped = list[Detections](), list[int](), list[tuple[str, str]]()
    for row in range(len(dataset))[local_slice(len(dataset))]:
        try:
            image = read_image(dataset, row).to(device).float() / 255
        except Unreadable as error:
            skipped.append((dataset.images.keys[row], str(error)))
            continue
        with compute.autocast():
            (output,) = model([image])
        arrays = {name: tensor.float().cpu().numpy() for name, tensor in output.items()}
        masks = [encode_mask(mask[0] >= 0.5) for mask in arrays.get("masks", ())]
        labels = arrays["labels"].astype(np.int64) - 1
        detections.append(Detections(arrays["boxes"], arrays["scores"], labels, tuple(masks)))
        rows.append(row)
    detections, rows = all_gather_objects(detections), all_gather_objects(rows)
    skipped = all_gather_objects(skipped)
    if not detections:
        raise none_readable(len(dataset), *skipped[0], "test images")
    return detections, np.array(rows), skipped
