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
