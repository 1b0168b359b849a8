"""Fine-tuning: the backbone and a linear classifier on it trained end to end with labels, pretrained or from scratch.

The tutorial's protocol: 200 epochs, one validation accuracy an epoch, and, as in its pretraining, SGD with momentum
0.9, weight decay 5e-4 and a cosine lr, on crops and flips. Learning rates and batch are not in its text and are ours.

The curve chooses nothing. Its images are labeled ones kept out of training, and the accuracy is that of the last epoch,
on test images that are looked at once, at the end.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Optimizer

from simsiam.config.method import Method
from simsiam.config.methods import SUPERVISED
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import iter_batches, steps_per_epoch
from simsiam.data.images import Images, hold_out, load_into_memory
from simsiam.distributed.collectives import (
    all_gather_objects,
    all_reduce_max,
    all_reduce_mean,
    wrap_ddp,
)
from simsiam.distributed.process_group import rank_zero_context, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import convert_sync_batchnorm, synchronize_replicas
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.model.backbones import feature_dim
from simsiam.model.optimizers import set_lr
from simsiam.model.precision import Compute, pick_device, pick_precision
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.gauges import all_finite
from simsiam.runs.encoder import build_backbone, eval_transform, load
from simsiam.runs.run_folder import Run, read_checkpoint
from simsiam.runs.weight_files import file_sha256
from simsiam.training.interrupt import InterruptHandler
from simsiam.training.progress import ProgressLine, Stopwatch
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
    """Fine-tune the run's backbone (or, `from_scratch`, a new one like it) on `train`; its accuracy on `test`, and how.

    Of the labeled images `labels` are used, each class in proportion; all by default. The curve is measured on `val`,
    or else on a tenth of them, kept out. `base_lr` and `head_lr` are the peaks for a batch of 256; a batch is never
    larger than the training set. Views are the run's own crops and flips, without color.

    The folder `out` gets last.pt, curve.jsonl (a line an epoch) and curve.png. Called again with the same arguments, it
    goes on from last.pt bit for bit. Raises UsageError for a wrong request, WorkFailed for a diverged loss, and Stopped
    after SIGINT or SIGTERM, with the state saved.
    """
    pretrained, out = Run(run), Path(out)
    if not (isfinite(head_lr) and head_lr >= 0):
        raise UsageError(f"head_lr is {head_lr}; it is at least 0")
    views = replace(pretrained.recipe.method.views[0], jitter_p=0, gray=0, blur=0, solarize=0)
    method = replace(SUPERVISED, views=(views,), base_lr=base_lr, weight_decay=weight_decay)
    plan = replace(
        pretrained.recipe,
        method=method,
        epochs=epochs,
        steps=None,
        batch_size=batch_size,
        seed=seed,
    )

    asked = val
    train, val = split_train_val(train, test, val, labels, seed)
    limit = int(plan.cache_gib * 2**30)
    (train, broken), (val, more) = load_into_memory(train, limit), load_into_memory(val, limit)
    plan = replace(plan, batch_size=min(batch_size, len(train)))
    per_epoch = steps_per_epoch(len(train), plan.batch_size)
    steps = epochs * per_epoch

    on = pick_device(device)
    compute = Compute(on, pick_precision(precision, on))
    weights = pretrained.path / "backbone.safetensors"
    settings = {
        "start": f"random, seed {seed}"
        if from_scratch
        else f"{weights.name} {short_sha256(weights)}",
        "backbone": f"{plan.backbone}, width {plan.width}, {plan.image_size} px",
        "epochs": epochs,
        "epoch": "last",
        "train_images": len(train),
        "val_images": len(val),
        "val": "held out of the labeled images" if asked is None else "given",
        "base_lr": base_lr,
        "head_lr": head_lr,
        "batch_size": plan.batch_size,
        "momentum": method.momentum,
        "weight_decay": weight_decay,
        "crop_min": views.crop_min,
        "flip": views.flip,
        "seed": seed,
        "precision": compute.precision,
    }
    model = build_classifier(pretrained, len(train.classes), seed=seed, from_scratch=from_scratch)
    if world_size() > 1:
        convert_sync_batchnorm(model)
    compute.place(model)
    optimizer = build_optimizer(model, method, head_lr)
    state = restore(out, settings)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    step, rows, loss_sum = state["step"], state["rows"], state["loss_sum"].to(on)
    unreadable = {key for key, _ in broken + more} | set(state["unreadable"])
    truth = torch.from_numpy(train.labels).to(on)

    network = wrap_ddp(model)

    @rank_zero_only
    def save() -> None:
        moved = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "rows": rows,
        }
        moved |= {"loss_sum": loss_sum, "unreadable": sorted(unreadable), "seconds": watch.seconds}
        with atomic_write(out / "last.pt") as part, open(part, "wb") as file:
            torch.save({"settings": settings} | moved, file)

    with (
        rank_zero_context(exclusive_lock(out / ".lock", str(out))),
        ProgressLine(step, steps, per_epoch) as line,
        InterruptHandler() as interrupt,
    ):
        watch = Stopwatch(state["seconds"])
        for batch in iter_batches(train, plan, step, steps, on):
            lr = set_lr(
                optimizer, batch.step, peak_lr=plan.batch_size / 256, steps=steps, warmup_steps=0
            )
            with compute.autocast():
                logits = network(batch.views[0])
            loss = F.cross_entropy(logits.float(), truth[batch.index.to(on)])
            optimizer.zero_grad()
            (batch.weight * loss).backward()
            optimizer.step()

            step, loss_sum = batch.step + 1, loss_sum + all_reduce_mean(loss, len(batch.index))
            watch.record_step(plan.batch_size, batch.wait)
            signum, stale, skipped = all_reduce_max(
                interrupt.signum, watch.save_due(plan.save_seconds), len(batch.skipped)
            )
            if skipped:
                unreadable |= {key for key, _ in all_gather_objects(batch.skipped)}
            stopping = bool(signum)
            with watch.paused():
                if step % per_epoch == 0:
                    if not all_finite(loss_sum, model):
                        raise WorkFailed(
                            f"diverged in epoch {len(rows) + 1}: take a base_lr smaller than {base_lr:g}"
                        )
                    found = {
                        "epoch": step // per_epoch,
                        "step": step,
                        "loss": loss_sum.item() / per_epoch,
                    }
                    found |= {"lr": lr["backbone"], "lr_head": lr["head"]}
                    rows.append(found | {"val_top1": accuracy(model, val, plan, compute)["top1"]})
                    line.update(step, rows[-1] | watch.rates())
                    loss_sum = torch.zeros_like(loss_sum)
                    write_curve(out / "curve.jsonl", rows)
                if step == steps or stopping or stale:
                    synchronize_replicas(model)
                    save()
            if stopping:
                break
    if step < steps:
        raise Stopped(f"stopped at step {step} of {steps}, saved; the same command goes on", signum)
    interrupt.raise_pending()
    curve = [row["val_top1"] for row in rows]
    plot_accuracy_curves(
        {"from scratch" if from_scratch else "pretrained": [curve]}, out / "curve.png"
    )
    about = {"val_top1": curve, "unreadable": len(unreadable), "seconds": round(watch.seconds, 1)}
    return {"parameters": settings, **accuracy(model, test, plan, compute), **about}


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
    found = extract_features(
        model, images, eval_transform(recipe), compute=compute
    )
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
def restore(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `out` holds, or a new one. Raises UsageError for a fine-tuning with other settings."""
    path = out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {
            "step": 0,
            "rows": [],
            "loss_sum": torch.zeros(()),
            "unreadable": [],
            "seconds": 0.0,
        }
    try:
        state = read_checkpoint(path)
    except UsageError as error:
        raise UsageError(f"{error}: delete it, and the fine-tuning starts anew") from None
    for name, value in settings.items():
        if (was := state["settings"].get(name)) != value:
            raise UsageError(
                f"{out} holds a fine-tuning with {name} {was}, not {value}: choose another folder"
            )
    return state


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
