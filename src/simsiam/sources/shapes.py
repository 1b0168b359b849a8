"""The built-in data set `shapes`, drawn by this program: the demo needs no file and no network.

An image has four to six bright copies of one shape on a dark, noisy background. Each copy has its
own position, angle, size and gray level; the label is the shape. The shape is what all copies share
and therefore what two crops of an image share. Nothing else distinguishes images: there is no
color, the background is the same everywhere, and no copy is darker than the background (a mixture
of dark and bright copies turned out to identify an image, and networks learned that instead of
shapes). Raw pixels say little about the label, because every copy is moved and rotated.

The drawing must not change: tests check a hash of it, because every number measured on `shapes`
depends on it.
"""

from functools import lru_cache
from math import hypot

import numpy as np

CLASSES = (
    "bar",
    "crescent",
    "disc",
    "half_disc",
    "l",
    "plus",
    "ring",
    "square",
    "star",
    "triangle",
)
IMAGE_SIZE = 32
PIXEL_GRID = np.arange(IMAGE_SIZE, dtype=np.float64)
MAX_TRIES = 200  # to place the copies; a crowded image may get fewer than intended
# Seed of the generator, and number of images.
SPLIT_SPECS = {"train": (0, 4000), "val": (1, 1000), "test": (2, 2000)}


@lru_cache
def draw_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw a split.

    Args:
        split: "train", "val" or "test".

    Returns:
        Pixels, uint8 (N, 3, 32, 32) with three equal channels, and labels, int64 (N,), which go
        through the classes in turn.
    """
    drawn = _draw_images(split)
    gray = np.stack([image for image, _ in drawn])
    labels = np.arange(len(gray), dtype=np.int64) % len(CLASSES)
    return np.broadcast_to(gray[:, None], (len(gray), 3, IMAGE_SIZE, IMAGE_SIZE)).copy(), labels


def draw_factors(split: str) -> dict[str, np.ndarray]:
    """Return what else than the shape distinguishes the images of a split.

    Args:
        split: "train", "val" or "test".

    Returns:
        float64 (N,) each: `number` of copies, and over the copies of an image the mean `size`
        (radius in pixels), `brightness` (above the background, 1 is white), `x` and `y` (pixels).
    """
    copies = [np.array(of_image) for _, of_image in _draw_images(split)]
    x, y, size, brightness = np.stack([of_image.mean(axis=0) for of_image in copies]).T
    number = np.array([len(of_image) for of_image in copies], np.float64)
    return {"number": number, "size": size, "brightness": brightness, "x": x, "y": y}


@lru_cache
def _draw_images(split: str) -> list[tuple[np.ndarray, list[tuple[float, float, float, float]]]]:
    """Draw a split: each image, and x, y, radius and contrast of its copies."""
    seed, n = SPLIT_SPECS[split]
    rng = np.random.Generator(np.random.Philox(key=[seed, IMAGE_SIZE]))
    return [_draw_image(rng, CLASSES[label % len(CLASSES)]) for label in range(n)]


def _draw_image(
    rng: np.random.Generator, shape: str
) -> tuple[np.ndarray, list[tuple[float, float, float, float]]]:
    """Draw an image, uint8 (32, 32), with x, y, radius and contrast of each copy.

    Uses only rng.random, whose stream is the same in every version of NumPy.
    """
    copies = []
    image = 0.3 + 0.1 * (rng.random((IMAGE_SIZE, IMAGE_SIZE)) - 0.5)
    for x, y, radius in _sample_circles(rng):
        angle = 2 * np.pi * rng.random()
        contrast = 0.25 + 0.35 * rng.random()
        copies.append((x, y, radius, contrast))
        patch = (
            slice(int(y - radius), int(y + radius) + 2),
            slice(int(x - radius), int(x + radius) + 2),
        )
        dy, dx = (
            (PIXEL_GRID[patch[0], None] - y) / radius,
            (PIXEL_GRID[None, patch[1]] - x) / radius,
        )
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        cover = 0.5 - radius * SIGNED_DISTANCES[shape](u, v)  # the outline, softened over one pixel
        image[patch] += contrast * np.minimum(np.maximum(cover, 0), 1)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), copies


def _sample_circles(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return x, y and radius in pixels of four to six circles.

    They touch neither each other nor the edge of the image.
    """
    circle_count = 4 + int(3 * rng.random())
    before = rng.bit_generator.state
    u = rng.random((MAX_TRIES, 3))
    radii = 4.4 + 1.8 * u[:, :1]
    centers = radii + (IMAGE_SIZE - 1 - 2 * radii) * u[:, 1:]
    circles = np.hstack([centers, radii]).tolist()  # Python numbers are faster in a loop
    places: list[tuple[float, float, float]] = []
    for tried in range(MAX_TRIES):
        x, y, radius = circles[tried]
        if all(hypot(x - a, y - b) > radius + r + 0.5 for a, b, r in places):
            places.append((x, y, radius))
            if len(places) == circle_count:
                break
    rng.bit_generator.state = before
    rng.random((tried + 1, 3))  # advance past the circles that were tried, and no further
    return places


def _box_distance(u, v, half_width, half_height, center=(0.0, 0.0)):
    return np.maximum(np.abs(u - center[0]) - half_width, np.abs(v - center[1]) - half_height)


def _star_distance(u, v):
    """Return the distance to the nearest of ten edges, after folding the plane into a tenth."""
    angle = np.abs((np.arctan2(u, v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    a, b = np.hypot(u, v) * np.sin(angle), np.hypot(u, v) * np.cos(angle)
    # An inner corner; the outer corner next to it is at (0, 1).
    inner = 0.42 * np.array([np.sin(np.pi / 5), np.cos(np.pi / 5)])
    edge = (inner - [0, 1]) / np.hypot(*(inner - [0, 1]))
    return edge[0] * (b - 1) - edge[1] * a


# Signed distance to each outline, negative inside. Coordinates are in radii of the copy; a shape
# reaches to a distance of about 1.
SIGNED_DISTANCES = {
    "bar": lambda u, v: _box_distance(u, v, 0.95, 0.26),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "disc": lambda u, v: np.hypot(u, v) - 0.85,
    "half_disc": lambda u, v: np.maximum(np.hypot(u, v + 0.35) - 0.95, -v - 0.35),
    "l": lambda u, v: np.minimum(
        _box_distance(u, v, 0.22, 0.85, (-0.45, 0)), _box_distance(u, v, 0.65, 0.22, (0, 0.63))
    ),
    "plus": lambda u, v: np.minimum(
        _box_distance(u, v, 0.95, 0.24), _box_distance(u, v, 0.24, 0.95)
    ),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.23,
    "square": lambda u, v: _box_distance(u, v, 0.7, 0.7),
    "star": _star_distance,
    "triangle": lambda u, v: np.maximum(np.sqrt(3) / 2 * np.abs(u) + v / 2, -v) - 0.48,
}
