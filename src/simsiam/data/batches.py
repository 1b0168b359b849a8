"""The order of images and the making of views, both functions of (seed, step): nothing depends on what ran before.

There are two orders, and each is a permutation of all images, of which an epoch takes as many as fill whole batches.
`shuffled` draws it uniformly. `interleaved` is for images that lie in blocks of shards, which are read as wholes: the
blocks are put in a random order, and so are the images of each; position j of the batches of an epoch goes through this
sequence from the j-th part of it on. So a batch takes its images from as many places as it has images, each block is
read once, by whoever makes this position, and a step's images are found without the steps before.

Images resident in memory are cropped on the device, a whole batch at a time. Others are read by worker processes,
which decode an image once for all its views and crop it; color, blur and normalization follow on the device.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.cuda import Event
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data import views
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.data.shards import Blocks
from simsiam.distributed.process_group import local_slice, world_size
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.utils.workers import CPU_CORES

ORDER_STREAM = 2  # the seed's stream for the order of images; views draw from a stream of their own
DEFAULT_VIEW_COUNT = 2  # of each image, where nobody trains on them
SEQUENTIAL_STEP_OFFSET = (
    2**40
)  # the steps from here on take all images in order, once: a look at them before training


@dataclass(frozen=True)
class ViewBatch:
    step: int
    index: Tensor  # (N,) positions of the images in the training set
    views: list[Tensor]  # each (N, 3, size, size), normalized, on the device
    skipped: list[tuple[str, str]]  # unreadable files met on the way: key and reason
    wait: float = 0.0  # seconds that the loop waited for them
    weight: float = 1.0  # of its loss, for the mean over processes to be the mean over the images of all of them


def steps_per_epoch(image_count: int, batch_size: int) -> int:
    """Whole batches in an epoch; the images left over wait for another epoch's order."""
    if image_count < batch_size:
        raise UsageError(
            f"batch_size is {batch_size} and there are only {image_count} images: take a smaller --batch-size"
        )
    return image_count // batch_size


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, image_count: int) -> np.ndarray:
    """The permutation of `count` images in an epoch: the ranks of uniform numbers, whose stream is fixed."""
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, epoch, 0, 0]))
    return np.argsort(rng.random(image_count), kind="stable")


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """The permutation of blocks in an epoch, and where in the sequence of their images each begins, and the end."""
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, epoch, 1, 0]))
    permuted = np.argsort(rng.random(len(blocks)), kind="stable")
    return permuted, np.cumsum(np.append(0, np.diff(blocks.offsets)[permuted]))


@lru_cache(maxsize=2**12)
def order_within_block(seed: int, epoch: int, block: int, image_count: int) -> np.ndarray:
    """The permutation of the `count` images of a block in an epoch."""
    rng = np.random.Generator(
        np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, epoch, 2 + block, 0])
    )
    return np.argsort(rng.random(image_count), kind="stable")


def interleaved_indices(seed: int, epoch: int, blocks: Blocks, positions: np.ndarray) -> np.ndarray:
    """The images at these positions of an epoch's sequence, block after block."""
    permuted, begin = block_order(seed, epoch, blocks)
    place = np.searchsorted(begin, positions, side="right") - 1
    found = []
    for block, inside in zip(permuted[place].tolist(), (positions - begin[place]).tolist()):
        first, after = blocks.offsets[block : block + 2].tolist()
        found.append(first + int(order_within_block(seed, epoch, block, after - first)[inside]))
    return np.array(found, np.int64)


def interleaved_blocks(images: Images, recipe: ResolvedRecipe) -> Blocks | None:
    """The blocks of the order `interleaved`; None where the order is `shuffled`."""
    return images.blocks if recipe.order == "auto" else None


def batch_indices(
    step: int, recipe: ResolvedRecipe, images: Images, batch_slice: slice = slice(None)
) -> np.ndarray:
    """The images (N,) of a step's batch, as positions in the training set; `mine`: at these places alone."""
    size, count = recipe.batch_size, len(images)
    per_epoch, positions = steps_per_epoch(count, size), np.arange(size)[batch_slice]
    if step >= SEQUENTIAL_STEP_OFFSET:  # the last batch steps back to be whole
        return min((step - SEQUENTIAL_STEP_OFFSET) * size, count - size) + positions
    epoch, step = divmod(step, per_epoch)
    if blocks := interleaved_blocks(images, recipe):
        return interleaved_indices(recipe.seed, epoch, blocks, positions * per_epoch + step)
    return epoch_order(recipe.seed, epoch, count)[step * size + positions]


def iter_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    """The batches of steps start .. stop - 1; of several processes each gets its share of every batch."""
    made = (_streamed_batches if images.pixels is None else _resident_batches)(
        images, recipe, start, stop, device
    )
    for batch in prefetch_cuda(made, device) if device.type == "cuda" else time_waits(made):
        weight = len(batch.index) * world_size() / recipe.batch_size
        yield replace(batch, weight=weight)


def time_waits(batch_iter: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
    """The same batches, and for how long each kept the loop waiting."""
    clock = time.monotonic()
    for batch in batch_iter:
        yield replace(batch, wait=time.monotonic() - clock)
        clock = time.monotonic()


def prefetch_cuda(batch_iter: Iterator[ViewBatch], device: torch.device) -> Iterator[ViewBatch]:
    """The same on CUDA, where a stream of its own makes the next batch while the step before it runs.

    The loop only launches work, and may be two steps ahead of the device: no more, for memory's sake. What a batch
    waited is known by then: from the end of the step before, on the device, to when its views were there.
    """
    aside, steps, waits = (
        torch.cuda.Stream(device),
        torch.cuda.current_stream(device),
        deque[tuple[Event, Event]](),
    )
    while True:
        with torch.cuda.stream(aside):
            batch = next(batch_iter, None)
        if batch is None:
            return
        free, ready = (stream.record_event(Event(enable_timing=True)) for stream in (steps, aside))
        steps.wait_event(ready)
        for view in batch.views:
            view.record_stream(steps)
        waits.append((free, ready))
        wait = 0.0
        if len(waits) > 2:
            free, ready = waits.popleft()
            free.synchronize()
            ready.synchronize()
            wait = max(0.0, free.elapsed_time(ready) / 1000)
        yield replace(batch, wait=wait)


def sequential_batches(images: Images, recipe: ResolvedRecipe, device: torch.device) -> Iterator[ViewBatch]:
    """Views of every image, in order."""
    return iter_batches(
        images,
        recipe,
        SEQUENTIAL_STEP_OFFSET,
        SEQUENTIAL_STEP_OFFSET - (-len(images) // recipe.batch_size),
        device,
    )


def _resident_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    assert images.pixels is not None
    pixels, mine = torch.from_numpy(images.pixels).to(device), local_slice(recipe.batch_size)
    for step in range(start, stop):
        index = torch.from_numpy(batch_indices(step, recipe, images, mine))
        made = _make_views(
            pixels[index.to(device)], recipe, step, recipe.method.view_count, mine.start
        )
        yield ViewBatch(step, index, made, [])


def _streamed_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    workers = CPU_CORES if recipe.workers is None else recipe.workers
    reading = torch.full(
        (max(workers, 1),), -1
    ).share_memory_()  # the image that each worker is at; -1: none
    mine, pin, limit = (
        local_slice(recipe.batch_size),
        device.type == "cuda",
        recipe.read_timeout if workers else 0,
    )
    parts = 1
    if interleaved_blocks(
        images, recipe
    ):  # a worker makes the same places of every batch: no other reads their blocks
        parts = max(1, min(workers, mine.stop - mine.start))
    steps, tasks = (
        _StepDataset(images, recipe, mine, parts, reading),
        range(start * parts, stop * parts),
    )
    loader = DataLoader(
        steps, batch_size=None, sampler=tasks, num_workers=workers, pin_memory=pin, timeout=limit
    )
    made = _iter_loader(loader, images, reading)
    for step in range(start, stop):
        crops, index, skipped = [], [], list[tuple[str, str]]()
        for part in islice(made, parts):
            if isinstance(part, WorkFailed):
                raise part
            crops.append(part[0].to(device, non_blocking=True))
            index.append(part[1])
            skipped += part[2]
        finished = _finish_views(torch.cat(crops, dim=1), recipe, step, mine.start)
        yield ViewBatch(step, torch.cat(index), finished, skipped)


def _iter_loader(loader: DataLoader, images: Images, current_image: Tensor) -> Iterator[Any]:
    """What the loader makes. Raises WorkFailed for a worker that hangs, with the file it is at, or that was killed."""
    made = iter(loader)
    while True:
        try:
            yield next(made)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            names = ", ".join(printable(images.keys[i]) for i in current_image.tolist() if i >= 0)
            if "timed out" in str(error):
                wait = (
                    f"has not come back for {loader.timeout:g} s from reading {names or 'an image'}"
                )
                raise WorkFailed(
                    f"a data worker {wait}: see whether the disk is, or give --read-timeout"
                ) from error
            raise WorkFailed(
                f"a data worker was killed, at {names or 'no image'}: perhaps memory ran out; take fewer --workers"
            ) from error


def make_training_views(
    images: Images,
    index: np.ndarray,
    recipe: ResolvedRecipe,
    step: int,
    device: torch.device,
    *,
    view_count: int = DEFAULT_VIEW_COUNT,
) -> list[Tensor]:
    """The first views, as in training, of the images at `index`, as if they were the batch of that step."""
    if images.pixels is not None:
        return _make_views(
            torch.from_numpy(images.pixels[index]).to(device), recipe, step, view_count
        )
    crops, _, _ = crop_images(images.prefetch(index, 0.25), index, recipe, step, view_count)
    return _finish_views(crops.to(device), recipe, step)


def _make_views(
    pixels: Tensor, recipe: ResolvedRecipe, step: int, view_count: int, first_position: int = 0
) -> list[Tensor]:
    return views.make_views(
        pixels,
        recipe.method.views,
        view_count=view_count,
        size=recipe.image_size,
        mean=recipe.mean,
        std=recipe.std,
        seed=recipe.seed,
        step=step,
        positions=np.arange(first_position, first_position + len(pixels)),
        compiled=recipe.compile,
    )


def _finish_views(
    crops: Tensor, recipe: ResolvedRecipe, step: int, first_position: int = 0
) -> list[Tensor]:
    """Crops uint8 (views, N, C, size, size) to views: what the device does."""
    how: dict[str, Any] = {"mean": recipe.mean, "std": recipe.std, "compiled": recipe.compile}
    sizes = [(1, 1)] * crops.shape[1]  # colors do not depend on the image's size
    return [
        views.finish_view(
            pixels, _sample_view_params(recipe, step, view, sizes, first_position), **how
        )
        for view, pixels in enumerate(crops)
    ]


class _StepDataset(Dataset):
    """A step to the crops of this process's share of its batch, or of a part of that: what a worker does."""

    def __init__(
        self,
        images: Images,
        recipe: ResolvedRecipe,
        batch_slice: slice,
        part_count: int,
        current_image: Tensor,
    ):
        self.images, self.recipe, self.current_image = images, recipe, current_image
        ends = np.linspace(batch_slice.start, batch_slice.stop, part_count + 1).astype(int).tolist()
        self.slices = [slice(first, after) for first, after in pairwise(ends)]

    def __getitem__(self, task: int) -> tuple[Tensor, Tensor, list[tuple[str, str]]] | WorkFailed:
        step, part = divmod(task, len(self.slices))
        mine, views = self.slices[part], self.recipe.method.view_count
        reading = self.current_image[info.id if (info := get_worker_info()) else 0]
        try:
            index = batch_indices(step, self.recipe, self.images, mine)
            if interleaved_blocks(self.images, self.recipe):
                reading.fill_(int(index[0]))
                self.images = self.images.prefetch(
                    index
                )  # goes on with the blocks that the step before left here
            return crop_images(self.images, index, self.recipe, step, views, mine.start, reading)
        except (
            WorkFailed
        ) as error:  # handed over rather than raised: a worker's exceptions arrive with a traceback
            return error
        finally:
            reading.fill_(-1)


def min_decode_side(recipe: ResolvedRecipe) -> int:
    """The pixels that an image's shorter side needs for no crop of it to be enlarged: a JPEG is not decoded larger."""
    return round(
        recipe.image_size
        / (min(v.crop_min for v in recipe.method.views) * views.ASPECT_RATIO[0]) ** 0.5
    )


def crop_images(
    images: Images,
    index: np.ndarray,
    recipe: ResolvedRecipe,
    step: int,
    view_count: int,
    first_position: int = 0,
    current_image: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    """Crops uint8 (views, N, C, size, size) of images read once each, which images they are, and what was unreadable.

    Their places in the batch begin with `first`. In the place of an unreadable image stands the next one that is not:
    batches stay whole and stay the same. `reading` is told the position of the image that is being read.
    """
    size, skipped = recipe.image_size, list[tuple[str, str]]()
    least = min_decode_side(recipe)

    def read(i: int) -> tuple[int, np.ndarray]:
        for at in range(i, i + len(images)):
            if current_image is not None:
                current_image.fill_(at % len(images))
            try:
                return at % len(images), images.read(at % len(images), least)
            except Unreadable as error:
                skipped.append((images.keys[at % len(images)], str(error)))
        raise WorkFailed(
            f"none of the {len(images)} images can be read; the first reason: {skipped[0][1]}"
        )

    found, batch = zip(*map(read, index), strict=True)
    crops = []
    for view in range(view_count):
        d = _sample_view_params(
            recipe, step, view, [image.shape[:2] for image in batch], first_position
        )
        boxes = zip(d.top, d.left, d.height, d.width, d.flip, strict=True)
        crops.append(
            torch.stack(
                [
                    views.resized_crop_one(image, *box, size)
                    for image, box in zip(batch, boxes, strict=True)
                ]
            )
        )
    return torch.stack(crops), torch.tensor(found), skipped


def _sample_view_params(
    recipe: ResolvedRecipe, step: int, view: int, sizes: list[tuple[int, int]], first_position: int = 0
) -> views.ViewParams:
    augmentation = recipe.method.views[min(view, len(recipe.method.views) - 1)]
    positions = np.arange(first_position, first_position + len(sizes))
    return views.sample_view_params(
        augmentation, np.array(sizes), seed=recipe.seed, step=step, view=view, positions=positions
    )
