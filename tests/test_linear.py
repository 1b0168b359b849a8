"""Linear classifiers: LARS as the authors have it, many heads at once, no choice on test images."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import nn

from simsiam.config.protocols import Settings
from simsiam.evaluation import protocol_linear
from simsiam.evaluation.frozen import FeatureSet, sample_per_class, top5_classes
from simsiam.evaluation.protocol_linear import (
    init_linear,
    linear_logits,
    train_heads,
    train_on_cached_features,
)
from simsiam.model.optimizers import LARS, cosine_schedule

CPU = torch.device("cpu")
STEPS, PEAK = 50, 1.6


def blobs(n: int, d: int = 12, classes: int = 5, seed: int = 0, noise: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, d, generator=g), labels


def trajectory(step_function) -> torch.Tensor:
    """Weights and biases of a linear classifier, float64, after each of 50 steps with a cosine lr.

    `step_function(parameters)` returns a function that takes one step with a given lr.
    """
    x, labels = blobs(60)
    layer = init_linear(12, 5, seed=0).double()
    step_with_lr, weights = step_function(list(layer.parameters())), []
    for step in range(STEPS):
        loss = F.cross_entropy(layer(x.double()), labels)
        layer.zero_grad()
        loss.backward()
        step_with_lr(PEAK * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        weights.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    return torch.stack(weights)


def authors_lars(parameters):
    """LARC around SGD, as in the authors' linear evaluation: scale the gradient, then apply SGD."""
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.0)

    def step(lr: float) -> None:
        for p in parameters:
            weight_norm, gradient_norm = p.data.norm(), p.grad.data.norm()
            if weight_norm != 0 and gradient_norm != 0:  # biases start at 0: first plain SGD
                p.grad.data *= 0.001 * weight_norm / (gradient_norm + 1e-8)
        sgd.param_groups[0]["lr"] = lr
        sgd.step()

    return step


def stepping(optimizer):
    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return step


def test_lars_is_that_of_the_authors_over_50_steps_with_a_cosine_lr():
    ours = trajectory(
        lambda p: stepping(LARS([{"params": p}], lr=0.0, momentum=0.9, weight_decay=0.0))
    )
    theirs = trajectory(authors_lars)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
    assert (theirs[-1] - theirs[0]).norm() > 0.01, "the weights moved"
    always = trajectory(lambda p: stepping(Lars(p, momentum=0.9, always_adapt=True)))
    torch.testing.assert_close(always, theirs, rtol=1e-6, atol=1e-10)
    # By default timm's LARS does not adapt parameters without weight decay.
    default = trajectory(lambda p: stepping(Lars(p, momentum=0.9)))
    assert (default - theirs).norm() > 10 * (theirs[-1] - theirs[0]).norm()


def test_heads_trained_together_equal_heads_trained_alone(monkeypatch):
    """Each equals torch's SGD on the same batches; one that diverges does not affect the others."""
    monkeypatch.setattr(protocol_linear, "BATCH_SIZE", 16)
    x, labels = blobs(50)
    grid = [(0.3, 0.0), (1e38, 0.0), (0.1, 0.01), (3.0, 1e-3)]
    together = train_heads(x, labels, grid, classes=5, epochs=4, seed=3)
    assert not together[..., 1].isfinite().all()
    for i in (0, 2, 3):
        lr, decay = grid[i]
        layer = nn.Linear(12, 5)
        for p in layer.parameters():
            nn.init.zeros_(p)
        groups = [{"params": layer.weight, "weight_decay": decay}, {"params": layer.bias}]
        sgd, generator = (
            torch.optim.SGD(groups, lr=lr, momentum=0.9),
            torch.Generator().manual_seed(3),
        )
        for epoch in range(4):
            order = torch.randperm(50, generator=generator)[:48]
            for step, batch in enumerate(order.split(16), 3 * epoch):
                for group in sgd.param_groups:
                    group["lr"] = lr * cosine_schedule(step, 12)
                sgd.zero_grad()
                F.cross_entropy(layer(x[batch]), labels[batch]).backward()
                sgd.step()
        torch.testing.assert_close(together[:-1, :, i], layer.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[-1, :, i], layer.bias, rtol=1e-4, atol=1e-5)


def test_cached_is_as_good_as_logistic_regression_with_a_search_for_c():
    """On scikit-learn's digits, with C chosen on the same held-out images.

    Also, a weight decay corresponds to the C of the same objective.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    pixels, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    features = FeatureSet(x[train], labels[train], x[test], 10, np.arange(1000)).standardize()
    x, y, test_labels = features.train_features, features.train_labels, labels[test]
    squared_norm = x.square().sum(1).mean().item()
    assert squared_norm == pytest.approx(61 / 64, abs=0.01)  # 3 of 64 pixels are constant
    result = train_on_cached_features(features, "h", Settings(), CPU)
    ours = 100 * (result.predictions[0][:, 0] == test_labels).float().mean().item()

    sizes, scores = np.bincount(y), {}
    held_out = sample_per_class(y.numpy(), -(-sizes // 5), [0])
    rest = np.setdiff1d(np.arange(1000), held_out)
    for c in (1, 10, 100, 1000):
        model = LogisticRegression(C=c, max_iter=1000)
        held_out_score = model.fit(x[rest], y[rest]).score(x[held_out], y[held_out])
        top1 = 100 * model.fit(x, y).score(features.test_features, test_labels)
        scores[c] = (held_out_score, top1)
    assert abs(ours - max(scores.values())[1]) <= 0.5
    grid = [(30.0, 1 / c / 1000) for c in scores]
    heads = train_heads(x, y, grid, classes=10, epochs=500, seed=0)
    predicted = linear_logits(heads, features.test_features).argmax(1)
    accuracies = 100 * (predicted == test_labels[:, None]).float().mean(0).numpy()
    assert accuracies == pytest.approx([top1 for _, top1 in scores.values()], abs=0.8)


def test_the_choice_is_made_on_images_that_no_head_was_trained_on():
    """With a third of the labels wrong, the head that memorizes them is best on its own images.

    On other images it is the worst.
    """
    x, labels = blobs(300, d=200, noise=1.5)
    wrong = torch.arange(0, 300, 3)
    labels[wrong] = (labels[wrong] + 1 + wrong // 3 % 4) % 5
    features = FeatureSet(x, labels, x[:10], 5, np.arange(300)).standardize()
    x, settings = features.train_features, Settings(linear_epochs=20)
    result = train_on_cached_features(features, "h", settings, CPU)
    memorizing = train_heads(x, labels, [(300.0, 0.0)], classes=5, epochs=300, seed=0)
    predicted = linear_logits(memorizing, x)[..., 0].argmax(1)
    assert (predicted == labels).float().mean() > 0.99
    assert result.selected["weight_decay"] == 1e-3 and result.selected["held_out_top1"] < 75
    other = features._replace(test_features=torch.randn(10, 200))
    assert train_on_cached_features(other, "h", settings, CPU).selected == result.selected


def test_classes_are_ranked_by_score_and_equal_ones_in_order():
    ranked = top5_classes(torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0]]))
    assert ranked.tolist() == [[1, 3, 2, 0, 4]]


@pytest.mark.parametrize("classes", [2, 9])
def test_the_layer_starts_as_in_the_paper_without_changing_torchs_generator(classes):
    before = torch.random.get_rng_state()
    layer = init_linear(4000, classes, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05) and not layer.bias.any()
    assert torch.equal(layer.weight, init_linear(4000, classes, seed=1).weight)
