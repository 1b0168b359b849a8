"""Protocol linear: one fully-connected layer on a frozen network, in three ways.

cached: on stored features, many learning rates and weight decays side by side, the best chosen on held-out training
images. paper: on fresh crops, with LARS (appendix A). sgd: the same with plain SGD, as MoCo does it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from simsiam.config.methods import SUPERVISED  # its views: crops and flips
from simsiam.config.protocols import Settings
from simsiam.data.batches import batches, steps_per_epoch
from simsiam.distributed.collectives import gather
from simsiam.errors import UsageError
from simsiam.evaluation.frozen import STANDARDIZED, Answer, Frozen, Known, drawn, kinds, likeliest
from simsiam.model.optimizers import LARS, cosine
from simsiam.model.precision import autocast
from simsiam.training.progress import Line, Stopwatch

MOMENTUM = 0.9
# cached. Most regularized first: of equally good heads the first is taken. Features have a norm of about 1, hence large
# learning rates and small decays, whatever the network's width.
LRS, DECAYS = (10.0, 30.0, 100.0, 300.0), (1e-3, 1e-4, 1e-5, 1e-6, 0.0)
GRID = [(lr, decay) for decay, lr in product(DECAYS, LRS)]
BATCH = 512
STEPS = 1000  # at least: a small set is passed over more often
# paper and sgd.
BASE_LRS = {"paper": (0.1,), "sgd": (30.0, 100.0)}  # times batch / 256: the authors'; MoCo's, and what users needed
LARGE = 4096  # the paper's batch, or all images if they are fewer


def probes(frozen: Frozen, how: Settings) -> Iterator[Answer]:
    """A linear classifier; `how.linear` says which."""
    if how.linear == "cached":
        for kind in kinds(how):
            yield cached(frozen.features(kind).standardized(), kind, how, frozen.device)
    else:
        yield from on_crops(frozen, how)


def cached(known: Known, kind: str, how: Settings, device: torch.device) -> Answer:
    """Every cell of GRID learns four fifths of each class, and the one best at the rest learns them all."""
    x, labels = known.train.to(device), known.labels.to(device)
    sizes = np.bincount(known.labels)
    held = drawn(known.labels.numpy(), np.minimum(-(-sizes // 5), sizes - 1).clip(0), [how.seed])
    rest = np.setdiff1d(np.arange(len(x)), held)
    if not len(held):
        raise UsageError("linear chooses on a fifth of each class, and no class has two training images")
    epochs = max(how.linear_epochs, -(-STEPS * BATCH // len(x)))
    heads = partial(train_heads, classes=known.classes, epochs=epochs, seed=how.seed)
    tried = scores(heads(x[rest], labels[rest], GRID), x[held])
    right = (tried.argmax(1) == labels[held, None]).sum(0).tolist()
    lr, decay = chosen = GRID[right.index(max(right))]
    head = heads(x, labels, [chosen])
    return Answer(
        name="cached",
        features=kind,
        parameters={
            "linear": "cached", "lr": LRS, "weight_decay": DECAYS, "held_out": "a fifth of each class",
            "optimizer": "sgd", "momentum": MOMENTUM, "schedule": "cosine", "batch_size": min(BATCH, len(x)),
            "epochs": epochs, "views": "none, as for testing", "standardized": STANDARDIZED, "seed": how.seed,
        },
        chosen={"lr": lr, "weight_decay": decay, "held_out_top1": round(100 * max(right) / len(held), 3)},
        ranked=[likeliest(scores(head, known.test.to(device))[:, :, 0])],
    )  # fmt: skip


def train_heads(
    x: Tensor, labels: Tensor, grid: Sequence[tuple[float, float]], *, classes: int, epochs: int, seed: int
) -> Tensor:
    """Weights (d + 1, classes, K) of K linear classifiers of x (N, d), one a (lr, decay) of grid; biases come last.

    They see the same batches and share one product a step, but each is as if trained alone: SGD with momentum on the
    cross entropy, from zero, under a cosine. Biases do not decay.
    """
    lr, decay = torch.tensor(grid, device=x.device).T
    w = torch.zeros(x.shape[1] + 1, classes, len(grid), device=x.device)
    velocity, order = torch.zeros_like(w), torch.Generator().manual_seed(seed)
    size = min(BATCH, len(x))
    per_epoch = len(x) // size
    ones, rows = torch.ones(size, 1, device=x.device), torch.arange(size, device=x.device)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            shuffled = torch.randperm(len(x), generator=order).to(x.device)
        batch = shuffled[step % per_epoch * size :][:size]
        some = torch.cat([x[batch], ones], dim=1)
        logits = (some @ w.flatten(1)).view(size, *w.shape[1:])
        logits = (logits - logits.amax(1, keepdim=True)).clamp(min=-60)  # below lie denormal numbers, slow on a CPU
        slope = logits.softmax(1)
        slope[rows, labels[batch]] -= 1
        gradient = (some.T @ slope.flatten(1)).div_(size).view_as(w)
        gradient[:-1].addcmul_(decay, w[:-1])
        velocity.mul_(MOMENTUM).add_(gradient)
        w.addcmul_(lr, velocity, value=-cosine(step, epochs * per_epoch))
    return w


def scores(w: Tensor, x: Tensor) -> Tensor:
    """(N, classes, K) of x (N, d)."""
    return (x @ w[:-1].flatten(1)).view(len(x), *w.shape[1:]) + w[-1]


def on_crops(frozen: Frozen, how: Settings) -> Iterator[Answer]:
    """A layer on features of fresh crops, its weights from N(0, 0.01), its biases from 0; one layer a learning rate."""
    n, device = len(frozen.train), frozen.device
    paper = how.linear == "paper"
    size = min(LARGE if paper else 256, n)
    base_lrs = BASE_LRS[how.linear] if how.base_lr is None else (how.base_lr,)
    recipe = replace(frozen.recipe, method=SUPERVISED, batch_size=size, seed=how.seed)
    per_epoch = steps_per_epoch(n, size)
    steps = how.linear_epochs * per_epoch
    known, network = frozen.features(how.features), frozen.network(how.features)
    labels = torch.from_numpy(frozen.train.labels).to(device)
    layers = [first_layer(known.train.shape[1], known.classes, how.seed).to(device) for _ in base_lrs]
    optimizers = [optimizer(layer, paper) for layer in layers]
    watch = Stopwatch()
    with Line(0, steps, per_epoch) as line:
        for batch in batches(frozen.train, recipe, 0, steps, device):
            with torch.no_grad(), autocast(device, frozen.precision):
                h, index = gather(network(batch.views[0]).float()), gather(batch.index.to(device))  # of all processes
            for layer, moves, base_lr in zip(layers, optimizers, base_lrs):
                moves.param_groups[0]["lr"] = base_lr * size / 256 * cosine(batch.step, steps)
                loss = F.cross_entropy(layer(h), labels[index])
                moves.zero_grad()
                loss.backward()
                moves.step()
            watch.count(size, batch.wait)
            if (batch.step + 1) % recipe.log_every == 0 or batch.step + 1 == steps:
                line.show(batch.step + 1, {"loss": loss.item()} | watch.rates())
    for layer, base_lr in zip(layers, base_lrs):
        parameters: dict[str, Any] = {
            "linear": how.linear, "optimizer": "lars" if paper else "sgd", "base_lr": base_lr, "batch_size": size,
            "peak_lr": base_lr * size / 256, "momentum": MOMENTUM, "weight_decay": 0.0, "schedule": "cosine",
            "epochs": how.linear_epochs, "views": "crops of 8 to 100 % of the area, flips", "seed": how.seed,
        }  # fmt: skip
        with torch.no_grad():
            ranked = likeliest(layer(known.test.to(device)))
        name = f"{how.linear}, base lr {base_lr:g}"
        yield Answer(name=name, features=how.features, parameters=parameters, ranked=[ranked])


def first_layer(dim: int, classes: int, seed: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dim, classes)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return layer


def optimizer(layer: nn.Linear, paper: bool) -> Optimizer:
    """LARS as in the authors' code, on weight and bias alike; or SGD. Neither decays weights."""
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())}]
    if paper:
        return LARS(groups, lr=0.0, momentum=MOMENTUM, weight_decay=0.0)
    return SGD(groups, lr=0.0, momentum=MOMENTUM)
