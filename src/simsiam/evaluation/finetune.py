"""Fine-tuning: train a backbone and a linear classifier on it with labels, end to end.

The protocol is that of the authors' tutorial: 200 epochs, one validation accuracy per epoch, and,
as in its pretraining, SGD with momentum 0.9, weight decay 5e-4 and a cosine lr, on crops and flips.
The tutorial gives neither learning rates nor the batch size; they are ours.

The validation curve chooses nothing. Its images are labeled images that are not trained on. The
result is the accuracy of the last epoch, on test images that are used once, at the end.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from math import isfinite
from pathlib import Path
from typing import TypeAlias, TypedDict

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
from simsiam.distributed.collectives import all_reduce_mean, wrap_ddp
from simsiam.distributed.process_group import rank_zero_context, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm
from simsiam.errors import UsageError, WorkFailed
from simsiam.model.backbones import feature_dim
from simsiam.model.optimizers import set_lr
from simsiam.model.patches import ClosedFormStart
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.runs.encoder import build_backbone, eval_transform, load
from simsiam.runs.run_folder import BACKBONE_FILE, Run
from simsiam.sources.fingerprint import digest_images
from simsiam.training.loop import (
    Metrics,
    SkippedFiles,
    Training,
    load_state,
    run_training,
    save_state,
)
from simsiam.utils.checksums import file_sha256, seal
from simsiam.utils.files import atomic_write, exclusive_lock, keep_fonts_in_cache, write_text

# Colors of Okabe and Ito, which color-blind people can distinguish; with these dash patterns the
# lines also differ in gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "black", "#56B4E9", "#E69F00")
Dash: TypeAlias = str | tuple[int, tuple[int, ...]]  # as matplotlib's `linestyle`
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":", (0, (6, 1)))
MAX_VAL_IMAGES = 5000  # images for the curve, by default a tenth of the labeled ones


class Accuracy(TypedDict):
    """Accuracy in percent.

    Attributes:
        top1: Top-1 accuracy.
        top5: Top-5 accuracy; with fewer classes, 100.
        n: The number of images that could be read.
    """

    top1: float
    top5: float
    n: int


class FineTuningResult(Accuracy):
    """The test accuracy of a fine-tuned network, and how it was obtained.

    Attributes:
        parameters: The settings.
        val_top1: Top-1 accuracy on the validation images after each epoch, in percent.
        unreadable: How many images could not be read.
        seconds: Training time, without measurements.
    """

    parameters: dict[str, object]
    val_top1: list[float]
    unreadable: int
    seconds: float


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
) -> FineTuningResult:
    """Fine-tune a run's backbone and a linear classifier on it, end to end.

    Views are the run's own crops and flips, without color changes, and as large as its images. The
    folder `out` gets last.pt, curve.jsonl (one line per epoch) and curve.png. Called again with the
    same arguments, training continues from last.pt, bit for bit.

    Args:
        run: The run folder.
        train: Labeled images to train on.
        test: Labeled images to test on, once, at the end.
        out: The folder of this fine-tuning.
        val: Labeled images for the curve; by default a tenth of `train`, which is held out.
        epochs: Passes over the training images.
        labels: How many of the labeled images to use, each class in proportion; by default all.
        from_scratch: Start from a new backbone like the run's instead of its weights.
        base_lr: Peak learning rate of the backbone, for a batch of 256.
        head_lr: Peak learning rate of the classifier, for a batch of 256.
        batch_size: Images in a batch; at most all training images.
        weight_decay: Weight decay of every parameter.
        seed: Seed of the classifier, of a new backbone, and of the order of images and their views.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", of the network.

    Returns:
        The test accuracy, the validation curve and the settings.

    Raises:
        UsageError: If an argument is wrong, or `out` holds a fine-tuning with other settings.
        WorkFailed: If the loss diverged, or `out` cannot be written.
        Stopped: After SIGINT or SIGTERM; the state is saved.
    """
    pretrained, out = Run(run), Path(out)
    if not (isfinite(head_lr) and head_lr >= 0):
        raise UsageError(f"head_lr is {head_lr}; it is at least 0")
    recipe = _finetuning_recipe(pretrained.recipe, base_lr, weight_decay, batch_size, epochs, seed)
    val_origin = "held out of the labeled images" if val is None else "given"
    train, val = split_train_val(train, test, val, labels, seed)
    max_bytes = int(recipe.cache_gib * 2**30)
    train, unreadable_train = load_into_memory(train, max_bytes)
    val, unreadable_val = load_into_memory(val, max_bytes)
    recipe = replace(recipe, batch_size=min(batch_size, len(train)))
    compute = Compute.pick(device, precision)
    start = f"random, seed {seed}" if from_scratch else describe_weights(pretrained)
    images = {
        "train_images": len(train),
        "train_digest": digest_images(train),
        "val_images": len(val),
        "val_digest": digest_images(val),
        "val": val_origin,
    }
    settings = _describe_settings(start, recipe, images, head_lr, compute)
    model = build_classifier(pretrained, len(train.classes), seed=seed, from_scratch=from_scratch)
    if world_size() > 1:
        convert_sync_batchnorm(model, compute.device)
    optimizer = build_optimizer(compute.place(model), recipe.method, head_lr)
    training = FineTuning(model, optimizer, train, val, recipe, compute, out, settings)
    training.unreadable |= {key for key, _ in unreadable_train + unreadable_val}
    training.run()
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


def _finetuning_recipe(
    recipe: ResolvedRecipe,
    base_lr: float,
    weight_decay: float,
    batch_size: int,
    epochs: int,
    seed: int,
) -> ResolvedRecipe:
    """The recipe of a run, with supervised training on its crops and flips."""
    views = replace(recipe.method.views[0], jitter_p=0, gray=0, blur=0, solarize=0)
    method = replace(SUPERVISED, views=(views,), base_lr=base_lr, weight_decay=weight_decay)
    return replace(
        recipe,
        method=method,
        view_ratio=1.0,  # views as large as the images of testing
        epochs=epochs,
        steps=None,
        batch_size=batch_size,
        seed=seed,
    )


def describe_weights(run: Run) -> str:
    """Name the weights that fine-tuning starts from.

    Args:
        run: The run.

    Returns:
        The name of the run's file of weights, and 16 digits of its hash if it exists.
    """
    weights = run.path / BACKBONE_FILE
    return f"{weights.name} {file_sha256(weights)[:16] if weights.exists() else ''}"


def _describe_settings(
    start: str,
    recipe: ResolvedRecipe,
    images: Mapping[str, object],
    head_lr: float,
    compute: Compute,
) -> dict[str, object]:
    """What determines the training: a saved state must agree with it."""
    method = recipe.method
    return {
        "start": start,
        "backbone": f"{recipe.backbone}, width {recipe.width}, {recipe.image_size} px",
        "epochs": recipe.epochs,
        "epoch": "last",
        **images,
        "base_lr": method.base_lr,
        "head_lr": head_lr,
        "batch_size": recipe.batch_size,
        "momentum": method.momentum,
        "weight_decay": method.weight_decay,
        "crop_min": method.views[0].crop_min,
        "flip": method.views[0].flip,
        "seed": recipe.seed,
        "precision": compute.precision,
    }


class FineTuning(Training[ViewBatch]):
    """Cross-entropy training of a classifier, with one validation accuracy per epoch.

    Args:
        model: The parts `backbone` and `head`, on the device.
        optimizer: Its optimizer, with parameter groups named like the parts.
        train: Labeled images to train on.
        val: Labeled images for the curve.
        recipe: The recipe of this training.
        compute: Where to compute, and in which precision.
        out: The folder of this training.
        settings: What a saved state must agree with.
    """

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
        self.loss_sum = state["loss_sum"].to(compute.device)  # over the steps of the current epoch
        self.unreadable = set(state["unreadable"])

    def run(self) -> None:
        """Train to the end.

        Raises:
            UsageError: If another process is training in this folder.
            WorkFailed: If the loss diverged.
            Stopped: After SIGINT or SIGTERM; the state is saved.
        """
        with rank_zero_context(exclusive_lock(self.out / ".lock", str(self.out))):
            outcome = run_training(self)
        if outcome.diverged:
            epoch = -(-outcome.step // self.steps_per_epoch)
            base_lr = self.recipe.method.base_lr
            raise WorkFailed(f"diverged in epoch {epoch}: take a base_lr smaller than {base_lr:g}")
        outcome.raise_if_stopped("saved; the same command continues")

    def batches(self) -> Iterator[ViewBatch]:
        """Yield the batches of the remaining steps."""
        return iter_batches(self.train, self.recipe, self.step, self.steps, self.compute.device)

    def train_step(self, batch: ViewBatch) -> Tensor:
        """Take one step; return the sum of the losses of the epoch so far."""
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

    def metrics(self) -> dict[str, float]:
        """Return the mean loss of the epoch so far and both learning rates."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        loss = self.loss_sum.item() / steps
        return {"loss": loss, "lr": self.lr["backbone"], "lr_head": self.lr["head"]}

    def measure(self) -> dict[str, float]:
        """Return the validation accuracy, at the end of an epoch."""
        self.loss_sum = torch.zeros_like(self.loss_sum)
        return {"val_top1": accuracy(self.model, self.val, self.recipe, self.compute)["top1"]}

    def log(self, record: Metrics) -> None:
        """Add a line to the curve at the end of an epoch."""
        if "val_top1" in record:  # once an epoch
            names = ("loss", "lr", "lr_head", "val_top1")
            epoch = {"epoch": self.step // self.steps_per_epoch, "step": self.step}
            self.rows.append(epoch | {name: record[name] for name in names})
            write_curve(self.out / "curve.jsonl", self.rows)

    def save(self, name: str) -> None:
        """Save the state as last.pt."""
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
        """Remember which files could not be read."""
        self.unreadable |= {key for key, _ in files}


def split_train_val(
    train: Images, test: Images, val: Images | None, labels: int | None, seed: int
) -> tuple[Images, Images]:
    """Choose the images to train on and those of the validation curve, each class in proportion.

    Args:
        train: The labeled images.
        test: The test images; only their classes are checked.
        val: The images of the curve; None takes a tenth of the labeled images.
        labels: How many of the labeled images to use; None uses all.
        seed: Seed of the choice.

    Returns:
        Images to train on, images of the curve.

    Raises:
        UsageError: If labels are missing, the classes differ, or there are too few labels.
    """
    for name, images in {"train": train, "test": test, "val": test if val is None else val}.items():
        if images.labels is None:
            raise UsageError(f"fine-tuning needs labels, and the {name} images have none")
        if images.classes != train.classes:
            raise UsageError(f"the {name} images have other classes than the training images")
    num_classes = len(train.classes)
    if labels is not None and not num_classes <= labels <= len(train):
        raise UsageError(
            f"labels is {labels}; it lies between {num_classes}, one per class, and {len(train)}, "
            "all that there are"
        )
    if labels is not None and labels < len(train):
        _, train = hold_out(train, labels, seed)
    if val is not None:
        return train, val
    if len(train) < 2 * num_classes:
        raise UsageError(
            f"{len(train)} labeled images of {num_classes} classes are too few to hold some out "
            f"for the curve: take {2 * num_classes} labels or more, or give images to validate on"
        )
    return hold_out(train, min(max(len(train) // 10, 1), MAX_VAL_IMAGES), seed)


def build_classifier(run: Run, classes: int, *, seed: int, from_scratch: bool) -> nn.Sequential:
    """Build a backbone and a linear classifier on it.

    The classifier depends on the seed alone. A new backbone is the one that pretraining with this
    seed starts from; patches beside it are those of the run.

    Args:
        run: The run whose backbone is used or copied.
        classes: The number of classes.
        seed: Seed of the initial weights.
        from_scratch: Whether to use a new backbone instead of the run's.

    Returns:
        A module with the parts `backbone` and `head`, in training mode: normalized images
        (N, C, H, W) to logits (N, classes).

    Raises:
        UsageError: If the run has no finished backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(run.recipe)
        head = nn.Linear(feature_dim(backbone), classes)
        nn.init.normal_(head.weight, std=0.01)  # as in linear evaluation (appendix A)
        nn.init.zeros_(head.bias)
    if not from_scratch:
        backbone.load_state_dict(load(run.path, head=False).state_dict())
    elif isinstance(backbone, ClosedFormStart):
        backbone.copy_fixed(load(run.path, head=False))
    return nn.Sequential(OrderedDict(backbone=backbone, head=head)).train()


def build_optimizer(model: nn.Module, method: Method, head_lr: float) -> Optimizer:
    """Build SGD with a learning rate for each part, and weight decay on every parameter.

    Args:
        model: The parts `backbone` and `head`.
        method: `base_lr` (of the backbone), `momentum` and `weight_decay` are used.
        head_lr: The learning rate of the classifier.

    Returns:
        The optimizer, with one parameter group per part.
    """
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
) -> Accuracy:
    """Measure the accuracy of a classifier.

    Args:
        model: Normalized images (N, C, H, W) to logits (N, classes).
        images: Labeled images.
        recipe: Its preprocessing is used.
        compute: Where to compute, and in which precision.

    Returns:
        The accuracy on the images that can be read.

    Raises:
        WorkFailed: If no image can be read.
    """
    features = extract_features(model, images, eval_transform(recipe), compute=compute)
    assert images.labels is not None
    ranked = features.matrices[0].topk(min(5, len(images.classes))).indices
    matches = ranked == torch.from_numpy(images.labels[features.kept_indices])[:, None]
    top1, top5 = (
        round(100 * match.any(1).sum().item() / len(matches), 3)
        for match in (matches[:, :1], matches)
    )
    return {"top1": top1, "top5": top5, "n": len(matches)}


@rank_zero_only
def write_curve(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a curve as JSON lines, one per epoch.

    Args:
        path: The file.
        rows: Named numbers of each epoch.

    Raises:
        WorkFailed: If the file cannot be written.
    """
    write_text(path, "".join(f"{json.dumps(seal(row))}\n" for row in rows))


def line_styles() -> Iterator[tuple[str, Dash]]:
    """Yield a color and a dash pattern for each line of a figure; the first 35 pairs differ."""
    for shift in count():
        for i, color in enumerate(COLORS):
            yield color, DASHES[(i + shift) % len(DASHES)]


@rank_zero_only
def plot_accuracy_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> None:
    """Draw validation curves as a PNG file of 1400 x 900 pixels.

    Each name has one thin line per seed and a thick line, their mean.

    Args:
        curves: For each name, the accuracies after each epoch, in percent, of each seed.
        path: The file.
        title: The title of the picture.

    Raises:
        UsageError: If the curves of one name differ in length.
        WorkFailed: If the file cannot be written.

    Example:
        >>> curves = {"pretrained": [result["val_top1"]], "from scratch": [other["val_top1"]]}
        >>> plot_accuracy_curves(curves, "finetune.png")
    """
    keep_fonts_in_cache()
    from matplotlib.figure import Figure  # pyplot would need a display and keep global state

    figure = Figure(figsize=(7, 4.5), dpi=200, layout="constrained")
    axes = figure.subplots()
    for (name, seeds), (color, dash) in zip(curves.items(), line_styles()):
        if len({len(curve) for curve in seeds}) != 1:
            raise UsageError(
                f"the curves of {name!r} differ in epochs: {[len(curve) for curve in seeds]}"
            )
        values = np.array(seeds)  # (seeds, epochs)
        last, epoch = values[:, -1], np.arange(1, values.shape[1] + 1)
        label = f"{name}: {last.mean():.1f} at the end"
        if len(last) > 1:
            spread = last.std(ddof=1)
            label = f"{name}: {last.mean():.1f} ± {spread:.1f} at the end, {len(last)} seeds"
        marker = "o" if len(epoch) == 1 else ""
        if len(values) > 1:
            axes.plot(epoch, values.T, color=color, linewidth=0.8, alpha=0.4, marker=marker)
        mean = values.mean(0)
        axes.plot(epoch, mean, ls=dash, c=color, lw=2.2, marker=marker, label=label)
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    with atomic_write(Path(path)) as part:
        figure.savefig(part, format="png")
