"""Training on top of a published network: candidates that `adapt` takes only if they are better.

The projector and the predictor are new, so they are trained first, on the frozen backbone; a new
head would otherwise pull the backbone away from what it knows. Then the late layers are trained as
well, then all layers. Batch norm of the backbone keeps its statistics, in training too: those of a
few small batches are worse. SimSiam's loss, views and learning rate schedule are the method's own.
"""

import time
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import iter_batches
from simsiam.data.images import from_arrays
from simsiam.data.transform import Transform
from simsiam.model.optimizers import cosine_schedule
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.monitoring.candidates import Branch, Candidate, Sample, map_candidate, measure
from simsiam.training.step import GradientStep

BATCH_SIZE = 32
WARMUP_SHARE = 0.3  # of the steps, in which the heads alone are trained
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MIN_STEPS = 60  # fewer change nothing that can be measured
# Each stage: the share of the weights that is trained, counted from the output, and its learning
# rate relative to that of the heads.
STAGES = {"late layers": (0.5, 0.1), "all layers": (1.0, 0.02)}


def trained_candidates(
    branch: Branch,
    recipe: ResolvedRecipe,
    transform: Transform,
    sample: Sample,
    compute: Compute,
    deadline: float,
) -> Iterator[Candidate]:
    """Train late layers, then all layers, each for its share of the time that is left.

    Args:
        branch: The network to start from.
        recipe: Its recipe.
        transform: Its preprocessing.
        sample: The images; those for fitting are trained on.
        compute: Where to compute, and in which precision.
        deadline: The end, in seconds of `time.monotonic`.

    Yields:
        A candidate for each stage: the trained network with its map.
    """
    start = time.monotonic()
    few = Sample(sample.pixels[:BATCH_SIZE], BATCH_SIZE // 2, None, [])
    measure({branch.name: branch.backbone}, transform, few, compute)
    measuring = (time.monotonic() - start) * len(sample.pixels) / len(few.pixels)
    for number, (stage, (share, lr_scale)) in enumerate(STAGES.items()):
        left = deadline - time.monotonic()
        seconds = left / (len(STAGES) - number) - measuring
        network = train_layers(
            branch.backbone,
            recipe,
            sample,
            compute,
            share=share,
            lr_scale=lr_scale,
            seconds=seconds,
        )
        if network is None:
            return
        (trained,) = measure({branch.name: network}, transform, sample, compute)
        yield map_candidate(trained, sample, f"{branch.name}, {stage} trained")


def train_layers(
    backbone: nn.Module,
    recipe: ResolvedRecipe,
    sample: Sample,
    compute: Compute,
    *,
    share: float,
    lr_scale: float,
    seconds: float,
    max_steps: int = 10_000,
) -> nn.Module | None:
    """Train the last layers of a copy of a backbone with SimSiam.

    Args:
        backbone: The backbone.
        recipe: Its recipe: size and normalization of the views, and the seed.
        sample: The images; those for fitting are trained on.
        compute: Where to compute, and in which precision.
        share: Share of the weights that is trained, counted from the output.
        lr_scale: Learning rate of the backbone relative to that of the heads.
        seconds: Time limit; the learning rate falls to zero at its end, or at that of the steps.
        max_steps: Largest number of steps.

    Returns:
        The trained copy, in eval mode; None if there is time for fewer than MIN_STEPS.
    """
    if seconds <= 0:
        return None
    images = from_arrays("fit", sample.pixels[: sample.fit_size].numpy())
    recipe = recipe.replace(batch_size=min(BATCH_SIZE, len(images)), method="simsiam")
    model = build(recipe.method, backbone=deepcopy(backbone), seed=recipe.seed)
    compute.place(model)
    late = late_parameters(model.backbone, share)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.SGD(
        [{"params": heads, "scale": 1.0}, {"params": late, "scale": lr_scale}],
        lr=recipe.peak_lr,
        momentum=recipe.method.momentum,
        weight_decay=recipe.method.weight_decay,
    )
    compute_gradients = GradientStep(model, compute).compute_gradients
    start, step = time.monotonic(), 0
    for step, batch in enumerate(iter_batches(images, recipe, 0, max_steps, compute.device)):
        elapsed = time.monotonic() - start
        if step == 5 and elapsed / step > seconds / min(MIN_STEPS, max_steps):
            return None
        done = max(elapsed / seconds, step / max_steps)
        if done >= 1:
            break
        if done >= WARMUP_SHARE:
            for parameter in late:
                parameter.requires_grad_(True)
        freeze_batch_norm(model)
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_lr * group["scale"] * cosine_schedule(done, 1.0)
        compute_gradients(batch.views, batch.index, batch.weight)
        optimizer.step()
    if step + 1 < min(MIN_STEPS, max_steps):
        return None
    return model.backbone.eval().requires_grad_(False)


def late_parameters(backbone: nn.Module, share: float) -> list[nn.Parameter]:
    """Return the last parameters of a network, in the order in which it defines them.

    Args:
        backbone: The network.
        share: Share of all weights that they have, at least.
    """
    chosen, count = list[nn.Parameter](), 0
    parameters = list(backbone.parameters())
    total = sum(p.numel() for p in parameters)
    for parameter in reversed(parameters):
        if count >= share * total:
            break
        chosen.append(parameter)
        count += parameter.numel()
    return chosen


def freeze_batch_norm(model: Siamese) -> None:
    """Set the batch norms of the backbone to use the statistics that they have.

    Args:
        model: The model, in training mode otherwise.
    """
    model.train()
    for module in model.backbone.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()
