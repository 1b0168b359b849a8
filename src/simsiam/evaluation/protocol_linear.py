"""Protocol linear: one fully-connected layer on a frozen network, in three ways.

cached: on stored features, many learning rates and weight decays side by side, the best chosen on held-out training
images. paper: on fresh crops, with LARS (appendix A). sgd: the same with plain SGD, as MoCo does it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from simsiam.config.methods import SUPERVISED  # its views: crops and flips
from simsiam.config.protocols import Settings
from simsiam.data.batches import ViewBatch, iter_batches, steps_per_epoch
from simsiam.distributed.collectives import all_gather
from simsiam.errors import UsageError
from simsiam.evaluation.frozen import (
    STANDARDIZATION,
    FeatureSet,
    FrozenNetwork,
    ProtocolResult,
    feature_kinds,
    sample_per_class,
    top5_classes,
)
from simsiam.model.optimizers import LARS, cosine_schedule
from simsiam.training.loop import Training, run_training

MOMENTUM = 0.9
# cached. Most regularized first: of equally good heads the first is taken. Features have a norm of about 1, hence large
# learning rates and small decays, whatever the network's width.
LRS, WEIGHT_DECAYS = (10.0, 30.0, 100.0, 300.0), (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
GRID = [(lr, decay) for decay, lr in product(WEIGHT_DECAYS, LRS)]
BATCH_SIZE = 512
MIN_STEPS = 1000  # at least: a small set is passed over more often
# paper and sgd.
BASE_LRS = {
    "paper": (0.1,),
    "sgd": (30.0, 100.0),
}  # times batch / 256: the authors'; MoCo's, and what users needed
PAPER_BATCH_SIZE = 4096  # the paper's batch, or all images if they are fewer


def evaluate_linear(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """A linear classifier; `how.linear` says which."""
    if settings.linear == "cached":
        for kind in feature_kinds(settings):
            yield train_on_cached_features(
                frozen.features(kind).standardize(), kind, settings, frozen.compute.device
            )
    else:
        yield from train_on_crops(frozen, settings)


def train_on_cached_features(
    feature_set: FeatureSet, kind: str, settings: Settings, device: torch.device
) -> ProtocolResult:
    """Every cell of GRID learns four fifths of each class, and the one best at the rest learns them all."""
    x, labels = feature_set.train_features.to(device), feature_set.train_labels.to(device)
    sizes = np.bincount(feature_set.train_labels)
    held = sample_per_class(
        feature_set.train_labels.numpy(),
        np.minimum(-(-sizes // 5), sizes - 1).clip(0),
        [settings.seed],
    )
    rest = np.setdiff1d(np.arange(len(x)), held)
    if not len(held):
        raise UsageError(
            "linear chooses on a fifth of each class, and no class has two training images"
        )
    epochs = max(settings.linear_epochs, -(-MIN_STEPS * BATCH_SIZE // len(x)))
    heads = partial(train_heads, classes=feature_set.classes, epochs=epochs, seed=settings.seed)
    tried = linear_logits(heads(x[rest], labels[rest], GRID), x[held])
    right = (tried.argmax(1) == labels[held, None]).sum(0).tolist()
    lr, decay = chosen = GRID[right.index(max(right))]
    head = heads(x, labels, [chosen])
    return ProtocolResult(
        name="cached",
        features=kind,
        parameters={
            "linear": "cached", "lr": LRS, "weight_decay": WEIGHT_DECAYS, "held_out": "a fifth of each class",
            "optimizer": "sgd", "momentum": MOMENTUM, "schedule": "cosine", "batch_size": min(BATCH_SIZE, len(x)),
            "epochs": epochs, "views": "none, as for testing", "standardized": STANDARDIZATION, "seed": settings.seed,
        },
        selected={"lr": lr, "weight_decay": decay, "held_out_top1": round(100 * max(right) / len(held), 3)},
        predictions=[top5_classes(linear_logits(head, feature_set.test_features.to(device))[:, :, 0])],
    )  # fmt: skip


def train_heads(
    x: Tensor,
    labels: Tensor,
    grid: Sequence[tuple[float, float]],
    *,
    classes: int,
    epochs: int,
    seed: int,
) -> Tensor:
    """Weights (d + 1, classes, K) of K linear classifiers of x (N, d), one a (lr, decay) of grid; biases come last.

    They see the same batches and share one product a step, but each is as if trained alone: SGD with momentum on the
    cross entropy, from zero, under a cosine. Biases do not decay.
    """
    lr, decay = torch.tensor(grid, device=x.device).T
    w = torch.zeros(x.shape[1] + 1, classes, len(grid), device=x.device)
    velocity, order = torch.zeros_like(w), torch.Generator().manual_seed(seed)
    size = min(BATCH_SIZE, len(x))
    per_epoch = len(x) // size
    ones, rows = torch.ones(size, 1, device=x.device), torch.arange(size, device=x.device)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(x), generator=order).to(x.device)
        batch = shuffled[step % per_epoch * size :][:size]
        some = torch.cat([x[batch], ones], dim=1)
        logits = (some @ w.flatten(1)).view(size, *w.shape[1:])
        logits = (logits - logits.amax(1, keepdim=True)).clamp(
            min=-60
        )  # below lie denormal numbers, slow on a CPU
        slope = logits.softmax(1)
        slope[rows, labels[batch]] -= 1
        gradient = (some.T @ slope.flatten(1)).div_(size).view_as(w)
        gradient[:-1].addcmul_(decay, w[:-1])
        velocity.mul_(MOMENTUM).add_(gradient)
        w.addcmul_(lr, velocity, value=-cosine_schedule(step, epochs * per_epoch))
    return w


def linear_logits(w: Tensor, x: Tensor) -> Tensor:
    """(N, classes, K) of x (N, d)."""
    return (x @ w[:-1].flatten(1)).view(len(x), *w.shape[1:]) + w[-1]


def train_on_crops(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Train a linear layer on features of fresh crops, one layer for each learning rate.

    Args:
        frozen: The network and the images.
        settings: `linear` is "paper" (LARS, appendix A) or "sgd"; `base_lr` replaces the default learning rates.

    Yields:
        One result for each learning rate.

    Raises:
        Stopped: After SIGINT or SIGTERM.
    """
    features = frozen.features(settings.features)
    training = LinearOnCrops(frozen, settings, features)
    run_training(training).raise_if_stopped("nothing was saved; the same command starts again")
    for layer, base_lr in zip(training.layers, training.base_lrs, strict=True):
        parameters: dict[str, Any] = {
            "linear": settings.linear,
            "optimizer": "lars" if settings.linear == "paper" else "sgd",
            "base_lr": base_lr,
            "batch_size": training.batch_size,
            "peak_lr": base_lr * training.batch_size / 256,
            "momentum": MOMENTUM,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "epochs": settings.linear_epochs,
            "views": "crops of 8 to 100 % of the area, flips",
            "seed": settings.seed,
        }
        with torch.no_grad():
            predictions = top5_classes(layer(features.test_features.to(frozen.compute.device)))
        name = f"{settings.linear}, base lr {base_lr:g}"
        yield ProtocolResult(
            name=name, features=settings.features, parameters=parameters, predictions=[predictions]
        )


class LinearOnCrops(Training):
    """Linear layers on the features of a frozen network, as the training loop sees them.

    Weights start from N(0, 0.01), biases from 0. All layers see the same crops; each has its own learning rate.
    """

    save_seconds = inf  # it takes minutes and is not resumed

    def __init__(self, frozen: FrozenNetwork, settings: Settings, features: FeatureSet):
        num_images, device = len(frozen.train), frozen.compute.device
        use_lars = settings.linear == "paper"
        self.frozen, self.network = frozen, frozen.network(settings.features)
        self.batch_size = min(PAPER_BATCH_SIZE if use_lars else 256, num_images)
        self.base_lrs = (
            BASE_LRS[settings.linear] if settings.base_lr is None else (settings.base_lr,)
        )
        self.recipe = replace(
            frozen.recipe, method=SUPERVISED, batch_size=self.batch_size, seed=settings.seed
        )
        self.log_every = self.recipe.log_every
        self.steps_per_epoch = steps_per_epoch(num_images, self.batch_size)
        self.steps = settings.linear_epochs * self.steps_per_epoch
        self.labels = torch.from_numpy(frozen.train.labels).to(device)
        dim = features.train_features.shape[1]
        self.layers = [
            init_linear(dim, features.classes, settings.seed).to(device) for _ in self.base_lrs
        ]
        self.model = nn.ModuleList(self.layers)
        self.optimizers = [build_linear_optimizer(layer, use_lars) for layer in self.layers]

    def batches(self) -> Iterator[ViewBatch]:
        device = self.frozen.compute.device
        return iter_batches(self.frozen.train, self.recipe, 0, self.steps, device)

    def train_step(self, batch: ViewBatch) -> Tensor:
        with torch.no_grad(), self.frozen.compute.autocast():
            h = all_gather(self.network(batch.views[0]).float())
        labels = self.labels[all_gather(batch.index.to(self.frozen.compute.device))]
        losses = []
        for layer, optimizer, base_lr in zip(self.layers, self.optimizers, self.base_lrs):
            optimizer.param_groups[0]["lr"] = (
                base_lr * self.batch_size / 256 * cosine_schedule(batch.step, self.steps)
            )
            loss = F.cross_entropy(layer(h), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.loss = losses[-1]
        # One learning rate may diverge while another learns.
        return torch.stack(losses).nan_to_num(nan=inf).amin()

    def metrics(self) -> dict[str, Any]:
        return {"loss": self.loss.item()}


def init_linear(dim: int, classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return layer


def build_linear_optimizer(layer: nn.Linear, use_lars: bool) -> Optimizer:
    """LARS as in the authors' code, on weight and bias alike; or SGD. Neither decays weights."""
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())}]
    if use_lars:
        return LARS(groups, lr=0.0, momentum=MOMENTUM, weight_decay=0.0)
    return SGD(groups, lr=0.0, momentum=MOMENTUM)
