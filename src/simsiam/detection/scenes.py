"""The embedded set for detection and segmentation: the demo's shapes, several kinds in one image, drawn by a program.

It is written as a folder of COCO's, so whoever reads it reads what anybody's COCO-format set would be. Drawn like
`shapes`: bright copies on a dark, noisy ground, each with its own place, angle, size and gray level.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simsiam.detection.metrics import encode_mask, import_pycocotools
from simsiam.sources.shapes import SIGNED_DISTANCES

CLASSES = ("bar", "disc", "plus", "ring", "star")
HEIGHT, WIDTH = 96, 128
SPLIT_SIZES = {"train": 300, "val": 60, "test": 120}  # images


def prepare_scenes(split_sizes: dict[str, int] | None = None) -> Path:
    """The folder that holds the set, drawn into the cache if it is not there yet."""
    sizes = split_sizes or SPLIT_SIZES
    cache = Path(os.path.expanduser(os.environ.get("SIMSIAM_DATA") or "~/.cache/simsiam/data"))
    folder = cache / ("scenes-" + "-".join(map(str, sizes.values())))
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        write_scenes(part, sizes)
        try:
            os.rename(part, folder)
        except OSError:  # another process was first, and has drawn the same
            assert folder.exists()
    return folder


def write_scenes(folder: Path, sizes: dict[str, int]) -> None:
    """A folder of COCO's with so many images in each split."""
    import_pycocotools()
    (folder / "annotations").mkdir(parents=True)
    for stream, (split, count) in enumerate(sizes.items()):
        rng = np.random.Generator(np.random.Philox(key=[stream, HEIGHT]))
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            pixels, kinds, masks = draw_scene(rng)
            Image.fromarray(np.repeat(pixels[..., None], 3, axis=2)).save(
                folder / split / f"{i:04d}.png"
            )
            images.append({"id": i, "file_name": f"{i:04d}.png", "height": HEIGHT, "width": WIDTH})
            for kind, mask in zip(kinds, masks, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": kind + 1,
                        **coco_annotation(mask),
                    }
                )
        categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))


def coco_annotation(mask: np.ndarray) -> dict[str, Any]:
    """COCO's words for one object."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    lengths = encode_mask(mask)
    return {
        "bbox": [int(value) for value in box], "area": int(mask.sum()), "iscrowd": 0,
        "segmentation": {"size": lengths["size"], "counts": lengths["counts"].decode()},
    }  # fmt: skip


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Pixels uint8 (H, W), classes and masks bool (H, W) of two to five objects. Uses rng.random only."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    image = 0.3 + 0.1 * (rng.random((HEIGHT, WIDTH)) - 0.5)
    kinds, masks = [], []
    for cx, cy, radius in sample_circles(rng):
        kind, angle = int(len(CLASSES) * rng.random()), 2 * np.pi * rng.random()
        dx, dy = (x - cx) / radius, (y - cy) / radius
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        cover = np.clip(0.5 - radius * SIGNED_DISTANCES[CLASSES[kind]](u, v), 0, 1)
        cover[np.hypot(dx, dy) > 1.1] = 0  # outlines are given around the copy only
        image += (0.25 + 0.35 * rng.random()) * cover
        kinds.append(kind)
        masks.append(cover >= 0.5)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), kinds, masks


def sample_circles(rng: np.random.Generator) -> Sequence[tuple[float, float, float]]:
    """Centers and radii in pixels of two to five circles that touch neither each other nor the edge."""
    wanted, found = 2 + int(4 * rng.random()), list[tuple[float, float, float]]()
    while len(found) < wanted:
        radius = 9 + 9 * rng.random()
        cx, cy = radius + 1 + (np.array([WIDTH, HEIGHT]) - 2 * radius - 2) * rng.random(2)
        if all(np.hypot(cx - a, cy - b) > radius + r + 1 for a, b, r in found):
            found.append((cx, cy, radius))
    return found
