"""The order of images and the batches of views, both functions of (seed, step).

Nothing depends on what ran before, so a run can be resumed at any step. There are two orders. Each
is a permutation of all images in every epoch, which uses as many of them as fill whole batches:

- `shuffled` draws the permutation uniformly.
- `interleaved` is for images in shards, which are read in whole blocks. The order of the blocks is
  random, and so is the order of the images in each. The sequence of all images is divided into
  batch_size parts, and position j of the batches runs through part j. So a batch takes its images
  from many places, each block is read once by the worker that makes this position, and the images
  of a step are found without the steps before it.

Images in memory are cropped on the device, a whole batch at a time. Other images are read by worker
processes, which decode an image once for all its views and crop it; color, blur and normalization
follow on the device.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.cuda import Event
from torch.utils.data import DataLoader, Dataset, get_worker_info

from simsiam.config.method import Views
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data import views
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.data.storage import Blocks
from simsiam.distributed.process_group import local_slice, world_size
from simsiam.errors import UsageError, WorkFailed, none_readable, printable
from simsiam.utils.system import SHARED_MEMORY, free_shared_memory, process_context
from simsiam.utils.workers import CPU_CORES

ORDER_STREAM = 2  # the seed's stream for the order of images; views draw from their own stream
DEFAULT_VIEW_COUNT = 2  # views of each image where nothing is trained on them
SEQUENTIAL_STEP_OFFSET = 2**40  # steps from here on go through all images in order, once

WORKER_PREFETCH = 2  # steps that a worker makes ahead

# Crops uint8 (N, C, size, size) of each view, the images (N,) they are of, and (key, reason) of
# each unreadable image that was replaced.
CropBatch: TypeAlias = tuple[list[Tensor], Tensor, list[tuple[str, str]]]


@dataclass(frozen=True)
class ViewBatch:
    """The views of a step, or this process's part of them.

    Attributes:
        step: The step.
        index: (N,), positions of the images in the training set.
        views: Each (N, C, size, size) float32, normalized, on the device.
        skipped: (key, reason) of each unreadable image that was replaced.
        wait: Seconds that the training loop waited for the batch.
        weight: Factor for the loss of this process, so that the mean over processes is the mean
            over all images of the batch.
    """

    step: int
    index: Tensor
    views: list[Tensor]
    skipped: list[tuple[str, str]]
    wait: float = 0.0
    weight: float = 1.0


def steps_per_epoch(image_count: int, batch_size: int) -> int:
    """Count the whole batches in an epoch. The order of the next epoch may use the images left.

    Args:
        image_count: Number of images.
        batch_size: Images in a batch, of all processes together.

    Returns:
        The number of steps.

    Raises:
        UsageError: There are fewer images than in one batch.
    """
    if image_count < batch_size:
        raise UsageError(
            f"batch_size is {batch_size} and there are only {image_count} images: "
            "take a smaller --batch-size"
        )
    return image_count // batch_size


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, image_count: int) -> np.ndarray:
    """Permute images for an epoch, by the ranks of uniform numbers from a fixed stream.

    Args:
        seed: Seed of the run.
        epoch: The epoch, from 0.
        image_count: Number of images.

    Returns:
        A permutation of range(image_count), int64.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, epoch, 0, 0]))
    return np.argsort(rng.random(image_count), kind="stable")


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Permute blocks for an epoch.

    Args:
        seed: Seed of the run.
        epoch: The epoch, from 0.
        blocks: The blocks.

    Returns:
        The permutation (blocks,), and the position (blocks + 1,) in the sequence of all images
        where each block in this order starts, and the end.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=[0, epoch, 1, 0]))
    permuted = np.argsort(rng.random(len(blocks)), kind="stable")
    return permuted, np.cumsum(np.append(0, np.diff(blocks.offsets)[permuted]))


@lru_cache(maxsize=2**12)
def order_within_block(seed: int, epoch: int, block: int, image_count: int) -> np.ndarray:
    """Permute the images of a block for an epoch.

    Args:
        seed: Seed of the run.
        epoch: The epoch, from 0.
        block: Number of the block.
        image_count: Number of its images.

    Returns:
        A permutation of range(image_count), int64.
    """
    counter = [0, epoch, 2 + block, 0]
    rng = np.random.Generator(np.random.Philox(key=[seed, ORDER_STREAM], counter=counter))
    return np.argsort(rng.random(image_count), kind="stable")


def interleaved_indices(seed: int, epoch: int, blocks: Blocks, positions: np.ndarray) -> np.ndarray:
    """Find the images at positions of the sequence of an epoch, which goes block after block.

    Args:
        seed: Seed of the run.
        epoch: The epoch, from 0.
        blocks: The blocks.
        positions: (N,), positions in the sequence of all images.

    Returns:
        (N,), the images, int64.
    """
    permuted, begin = block_order(seed, epoch, blocks)
    place = np.searchsorted(begin, positions, side="right") - 1
    indices = []
    for block, inside in zip(permuted[place].tolist(), (positions - begin[place]).tolist()):
        first, after = blocks.offsets[block : block + 2].tolist()
        indices.append(first + int(order_within_block(seed, epoch, block, after - first)[inside]))
    return np.array(indices, np.int64)


def interleaved_blocks(images: Images, recipe: ResolvedRecipe) -> Blocks | None:
    """Return the blocks of the order `interleaved`.

    Args:
        images: The training images.
        recipe: The recipe, for its order.

    Returns:
        The blocks; None if the order is `shuffled`.
    """
    return images.blocks if recipe.order == "auto" else None


def batch_indices(
    step: int, recipe: ResolvedRecipe, images: Images, batch_slice: slice = slice(None)
) -> np.ndarray:
    """Find the images of a step's batch.

    Args:
        step: The step.
        recipe: Gives seed, batch size and order.
        images: The training images.
        batch_slice: The positions in the batch that are needed.

    Returns:
        (N,), positions in the training set, int64.
    """
    size, count = recipe.batch_size, len(images)
    per_epoch, positions = steps_per_epoch(count, size), np.arange(size)[batch_slice]
    if step >= SEQUENTIAL_STEP_OFFSET:  # the last batch is moved back, so that it is whole
        return min((step - SEQUENTIAL_STEP_OFFSET) * size, count - size) + positions
    epoch, step = divmod(step, per_epoch)
    if blocks := interleaved_blocks(images, recipe):
        return interleaved_indices(recipe.seed, epoch, blocks, positions * per_epoch + step)
    return epoch_order(recipe.seed, epoch, count)[step * size + positions]


def iter_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    """Make the batches of steps start to stop - 1; each process makes its part of every batch.

    Args:
        images: The training images.
        recipe: The recipe.
        start: First step.
        stop: Step after the last one.
        device: Where views are made and returned.

    Yields:
        The batches, in order.

    Raises:
        WorkFailed: No image can be read, a shard can no longer be read, or a data worker hangs or
            was killed.
    """
    make_batches = _streamed_batches if images.pixels is None else _resident_batches
    batches = make_batches(images, recipe, start, stop, device)
    for batch in prefetch_cuda(batches, device) if device.type == "cuda" else time_waits(batches):
        weight = len(batch.index) * world_size() / recipe.batch_size
        yield replace(batch, weight=weight)


def time_waits(batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
    """Measure how long each batch makes the loop wait.

    Args:
        batches: The batches.

    Yields:
        The same batches, with `wait`.
    """
    start = time.monotonic()
    for batch in batches:
        yield replace(batch, wait=time.monotonic() - start)
        start = time.monotonic()


def prefetch_cuda(batches: Iterator[ViewBatch], device: torch.device) -> Iterator[ViewBatch]:
    """Make the next batch in a CUDA stream of its own while the step before it runs.

    The training loop only launches work, so it may be ahead of the device; two steps at most, to
    limit memory. The wait for a batch is measured on the device, from the end of the step before
    until its views are ready, and is known two steps later: `wait` is that of an earlier batch.

    Args:
        batches: The batches.
        device: A CUDA device.

    Yields:
        The same batches, with `wait`.
    """
    batch_stream, step_stream = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    events = deque[tuple[Event, Event]]()
    while True:
        with torch.cuda.stream(batch_stream):
            batch = next(batches, None)
        if batch is None:
            return
        free, ready = (
            stream.record_event(Event(enable_timing=True)) for stream in (step_stream, batch_stream)
        )
        step_stream.wait_event(ready)
        for view in batch.views:
            view.record_stream(step_stream)
        events.append((free, ready))
        wait = 0.0
        if len(events) > 2:
            free, ready = events.popleft()
            free.synchronize()
            ready.synchronize()
            wait = max(0.0, free.elapsed_time(ready) / 1000)
        yield replace(batch, wait=wait)


def sequential_batches(
    images: Images, recipe: ResolvedRecipe, device: torch.device
) -> Iterator[ViewBatch]:
    """Make views of all images in order, once.

    Args:
        images: The training images.
        recipe: The recipe.
        device: Where views are made.

    Returns:
        The batches; the last one repeats images if they do not fill it.
    """
    batch_count = -(-len(images) // recipe.batch_size)
    start = SEQUENTIAL_STEP_OFFSET
    return iter_batches(images, recipe, start, start + batch_count, device)


def _resident_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    assert images.pixels is not None
    pixels, own_slice = torch.from_numpy(images.pixels).to(device), local_slice(recipe.batch_size)
    for step in range(start, stop):
        index = torch.from_numpy(batch_indices(step, recipe, images, own_slice))
        made = _make_views(pixels[index.to(device)], recipe, step, None, own_slice.start)
        yield ViewBatch(step, index, made, [])


def _streamed_batches(
    images: Images, recipe: ResolvedRecipe, start: int, stop: int, device: torch.device
) -> Iterator[ViewBatch]:
    workers = CPU_CORES if recipe.workers is None else recipe.workers
    current_image = torch.full((max(workers, 1),), -1).share_memory_()  # of each worker; -1: none
    own_slice, parts = local_slice(recipe.batch_size), 1
    # With blocks, each worker makes the same positions of every batch: it alone reads their blocks.
    if interleaved_blocks(images, recipe):
        parts = max(1, min(workers, own_slice.stop - own_slice.start))
    _check_shared_memory(recipe, own_slice.stop - own_slice.start, workers, parts)
    loader: DataLoader = DataLoader(
        _StepDataset(images, recipe, own_slice, parts, current_image),
        batch_size=None,
        sampler=range(start * parts, stop * parts),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        timeout=recipe.read_timeout if workers else 0,
        prefetch_factor=WORKER_PREFETCH if workers else None,
        multiprocessing_context=process_context() if workers else None,
    )
    results = _iter_loader(loader, images, current_image)
    for step in range(start, stop):
        crops, index, skipped = list[list[Tensor]](), [], list[tuple[str, str]]()
        for result in islice(results, parts):
            if isinstance(result, WorkFailed):
                raise result
            crops.append([view.to(device, non_blocking=True) for view in result[0]])
            index.append(result[1])
            skipped += result[2]
        by_view = [torch.cat(parts) for parts in zip(*crops, strict=True)]
        finished = _finish_views(by_view, recipe, step, None, own_slice.start)
        yield ViewBatch(step, torch.cat(index), finished, skipped)


def _check_shared_memory(recipe: ResolvedRecipe, batch_size: int, workers: int, parts: int) -> None:
    """Raise WorkFailed if workers would not have room for their crops: they would hang."""
    pixels = sum(size**2 for size in recipe.view_sizes)
    num_bytes = -(-batch_size // parts) * recipe.channels * pixels  # that a worker makes at a time
    needed = (WORKER_PREFETCH + 1) * workers * num_bytes
    if (free := free_shared_memory()) is not None and needed > free:
        raise WorkFailed(
            f"{workers} data workers need {needed / 2**20:,.1f} MiB of shared memory, and "
            f"{SHARED_MEMORY} has {free / 2**20:,.1f} MiB: give the container more, as with "
            "`docker run --shm-size=1g`, or take --workers 0"
        )


def _iter_loader(
    loader: DataLoader, images: Images, current_image: Tensor
) -> Iterator[CropBatch | WorkFailed]:
    """Yield what the loader makes; raise WorkFailed if a worker hangs, is killed or lacks files."""
    results = iter(loader)
    while True:
        try:
            yield next(results)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:
            # Each batch of a worker takes an open file until it is used.
            if "open files" in str(error) or "ancdata" in str(error):
                raise WorkFailed(
                    "too many open files for the data workers: allow more (`ulimit -n`), or take "
                    "fewer --workers"
                ) from error
            if not str(error).startswith("DataLoader"):
                raise
            names = ", ".join(printable(images.keys[i]) for i in current_image.tolist() if i >= 0)
            if "timed out" in str(error):
                raise WorkFailed(
                    f"a data worker has not come back for {loader.timeout:g} s from reading "
                    f"{names or 'an image'}: check the disk and the shared memory, or "
                    "give a larger --read-timeout"
                ) from error
            raise WorkFailed(
                f"a data worker was killed, at {names or 'no image'}: "
                "perhaps memory ran out; take fewer --workers"
            ) from error


def make_training_views(
    images: Images,
    index: np.ndarray,
    recipe: ResolvedRecipe,
    step: int,
    device: torch.device,
    *,
    view_count: int | None = DEFAULT_VIEW_COUNT,
) -> list[Tensor]:
    """Make views as in training, as if these images were the batch of this step.

    Args:
        images: The images.
        index: (N,), positions of those to use.
        recipe: The recipe.
        step: The step that seeds the augmentation.
        device: Where views are made.
        view_count: Number of views of each image, without small crops; None: as in training.

    Returns:
        The first views, each (N, C, size, size) float32, normalized.

    Raises:
        WorkFailed: No image can be read.
    """
    if images.pixels is not None:
        pixels = torch.from_numpy(images.pixels[index]).to(device)
        return _make_views(pixels, recipe, step, view_count)
    crops, _, _ = crop_images(images.prefetch(index, 0.25), index, recipe, step, view_count)
    return _finish_views([view.to(device) for view in crops], recipe, step, view_count)


def _view_kinds(recipe: ResolvedRecipe, view_count: int | None) -> list[tuple[Views, int]]:
    """Augmentation and side of a number of views; if it is None, of those of a training step."""
    method = recipe.method
    full = method.full_view_count if view_count is None else view_count
    last = len(method.views) - 1
    kinds = [(method.views[min(view, last)], recipe.view_size) for view in range(full)]
    small = method.small_crops if view_count is None else 0
    return kinds + [(method.small_views, recipe.small_crop_size) for _ in range(small)]


def _make_views(
    pixels: Tensor,
    recipe: ResolvedRecipe,
    step: int,
    view_count: int | None,
    first_position: int = 0,
) -> list[Tensor]:
    augmentations, sizes = zip(*_view_kinds(recipe, view_count), strict=True)
    return views.make_views(
        pixels,
        augmentations,
        view_count=len(sizes),
        size=sizes,
        mean=recipe.mean,
        std=recipe.std,
        seed=recipe.seed,
        step=step,
        positions=np.arange(first_position, first_position + len(pixels)),
        compiled=recipe.compile,
    )


def _finish_views(
    crops: list[Tensor],
    recipe: ResolvedRecipe,
    step: int,
    view_count: int | None,
    first_position: int = 0,
) -> list[Tensor]:
    """Make views of crops, uint8 (N, C, size, size) for each view: the work of the device."""
    sizes = [(1, 1)] * len(crops[0])  # only the crop would depend on the size of an image
    return [
        views.finish_view(
            pixels,
            _sample_view_params(augmentation, recipe.seed, step, view, sizes, first_position),
            mean=recipe.mean,
            std=recipe.std,
            compiled=recipe.compile,
        )
        for view, ((augmentation, _), pixels) in enumerate(
            zip(_view_kinds(recipe, view_count), crops, strict=True)
        )
    ]


class _StepDataset(Dataset):
    """The crops of a step's batch, or of a part of it, by task: the work of a data worker."""

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

    def __getitem__(self, task: int) -> CropBatch | WorkFailed:
        step, part = divmod(task, len(self.slices))
        part_slice = self.slices[part]
        current = self.current_image[info.id if (info := get_worker_info()) else 0]
        try:
            index = batch_indices(step, self.recipe, self.images, part_slice)
            if interleaved_blocks(self.images, self.recipe):
                current.fill_(int(index[0]))
                self.images = self.images.prefetch(index)  # keeps what the step before loaded
            return crop_images(
                self.images, index, self.recipe, step, None, part_slice.start, current
            )
        except WorkFailed as error:  # returned: an exception raised here would carry a traceback
            return error
        finally:
            current.fill_(-1)


def min_decode_side(recipe: ResolvedRecipe) -> int:
    """Compute how large a JPEG must be decoded, so that nothing of it has to be enlarged.

    Args:
        recipe: Gives the size of views and the smallest crop.

    Returns:
        Pixels of the shorter side of an image.
    """
    kinds = _view_kinds(recipe, len(recipe.method.views)) + _view_kinds(recipe, None)
    sides = [round(size / (v.crop_min * views.ASPECT_RATIO[0]) ** 0.5) for v, size in kinds]
    return max(recipe.image_size, *sides)  # whole images are measured as well


def crop_images(
    images: Images,
    index: np.ndarray,
    recipe: ResolvedRecipe,
    step: int,
    view_count: int | None,
    first_position: int = 0,
    current_image: Tensor | None = None,
) -> CropBatch:
    """Read images, each once, and crop them for all views.

    An unreadable image is replaced by the next readable one, so that batches stay whole and do not
    depend on when a file broke.

    Args:
        images: The images.
        index: (N,), positions of those to read.
        recipe: The recipe.
        step: The step.
        view_count: Number of views of each image, without small crops; None: as in training.
        first_position: Position of the first image in the batch.
        current_image: A tensor with one element, set to the position of the image being read.

    Returns:
        Crops uint8 (N, C, size, size) of each view, the positions (N,) of the images that were
        read, and the (key, reason) of each unreadable one.

    Raises:
        WorkFailed: No image can be read, or a shard can no longer be read.
    """
    skipped = list[tuple[str, str]]()
    min_side = min_decode_side(recipe)

    def read(i: int) -> tuple[int, np.ndarray]:
        for at in range(i, i + len(images)):
            if current_image is not None:
                current_image.fill_(at % len(images))
            try:
                return at % len(images), images.read(at % len(images), min_side)
            except Unreadable as error:
                skipped.append((images.keys[at % len(images)], str(error)))
        raise none_readable(len(images), *skipped[0])

    indices, batch = zip(*map(read, index), strict=True)
    sizes = [image.shape[:2] for image in batch]
    crops = []
    for view, (augmentation, size) in enumerate(_view_kinds(recipe, view_count)):
        d = _sample_view_params(augmentation, recipe.seed, step, view, sizes, first_position)
        boxes = zip(d.top, d.left, d.height, d.width, d.flip, strict=True)
        crops.append(
            torch.stack(
                [
                    views.resized_crop_one(x, *box, size, augmentation.interpolation)
                    for x, box in zip(batch, boxes, strict=True)
                ]
            )
        )
    return crops, torch.tensor(indices), skipped


def _sample_view_params(
    augmentation: Views,
    seed: int,
    step: int,
    view: int,
    sizes: list[tuple[int, int]],
    first_position: int = 0,
) -> views.ViewParams:
    positions = np.arange(first_position, first_position + len(sizes))
    return views.sample_view_params(
        augmentation,
        np.array(sizes),
        seed=seed,
        step=step,
        view=view,
        positions=positions,
    )
