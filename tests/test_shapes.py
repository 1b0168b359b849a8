"""The built-in data set is frozen: every number measured on it depends on these pixels."""

import hashlib

import numpy as np

from simsiam.sources import shapes

# sha256 of the first channel, 16 digits.
FROZEN = {"train": "6d1eb76efe52dab7", "val": "7afb4421f8270322", "test": "56e95e6d458432ec"}


def test_pixels_are_frozen():
    for split, digest in FROZEN.items():
        pixels, labels = shapes.draw_split(split)
        assert (
            pixels.shape == (shapes.SPLIT_SPECS[split][1], 3, 32, 32) and pixels.dtype == np.uint8
        )
        assert hashlib.sha256(pixels[:, 0].tobytes()).hexdigest()[:16] == digest, split
        assert (pixels == pixels[:, :1]).all()
        assert np.bincount(labels).tolist() == [len(labels) // 10] * 10


def test_factors_are_those_of_the_drawing():
    """The centroid of what is brighter than the background, and how much of it there is."""
    pixels, _ = shapes.draw_split("val")
    factors = shapes.draw_factors("val")
    bright = np.clip(pixels[:, 0] / 255 - 0.37, 0, None)
    weight = bright.sum(axis=(1, 2))
    for name, axis in (("x", 1), ("y", 2)):
        centroid = (bright.sum(axis=axis) * shapes.PIXEL_GRID).sum(axis=1) / weight
        assert np.corrcoef(centroid, factors[name])[0, 1] > 0.65
    assert set(factors["number"]) <= {1, 2, 3, 4, 5, 6} and factors["number"].mean() > 3
    assert factors["size"].min() >= 4.4 and factors["size"].max() <= 6.2
    assert factors["brightness"].min() >= 0.25 and factors["brightness"].max() <= 0.6
    amount = factors["number"] * factors["size"] ** 2 * factors["brightness"]
    disc = np.arange(1000) % 10 == shapes.CLASSES.index("disc")
    assert np.corrcoef(amount[disc], weight[disc])[0, 1] > 0.9
