"""Training on top of a published network: candidates that `adapt` takes only if they are better.

The projector and the predictor are new, so they are trained first, on the frozen backbone; a new
head would otherwise pull the backbone away from what it knows. Then the late layers are trained as
well, then all layers. Batch norm of the backbone keeps its statistics, in training too: those of a
few small batches are worse. SimSiam's loss, views and learning rate schedule are the method's own.
"""

import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from simsiam.config.method import EQUAL_TERMS, Method
from simsiam.config.methods import METHODS
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.batches import ViewBatch, iter_batches, steps_per_epoch
from simsiam.data.images import from_arrays
from simsiam.data.transform import Transform
from simsiam.model.optimizers import cosine_schedule
from simsiam.model.precision import Compute
from simsiam.model.siamese import Siamese, build
from simsiam.monitoring.candidates import (
    MARGIN,
    Branch,
    Candidate,
    Sample,
    map_candidate,
    measure,
)
from simsiam.training.loop import Training, run_training
from simsiam.training.progress import print_labeled
from simsiam.training.step import GradientStep

BATCH_SIZE = 32
WARMUP_SHARE = 0.3  # of the steps, in which the heads alone are trained
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MIN_STEPS = 60  # fewer change nothing that can be measured
HEAD_WIDTHS = ("dim", "proj_layers", "proj_hidden", "pred_dim")
TRIAL_STEPS = 3  # steps without an update that the time of a step is estimated from
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
        A candidate for each stage: the trained network with its map. A stage for which there is
        too little time, or whose loss diverges, is left out, which is printed.

    Raises:
        Stopped: If a signal arrives while a stage is trained.
    """
    start = time.monotonic()
    few = Sample(sample.pixels[:BATCH_SIZE], BATCH_SIZE // 2, None, [])
    measure({branch.name: branch.backbone}, transform, few, compute)
    measuring = (time.monotonic() - start) * len(sample.pixels) / len(few.pixels)
    for number, (stage, (share, lr_scale)) in enumerate(STAGES.items()):
        left = deadline - time.monotonic()
        seconds = left / (len(STAGES) - number) - measuring
        training = LayerTraining(branch.backbone, recipe, sample, compute, share, lr_scale)
        if seconds <= 0 or not training.fit_steps(seconds):
            print_labeled("left out", f"{stage} trained: no time for {MIN_STEPS} steps")
            return
        print_labeled("training", f"{stage}, {training.steps} steps")
        outcome = run_training(training)
        outcome.raise_if_stopped("the best of what was tried before is kept")
        if outcome.diverged:
            print_labeled("left out", f"{stage} trained: the loss is not finite")
            continue
        network = training.model.backbone.eval().requires_grad_(False)
        (trained,) = measure({branch.name: network}, transform, sample, compute)
        candidate = map_candidate(trained, sample, f"{branch.name}, {stage} trained")
        yield replace(candidate, margin=MARGIN)


class LayerTraining(Training[ViewBatch]):
    """SimSiam on a copy of a network, whose last layers are trained.

    Args:
        backbone: The network.
        recipe: Its recipe: size and normalization of the views, and the seed.
        sample: The images; those for fitting are trained on.
        compute: Where to compute, and in which precision.
        share: Share of the weights that is trained, counted from the output.
        lr_scale: Learning rate of the backbone relative to that of the heads.
        steps: Number of steps; `fit_steps` chooses it for a time.
    """

    model: Siamese
    log_every = 10
    save_seconds = float("inf")  # it takes minutes and is not resumed

    def __init__(
        self,
        backbone: nn.Module,
        recipe: ResolvedRecipe,
        sample: Sample,
        compute: Compute,
        share: float,
        lr_scale: float,
        steps: int = MIN_STEPS,
    ):
        self.images = from_arrays("fit", sample.pixels[: sample.fit_size].numpy())
        self.batch_size = min(BATCH_SIZE, len(self.images))
        self.recipe = replace(
            recipe, batch_size=self.batch_size, method=simsiam_method(recipe.method)
        )
        self.steps, self.seconds_limit = steps, float("inf")
        self.steps_per_epoch = steps_per_epoch(len(self.images), self.batch_size)
        self.compute = compute
        method = self.recipe.method
        self.model = build(method, backbone=deepcopy(backbone), seed=recipe.seed)
        compute.place(self.model)
        freeze_batch_norm(self.model)
        self.model.backbone.requires_grad_(False)
        self.late = late_parameters(self.model.backbone, share)
        heads = [p for name, p in self.model.named_parameters() if name[:9] != "backbone."]
        self.optimizer = torch.optim.SGD(
            [
                {"params": heads, "scale": 1.0},
                {"params": self.late, "scale": lr_scale},
            ],
            lr=self.recipe.peak_lr,
            momentum=method.momentum,
            weight_decay=method.weight_decay,
        )
        self.compute_gradients = GradientStep(self.model, compute).compute_gradients

    def fit_steps(self, seconds: float) -> bool:
        """Choose the number of steps for a time, by a trial without updates.

        Args:
            seconds: The time, the trial included. Training also ends when it is over.

        Returns:
            Whether there is time for MIN_STEPS.
        """
        start = time.monotonic()
        self._train_late(True)
        for batch in iter_batches(self.images, self.recipe, 0, TRIAL_STEPS, self.compute.device):
            self.compute_gradients(batch.views, batch.index, batch.weight)
        self._train_late(False)
        trial = time.monotonic() - start
        self.seconds_limit = seconds - trial
        self.steps = int(self.seconds_limit / trial * TRIAL_STEPS)
        return self.steps >= MIN_STEPS

    def batches(self) -> Iterator[ViewBatch]:
        """Yield batches until the steps are done, or the time is over on a machine now slower."""
        for batch in iter_batches(self.images, self.recipe, 0, self.steps, self.compute.device):
            if self.done >= 1:
                return
            yield batch

    @property
    def done(self) -> float:
        """The share of the training that is done, in steps or in time."""
        return max(self.step / self.steps, self.seconds / self.seconds_limit)

    def train_step(self, batch: ViewBatch) -> Tensor:
        """Train the heads, and the late layers after the warm-up."""
        self._train_late(self.done >= WARMUP_SHARE)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.peak_lr * group["scale"] * cosine_schedule(self.done, 1.0)
        self.loss = self.compute_gradients(batch.views, batch.index, batch.weight).loss
        self.optimizer.step()
        return self.loss

    def metrics(self) -> dict[str, float]:
        """Return the loss of the latest step."""
        return {"loss": self.loss.item()}

    def _train_late(self, trained: bool) -> None:
        """Give the late layers gradients, or none."""
        for parameter in self.late:
            parameter.requires_grad_(trained)


def simsiam_method(method: Method) -> Method:
    """Return SimSiam, with the augmentations, optimizer and widths of a run that is called so.

    Other targets, losses and predictors may need more than a step's gradient, as `after_step`.

    Args:
        method: The method of the run.
    """
    simsiam = METHODS["simsiam"]
    kept = (*EQUAL_TERMS, *HEAD_WIDTHS) if method.name == simsiam.name else ()
    return replace(simsiam, **{cell: vars(method)[cell] for cell in kept})


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
