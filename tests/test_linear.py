"""Linear classifiers: LARS is the authors', heads trained together are as if alone, no choice sees a test image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim.lars import Lars
from torch import nn

from simsiam.config.protocols import Settings
from simsiam.evaluation import protocol_linear as linear
from simsiam.evaluation.frozen import FeatureSet, sample_per_class, top5_classes
from simsiam.evaluation.protocol_linear import init_linear, train_heads, train_on_cached_features
from simsiam.model.optimizers import LARS, cosine_schedule

CPU = torch.device("cpu")
STEPS, PEAK = 50, 1.6


def blobs(n: int, d: int = 12, classes: int = 5, seed: int = 0, noise: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, d, generator=g), labels


def trajectory(optimizer_of) -> torch.Tensor:
    """Weights and biases of a linear classifier in float64 after each of 50 steps under a cosine lr."""
    x, labels = blobs(60)
    layer = init_linear(12, 5, seed=0).double()
    optimizer, passed = optimizer_of(list(layer.parameters())), []
    for step in range(STEPS):
        loss = F.cross_entropy(layer(x.double()), labels)
        layer.zero_grad()
        loss.backward()
        optimizer(PEAK * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        passed.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    return torch.stack(passed)


def authors(parameters):
    """LARC around SGD, as the authors' linear evaluation has it: first the gradient is scaled, then SGD sees it."""
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.0)

    def step(lr: float) -> None:
        for p in parameters:
            length, slope = p.data.norm(), p.grad.data.norm()
            if length != 0 and slope != 0:  # biases start at zero: their first step is plain SGD
                p.grad.data *= 0.001 * length / (slope + 1e-8)
        sgd.param_groups[0]["lr"] = lr
        sgd.step()

    return step


def stepping(optimizer):
    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return step


def test_lars_is_the_authors_over_50_steps_under_a_cosine():
    ours = trajectory(
        lambda p: stepping(LARS([{"params": p}], lr=0.0, momentum=0.9, weight_decay=0.0))
    )
    theirs = trajectory(authors)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
    assert (theirs[-1] - theirs[0]).norm() > 0.01, "it went somewhere"
    adapting = trajectory(lambda p: stepping(Lars(p, momentum=0.9, always_adapt=True)))
    torch.testing.assert_close(adapting, theirs, rtol=1e-6, atol=1e-10)
    plain = trajectory(
        lambda p: stepping(Lars(p, momentum=0.9))
    )  # adapts nothing where nothing decays
    assert (plain - theirs).norm() > 10 * (theirs[-1] - theirs[0]).norm()


def test_heads_trained_together_are_as_if_trained_alone(monkeypatch):
    """Each equals torch's SGD on the same batches; one that diverges troubles no other."""
    monkeypatch.setattr(linear, "BATCH_SIZE", 16)
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
        sgd, shuffle = (
            torch.optim.SGD(groups, lr=lr, momentum=0.9),
            torch.Generator().manual_seed(3),
        )
        for epoch in range(4):
            for at, batch in enumerate(torch.randperm(50, generator=shuffle)[:48].split(16)):
                for group in sgd.param_groups:
                    group["lr"] = lr * cosine_schedule(3 * epoch + at, 12)
                sgd.zero_grad()
                F.cross_entropy(layer(x[batch]), labels[batch]).backward()
                sgd.step()
        torch.testing.assert_close(together[:-1, :, i], layer.weight.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[-1, :, i], layer.bias, rtol=1e-4, atol=1e-5)


def test_cached_is_as_good_as_logistic_regression_with_its_c_swept():
    """On scikit-learn's digits, C chosen on the same held-out images. And a decay is the C of the same objective."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    pixels, labels = load_digits(return_X_y=True)
    x, labels = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    known = FeatureSet(x[train], labels[train], x[test], 10, np.arange(1000)).standardize()
    assert torch.allclose(
        known.train_features.square().sum(1).mean(), torch.tensor(61 / 64), atol=0.01
    )  # 3 pixels are constant
    answer = train_on_cached_features(known, "h", Settings(), CPU)
    ours = 100 * (answer.predictions[0][:, 0] == labels[test]).float().mean().item()

    sizes, found = np.bincount(known.train_labels), {}
    held = sample_per_class(known.train_labels.numpy(), -(-sizes // 5), [0])
    rest = np.setdiff1d(np.arange(1000), held)
    for c in (1, 10, 100, 1000):
        model, y = LogisticRegression(C=c, max_iter=1000), known.train_labels
        chosen_by = model.fit(known.train_features[rest], y[rest]).score(
            known.train_features[held], y[held]
        )
        found[c] = (
            chosen_by,
            100 * model.fit(known.train_features, y).score(known.test_features, labels[test]),
        )
    assert abs(ours - max(found.values())[1]) <= 0.5
    heads = train_heads(
        known.train_features,
        known.train_labels,
        [(30.0, 1 / c / 1000) for c in found],
        classes=10,
        epochs=500,
        seed=0,
    )
    right = (
        (linear.linear_logits(heads, known.test_features).argmax(1) == labels[test, None])
        .float()
        .mean(0)
    )
    assert 100 * right.numpy() == pytest.approx([top1 for _, top1 in found.values()], abs=0.8)


def test_the_choice_is_made_on_images_that_no_head_learned_from():
    """Where a third of the labels are wrong, learning them by heart is best on what was learned and worst elsewhere."""
    x, labels = blobs(300, d=200, noise=1.5)
    wrong = torch.arange(0, 300, 3)
    labels[wrong] = (labels[wrong] + 1 + wrong // 3 % 4) % 5
    known = FeatureSet(x, labels, x[:10], 5, np.arange(300)).standardize()
    answer = train_on_cached_features(known, "h", Settings(linear_epochs=20), CPU)
    by_heart = train_heads(
        known.train_features, labels, [(300.0, 0.0)], classes=5, epochs=300, seed=0
    )
    learned = (
        (linear.linear_logits(by_heart, known.train_features)[..., 0].argmax(1) == labels)
        .float()
        .mean()
    )
    assert (
        learned > 0.99
        and answer.selected["weight_decay"] == 1e-3
        and answer.selected["held_out_top1"] < 75
    )
    elsewhere = train_on_cached_features(
        known._replace(test=torch.randn(10, 200)), "h", Settings(linear_epochs=20), CPU
    )
    assert elsewhere.selected == answer.selected


def test_the_likeliest_come_first_and_equal_ones_in_order():
    found = top5_classes(torch.tensor([[0.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0]]))
    assert found.tolist() == [[1, 3, 2, 0, 4]]


@pytest.mark.parametrize("classes", [2, 9])
def test_the_layer_starts_as_in_the_paper_and_torchs_generator_is_left_alone(classes):
    before = torch.random.get_rng_state()
    layer = init_linear(4000, classes, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05) and not layer.bias.any()
    assert torch.equal(layer.weight, init_linear(4000, classes, seed=1).weight)
