"""The built-in set for detection and segmentation: several of the demo's shapes in each image.

It is written as a folder in COCO format and read like any other such set. As in `shapes`, bright
copies are drawn on a dark, noisy ground, each with its own position, angle, size and gray level.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from simsiam.detection.metrics import encode_mask, import_pycocotools
from simsiam.errors import WorkFailed
from simsiam.sources.shapes import SIGNED_DISTANCES
from simsiam.utils.files import atomic_folder

CLASSES = ("bar", "disc", "plus", "ring", "star")
HEIGHT, WIDTH = 96, 128  # pixels
SPLIT_SIZES = {"train": 300, "val": 60, "test": 120}  # images


def prepare_scenes(split_sizes: Mapping[str, int] | None = None) -> Path:
    """Draw the set into the cache if it is not there yet.

    Args:
        split_sizes: The number of images in each split; SPLIT_SIZES by default.

    Returns:
        The folder of the set.
    """
    sizes = split_sizes or SPLIT_SIZES
    cache = Path(os.path.expanduser(os.environ.get("SIMSIAM_DATA") or "~/.cache/simsiam/data"))
    folder = cache / ("scenes-" + "-".join(map(str, sizes.values())))
    if not folder.exists():
        try:
            with atomic_folder(folder) as part:
                write_scenes(part, sizes)
        except WorkFailed:
            if not folder.exists():  # no other process has finished the same set first
                raise
    return folder


def write_scenes(folder: Path, split_sizes: Mapping[str, int]) -> None:
    """Write a set in COCO format.

    Args:
        folder: The folder to create.
        split_sizes: The number of images in each split.
    """
    import_pycocotools()
    (folder / "annotations").mkdir(parents=True)
    for stream, (split, count) in enumerate(split_sizes.items()):
        rng = np.random.Generator(np.random.Philox(key=[stream, HEIGHT]))
        (folder / split).mkdir()
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for i in range(count):
            pixels, labels, masks = draw_scene(rng)
            name = f"{i:04d}.png"
            Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(folder / split / name)
            images.append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for label, mask in zip(labels, masks, strict=True):
                ids = {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1}
                annotations.append(ids | coco_annotation(mask))
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content), "utf-8")


def coco_annotation(mask: np.ndarray) -> dict[str, object]:
    """Describe one object.

    Args:
        mask: (H, W) bool.

    Returns:
        The bbox, area, iscrowd and segmentation of a COCO annotation.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    lengths = encode_mask(mask)
    return {
        "bbox": [int(value) for value in box],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": lengths["size"], "counts": lengths["counts"].decode()},
    }


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Draw one image of two to five objects.

    Args:
        rng: Random numbers; only `rng.random` is used, which is stable across numpy versions.

    Returns:
        The pixels, (H, W) uint8; and of each object the index of its class and its mask, (H, W)
        bool.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = 0.3 + 0.1 * (rng.random((HEIGHT, WIDTH)) - 0.5)
    labels, masks = [], []
    for cx, cy, radius in sample_circles(rng):
        label, angle = int(len(CLASSES) * rng.random()), 2 * np.pi * rng.random()
        dx, dy = (x - cx) / radius, (y - cy) / radius
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        cover = np.clip(0.5 - radius * SIGNED_DISTANCES[CLASSES[label]](u, v), 0, 1)
        cover[np.hypot(dx, dy) > 1.1] = 0  # the signed distances are valid near the shape only
        image += (0.25 + 0.35 * rng.random()) * cover
        labels.append(label)
        masks.append(cover >= 0.5)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), labels, masks


def sample_circles(rng: np.random.Generator) -> Sequence[tuple[float, float, float]]:
    """Draw two to five circles that touch neither each other nor the edge.

    Args:
        rng: Random numbers.

    Returns:
        The center x, center y and radius of each, in pixels.
    """
    count, circles = 2 + int(4 * rng.random()), list[tuple[float, float, float]]()
    while len(circles) < count:
        radius = 9 + 9 * rng.random()
        cx, cy = radius + 1 + (np.array([WIDTH, HEIGHT]) - 2 * radius - 2) * rng.random(2)
        if all(np.hypot(cx - a, cy - b) > radius + r + 1 for a, b, r in circles):
            circles.append((cx, cy, radius))
    return circles
