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

from simsiam.data.batches import order, steps_per_epoch
from simsiam.data.decode import Unreadable
from simsiam.data.transform import tensor
from simsiam.detection.annotations import Annotated
from simsiam.detection.metrics import Found, packed, pixels_of
from simsiam.detection.schedules import Schedule
from simsiam.distributed.collectives import mean, most, parallel, union
from simsiam.distributed.process_group import by_first, count, rank, share
from simsiam.distributed.sync_batch_norm import settle, synchronize
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.evaluation.finetune import restore
from simsiam.model.precision import autocast
from simsiam.monitoring.gauges import finite, grad_norm
from simsiam.runs.journal import Journal
from simsiam.runs.run_folder import Folder
from simsiam.training.interrupt import Interrupt
from simsiam.training.progress import Line, Stopwatch
from simsiam.utils.files import whole
from simsiam.utils.workers import CORES

SAMPLES = 3  # the seed's stream for what a step draws; batches.ORDER and views have others
LOG_EVERY, SAVE_SECONDS = 20, 60.0


class Batch(NamedTuple):
    images: list[Tensor]  # each (C, H, W), of its own size
    targets: list[dict[str, Tensor]]  # boxes (K, 4), labels (K,) from 1, perhaps masks (K, H, W)
    skipped: list[tuple[str, str]]  # unreadable files met on the way: key and reason
    wait: float = 0.0  # seconds that the loop waited for them


class Where(NamedTuple):
    """The machine's part of a fine-tuning."""

    device: torch.device
    precision: str


@dataclass(frozen=True, eq=False)
class Steps(Dataset):
    """A step to its images and targets: what a worker does."""

    part: Annotated
    batch_size: int
    seed: int
    masks: bool
    mine: slice  # this process's part of a batch

    def __getitem__(self, step: int) -> Batch | WorkFailed:
        per_epoch = steps_per_epoch(len(self.part), self.batch_size)
        first = step % per_epoch * self.batch_size
        rows = order(self.seed, step // per_epoch, len(self.part))[first : first + self.batch_size][self.mine]
        skipped: list[tuple[str, str]] = []
        try:
            images, targets = zip(*(self.example(int(i), skipped) for i in rows), strict=True)
        except WorkFailed as error:  # handed over rather than raised: a worker's exceptions arrive with a traceback
            return error
        return Batch(list(images), list(targets), skipped)

    def example(self, i: int, skipped: list[tuple[str, str]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i, or in the place of an unreadable one the next that is not."""
        for at in (row % len(self.part) for row in range(i, i + len(self.part))):
            try:
                pixels = read(self.part, at)
            except Unreadable as error:
                skipped.append((self.part.images.keys[at], str(error)))
                continue
            objects = self.part.objects[at]
            target = {"boxes": torch.from_numpy(objects.boxes), "labels": torch.from_numpy(objects.labels) + 1}
            return pixels, target | ({"masks": torch.from_numpy(pixels_of(objects))} if self.masks else {})
        raise WorkFailed(f"none of the {len(self.part)} images can be read; the first reason: {skipped[0][1]}")


def read(part: Annotated, i: int) -> Tensor:
    """Image i, uint8 (C, H, W). Raises Unreadable, also for an image of another size than its boxes are drawn on."""
    pixels = part.images.read(i)
    h, w = part.objects[i].size
    if pixels.shape[:2] != (h, w):
        raise Unreadable(f"{pixels.shape[1]} x {pixels.shape[0]} pixels upright, annotated as {w} x {h}")
    return tensor(pixels)[0]


def batches(steps: Steps, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """What is learned from in steps start .. stop - 1, on the device, images as floats in 0..1."""
    workers, clock = CORES if device.type == "cuda" else 0, time.monotonic()  # on a CPU the network has all cores
    how: dict[str, Any] = {"batch_size": None, "num_workers": workers, "collate_fn": as_it_is}
    for made in DataLoader(steps, sampler=range(start, stop), **how):
        if isinstance(made, WorkFailed):
            raise made
        images = [image.to(device, non_blocking=True).float() / 255 for image in made.images]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in made.targets]
        yield Batch(images, targets, made.skipped, time.monotonic() - clock)
        clock = time.monotonic()


def as_it_is(made: Any) -> Any:
    return made


def sow(seed: int, step: int) -> None:
    """Seed torch's random numbers for a step of this process."""
    torch.manual_seed(int(np.random.SeedSequence([seed, SAMPLES, step, rank()]).generate_state(1, np.uint64)[0] >> 1))


def optimizer_of(model: nn.Module, how: Schedule) -> Optimizer:
    """SGD; batch norms' weights and biases do not decay, as in detectron2."""
    norms = [p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters(False)]
    free = {id(p) for p in norms}
    rest = [p for p in model.parameters() if id(p) not in free]
    groups = [{"params": rest, "weight_decay": how.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return SGD(groups, lr=0.0, momentum=0.9, fused=True)


def train(
    model: nn.Module, part: Annotated, how: Schedule, *, out: Path, lr: float, seed: int, masks: bool, where: Where,
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Train the detector on the learnable images, and set its batch norms' averages; unreadable images and seconds.

    The folder gets last.pt, metrics.jsonl and TensorBoard's events. Called again with the same settings it goes on from
    last.pt. Raises UsageError for other settings there, WorkFailed for a diverged loss, and Stopped after a signal.
    """
    device, precision = where
    batch_size = min(how.batch_size, len(part))
    if batch_size < count():
        raise UsageError(f"batch_size is {batch_size} and there are {count()} processes: each needs an image")
    state = by_first(restore)(out, settings)
    mine, per_epoch = share(batch_size), steps_per_epoch(len(part), batch_size)
    steps = Steps(part, batch_size, seed, masks, mine)
    model.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if count() > 1:
        synchronize(model)
    network, optimizer = parallel(model), optimizer_of(model, how)
    weight = (mine.stop - mine.start) * count() / batch_size  # processes are averaged, and images should be
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = step = state["step"]
    unreadable = set(map(tuple, state["unreadable"]))

    def save() -> None:
        moved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        moved |= {"unreadable": sorted(unreadable), "seconds": watch.seconds}
        with whole(out / "last.pt") as part, open(part, "wb") as file:
            torch.save({"settings": settings} | moved, file)

    with (
        torch.random.fork_rng(),
        Journal(Folder(out), start) as journal,
        Line(start, how.steps, per_epoch) as line,
        Interrupt() as interrupt,
    ):
        watch = Stopwatch(state["seconds"])
        for batch in batches(steps, start, how.steps, device):
            sow(seed, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * how.share(step)
            with autocast(device, precision):
                losses = network(batch.images, batch.targets)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            (weight * loss).backward()
            optimizer.step()

            step += 1
            watch.count(batch_size, batch.wait)
            # What one process is told or meets, all act on at this same step.
            signum, stale, broken = most(interrupt.signum, watch.stale(SAVE_SECONDS), len(batch.skipped))
            if broken:
                unreadable |= set(union(batch.skipped))
            last, stopping = step == how.steps, bool(signum)
            logged = last or step == 1 or step % LOG_EVERY == 0
            saved = last or stopping or bool(stale)
            with watch.paused():
                ill = (logged or saved) and not finite(loss, model if saved else None)
                if any(most(ill)):
                    raise WorkFailed(f"diverged at step {step} of {how.steps}: take an lr smaller than {lr:g}")
                if logged:
                    each = {name: mean(value, mine.stop - mine.start).item() for name, value in losses.items()}
                    found = {"loss": sum(each.values())} | each
                    found |= {"lr": lr * how.share(step - 1), "grad_norm": grad_norm(model), **watch.rates()}
                    journal.log({"step": step, "epoch": round(step / per_epoch, 4)} | found)
                    line.show(step, found)
                if saved:
                    settle(model)
                    save()
            if stopping:
                break
        if step < how.steps:
            raise Stopped(f"stopped at step {step} of {how.steps}, saved; the same command goes on", signum)
        if how.precise_bn:
            take_averages(model, steps, how, where)
            settle(model)
    interrupt.pass_on()
    return {"unreadable": sorted(unreadable), "seconds": round(watch.seconds, 1), "epochs": how.steps / per_epoch}


@torch.no_grad()
def take_averages(model: nn.Module, steps: Steps, how: Schedule, where: Where) -> None:
    """Give every batch norm the plain mean of its statistics over `precise_bn` batches of training (PreciseBN)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # torch's word for the plain mean
    for step, batch in enumerate(batches(steps, 0, how.precise_bn, where.device)):
        sow(steps.seed, step)
        with autocast(*where):
            model(batch.images, batch.targets)
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum


@torch.no_grad()
def detect(model: nn.Module, part: Annotated, where: Where) -> tuple[list[Found], np.ndarray, list[tuple[str, str]]]:
    """What the detector finds in each image that can be read, their positions, and key and reason of the others."""
    device, precision = where
    model.to(device).eval()
    found, kept, skipped = list[Found](), list[int](), list[tuple[str, str]]()
    for i in range(len(part))[share(len(part))]:
        try:
            image = read(part, i).to(device).float() / 255
        except Unreadable as error:
            skipped.append((part.images.keys[i], str(error)))
            continue
        with autocast(device, precision):
            (seen,) = model([image])
        boxes, scores, labels = (seen[key].float().cpu().numpy() for key in ("boxes", "scores", "labels"))
        masks = [packed(mask[0] >= 0.5) for mask in seen["masks"].float().cpu().numpy()] if "masks" in seen else []
        found.append(Found(boxes, scores, labels.astype(np.int64) - 1, tuple(masks)))
        kept.append(i)
    found, kept, skipped = union(found), union(kept), union(skipped)
    if not found:
        raise WorkFailed(f"none of the {len(part)} test images can be read; the first reason: {skipped[0][1]}")
    return found, np.array(kept), skipped
