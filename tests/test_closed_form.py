"""Closed forms: the patches equal their definition, and the map makes view noise white."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from simsiam.model.patches import (
    CONTRAST_FLOOR,
    PATCH_SIDE,
    ROOT_FLOOR,
    THRESHOLD,
    fit_patches,
    resize_matrix,
    sample_patches,
    spherical_kmeans,
    zca,
)
from simsiam.model.view_noise import fit_map, view_noise_covariance
from simsiam.monitoring.signals import view_agreement


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    return F.interpolate(draw(40, 3, 20, 20), size=48, mode="bilinear").sigmoid()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [24, 48])
def test_patches_equal_their_definition(images, channels, size):
    """Unfold, contrast-normalize, whiten, compare with the centers, average over the quarters."""
    images = images[:, :channels]
    backbone = fit_patches(images, (size,), seed=3)
    scale, generator = backbone.scales[0], torch.Generator().manual_seed(3)
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    m, whitening = zca(sampled := sample_patches(small, generator))
    centers = spherical_kmeans((sampled - m) @ whitening, generator)

    patches = F.unfold(small, PATCH_SIDE, stride=scale.stride).transpose(1, 2)  # (N, places, d)
    patches = patches - patches.mean(2, keepdim=True)
    patches = patches / (patches.var(2, correction=0, keepdim=True) + CONTRAST_FLOOR).sqrt()
    response = ((patches - m) @ whitening @ centers.T - THRESHOLD).clamp(min=0)
    side = int(response.shape[1] ** 0.5)
    maps = response.transpose(1, 2).unflatten(2, (side, side))
    expected = F.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2).flatten(1)
    h = backbone(images)
    assert h.shape == (40, backbone.dim)
    torch.testing.assert_close(h, expected.clamp_min(ROOT_FLOOR).sqrt(), rtol=1e-3, atol=1e-4)


def test_two_sizes_are_joined_and_normalization_is_undone(images):
    both, one = (fit_patches(images, sizes, seed=1) for sizes in ((24, 48), (48,)))
    h = both(images)
    torch.testing.assert_close(h[:, one.dim :], one(images))
    both.mean.fill_(0.4)
    both.std.fill_(0.2)
    torch.testing.assert_close(both((images - 0.4) / 0.2), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("source", "size"), [(48, 24), (50, 32), (48, 48), (224, 64)])
def test_resizing_is_torchs(source, size):
    x, matrix = draw(2, 3, source, source), resize_matrix(source, size)
    expected = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected, rtol=1e-4, atol=1e-5)


def views_of(images, views, signal, noise, seed=0):
    """Features of views: a Gaussian signal per image and Gaussian noise per view."""
    d = len(signal)
    shared = draw(images, 1, d, seed=seed).double() @ signal
    return shared + draw(images, views, d, seed=seed + 1).double() @ noise


@pytest.fixture(scope="module")
def features():
    d = 12
    return views_of(500, 4, draw(d, d, seed=5).double(), draw(d, d, seed=6).double()) + 3


def test_after_the_map_view_noise_is_white(features):
    linear = fit_map(features.mean((0, 1)), view_noise_covariance(features), 0.0).double()
    mapped = linear(features)
    torch.testing.assert_close(
        view_noise_covariance(mapped), torch.eye(12).double(), rtol=1e-4, atol=1e-4
    )
    assert mapped.mean((0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_a_rotation_before_the_map_changes_no_cosine_after_it(features, shrinkage):
    def cosines(h):
        linear = fit_map(h.mean((0, 1)), view_noise_covariance(h), shrinkage).double()
        unit = F.normalize(linear(h[:50, 0]), dim=1)
        return unit @ unit.T

    rotation = torch.linalg.qr(draw(12, 12, seed=9).double()).Q
    torch.testing.assert_close(
        cosines(features @ rotation), cosines(features), rtol=1e-4, atol=1e-4
    )


def test_on_drawn_data_the_map_is_the_true_one_up_to_sampling():
    """The error of the estimated noise covariance falls with the square root of the images."""
    noise = draw(8, 8, seed=6).double()
    true = noise.T @ noise
    errors = []
    for n in (300, 30_000):
        h = views_of(n, 4, draw(8, 8, seed=5).double(), noise)
        errors.append((view_noise_covariance(h) - true).norm() / true.norm())
        matrix = torch.linalg.inv(true + 0.1 * true.diagonal().mean() * torch.eye(8))  # T' T
        linear = fit_map(h.mean((0, 1)), view_noise_covariance(h), 0.1)
        off = (linear.weight.T @ linear.weight - matrix).norm() / matrix.norm()
        assert off < 20 / n**0.5
    assert errors[1] < 0.3 * errors[0]


def test_what_gradient_descent_on_the_linear_method_arrives_at():
    """Each direction ends at the predicted gain or collapses; strong ones never do."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from linear_method import descend, predicted_gain

    signal, noise = torch.tensor([1, 1, 0.25, 0.01]).double(), torch.tensor([0.1, 4, 0.25, 1.0])
    gain = descend(signal.diag(), noise.double().diag(), seed=1).norm(dim=0)
    predicted = predicted_gain(signal, noise.double())
    assert predicted[3] == 0 and gain[3] < 1e-6  # weight decay wins
    torch.testing.assert_close(gain[[0, 2]], predicted[[0, 2]], rtol=1e-4, atol=1e-6)
    assert gain[1] < 1e-6 or abs(gain[1] - predicted[1]) < 1e-4


def test_equal_views_agree_and_unrelated_ones_agree_by_chance():
    a, b = draw(400, 30), draw(400, 30, seed=1)
    same, unrelated = view_agreement(a, a), view_agreement(a, b)
    assert (same[0] == 1).all() and same[1].min() > 1
    assert unrelated[0].mean() < 0.05 and unrelated[1].mean().abs() < 0.05


def test_neighborhoods_count_where_images_are_forgotten():
    """Views that keep the class and forget the image: reciprocal ranks are low, neighbors near."""
    classes = draw(10, 30).repeat_interleave(40, dim=0)
    views = [classes + 0.01 * draw(400, 30, seed=seed) for seed in (2, 3)]
    recognition, nearness = view_agreement(*views).mean(1)
    assert recognition < 0.15 and nearness > 2
