"""Fine-tuning a detector: batches as functions of (seed, step), the loop, exact averages at its end, what it finds.

Every step draws its flips, sizes and samples of anchors and regions from random numbers seeded by (seed, step), so a
run that was stopped goes on bit for bit. Several processes share a batch, its statistics and gradients; each draws for
its own images, so their number is among what a run depends on.
"""

import time
from collections.abc import Iterator
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
    all_reduce_max,
    all_reduce_mean,
    wrap_ddp,
)
from simsiam.distributed.process_group import local_slice, rank, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm, synchronize_replicas
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.evaluation.finetune import restore
from simsiam.model.precision import Compute
from simsiam.monitoring.gauges import all_finite, grad_norm
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.run_folder import TrainingFolder
from simsiam.training.interrupt import InterruptHandler
from simsiam.training.progress import ProgressLine, Stopwatch
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

RNG_STREAM = 3  # the seed's stream for what a step draws; batches.ORDER and views have others
LOG_EVERY, SAVE_SECONDS = 20, 60.0


class DetectionBatch(NamedTuple):
    images: list[Tensor]  # each (C, H, W), of its own size
    targets: list[dict[str, Tensor]]  # boxes (K, 4), labels (K,) from 1, perhaps masks (K, H, W)
    skipped: list[tuple[str, str]]  # unreadable files met on the way: key and reason
    wait_seconds: float = 0.0  # seconds that the loop waited for them


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
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
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
    model: nn.Module, dataset: DetectionDataset, schedule: Schedule, *, out: Path, lr: float, seed: int, masks: bool, compute: Compute,
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Train the detector on the learnable images, and set its batch norms' averages; unreadable images and seconds.

    The folder gets last.pt, metrics.jsonl and TensorBoard's events. Called again with the same settings it goes on from
    last.pt. Raises UsageError for other settings there, WorkFailed for a diverged loss, and Stopped after a signal.
    """
    device, precision = compute
    batch_size = min(schedule.batch_size, len(dataset))
    if batch_size < world_size():
        raise UsageError(
            f"batch_size is {batch_size} and there are {world_size()} processes: each needs an image"
        )
    state = rank_zero_only(restore)(out, settings)
    mine, per_epoch = local_slice(batch_size), steps_per_epoch(len(dataset), batch_size)
    steps = StepDataset(dataset, batch_size, seed, masks, mine)
    compute.place(model).train()
    if world_size() > 1:
        convert_sync_batchnorm(model)
    network, optimizer = wrap_ddp(model), build_optimizer(model, schedule)
    weight = (
        (mine.stop - mine.start) * world_size() / batch_size
    )  # processes are averaged, and images should be
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = step = state["step"]
    unreadable = set(map(tuple, state["unreadable"]))

    def save() -> None:
        moved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        moved |= {"unreadable": sorted(unreadable), "seconds": watch.seconds}
        with atomic_write(out / "last.pt") as part, open(part, "wb") as file:
            torch.save({"settings": settings} | moved, file)

    with (
        torch.random.fork_rng(),
        MetricsLogger(TrainingFolder(out), start) as journal,
        ProgressLine(start, schedule.steps, per_epoch) as line,
        InterruptHandler() as interrupt,
    ):
        watch = Stopwatch(state["seconds"])
        for batch in load_batches(steps, start, schedule.steps, device):
            seed_step(seed, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule.lr_factor(step)
            with compute.autocast():
                losses = network(batch.images, batch.targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            (weight * loss).backward()
            optimizer.step()

            step += 1
            watch.record_step(batch_size, batch.wait_seconds)
            # What one process is told or meets, all act on at this same step.
            signum, stale, broken = all_reduce_max(
                interrupt.signum, watch.save_due(SAVE_SECONDS), len(batch.skipped)
            )
            if broken:
                unreadable |= set(all_gather_objects(batch.skipped))
            last, stopping = step == schedule.steps, bool(signum)
            logged = last or step == 1 or step % LOG_EVERY == 0
            saved = last or stopping or bool(stale)
            with watch.paused():
                ill = (logged or saved) and not all_finite(loss, model if saved else None)
                if any(all_reduce_max(ill)):
                    raise WorkFailed(
                        f"diverged at step {step} of {schedule.steps}: take an lr smaller than {lr:g}"
                    )
                if logged:
                    each = {
                        name: all_reduce_mean(value, mine.stop - mine.start).item()
                        for name, value in losses.items()
                    }
                    found = {"loss": sum(each.values())} | each
                    found |= {
                        "lr": lr * schedule.lr_factor(step - 1),
                        "grad_norm": grad_norm(model),
                        **watch.rates(),
                    }
                    journal.log({"step": step, "epoch": round(step / per_epoch, 4)} | found)
                    line.update(step, found)
                if saved:
                    synchronize_replicas(model)
                    save()
            if stopping:
                break
        if step < schedule.steps:
            raise Stopped(
                f"stopped at step {step} of {schedule.steps}, saved; the same command goes on",
                signum,
            )
        if schedule.precise_bn:
            update_bn_stats(model, steps, schedule, compute)
            synchronize_replicas(model)
    interrupt.raise_pending()
    return {
        "unreadable": sorted(unreadable),
        "seconds": round(watch.seconds, 1),
        "epochs": schedule.steps / per_epoch,
    }


@torch.no_grad()
def update_bn_stats(
    model: nn.Module, step_dataset: StepDataset, schedule: Schedule, compute: Compute
) -> None:
    """Give every batch norm the plain mean of its statistics over `precise_bn` batches of training (PreciseBN)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
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
