"""Views are pure functions of (seed, step, view, position), with torchvision's distributions."""

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from PIL import ImageFilter
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor

from simsiam.config.methods import Views
from simsiam.data import views
from simsiam.data.views import (
    CONTRAST,
    HUE,
    IDENTITY_FACTORS,
    JITTER_ORDERS,
    ViewParams,
    augment_color,
    describe_augmentation,
    draw_uniforms,
    finish_view,
    make_views,
    resized_crop,
    resized_crop_one,
    sample_view_params,
)

EVERYTHING = Views(jitter_p=0.9, solarize=0.3)
OFF = Views(crop_min=1.0, flip=0.0, jitter_p=0.0, gray=0.0, blur=0.0)
GRAY_IMAGES = Views(jitter=(0.4, 0.4, 0.0, 0.0), gray=0.0)
HALF = (0.5, 0.5, 0.5)


def photos(n, h, w, channels=3, seed=0):
    """Make uint8 noise with large patches, so that blur, resizing and contrast have an effect."""
    g = torch.Generator().manual_seed(seed)
    patches = F.resize(
        torch.rand(n, channels, 3, 3, generator=g), [h, w], F.InterpolationMode.NEAREST
    )
    noise = torch.rand(n, channels, h, w, generator=g)
    return ((0.6 * patches + 0.4 * noise) * 255).round().byte()


def pixels(n, h, w, channels=3, seed=0):
    return photos(n, h, w, channels, seed) / 255


def nothing(n, size=32):
    """Draws that change nothing; a test replaces the one it is about."""
    zero, no = np.zeros(n, np.int64), np.zeros(n, bool)
    whole = zero + size
    order, factors = np.tile(JITTER_ORDERS[0], (n, 1)), np.tile(IDENTITY_FACTORS, (n, 1))
    return ViewParams(zero, zero, whole, whole, no, order, factors, no, np.zeros(n), no)


def many(recipe, n=4000, size=(32, 32), seed=1):
    return sample_view_params(
        recipe, np.tile(size, (n, 1)), seed=seed, step=0, view=0, positions=np.arange(n)
    )


def two_views(images, positions, recipes=(EVERYTHING,), **changes):
    kwargs = dict(view_count=2, size=24, mean=HALF, std=HALF, seed=3, step=5) | changes
    return make_views(images, recipes, positions=positions, **kwargs)


# Purity.


def test_a_row_of_uniforms_belongs_to_its_position():
    positions = np.arange(1000, 1040)
    together = draw_uniforms(7, 3, 1, positions)
    assert together.dtype == np.float64 and together.min() >= 0 and together.max() < 1
    for i, p in enumerate(positions):
        assert (draw_uniforms(7, 3, 1, np.array([p])) == together[i]).all()
    shuffle = np.random.default_rng(0).permutation(40)
    assert (draw_uniforms(7, 3, 1, positions[shuffle]) == together[shuffle]).all()
    assert (
        draw_uniforms(7, 3, 1, positions[::4]) == together[::4]
    ).all()  # as on every fourth process


def test_no_two_rows_share_a_number():
    rows = [
        draw_uniforms(seed, step, view, np.arange(50))
        for seed in (0, 1, 2**64 - 1)
        for step in (0, 1)
        for view in (0, 1)
    ]
    numbers = np.concatenate(rows).ravel()
    assert len(np.unique(numbers)) == len(numbers)


def test_a_view_ignores_the_batch_around_it_and_every_global_generator():
    images, positions = photos(12, 40, 28), np.arange(100, 112)
    views = two_views(images, positions)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    shuffle = np.random.default_rng(0).permutation(12)
    parts = (slice(None), shuffle, slice(4, 9), slice(3, 4))
    for part in parts:
        for view, again in zip(views, two_views(images[part], positions[part]), strict=True):
            torch.testing.assert_close(again, view[part], rtol=0, atol=2e-6)
    assert (torch.get_rng_state() == states[0]).all() and (
        np.random.get_state()[1] == states[1]
    ).all()
    torch.manual_seed(123)
    np.random.seed(123)
    assert all(a.equal(b) for a, b in zip(views, two_views(images, positions), strict=True))


def test_views_steps_seeds_and_positions_differ():
    images, positions = photos(1, 32, 32).expand(12, -1, -1, -1), np.arange(12)
    views = [
        *two_views(images, positions),
        *two_views(images, positions, step=6),
        *two_views(images, positions, seed=4),
        *two_views(images, positions + 12),
    ]
    rows = torch.cat(views).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 96


def test_only_the_crop_depends_on_the_size_of_the_image():
    a, b = many(EVERYTHING, size=(32, 32)), many(EVERYTHING, size=(500, 375))
    for name in {f.name for f in fields(ViewParams)} - {"top", "left", "height", "width"}:
        assert (getattr(a, name) == getattr(b, name)).all(), name


def test_pixels_are_never_read_back():
    """The meta device has no values: code that would wait for a value from a GPU fails on it."""
    views = two_views(
        photos(64, 32, 32).to("meta"), np.arange(64), recipes=(replace(EVERYTHING, blur=1.0),)
    )
    assert [v.shape for v in views] == [(64, 3, 24, 24)] * 2


# Pixels.

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


@pytest.mark.parametrize("h, w, size", [(32, 32, 32), (20, 50, 32), (97, 64, 24), (9, 11, 40)])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_is_resized_crop_then_flip(h, w, size, channels, interpolation):
    images = photos(24, h, w, channels)
    d = many(Views(crop_min=0.05), 24, (h, w))
    d = replace(
        d,
        height=np.append(d.height[1:], h),
        top=np.append(np.minimum(d.top[:-1], h - d.height[1:]), 0),
    )
    ours = resized_crop(images, d, size, interpolation=interpolation)
    assert ours.dtype == torch.float32 and ours.shape == (24, channels, size, size)
    assert ours.min() >= 0 and ours.max() <= 1 and d.flip.any() and not d.flip.all()
    for i, image in enumerate(images / 255):
        box = [int(v[i]) for v in (d.top, d.left, d.height, d.width)]
        theirs = F.resized_crop(
            image, *box, size=[size, size], interpolation=MODES[interpolation], antialias=True
        ).clamp(0, 1)  # a bicubic filter overshoots
        torch.testing.assert_close(
            ours[i], F.hflip(theirs) if d.flip[i] else theirs, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("h, w, size", [(32, 32, 32), (97, 64, 24), (20, 50, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_one_is_pillows_to_one_level_and_agrees_with_crop(h, w, size, interpolation):
    images, d = photos(16, h, w), many(Views(crop_min=0.05), 16, (h, w))
    together = resized_crop(images, d, size, interpolation=interpolation)
    for i in range(16):
        top, left, height, width, flip = (
            v[i].item() for v in (d.top, d.left, d.height, d.width, d.flip)
        )
        image = F.to_pil_image(images[i])
        box = top, left, height, width
        ours = resized_crop_one(np.asarray(image), *box, flip, size, interpolation)
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        theirs = F.resized_crop(image, *box, [size, size], MODES[interpolation])
        off = (ours.int() - pil_to_tensor(F.hflip(theirs) if flip else theirs)).abs()
        assert off.max() <= (1 if interpolation == "bilinear" else 2)
        assert (off > 0).float().mean() < 0.1
        distance = (255 * together[i] - ours).abs()
        if interpolation == "bicubic":  # clipped between rows and columns, where it overshoots
            distance = distance.quantile(0.95)
        assert distance.max() < 1.5


@pytest.mark.parametrize("channels", [1, 2, 5, 16])
def test_crop_one_of_any_number_of_channels_crops_each_alike(channels):
    image = np.random.default_rng(channels).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    ours = resized_crop_one(image, 3, 4, 15, 11, True, 8)
    assert ours.shape == (channels, 8, 8)
    for c in range(channels):
        alike = resized_crop_one(image[..., [c, c, c]], 3, 4, 15, 11, True, 8)
        assert alike.equal(ours[[c, c, c]])


ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize(
    "op, factor", [(op, f) for op in range(3) for f in (0.0, 0.3, 1.7)] + [(3, -0.5), (3, 0.37)]
)
def test_each_color_operation_is_torchvisions(op, factor):
    x = pixels(4, 16, 24)
    x[0, :, :, ::2] = x[0, :1, :, ::2]  # no hue at all
    x[1, 1] = x[1, 0]  # ties between channels
    x[2], x[3, :, :8] = (x[2] > 0.5).float(), 0.0
    factors = nothing(4).factors
    factors[:, op] = factor
    ours = augment_color(x.clone(), replace(nothing(4), factors=factors))
    torch.testing.assert_close(ours, ADJUST[op](x, factor), rtol=0, atol=1e-5)


def test_jitter_is_torchvisions_in_each_images_own_order():
    n = 96
    x, d = pixels(n, 16, 16), many(Views(jitter=(0.8, 0.8, 0.8, 0.3)), n)
    only_jitter = replace(nothing(n), order=d.order, factors=d.factors)
    assert len(np.unique(d.order, axis=0)) > 20 and (d.factors == IDENTITY_FACTORS).all(1).any()
    ours = augment_color(x.clone(), only_jitter)
    for i in range(n):
        theirs = x[i]
        for op in d.order[i]:
            theirs = ADJUST[op](theirs, d.factors[i, op])
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=1e-5)


def test_gray_and_solarize_are_torchvisions_and_touch_only_those_who_drew_them():
    x, drawn = pixels(6, 16, 16), np.array([True, False] * 3)
    x[0, 0, 0, 0] = 0.5
    gray = augment_color(x.clone(), replace(nothing(6), gray=drawn))
    torch.testing.assert_close(gray[::2], F.rgb_to_grayscale(x[::2], 3), rtol=0, atol=1e-6)
    negative = augment_color(x.clone(), replace(nothing(6), solarize=drawn))
    assert negative[::2].equal(F.solarize(x[::2], 0.5))
    assert gray[1::2].equal(x[1::2]) and negative[1::2].equal(x[1::2])


def box_blurs(image, sigma, after_each_pass):
    """Blur an image (C, H, W) in 0..255 like Pillow: three box filters along rows and columns."""
    variance = sigma**2 / 3
    whole = int((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (
        (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    )
    inner = int(
        2**24 / np.float32(2 * (whole + part) + 1)
    )  # Pillow counts in 24-bit fractions, which settles ties
    outer = (2**24 - (2 * whole + 1) * inner) // 2
    kernel = np.array([outer] + [inner] * (2 * whole + 1) + [outer]) / 2**24
    for axis in (2, 2, 2, 1, 1, 1):
        padding = [(whole + 1, whole + 1) if a == axis else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(image, padding, "edge"), len(kernel), axis
        )
        image = after_each_pass(windows @ kernel)
    return image


@pytest.mark.parametrize("h, w", [(32, 32), (24, 40), (5, 3)])
def test_blur_is_pillows_without_its_rounding(h, w):
    sigma = np.array(
        [0.0, 0.1, 0.5, 1.0, 2**0.5, 2.0, 3.7, 6.0]
    )  # at sqrt(2) the box radius is a whole number
    images = photos(len(sigma), h, w)
    ours = augment_color(images / 255, replace(nothing(len(sigma)), sigma=sigma))
    assert ours[0].equal(images[0] / 255)
    for image, s, blurred in zip(images, sigma, ours, strict=True):
        pillows = pil_to_tensor(F.to_pil_image(image).filter(ImageFilter.GaussianBlur(float(s))))
        rounded = box_blurs(image.numpy(), s, lambda x: np.floor(x + 0.5))
        assert (rounded == pillows.numpy()).all(), s
        exact = box_blurs(image.numpy(), s, lambda x: x) / 255
        torch.testing.assert_close(blurred, torch.from_numpy(exact).float(), rtol=0, atol=1e-5)
        assert (blurred - pillows / 255).square().mean().sqrt() < 1 / 255


def test_jitter_then_gray_then_blur_then_solarize():
    n = 64
    x, d = pixels(n, 16, 16), many(EVERYTHING, n)
    assert (d.gray & (d.sigma > 0) & d.solarize).any()
    alone = nothing(n)
    y = augment_color(x.clone(), replace(alone, order=d.order, factors=d.factors))
    for stage in ({"gray": d.gray}, {"sigma": d.sigma}, {"solarize": d.solarize}):
        y = augment_color(y, replace(alone, **stage))
    torch.testing.assert_close(augment_color(x.clone(), d), y)
    assert y.min() >= 0 and y.max() <= 1


@pytest.mark.parametrize("channels", [1, 5])
def test_without_three_channels_brightness_contrast_blur_and_solarize_are_left(channels):
    n = 32
    x, d = pixels(n, 16, 16, channels), many(EVERYTHING, n)
    ours = augment_color(x.clone(), replace(d, sigma=np.zeros(n)))
    for i in range(n):
        theirs = x[i]
        for op in d.order[i]:
            base = theirs.mean() if op == CONTRAST else 0.0
            factor = d.factors[i, op] if op <= CONTRAST else 1.0
            theirs = (factor * theirs + (1 - factor) * base).clamp(0, 1)
        torch.testing.assert_close(
            ours[i], F.solarize(theirs, 0.5) if d.solarize[i] else theirs, rtol=0, atol=1e-5
        )
    views = two_views(
        photos(n, 20, 30, channels), np.arange(n), mean=(0.5,) * channels, std=(0.5,) * channels
    )
    assert [v.shape for v in views] == [(n, channels, 24, 24)] * 2


def test_a_recipe_with_everything_off_is_normalization():
    images = photos(5, 24, 24)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    (view,) = make_views(
        images,
        (OFF,),
        view_count=1,
        size=24,
        mean=mean,
        std=std,
        seed=0,
        step=0,
        positions=np.arange(5),
    )
    torch.testing.assert_close(view, F.normalize(images / 255, mean, std), rtol=0, atol=1e-5)
    with pytest.raises(ValueError):
        finish_view(images, nothing(5), mean=(0.5,), std=(0.5,))


def test_make_views_gives_each_view_its_recipe_and_its_form():
    images, positions = photos(8, 40, 28), np.arange(8)
    views = two_views(images, positions, recipes=(OFF, EVERYTHING), view_count=3)
    assert len(views) == 3
    for view in views:
        assert view.shape == (8, 3, 24, 24) and view.dtype == torch.float32
        assert (
            view.is_contiguous(memory_format=torch.channels_last)
            and view.min() >= -1
            and view.max() <= 1
        )
    first, second, third = (
        two_views(images, positions, recipes=(r,), view_count=3)
        for r in (OFF, EVERYTHING, EVERYTHING)
    )
    assert views[0].equal(first[0]) and views[1].equal(second[1]) and views[2].equal(third[2])


def test_cropping_in_workers_gives_the_views_of_the_batch():
    images, positions = photos(16, 40, 28), np.arange(16)
    recipe = replace(
        EVERYTHING, jitter_p=0.0, solarize=0.0
    )  # which would magnify Pillow's rounding
    key = dict(seed=3, step=5, view=0)
    crops = []
    for image, p in zip(images, positions, strict=True):
        d = sample_view_params(recipe, np.array([[40, 28]]), positions=np.array([p]), **key)
        box = (v.item() for v in (d.top, d.left, d.height, d.width, d.flip))
        crops.append(resized_crop_one(image.permute(1, 2, 0).numpy(), *box, size=24))
    d = sample_view_params(recipe, np.full((16, 2), 24), positions=positions, **key)
    view = finish_view(torch.stack(crops), d, mean=HALF, std=HALF)
    (batch,) = two_views(images, positions, recipes=(recipe,), view_count=1)
    torch.testing.assert_close(view, batch, rtol=0, atol=1.5 / 255 / 0.5)


# Speed changes nothing.


@pytest.mark.parametrize("at_once", [1, 3 * 24 * 24 * 7, 2**30])
def test_parts_of_any_size_give_the_same_view(at_once, monkeypatch):
    """One image at a time is the reference: no sorting, and no other image to be confused with."""
    images, positions = photos(30, 40, 28), np.arange(30)
    monkeypatch.setattr(views, "CHUNK_NUMEL", 1)
    plain = two_views(images, positions)
    monkeypatch.setattr(views, "CHUNK_NUMEL", at_once)
    for view, again in zip(plain, two_views(images, positions), strict=True):
        torch.testing.assert_close(again, view, rtol=0, atol=5e-6)


def test_a_compiled_kernel_is_the_eager_one(monkeypatch):
    """As torch.compile captures it, for any size; making C++ of that takes too long for a test."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    views._get_kernels.cache_clear()
    compiled = views._get_kernels(torch.device("cpu"), True)
    views._get_kernels.cache_clear()
    assert compiled is not views.EAGER_KERNELS
    some = torch.linspace(0.2, 1.0, 5).view(5, 1, 1)
    spans = 3 * some, 20 * some, 24, 16, (some > 0.5).float()
    for cubic in (False, True):
        torch.testing.assert_close(
            compiled.resampling_matrix(*spans, cubic),
            views.EAGER_KERNELS.resampling_matrix(*spans, cubic),
            rtol=0,
            atol=1e-5,
        )
    blends = some[..., None], (some[..., None] > 0.7).float(), (some[..., None] < 0.5).float()
    for name, values in {"blend": blends, "shift_hue": (some[..., None],)}.items():
        x, eager = pixels(5, 24, 16), pixels(5, 24, 16)
        getattr(compiled, name)(x, *values)
        getattr(views.EAGER_KERNELS, name)(eager, *values)
        torch.testing.assert_close(x, eager, rtol=0, atol=1e-5)
    taps = torch.linspace(0, 0.2, 15).view(5, 3)
    for dim in (2, 3):
        torch.testing.assert_close(
            compiled.box_filter(x, taps, dim),
            views.EAGER_KERNELS.box_filter(x, taps, dim),
            rtol=0,
            atol=1e-6,
        )


def test_kernels_are_compiled_for_a_few_cases_whatever_is_drawn(monkeypatch, caplog):
    """After eight compilations, torch runs a function uncompiled, and only a log says so."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(views, "CHUNK_NUMEL", 3 * 24 * 24 * 5)
    views._get_kernels.cache_clear()
    for step in range(20):
        two_views(photos(30, 40, 28), np.arange(30), step=step, compiled=True)
    views._get_kernels.cache_clear()
    assert "torch._dynamo hit config" not in caplog.text


def test_where_nothing_can_be_compiled_one_line_says_so(monkeypatch, capsys):
    def refuse(*tensors):
        raise RuntimeError("no C++ compiler found\nand a long trace")

    monkeypatch.setattr(torch, "compile", lambda kernel, **how: refuse)
    views._get_kernels.cache_clear()
    images, positions = photos(4, 24, 24), np.arange(4)
    eager = two_views(images, positions)
    assert all(
        a.equal(b) for a, b in zip(eager, two_views(images, positions, compiled=True), strict=True)
    )
    views._get_kernels.cache_clear()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no C++ compiler found" in said and "long trace" not in said


# Distributions. The seeds are fixed: these fail for a wrong distribution, not by chance.


def assert_same_distribution(ours, theirs, name=""):
    """Two-sample Kolmogorov-Smirnov, level 0.001."""
    ours, theirs = np.sort(ours), np.sort(theirs)
    at = np.concatenate([ours, theirs])
    gap = np.searchsorted(ours, at, "right") / len(ours) - np.searchsorted(
        theirs, at, "right"
    ) / len(theirs)
    assert np.abs(gap).max() < 1.95 * np.sqrt(1 / len(ours) + 1 / len(theirs)), name


@pytest.mark.parametrize("size", [(32, 32), (50, 20), (7, 40)])
@pytest.mark.parametrize("crop_min", [0.08, 0.6])
def test_crops_are_distributed_as_random_resized_crops(size, crop_min):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = T.RandomResizedCrop(8, scale=(crop_min, 1.0))
        params = [theirs.make_params([torch.empty(3, *size)]) for _ in range(3000)]
    t = {name: np.array([p[name] for p in params]) for name in ("top", "left", "height", "width")}
    d = many(Views(crop_min=crop_min), 12000, size)
    for name in t:
        assert_same_distribution(getattr(d, name), t[name], name)
    for name, derived in {
        "area": lambda h, w, top, left: h * w,
        "aspect": lambda h, w, top, left: w / h,
        "below": lambda h, w, top, left: size[0] - top - h,
        "right": lambda h, w, top, left: size[1] - left - w,
    }.items():
        ours = derived(d.height, d.width, d.top, d.left)
        assert_same_distribution(ours, derived(t["height"], t["width"], t["top"], t["left"]), name)


def test_the_fallback_is_the_central_crop():
    d = many(Views(crop_min=1.0), 50, (100, 21))
    assert (
        (d.height == 28).all()
        and (d.width == 21).all()
        and (d.top == 36).all()
        and (d.left == 0).all()
    )
    d = many(Views(crop_min=1.0), 50, (21, 100))
    assert (
        (d.height == 21).all()
        and (d.width == 28).all()
        and (d.top == 0).all()
        and (d.left == 36).all()
    )


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4, 0.1), (1.5, 0.0, 0.2, 0.5)])
def test_factors_are_distributed_as_in_color_jitter(jitter):
    d = many(Views(jitter=jitter, jitter_p=1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [T.ColorJitter(*jitter).make_params([]) for _ in range(2000)]
    for op, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        if jitter[op]:
            assert_same_distribution(d.factors[:, op], [p[f"{name}_factor"] for p in params], name)
        else:
            assert (d.factors[:, op] == IDENTITY_FACTORS[op]).all()


def test_the_24_orders_are_equally_likely():
    orders, counts = np.unique(many(Views(), 24 * 250).order, axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == range(4)).all()
    assert ((counts - 250) ** 2 / 250).sum() < 50  # chi-square with 23 degrees of freedom: 0.001


def test_probabilities_are_those_of_the_recipe():
    recipe = Views(
        flip=0.3, jitter_p=0.7, gray=0.15, blur=0.6, blur_sigma=(0.5, 1.5), solarize=0.25
    )
    d, n = many(recipe), 4000
    blurred = d.sigma > 0
    jittered = (d.factors != IDENTITY_FACTORS).all(axis=1)
    assert (jittered | (d.factors == IDENTITY_FACTORS).all(axis=1)).all()
    for drawn, p in [
        (d.flip, 0.3),
        (jittered, 0.7),
        (d.gray, 0.15),
        (blurred, 0.6),
        (d.solarize, 0.25),
    ]:
        assert abs(drawn.mean() - p) < 3.3 * np.sqrt(p * (1 - p) / n)
    assert_same_distribution(d.sigma[blurred], np.linspace(0.5, 1.5, 4000), "sigma")
    for p in (0.0, 1.0):
        d = many(Views(flip=p, jitter_p=p, gray=p, blur=p, solarize=p))
        assert all(
            (x == p).all()
            for x in (
                d.flip,
                d.gray,
                d.sigma > 0,
                d.solarize,
                (d.factors != IDENTITY_FACTORS).all(1),
            )
        )


def test_nothing_drawn_predicts_anything_else():
    d = many(Views(crop_min=0.05, solarize=0.5), size=(400, 400))
    place = d.top / (400 - d.height + 1), d.left / (400 - d.width + 1)
    shape = d.height * d.width, np.log(d.width / d.height)
    others = (
        d.flip,
        *d.order[:, 1:].T,
        *d.factors.T,
        d.factors[:, HUE] == 0,
        d.gray,
        d.sigma > 0,
        d.solarize,
    )
    r = np.corrcoef(np.stack([*place, *shape, *others]).astype(float))
    r[5:8, 5:8] = 0  # an order does not repeat itself
    assert np.abs(r - np.diag(np.diag(r))).max() < 4 / np.sqrt(4000)


# Words.


def test_a_recipe_in_words_has_a_line_for_each_operation_that_is_on():
    assert describe_augmentation(Views()) == [
        "crop 20% to 100% of the area and resize",
        "flip left to right, with probability 0.5",
        "jitter brightness by 0.4, contrast by 0.4, saturation by 0.4, hue by 0.1, "
        "in random order, "
        "with probability 0.8",
        "turn gray, with probability 0.2",
        "blur with sigma 0.1 to 2 pixels, with probability 0.5",
    ]
    assert describe_augmentation(OFF) == ["crop 100% to 100% of the area and resize"]
    assert describe_augmentation(
        replace(OFF, jitter_p=1.0, jitter=(0.0, 0.0, 0.0, 0.0), solarize=1.0)
    )[1:] == ["solarize"]
    assert "saturation" not in " ".join(describe_augmentation(GRAY_IMAGES))
