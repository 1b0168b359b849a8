"""The protocol linear: train one linear layer on a frozen network, in one of three ways.

- cached: on stored features, with many learning rates and weight decays side by side; the best pair
  is chosen on training images that are held out.
- paper: on random crops, with LARS (appendix A).
- sgd: on random crops, with plain SGD, as MoCo does it.

An epoch of paper and sgd has whole batches only; the authors' code also trains on the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import inf

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
# cached. Standardized features have a norm of about 1, hence the large learning rates and the small
# decays, whatever the network's width. The most regularized pair comes first, so that of equally
# good ones it is chosen.
LRS, WEIGHT_DECAYS = (10.0, 30.0, 100.0, 300.0), (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
GRID = [(lr, decay) for decay, lr in product(WEIGHT_DECAYS, LRS)]
BATCH_SIZE = 512
MIN_STEPS = 1000  # with few images, there are more epochs
# paper and sgd. Learning rates for a batch of 256: that of the authors' code; that of MoCo, and the
# one that users of SimSiam needed with SGD.
BASE_LRS = {"paper": (0.1,), "sgd": (30.0, 100.0)}
PAPER_BATCH_SIZE, SGD_BATCH_SIZE = 4096, 256  # or all images, if they are fewer


def evaluate_frozen(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Classify test images by a linear layer.

    Args:
        frozen: The network and the images.
        settings: `linear`, `linear_epochs`, `base_lr`, `seed`, `features` and `baselines` are used.

    Yields:
        One result for each kind of features (cached) or each learning rate (paper and sgd).

    Raises:
        UsageError: If no class has two training images (cached).
        Stopped: After SIGINT or SIGTERM (paper and sgd).
    """
    if settings.linear == "cached":
        for kind in feature_kinds(frozen, settings):
            features = frozen.features(kind).standardize()
            yield train_on_cached_features(features, kind, settings, frozen.compute.device)
    else:
        yield from train_on_crops(frozen, settings)


def train_on_cached_features(
    features: FeatureSet, kind: str, settings: Settings, device: torch.device
) -> ProtocolResult:
    """Train a linear layer on stored features.

    Each pair of GRID is trained on four fifths of each class. The pair with the best accuracy on
    the rest is then trained on all training images.

    Args:
        features: Standardized features.
        kind: Their kind, for the result.
        settings: `linear_epochs` and `seed` are used.
        device: Where to compute.

    Returns:
        The predictions of the final layer.

    Raises:
        UsageError: If no class has two training images.
    """
    x, labels = features.train_features.to(device), features.train_labels.to(device)
    sizes = np.bincount(features.train_labels)
    counts = np.minimum(-(-sizes // 5), sizes - 1).clip(0)
    held_out = sample_per_class(features.train_labels.numpy(), counts, [settings.seed])
    rest = np.setdiff1d(np.arange(len(x)), held_out)
    if not len(held_out):
        raise UsageError(
            "linear chooses on a fifth of each class, and no class has two training images"
        )
    epochs = max(settings.linear_epochs, -(-MIN_STEPS * BATCH_SIZE // len(x)))
    train = partial(train_heads, classes=features.classes, epochs=epochs, seed=settings.seed)
    logits = linear_logits(train(x[rest], labels[rest], GRID), x[held_out])
    correct = (logits.argmax(1) == labels[held_out, None]).sum(0).tolist()
    lr, decay = best = GRID[correct.index(max(correct))]
    head = train(x, labels, [best])
    test_logits = linear_logits(head, features.test_features.to(device))[:, :, 0]
    return ProtocolResult(
        name="cached",
        features=kind,
        parameters={
            "linear": "cached",
            "lr": LRS,
            "weight_decay": WEIGHT_DECAYS,
            "held_out": "a fifth of each class",
            "optimizer": "sgd",
            "momentum": MOMENTUM,
            "schedule": "cosine",
            "batch_size": min(BATCH_SIZE, len(x)),
            "epochs": epochs,
            "views": "none, as for testing",
            "standardized": STANDARDIZATION,
            "seed": settings.seed,
        },
        selected={
            "lr": lr,
            "weight_decay": decay,
            "held_out_top1": round(100 * max(correct) / len(held_out), 3),
        },
        predictions=[top5_classes(test_logits)],
    )


def train_heads(
    x: Tensor,
    labels: Tensor,
    grid: Sequence[tuple[float, float]],
    *,
    classes: int,
    epochs: int,
    seed: int,
) -> Tensor:
    """Train K linear classifiers at once, one for each learning rate and weight decay.

    They are given the same batches and share one matrix product per step, but each is trained as if
    it were alone: SGD with momentum on the cross-entropy, from zero, with a cosine learning rate
    and no decay of biases.

    Args:
        x: Standardized features, (N, d) float32.
        labels: (N,) int64.
        grid: K pairs (learning rate, weight decay).
        classes: The number of classes.
        epochs: Passes over the features.
        seed: Seed of their order.

    Returns:
        Weights, (d + 1, classes, K); the last row has the biases.
    """
    lr, decay = torch.tensor(grid, device=x.device).T
    w = torch.zeros(x.shape[1] + 1, classes, len(grid), device=x.device)
    velocity, generator = torch.zeros_like(w), torch.Generator().manual_seed(seed)
    size = min(BATCH_SIZE, len(x))
    per_epoch = len(x) // size
    ones, rows = torch.ones(size, 1, device=x.device), torch.arange(size, device=x.device)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        batch = order[step % per_epoch * size :][:size]
        inputs = torch.cat([x[batch], ones], dim=1)
        logits = (inputs @ w.flatten(1)).view(size, *w.shape[1:])
        # Without the clamp, probabilities become denormal numbers, which are slow on a CPU.
        logits = (logits - logits.amax(1, keepdim=True)).clamp(min=-60)
        residual = logits.softmax(1)
        residual[rows, labels[batch]] -= 1
        gradient = (inputs.T @ residual.flatten(1)).div_(size).view_as(w)
        gradient[:-1].addcmul_(decay, w[:-1])
        velocity.mul_(MOMENTUM).add_(gradient)
        w.addcmul_(lr, velocity, value=-cosine_schedule(step, epochs * per_epoch))
    return w


def linear_logits(w: Tensor, x: Tensor) -> Tensor:
    """Compute the logits of K linear classifiers.

    Args:
        w: What `train_heads` returned, (d + 1, classes, K).
        x: Features, (N, d) float32.

    Returns:
        (N, classes, K).
    """
    return (x @ w[:-1].flatten(1)).view(len(x), *w.shape[1:]) + w[-1]


def train_on_crops(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Train a linear layer on features of random crops, one layer for each learning rate.

    Args:
        frozen: The network and the images.
        settings: `linear` is "paper" (LARS, appendix A) or "sgd"; `base_lr` replaces the default
            learning rates.

    Yields:
        One result for each learning rate.

    Raises:
        Stopped: After SIGINT or SIGTERM.
    """
    features = frozen.features(settings.features)
    training = LinearOnCrops(frozen, settings, features)
    run_training(training).raise_if_stopped("nothing was saved; the same command starts again")
    for layer, base_lr in zip(training.layers, training.base_lrs, strict=True):
        parameters: dict[str, object] = {
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


class LinearOnCrops(Training[ViewBatch]):
    """Training of linear layers on the features of a frozen network.

    All layers are given the same crops; each has its own learning rate.

    Args:
        frozen: The network and the images.
        settings: `linear`, `linear_epochs`, `base_lr`, `features` and `seed` are used.
        features: Features of the same kind, for their width and the number of classes.
    """

    save_seconds = inf  # it takes minutes and is not resumed

    def __init__(self, frozen: FrozenNetwork, settings: Settings, features: FeatureSet):
        num_images, device = len(frozen.train), frozen.compute.device
        use_lars = settings.linear == "paper"
        self.frozen, self.network = frozen, frozen.network(settings.features)
        self.batch_size = min(PAPER_BATCH_SIZE if use_lars else SGD_BATCH_SIZE, num_images)
        self.base_lrs = (
            BASE_LRS[settings.linear] if settings.base_lr is None else (settings.base_lr,)
        )
        self.recipe = replace(
            frozen.recipe,
            method=SUPERVISED,
            view_ratio=1.0,  # views as large as the images of testing
            batch_size=self.batch_size,
            seed=settings.seed,
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
        """Yield the batches of all steps."""
        device = self.frozen.compute.device
        return iter_batches(self.frozen.train, self.recipe, 0, self.steps, device)

    def train_step(self, batch: ViewBatch) -> Tensor:
        """Take one step of every layer; return the smallest of their losses."""
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
        # The loop stops at a loss that is not finite: one learning rate may diverge, not all.
        return torch.stack(losses).nan_to_num(nan=inf).amin()

    def metrics(self) -> dict[str, float]:
        """Return the loss of the layer with the largest learning rate."""
        return {"loss": self.loss.item()}


def init_linear(dim: int, classes: int, seed: int) -> nn.Linear:
    """Build a linear layer with weights from N(0, 0.01) and biases 0, as in appendix A.

    Args:
        dim: The width of the features.
        classes: The number of classes.
        seed: Seed of the weights. The state of torch's global generator is not changed.

    Returns:
        The layer, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return layer


def build_linear_optimizer(layer: nn.Linear, use_lars: bool) -> Optimizer:
    """Build the optimizer of a layer, without weight decay.

    Args:
        layer: The layer.
        use_lars: Whether to use LARS, as in the authors' code on weights and biases alike, or SGD.

    Returns:
        The optimizer, with learning rate 0.
    """
    groups: list[dict[str, object]] = [{"params": list(layer.parameters())}]
    if use_lars:
        return LARS(groups, lr=0.0, momentum=MOMENTUM, weight_decay=0.0)
    return SGD(groups, lr=0.0, momentum=MOMENTUM)
