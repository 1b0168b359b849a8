"""The order of images and the making of views, both functions of (seed, step): nothing depends on what ran before.

Images resident in memory are cropped on the device, a whole batch at a time. Others are read by worker processes,
which decode an image once for all its views and crop it; color, blur and normalization follow on the device.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simsiam import views
from simsiam.errors import UsageError, WorkFailed
from simsiam.images import CORES, Images, Unreadable
from simsiam.recipes import Recipe

ORDER = 2  # the seed's stream for the order of images; views draw from a stream of their own
SWEEP = 2**40  # the steps from here on take all images in order, once: a look at them before training


@dataclass(frozen=True)
class Batch:
    step: int
    index: Tensor  # (N,) positions of the images in the training set
    views: list[Tensor]  # each (N, 3, size, size), normalized, on the device
    wait: float  # seconds that the loop waited for them
    skipped: list[tuple[str, str]]  # unreadable files met on the way: key and reason


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch; the images left over wait for another epoch's order."""
    if count < batch_size:
        raise UsageError(f"batch_size is {batch_size} and there are only {count} images: take a smaller --batch-size")
    return count // batch_size


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of `count` images in an epoch: the ranks of uniform numbers, whose stream is fixed."""
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER], counter=[0, epoch, 0, 0]))
    return np.argsort(rng.random(count), kind="stable")


def members(step: int, recipe: Recipe, count: int) -> np.ndarray:
    """The images (N,) of a step's batch, by position in the training set."""
    per_epoch = steps_per_epoch(count, recipe.batch_size)
    if step >= SWEEP:  # the last batch steps back to be whole
        first = min((step - SWEEP) * recipe.batch_size, count - recipe.batch_size)
        return np.arange(first, first + recipe.batch_size)
    first = step % per_epoch * recipe.batch_size
    return order(recipe.seed, step // per_epoch, count)[first : first + recipe.batch_size]


def batches(images: Images, recipe: Recipe, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1."""
    clock = time.monotonic()
    for batch in (_streamed if images.pixels is None else _resident)(images, recipe, start, stop, device):
        yield replace(batch, wait=time.monotonic() - clock)
        clock = time.monotonic()


def sweep(images: Images, recipe: Recipe, device: torch.device) -> Iterator[Batch]:
    """Views of every image, in order."""
    return batches(images, recipe, SWEEP, SWEEP - (-len(images) // recipe.batch_size), device)


def _resident(images: Images, recipe: Recipe, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    assert images.pixels is not None and recipe.image_size and recipe.mean and recipe.std
    pixels = images.pixels.to(device)
    for step in range(start, stop):
        index = torch.from_numpy(members(step, recipe, len(images)))
        x = views.make_views(
            pixels[index.to(device)],
            recipe.method.views,
            count=recipe.method.view_count,
            size=recipe.image_size,
            mean=recipe.mean,
            std=recipe.std,
            seed=recipe.seed,
            step=step,
            positions=np.arange(recipe.batch_size),
        )
        yield Batch(step, index, x, 0.0, [])


def _streamed(images: Images, recipe: Recipe, start: int, stop: int, device: torch.device) -> Iterator[Batch]:
    assert recipe.mean and recipe.std
    workers = CORES if recipe.workers is None else recipe.workers
    crops_of = _Crops(images, recipe)
    pin = device.type == "cuda"
    loader = DataLoader(crops_of, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin)
    for step, made in enumerate(loader, start):
        if isinstance(made, WorkFailed):
            raise made
        crops, index, skipped = made
        x = []
        for view, pixels in enumerate(crops.to(device, non_blocking=True)):
            draws = _draw(recipe, step, view, [(1, 1)] * len(pixels))  # colors do not depend on the image's size
            colored = views.color(pixels.float().div_(255), draws)
            x.append(views.normalize(colored, recipe.mean, recipe.std).contiguous(memory_format=torch.channels_last))
        yield Batch(step, index, x, 0.0, skipped)


class _Crops(Dataset):
    """A step to the crops of its batch, uint8 (views, N, 3, size, size): what a worker does."""

    def __init__(self, images: Images, recipe: Recipe):
        self.images, self.recipe = images, recipe

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, list[tuple[str, str]]] | WorkFailed:
        try:
            return self._make(step)
        except WorkFailed as error:  # handed over rather than raised: a worker's exceptions arrive with a traceback
            return error

    def _make(self, step: int) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        skipped: list[tuple[str, str]] = []
        index, batch = zip(*(self._read(i, skipped) for i in members(step, self.recipe, len(self.images))), strict=True)
        size = self.recipe.image_size
        assert size is not None
        crops = []
        for view in range(self.recipe.method.view_count):
            d = _draw(self.recipe, step, view, [(image.height, image.width) for image in batch])
            boxes = zip(d.top, d.left, d.height, d.width, d.flip, strict=True)
            crops.append(
                torch.stack([views.crop_one(image, *box, size) for image, box in zip(batch, boxes, strict=True)])
            )
        return torch.stack(crops), torch.tensor(index), skipped

    def _read(self, i: int, skipped: list[tuple[str, str]]) -> tuple[int, Image.Image]:
        """Image i or, where it is unreadable, the next one that is not: batches stay whole and stay the same."""
        for at in range(i, i + len(self.images)):
            try:
                return at % len(self.images), self.images.read(at % len(self.images))
            except Unreadable as error:
                skipped.append((self.images.keys[at % len(self.images)], str(error)))
        raise WorkFailed(f"none of the {len(self.images)} images can be read; the first reason: {skipped[0][1]}")


def _draw(recipe: Recipe, step: int, view: int, sizes: list[tuple[int, int]]) -> views.Draws:
    augmentation = recipe.method.views[min(view, len(recipe.method.views) - 1)]
    positions = np.arange(len(sizes))
    return views.draw(augmentation, np.array(sizes), seed=recipe.seed, step=step, view=view, positions=positions)
