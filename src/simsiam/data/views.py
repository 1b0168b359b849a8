"""Views: augmentation of a whole batch, each image with its own parameters.

A view is a pure function of (seed, step, view, position in the global batch). `draw_uniforms` turns
these four into random numbers, `sample_view_params` turns the numbers into parameters (numpy, on
the host), and `resized_crop` and `augment_color` turn parameters into pixels (torch, on any
device). Nothing else has an influence: not the order or the size of the batch, the number of
workers, a global generator, or what ran before. Operations and distributions are torchvision's, the
blur is Pillow's, and the defaults of `Views` are the paper's (appendix A).

Images that differ in size are cropped one by one in data workers, with `sample_view_params` and
`resized_crop_one`. Then the batch of crops goes through `sample_view_params` again (only the crop
depends on the sizes of images) and `finish_view`.

Most of the time would be spent on moving pixels between memory and cache. So a CPU processes a
batch in parts that fit into its cache, and the operations that touch pixels most often are
`Kernels`, each of which is a single loop when compiled.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.config.methods import Views
from simsiam.utils.devices import device_traits

# The second half of the Philox key: whatever else draws from the seed uses another number.
VIEW_STREAM = 1
# Values of the Philox counter that belong to one position; each yields four numbers.
COUNTERS_PER_POSITION = 9
CROP_ATTEMPTS = 10  # crops tried before the central one (RandomResizedCrop)
ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height of a crop (RandomResizedCrop)
BRIGHTNESS, CONTRAST, SATURATION, HUE = COLOR_OPS = range(4)
JITTER_ORDERS = np.array(list(itertools.permutations(COLOR_OPS)))
IDENTITY_FACTORS = np.array([1.0, 1.0, 1.0, 0.0])  # factors and a shift without effect
CHUNK_NUMEL = 2**20  # values processed at a time on a CPU: 4 MiB in float32


def draw_uniforms(seed: int, step: int, view: int, positions: np.ndarray) -> np.ndarray:
    """Draw uniform numbers for images, each row a function of its own position only.

    Philox is counter-based (Salmon et al., 2011): a row can be computed without those before it.

    Args:
        seed: Seed of the run.
        step: The step.
        view: Number of the view, from 0.
        positions: (N,), positions in the global batch.

    Returns:
        (N, 4 * COUNTERS_PER_POSITION) float64 in [0, 1).
    """

    def rows(run: np.ndarray) -> np.ndarray:
        counter = np.array([int(run[0]) * COUNTERS_PER_POSITION, view, step, 0], dtype=np.uint64)
        philox = np.random.Philox(
            key=np.array([seed, VIEW_STREAM], dtype=np.uint64), counter=counter
        )
        return np.random.Generator(philox).random((len(run), 4 * COUNTERS_PER_POSITION))

    # Neighbors have adjacent counters, so a run of consecutive positions is one call.
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return np.concatenate([rows(run) for run in runs])


@dataclass(frozen=True)
class ViewParams:
    """Parameters drawn for N images, arrays of length N.

    Attributes:
        top: Top of the crop, in pixels of the source image.
        left: Left side of the crop.
        height: Height of the crop.
        width: Width of the crop.
        flip: bool, whether to flip the crop left to right.
        order: (N, 4), each row a permutation of COLOR_OPS.
        factors: (N, 4), a column for each of COLOR_OPS; IDENTITY_FACTORS without jitter.
        gray: bool, whether to convert to gray.
        sigma: Standard deviation of the blur in pixels of the view; 0 without blur.
        solarize: bool, whether to solarize.
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    gray: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray

    def __getitem__(self, rows: np.ndarray | slice) -> "ViewParams":
        """Return the parameters of some of the images."""
        return ViewParams(*(getattr(self, f.name)[rows] for f in fields(self)))


def sample_view_params(
    augmentation: Views,
    sizes: np.ndarray,
    *,
    seed: int,
    step: int,
    view: int,
    positions: np.ndarray,
) -> ViewParams:
    """Draw the parameters of a view, distributed as in torchvision.

    Args:
        augmentation: Probabilities and ranges.
        sizes: (N, 2), height and width of each image in pixels.
        seed: Seed of the run.
        step: The step.
        view: Number of the view, from 0.
        positions: (N,), positions of the images in the global batch.

    Returns:
        The parameters of each image.
    """
    # 33 of the 36 numbers are used; a new operation can take a spare one without changing others.
    u = draw_uniforms(seed, step, view, positions)
    u_area, u_aspect, u_factors, u = np.split(
        u, [CROP_ATTEMPTS, 2 * CROP_ATTEMPTS, 2 * CROP_ATTEMPTS + 4], axis=1
    )
    u_top, u_left, u_flip, u_jitter, u_order, u_gray, u_blur, u_sigma, u_solarize = u.T[:9]

    # RandomResizedCrop: the first attempt that fits into the image. Its fallback, the largest
    # central crop of an allowed aspect ratio, is one more attempt, which always fits.
    area = sizes.prod(axis=1, keepdims=True) * _lerp(
        augmentation.crop_min, augmentation.crop_max, u_area
    )
    aspect = np.exp(_lerp(np.log(ASPECT_RATIO[0]), np.log(ASPECT_RATIO[1]), u_aspect))
    largest = np.minimum(sizes, sizes[:, ::-1] * ASPECT_RATIO[1])
    attempts = np.concatenate(
        [np.sqrt(np.stack([area / aspect, area * aspect], axis=2)), largest[:, None]], axis=1
    )
    attempts = np.rint(attempts).astype(np.int64)  # (N, CROP_ATTEMPTS + 1, 2)
    fits = (attempts > 0) & (attempts <= sizes[:, None])
    chosen = fits.all(axis=2).argmax(axis=1)
    extent = attempts[np.arange(len(sizes)), chosen]
    slack = sizes - extent
    anywhere = np.floor(np.stack([u_top, u_left], axis=1) * (slack + 1)).astype(np.int64)
    corner = np.where((chosen < CROP_ATTEMPTS)[:, None], anywhere, slack // 2)

    strength = np.array(augmentation.jitter)
    # A factor is not negative; a shift may be.
    lowest = np.maximum(IDENTITY_FACTORS - strength, [0.0, 0.0, 0.0, -np.inf])
    factors = _lerp(lowest, IDENTITY_FACTORS + strength, u_factors)
    return ViewParams(
        top=corner[:, 0],
        left=corner[:, 1],
        height=extent[:, 0],
        width=extent[:, 1],
        flip=u_flip < augmentation.flip,
        order=JITTER_ORDERS[(u_order * len(JITTER_ORDERS)).astype(np.int64)],
        factors=np.where((u_jitter < augmentation.jitter_p)[:, None], factors, IDENTITY_FACTORS),
        gray=u_gray < augmentation.gray,
        sigma=np.where(u_blur < augmentation.blur, _lerp(*augmentation.blur_sigma, u_sigma), 0.0),
        solarize=u_solarize < augmentation.solarize,
    )


def resized_crop(
    images: Tensor,
    view_params: ViewParams,
    size: int,
    *,
    interpolation: str = "bilinear",
    compiled: bool = False,
) -> Tensor:
    """Crop images, resize the crops with antialiasing, and flip some of them.

    The operation is linear and separable: one matrix for the rows of each image and one for its
    columns. If it is bilinear and no crop can shrink, each row of a matrix has two nonzero numbers,
    and `grid_sample` takes a quarter of the time.

    Args:
        images: uint8 (N, C, H, W).
        view_params: Parameters of the N images.
        size: Side of the views in pixels.
        interpolation: "bilinear" or "bicubic".
        compiled: Whether to use compiled kernels.

    Returns:
        (N, C, size, size) float32 in [0, 1].
    """
    params = np.stack(
        [view_params.top, view_params.height, view_params.left, view_params.width, view_params.flip]
    )
    top, height, left, width, flip = _to_device(params, images.device)[..., None, None]
    cubic = interpolation == "bicubic"
    if max(images.shape[2:]) <= size and not cubic:
        y = _grid_coordinates(top, height, images.shape[2], size, torch.zeros_like(flip))
        x = _grid_coordinates(left, width, images.shape[3], size, flip).mT
        grid = torch.stack(torch.broadcast_tensors(x, y), dim=3)
        return F.grid_sample(images / 255, grid, align_corners=False).clamp_(0, 1)
    resampling = _get_kernels(images.device, compiled).resampling_matrix
    rows = resampling(top, height, images.shape[2], size, torch.zeros_like(flip), cubic).div_(255)
    columns = resampling(left, width, images.shape[3], size, flip, cubic)
    x = images.float().flatten(1, 2) @ columns.mT  # all channels in one product
    return (rows[:, None] @ x.unflatten(1, images.shape[1:3])).clamp_(0, 1)


def resized_crop_one(
    image: np.ndarray,
    top: int,
    left: int,
    height: int,
    width: int,
    flip: bool,
    size: int,
    interpolation: str = "bilinear",
) -> Tensor:
    """Crop one image of any size, resize the crop with antialiasing, and flip it, all in uint8.

    The result differs from Pillow's resize by at most one gray level, in a third of the time.

    Args:
        image: uint8 (H, W, C).
        top: Top of the crop in pixels.
        left: Left side of the crop in pixels.
        height: Height of the crop in pixels.
        width: Width of the crop in pixels.
        flip: Whether to flip it left to right.
        size: Side of the result in pixels.
        interpolation: "bilinear" or "bicubic".

    Returns:
        uint8 (C, size, size).
    """
    box = torch.from_numpy(image[top : top + height, left : left + width].copy())
    # `interpolate` is fast here because channels are last in memory.
    box = box.permute(2, 0, 1)[None]
    pixels = F.interpolate(box, (size, size), mode=interpolation, antialias=True)[0]
    return (pixels.flip(2) if flip else pixels).contiguous()


def augment_color(x: Tensor, view_params: ViewParams, *, compiled: bool = False) -> Tensor:
    """Jitter colors (each image in its own order), convert to gray, blur and solarize.

    Images without three channels have no color: saturation, hue and gray are left out.

    Args:
        x: (N, C, H, W) float32 in [0, 1]; its memory may be reused.
        view_params: Parameters of the N images.
        compiled: Whether to use compiled kernels.

    Returns:
        (N, C, H, W) float32 in [0, 1].
    """
    rgb, factors = x.shape[1] == 3, view_params.factors
    if not rgb:
        factors = np.where([True, True, False, False], factors, IDENTITY_FACTORS)
    kernels = _get_kernels(x.device, compiled)
    x = _color_jitter(x, view_params.order, factors, kernels)
    if rgb:
        x = _apply_to_rows(x, view_params.gray, lambda x: x.copy_(_to_gray(x)))
    sigma, blur = view_params.sigma, partial(_gaussian_blur, kernels=kernels)
    x = _apply_to_rows(x, sigma > 0, blur, _box_radius(sigma))
    # Solarizing is 1 - x from 1/2 upwards, which is this minimum.
    return _apply_to_rows(x, view_params.solarize, lambda x: torch.minimum(x, 1 - x))


def finish_view(
    pixels: Tensor,
    view_params: ViewParams,
    *,
    size: int | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    compiled: bool = False,
) -> Tensor:
    """Make a view of images, or of crops of them. Call it outside autocast (see `make_views`).

    Args:
        pixels: uint8 (N, C, H, W).
        view_params: Parameters of the N images.
        size: Side of the view in pixels; None if `pixels` are crops already.
        mean: Mean of each channel, for normalization.
        std: Standard deviation of each channel.
        interpolation: How images are resized, "bilinear" or "bicubic".
        compiled: Whether to use compiled kernels.

    Returns:
        (N, C, size, size) float32, normalized, in the device's memory format.

    Raises:
        ValueError: There are not as many means and standard deviations as channels.
    """
    n, channels, *cropped = pixels.shape
    shape = (n, channels, size, size) if size else (n, channels, *cropped)
    memory_format = device_traits(pixels.device).memory_format
    view = torch.empty(shape, device=pixels.device, memory_format=memory_format)
    if not channels == len(mean) == len(std):
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for {channels} channels"
        )
    shifts, scales = _to_device(np.array([-np.array(mean), np.ones(channels)]) / std, pixels.device)
    for part in _chunk_slices(view):
        params = view_params[part]
        if size:
            x = resized_crop(
                pixels[part], params, size, interpolation=interpolation, compiled=compiled
            )
        else:
            x = pixels[part] / 255
        x, out = augment_color(x, params, compiled=compiled), view[part]
        for c in range(channels):  # channel by channel: all at once writes three numbers at a time
            torch.addcmul(shifts[c], x[:, c], scales[c], out=out[:, c])
    return view


def make_views(
    images: Tensor,
    augmentations: tuple[Views, ...],
    *,
    view_count: int,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    step: int,
    positions: np.ndarray,
    compiled: bool = False,
) -> list[Tensor]:
    """Make several views of images. Works inside autocast as well, in full precision.

    Args:
        images: uint8 (N, C, H, W).
        augmentations: The augmentation of each view; the last one also serves all later views.
        view_count: Number of views.
        size: Side of the views in pixels, or of each view.
        mean: Mean of each channel, for normalization.
        std: Standard deviation of each channel.
        seed: Seed of the run.
        step: The step.
        positions: (N,), positions of the images in the global batch.
        compiled: Whether to use compiled kernels.

    Returns:
        The views, each (N, C, size, size) float32, normalized, in the device's memory format.
    """
    sizes = np.broadcast_to(images.shape[2:], (len(images), 2))
    sides = [size] * view_count if isinstance(size, int) else size
    views = []
    for view, side in zip(range(view_count), sides, strict=True):
        augmentation = augmentations[min(view, len(augmentations) - 1)]
        params = sample_view_params(
            augmentation, sizes, seed=seed, step=step, view=view, positions=positions
        )
        with _disable_autocast(images.device.type):  # crop and blur in full precision
            x = finish_view(
                images,
                params,
                size=side,
                mean=mean,
                std=std,
                interpolation=augmentation.interpolation,
                compiled=compiled,
            )
        views.append(x)
    return views


def describe_augmentation(augmentation: Views) -> list[str]:
    """Describe an augmentation in words.

    Args:
        augmentation: The augmentation.

    Returns:
        A line for each operation that is used, in the order in which they are applied.
    """
    names = zip(("brightness", "contrast", "saturation", "hue"), augmentation.jitter, strict=True)
    jitter = ", ".join(f"{name} by {strength:g}" for name, strength in names if strength)
    crop = augmentation
    bicubic = ", bicubically" * (augmentation.interpolation == "bicubic")
    lines = [
        (1, f"crop {crop.crop_min:.0%} to {crop.crop_max:.0%} of the area and resize{bicubic}"),
        (augmentation.flip, "flip left to right"),
        (augmentation.jitter_p if jitter else 0, f"jitter {jitter}, in random order"),
        (augmentation.gray, "turn gray"),
        (augmentation.blur, "blur with sigma {:g} to {:g} pixels".format(*augmentation.blur_sigma)),
        (augmentation.solarize, "solarize"),
    ]
    return [line if p == 1 else f"{line}, with probability {p:g}" for p, line in lines if p]


def _disable_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):  # the device "meta"
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _lerp(low, high, u):
    return low + (high - low) * u


def _to_device(values: np.ndarray, device: torch.device, dtype: type = np.float32) -> Tensor:
    """Copy to the device; to CUDA without waiting, as unpinned memory is staged before return."""
    return torch.from_numpy(values.astype(dtype)).to(device, non_blocking=device.type == "cuda")


def _chunk_slices(x: Tensor) -> Iterator[slice]:
    """Yield equal slices of the batch, of about CHUNK_NUMEL values on a CPU; one slice on a GPU."""
    count = min(len(x), max(1, round(x.numel() / CHUNK_NUMEL))) if x.device.type == "cpu" else 1
    ends = [len(x) * i // count for i in range(count + 1)]
    return itertools.starmap(slice, itertools.pairwise(ends))


def _select_rows(x: Tensor, rows: np.ndarray) -> Tensor:
    return x.index_select(0, _to_device(rows, x.device, np.int64))


def _apply_to_rows(
    x: Tensor, mask: np.ndarray, op: Callable[..., Tensor], *op_args: np.ndarray
) -> Tensor:
    """Replace x[mask] by op(x[mask], *op_args[mask]).

    The mask is on the host, so there is no wait for the device, and no work on the other rows.
    """
    if mask.all():
        return op(x, *op_args)
    rows = np.flatnonzero(mask)
    if len(rows):
        changed = op(_select_rows(x, rows), *(v[rows] for v in op_args))
        x.index_copy_(0, _to_device(rows, x.device, np.int64), changed)
    return x


def _color_jitter(x: Tensor, order: np.ndarray, factors: np.ndarray, kernels: "Kernels") -> Tensor:
    """Apply the four color operations to x (N, C, H, W), in the order and with the factors of each.

    `order` and `factors` are (N, 4). Three of the operations are one formula, `_blend`; only hue is
    another. So images are sorted by the place of hue in their order, the latest first, and those
    without jitter last. Then the operations before hue, hue itself, and the operations after it
    each apply to a contiguous run of images.
    """
    turn = np.where((factors != IDENTITY_FACTORS).any(axis=1), (order == HUE).argmax(axis=1), -1)
    rows = np.argsort(-turn, kind="stable")
    turn, order, factors = turn[rows], order[rows], np.take_along_axis(factors, order, axis=1)[rows]
    jittered, moved = int((turn >= 0).sum()), (np.diff(rows) != 1).any()
    y = _select_rows(x, rows) if moved else x

    rest = 1 - factors
    values = _to_device(np.stack([rest, order == CONTRAST, order == SATURATION]), x.device)[
        ..., None, None, None
    ]

    def blend(some: slice, step: int) -> None:
        if rest[some, step].any():
            kernels.blend(y[some], *values[:, some, step])

    for step in range(3):
        blend(slice(0, (turn > step).sum()), step)
    shift = np.where(turn >= 0, np.take_along_axis(factors, turn[:, None], axis=1)[:, 0], 0.0)[
        :jittered
    ]
    if shift.any():
        kernels.shift_hue(y[:jittered], _to_device(shift, x.device)[:, None, None, None])
    for step in range(1, 4):
        blend(slice((turn >= step).sum(), jittered), step)
    return _select_rows(y, np.argsort(rows)) if moved else y


def _pixel_centers(start: Tensor, length: Tensor, size: int, flip: Tensor) -> Tensor:
    """Return where the pixels of a crop are in the image, in its pixels, (N, size, 1).

    All tensor arguments are (N, 1, 1).
    """
    target = torch.arange(size, device=start.device)[:, None] + 0.5
    return start + length / size * torch.where(flip > 0, size - target, target)


def _grid_coordinates(
    start: Tensor, length: Tensor, source_size: int, size: int, flip: Tensor
) -> Tensor:
    """Return `_pixel_centers` scaled to -1..1, as `grid_sample` expects.

    No center is closer to the edge of the crop than the centers of its outermost pixels.
    """
    center = _pixel_centers(start, length, size, flip)
    return center.maximum(start + 0.5).minimum(start + length - 0.5).mul_(2 / source_size).sub_(1)


def _resampling_matrix(
    start: Tensor, length: Tensor, source_size: int, size: int, flip: Tensor, cubic: bool
) -> Tensor:
    """Return matrices (N, size, source_size) that resize, and flip if `flip`, part of a line.

    The part is the pixels start to start + length of source_size; tensor arguments are (N, 1, 1).
    The filter is a triangle two pixels wide, or Keys' cubic (a = -1/2) four pixels wide, as in
    Pillow: pixels of the input or the output, whichever are larger. It uses no pixel outside the
    crop.
    """
    pixel = torch.arange(source_size, device=start.device) + 0.5
    center = _pixel_centers(start, length, size, flip)
    u = (pixel - center).abs_() / (length / size).clamp(min=1)
    if cubic:
        inner, outer = (1.5 * u - 2.5) * u * u + 1, ((2.5 - 0.5 * u) * u - 4) * u + 2
        weight = torch.where(u < 1, inner, outer.where(u < 2, 0.0))
    else:
        weight = (1 - u).clamp_(min=0)
    weight *= (pixel > start) & (pixel < start + length)
    return weight.div_(weight.sum(2, keepdim=True))


def _to_gray(x: Tensor) -> Tensor:
    """Convert (n, C, H, W) to (n, 1, H, W), with torchvision's weights; by the mean without RGB."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _blend(x: Tensor, weight: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """Replace x (n, C, H, W) by (1 - weight) * x + weight * base, in place.

    The base is the image in gray if `saturation` is 1, its mean gray if `contrast` is 1, and black
    if both are 0; all three arguments are (n, 1, 1, 1).
    """
    gray = _to_gray(x)
    base = gray.mul(saturation).add_(contrast * gray.mean((2, 3), keepdim=True))
    x.lerp_(base.expand_as(x), weight).clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of x (n, 3, H, W) by `shift` (n, 1, 1, 1) of a circle, in place."""
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # The usual three cases in one formula, because branching on pixels would take most of the time.
    # `red` is how far red is below the largest channel; `side` is positive toward green, negative
    # toward blue. In sixths of a circle from red, the absolute hue is |side| where red is the
    # largest channel, 1 + red where it is in the middle, and 3 - |side| where it is the smallest;
    # its sign is that of `side`.
    safe = chroma.clamp(min=torch.finfo(x.dtype).tiny)
    red, side = (value - r).div_(safe), (g - b).div_(safe)
    hue = side.abs()
    hue = torch.addcmul(hue, red, 3 - 2 * hue).copysign_(side)
    hue = hue.div_(6).add_(1 + shift % 1).frac_().mul_(6)
    # Back to RGB: how far each channel is below the value, in units of the chroma.
    below = 2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1
    for channel, units in zip((r, g, b), below, strict=True):
        channel.copy_(value - units.clamp_(0, 1).mul_(chroma))


def _box_filter(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Apply a box filter to x (n, C, H, W) along `dim`, with replicated edges.

    `taps` are (n, r + 1), the weight of a pixel by its distance to the center.
    """
    reach, taps = taps.shape[1] - 1, taps[:, :, None, None, None]
    length, beyond = x.shape[dim], [reach if d == dim else -1 for d in range(4)]
    before, after = (x.narrow(dim, end, 1).expand(beyond) for end in (0, length - 1))
    wide = torch.cat([before, x, after], dim)
    y = taps[:, 0] * x
    for k in range(1, reach + 1):
        y.addcmul_(taps[:, k], wide.narrow(dim, reach - k, length))
        y.addcmul_(taps[:, k], wide.narrow(dim, reach + k, length))
    return y


class Kernels(NamedTuple):
    """The functions that gain from `torch.compile`: many operations per pixel, or on few pixels."""

    resampling_matrix: Callable[..., Tensor]
    blend: Callable[..., None]
    shift_hue: Callable[..., None]
    box_filter: Callable[..., Tensor]


EAGER_KERNELS = Kernels(_resampling_matrix, _blend, _shift_hue, _box_filter)


@cache
def _get_kernels(device: torch.device, compiled: bool) -> Kernels:
    """Return the kernels; compiled ones are equal up to rounding.

    If compiling fails, print one line to stderr and return EAGER_KERNELS.
    """
    if not compiled:
        return EAGER_KERNELS
    kernels = Kernels(
        torch.compile(_resampling_matrix, dynamic=True),
        torch.compile(_blend, dynamic=True),
        torch.compile(_shift_hue, dynamic=True),
        torch.compile(_box_filter, dynamic=True),
    )
    x, ones = torch.zeros(2, 3, 8, 8, device=device), torch.ones(2, 1, 1, 1, device=device)
    try:
        kernels.resampling_matrix(ones[0], ones[0], 8, 4, ones[0], False)
        kernels.blend(x, ones, ones, ones)
        kernels.shift_hue(x, ones)
        kernels.box_filter(x, torch.ones(2, 3, device=device), 2)
    except RuntimeError as error:  # no C++ compiler, a platform that has none, ...
        reason = str(error).strip().partition("\n")[0]
        print(f"simsiam: torch.compile fails here and is not used: {reason}", file=sys.stderr)
        return EAGER_KERNELS
    return kernels


def compile_works(device: torch.device) -> bool:
    """Test whether torch.compile works; if it does not, print one line to stderr, once.

    Args:
        device: The device to compile for.

    Returns:
        Whether compiled kernels are used there.
    """
    return _get_kernels(device, True) is not EAGER_KERNELS


def _box_radius(sigma: np.ndarray) -> np.ndarray:
    """Return the radius of the box filter that, applied three times, has standard deviation sigma.

    Gwosdek et al., 2011.
    """
    variance = sigma**2 / 3
    r = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # the integer part of the radius
    return r + (2 * r + 1) * (r * (r + 1) - 3 * variance) / (6 * (variance - (r + 1) ** 2))


def _gaussian_blur(x: Tensor, radius: np.ndarray, kernels: Kernels) -> Tensor:
    """Blur x (n, C, H, W) like Pillow's GaussianBlur, with replicated edges.

    These are three box filters of `radius` (n,) along each side.
    """
    # Most recipes need at most 2; a larger reach compiles another kernel.
    reach = max(2, int(np.ceil(radius.max())))
    distance, r = np.arange(reach + 1), radius[:, None]
    # The weight of a pixel is the part of it that is inside the box.
    taps = _to_device((r + 1 - distance).clip(0, 1) / (2 * r + 1), x.device)
    for dim in (2, 2, 2, 3, 3, 3):
        x = kernels.box_filter(x, taps, dim)
    return x
