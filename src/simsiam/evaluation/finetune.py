"""Fine-tuning: the backbone and a linear classifier on it trained end to end with labels, pretrained or from scratch.

The tutorial's protocol: 200 epochs, one validation accuracy an epoch, and, as in its pretraining, SGD with momentum
0.9, weight decay 5e-4 and a cosine lr, on crops and flips. Learning rates and batch are not in its text and are ours.

The curve chooses nothing. Its images are labeled ones kept out of training, and the accuracy is that of the last epoch,
on test images that are looked at once, at the end.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from simsiam.config.method import Method
from simsiam.config.methods import SUPERVISED
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import ViewBatch, iter_batches, steps_per_epoch
from simsiam.data.images import Images, hold_out, load_into_memory
from simsiam.distributed.collectives import (
    all_reduce_mean,
    wrap_ddp,
)
from simsiam.distributed.process_group import rank_zero_context, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm
from simsiam.errors import UsageError, WorkFailed
from simsiam.model.backbones import feature_dim
from simsiam.model.optimizers import set_lr
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.runs.encoder import build_backbone, eval_transform, load
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import file_sha256
from simsiam.training.loop import (
    SkippedFiles,
    Training,
    load_state,
    run_training,
    save_state,
)
from simsiam.utils.files import atomic_write, exclusive_lock

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
)  # Okabe and Ito's: told apart without seeing red or green ...
DASHES = ("-", "--", "-.", ":")  # ... and, with these, in gray


def finetune(
    run: str | os.PathLike[str],
    train: Images,
    test: Images,
    *,
    out: str | os.PathLike[str],
    val: Images | None = None,
    epochs: int = 200,
    labels: int | None = None,
    from_scratch: bool = False,
    base_lr: float = 0.1,
    head_lr: float = 1.0,
    batch_size: int = 64,
    weight_decay: float = 5e-4,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Fine-tune a run's backbone and a linear classifier on it, end to end.

    Views are the run's own crops and flips, without color. The folder `out` gets last.pt, curve.jsonl (one line an
    epoch) and curve.png. Called again with the same arguments, it continues from last.pt bit for bit.

    Args:
        run: The run folder.
        train: Labeled images to train on.
        test: Labeled images to test on, once, at the end.
        out: The folder of this fine-tuning.
        val: Labeled images for the curve; by default a tenth of the training images, kept out of training.
        epochs: Passes over the training images.
        labels: How many of the labeled images to use, each class in proportion; all by default.
        from_scratch: Start from a new backbone like the run's instead of its weights.
        base_lr: Peak learning rate of the backbone, for a batch of 256.
        head_lr: Peak learning rate of the classifier, for a batch of 256.
        batch_size: Images in a batch; never more than there are training images.
        weight_decay: On every parameter.
        seed: Of the classifier, of a new backbone, of the order of images and of the views.
        device: "cpu", "cuda", ...; "auto" takes a GPU where there is one.
        precision: "auto", "bfloat16" or "float32".

    Returns:
        The settings as `parameters`, `top1` and `top5` in percent over `n` test images, the curve as `val_top1`, the
        number of `unreadable` images, and the training `seconds`.

    Raises:
        UsageError: If the request is wrong.
        WorkFailed: If the loss diverged.
        Stopped: After SIGINT or SIGTERM; the state is saved.
    """
    pretrained, out = Run(run), Path(out)
    if not (isfinite(head_lr) and head_lr >= 0):
        raise UsageError(f"head_lr is {head_lr}; it is at least 0")
    views = replace(pretrained.recipe.method.views[0], jitter_p=0, gray=0, blur=0, solarize=0)
    method = replace(SUPERVISED, views=(views,), base_lr=base_lr, weight_decay=weight_decay)
    recipe = replace(
        pretrained.recipe,
        method=method,
        epochs=epochs,
        steps=None,
        batch_size=batch_size,
        seed=seed,
    )
    val_origin = "held out of the labeled images" if val is None else "given"
    train, val = split_train_val(train, test, val, labels, seed)
    limit = int(recipe.cache_gib * 2**30)
    train, unreadable_train = load_into_memory(train, limit)
    val, unreadable_val = load_into_memory(val, limit)
    recipe = replace(recipe, batch_size=min(batch_size, len(train)))
    compute = Compute.pick(device, precision)
    weights = pretrained.path / "backbone.safetensors"
    settings = {
        "start": f"random, seed {seed}"
        if from_scratch
        else f"{weights.name} {short_sha256(weights)}",
        "backbone": f"{recipe.backbone}, width {recipe.width}, {recipe.image_size} px",
        "epochs": epochs,
        "epoch": "last",
        "train_images": len(train),
        "val_images": len(val),
        "val": val_origin,
        "base_lr": base_lr,
        "head_lr": head_lr,
        "batch_size": recipe.batch_size,
        "momentum": method.momentum,
        "weight_decay": weight_decay,
        "crop_min": views.crop_min,
        "flip": views.flip,
        "seed": seed,
        "precision": compute.precision,
    }
    model = build_classifier(pretrained, len(train.classes), seed=seed, from_scratch=from_scratch)
    if world_size() > 1:
        convert_sync_batchnorm(model, compute.device)
    compute.place(model)
    optimizer = build_optimizer(model, method, head_lr)
    training = FineTuning(model, optimizer, train, val, recipe, compute, out, settings)
    training.unreadable |= {key for key, _ in unreadable_train + unreadable_val}
    with rank_zero_context(exclusive_lock(out / ".lock", str(out))):
        outcome = run_training(training)
    if outcome.diverged:
        epoch = -(-outcome.step // training.steps_per_epoch)
        raise WorkFailed(f"diverged in epoch {epoch}: take a base_lr smaller than {base_lr:g}")
    outcome.raise_if_stopped("saved; the same command continues")
    curve = [row["val_top1"] for row in training.rows]
    name = "from scratch" if from_scratch else "pretrained"
    plot_accuracy_curves({name: [curve]}, out / "curve.png")
    return {
        "parameters": settings,
        **accuracy(model, test, recipe, compute),
        "val_top1": curve,
        "unreadable": len(training.unreadable),
        "seconds": round(training.seconds, 1),
    }


class FineTuning(Training):
    """Cross-entropy of a classifier, as the training loop sees it; one validation accuracy an epoch."""

    def __init__(
        self,
        model: nn.Sequential,
        optimizer: Optimizer,
        train: Images,
        val: Images,
        recipe: ResolvedRecipe,
        compute: Compute,
        out: Path,
        settings: Mapping[str, object],
    ):
        self.model, self.optimizer, self.network = model, optimizer, wrap_ddp(model)
        self.train, self.val, self.recipe, self.compute = train, val, recipe, compute
        self.out, self.settings = out, settings
        self.batch_size, self.save_seconds = recipe.batch_size, recipe.save_seconds
        self.steps_per_epoch = steps_per_epoch(len(train), recipe.batch_size)
        self.steps = recipe.epochs * self.steps_per_epoch
        self.log_every = self.measure_every = self.steps_per_epoch
        self.labels = torch.from_numpy(train.labels).to(compute.device)
        initial = {"step": 0, "rows": [], "loss_sum": torch.zeros(()), "unreadable": []}
        state = load_state(out, settings, initial | {"seconds": 0.0})
        if "model" in state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]
        self.loss_sum = state["loss_sum"].to(compute.device)  # of the epoch so far
        self.unreadable = set(state["unreadable"])

    def batches(self) -> Iterator[ViewBatch]:
        return iter_batches(self.train, self.recipe, self.step, self.steps, self.compute.device)

    def train_step(self, batch: ViewBatch) -> Tensor:
        self.lr = set_lr(
            self.optimizer,
            batch.step,
            peak_lr=self.batch_size / 256,
            steps=self.steps,
            warmup_steps=0,
        )
        with self.compute.autocast():
            logits = self.network(batch.views[0])
        labels = self.labels[batch.index.to(self.compute.device)]
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        (batch.weight * loss).backward()
        self.optimizer.step()
        self.loss_sum = self.loss_sum + all_reduce_mean(loss, len(batch.index))
        return self.loss_sum

    def metrics(self) -> dict[str, Any]:
        steps = (self.step - 1) % self.steps_per_epoch + 1
        loss = self.loss_sum.item() / steps
        return {"loss": loss, "lr": self.lr["backbone"], "lr_head": self.lr["head"]}

    def measure(self) -> dict[str, Any]:
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return {"val_top1": accuracy(self.model, self.val, self.recipe, self.compute)["top1"]}

    def log(self, record: dict[str, Any]) -> None:
        if "val_top1" in record:  # once an epoch
            names = ("loss", "lr", "lr_head", "val_top1")
            epoch = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
            self.rows.append(epoch | {name: record[name] for name in names})
            write_curve(self.out / "curve.jsonl", self.rows)

    def save(self, name: str) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "loss_sum": self.loss_sum,
            "unreadable": sorted(self.unreadable),
            "seconds": self.seconds,
        }
        save_state(self.out, self.settings, state)

    def record_unreadable(self, files: SkippedFiles) -> None:
        self.unreadable |= {key for key, _ in files}


def split_train_val(
    train: Images, test: Images, val: Images | None, labels: int | None, seed: int
) -> tuple[Images, Images]:
    """(the images to train on, those of the curve): functions of (labels, seed), each class in proportion."""
    for name, images in {"train": train, "test": test, "val": test if val is None else val}.items():
        if images.labels is None:
            raise UsageError(f"fine-tuning needs labels, and the {name} images have none")
        if images.classes != train.classes:
            raise UsageError(f"the {name} images have other classes than the training images")
    least = len(train.classes)
    if labels is not None and not least <= labels <= len(train):
        raise UsageError(
            f"labels is {labels}; it lies between {least}, one a class, and {len(train)}, all there are"
        )
    if labels is not None and labels < len(train):
        _, train = hold_out(train, labels, seed)
    if val is not None:
        return train, val
    if len(train) < 2 * least:
        few = f"{len(train)} labeled images of {least} classes are too few to keep some out for the curve"
        raise UsageError(f"{few}: take {2 * least} labels or more, or give images to validate on")
    return hold_out(train, min(max(len(train) // 10, 1), 5000), seed)


def build_classifier(run: Run, classes: int, *, seed: int, from_scratch: bool) -> nn.Sequential:
    """`backbone`, the run's or a new one, and `head`: images (N, C, H, W) to logits (N, classes).

    The head depends on the seed alone, and a new backbone is the one that pretraining with this seed starts from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(run.recipe)
        head = nn.Linear(feature_dim(backbone), classes)
        nn.init.normal_(head.weight, std=0.01)  # as in linear evaluation (appendix A)
        nn.init.zeros_(head.bias)
    return nn.Sequential(
        OrderedDict(backbone=backbone if from_scratch else load(run.path), head=head)
    ).train()


def build_optimizer(model: nn.Sequential, method: Method, head_lr: float) -> Optimizer:
    """SGD over backbone and head, each with its own lr; weight decay on every parameter, as in pretraining."""
    lrs = {"backbone": method.base_lr, "head": head_lr}
    groups = [
        {
            "name": name,
            "schedule": "cosine",
            "lr_scale": lrs[name],
            "params": list(part.parameters()),
        }
        for name, part in model.named_children()
    ]
    return SGD(
        groups,
        lr=method.base_lr,
        momentum=method.momentum,
        weight_decay=method.weight_decay,
        fused=True,
    )


def accuracy(
    model: nn.Module, images: Images, recipe: ResolvedRecipe, compute: Compute
) -> dict[str, float]:
    """`top1` and `top5` in percent (top5 of as many classes as there are) over the `n` images that could be read."""
    found = extract_features(model, images, eval_transform(recipe), compute=compute)
    assert images.labels is not None
    best = found.matrices[0].topk(min(5, len(images.classes))).indices
    hits = best == torch.from_numpy(images.labels[found.kept_indices])[:, None]
    top1, top5 = (
        round(100 * part.any(1).sum().item() / len(hits), 3) for part in (hits[:, :1], hits)
    )
    return {"top1": top1, "top5": top5, "n": len(hits)}


@rank_zero_only
def write_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line an epoch."""
    with atomic_write(path) as part:
        part.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def short_sha256(path: Path) -> str:
    """What tells one file of weights from another; "" where there is none."""
    return file_sha256(path)[:16] if path.exists() else ""


@rank_zero_only
def plot_accuracy_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw validation accuracies as a PNG, 1400 x 900: a curve a seed under each name, pale, and their mean, bold.

    >>> compare({"pretrained": [r["val_top1"] for r in pretrained], "from scratch": [...]}, "finetune.png")
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), dpi=200, layout="constrained")
    axes = figure.subplots()
    for (name, seeds), color, dash in zip(curves.items(), cycle(COLORS), cycle(DASHES)):
        if len({len(curve) for curve in seeds}) != 1:
            raise UsageError(
                f"the curves of {name!r} differ in epochs: {[len(curve) for curve in seeds]}"
            )
        values = np.array(seeds)  # (seeds, epochs)
        last, epoch = values[:, -1], np.arange(1, values.shape[1] + 1)
        spread, n = (
            (f" ± {last.std(ddof=1):.1f}", f", {len(last)} seeds") if len(last) > 1 else ("", "")
        )
        label = f"{name}: {last.mean():.1f}{spread} at the end{n}"
        marker = "o" if len(epoch) == 1 else ""
        if len(values) > 1:
            axes.plot(epoch, values.T, color=color, linewidth=0.8, alpha=0.4, marker=marker)
        axes.plot(
            epoch, values.mean(0), dash, color=color, linewidth=2.2, marker=marker, label=label
        )
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    with atomic_write(Path(path)) as part:
        figure.savefig(part, format="png")
