"""Weights by name become a run folder, with the preprocessing that belongs to them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from simsiam.config.recipes import Recipe
from simsiam.data.transform import Transform
from simsiam.errors import UsageError
from simsiam.exports.timm import crop_fraction

# --- preprocessing ---


def photo(width=301, height=203):
    """Smooth colors with edges: an image that resizing can get wrong."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (9 + 4 * c) + y / (17 - 3 * c)) for c in range(3)]
    pixels = np.stack(waves, 2).clip(0, 255).astype(np.uint8)
    pixels[60:120, 80:200] = 255 - pixels[60:120, 80:200]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(96, 110), (64, 64)])
def test_an_image_is_prepared_as_timm_and_torchvision_do(interpolation, size, resize):
    from timm.data import create_transform
    from torchvision.transforms._presets import ImageClassification
    from torchvision.transforms.functional import InterpolationMode

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    ours = Transform(size, mean, std, interpolation, resize)
    theirs = create_transform(
        input_size=size, interpolation=interpolation, mean=mean, std=std,
        crop_pct=crop_fraction(ours), crop_mode="center",
    )  # fmt: skip
    preset = ImageClassification(
        crop_size=size, resize_size=resize, mean=mean, std=std,
        interpolation=InterpolationMode(interpolation),
    )  # fmt: skip
    x = ours(photo())[0]
    scale = torch.tensor(std).view(-1, 1, 1) * 255
    for other in (theirs, preset):
        difference = ((other(photo()) - x) * scale).abs()  # in gray levels
        assert difference.max() < 2 and difference.mean() < 0.4


@pytest.mark.parametrize("size", [32, 160, 224, 288, 299, 384])
def test_timm_resizes_to_the_same_number_of_pixels(size):
    for resize in range(size, 2 * size, 7):
        fraction = crop_fraction(Transform(size, (0.5,), (0.5,), shorter_side=resize))
        assert math.floor(size / fraction) == resize


def test_recipes_without_a_preprocessing_of_their_own_are_prepared_as_before():
    data = Recipe().to_dict()
    assert data.pop("eval_resize") is None and data.pop("eval_interpolation") == "bilinear"
    assert Recipe.from_dict(data) == Recipe()
    assert (
        Transform(224, (0.5,), (0.5,)).resize == 256 and Transform(64, (0.5,), (0.5,)).resize == 64
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 224, "eval_resize": 200}, "eval_resize is 200; it lies between 224 and"),
        ({"eval_interpolation": "cubic"}, "unknown eval_interpolation 'cubic': did you mean"),
    ],
)
def test_a_wrong_preprocessing_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Recipe().replace(**settings)
