"""Views: a recipe (`methods.Views`) applied to a whole batch, each image with its own parameters.

A view is a pure function of (seed, step, view, position in the global batch). `uniforms` turns these four into numbers,
`draw` turns the numbers into parameters (numpy, on the host), `crop` and `color` turn parameters into pixels (torch, on
any device). Nothing else has a say: not the order or size of the batch, the number of workers, a global generator, or
what ran before. Operations and distributions are torchvision's, the blur is Pillow's, the recipe is the paper's
(appendix A).

Images that differ in size are cropped one by one in data workers: there, `draw` and `crop_one`; then, on the batch,
`draw` again (only the crop depends on `sizes`) and `finish`.

Most of the time would go into moving pixels between memory and cache, so a CPU takes a batch in parts that its cache
can hold, and the operations that touch pixels most often are `Kernels`, each one loop where they are compiled.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.config.methods import Views

VIEW_STREAM = 1  # our half of the Philox key: whoever else draws from the seed takes another number
COUNTERS_PER_POSITION = (
    9  # counts of the Philox counter that one position owns; a count yields four numbers
)
CROP_ATTEMPTS = 10  # crops tried before the central one (RandomResizedCrop)
ASPECT_RATIO = (3 / 4, 4 / 3)  # width / height of a crop (RandomResizedCrop)
BRIGHTNESS, CONTRAST, SATURATION, HUE = COLOR_OPS = range(4)
JITTER_ORDERS = np.array(list(itertools.permutations(COLOR_OPS)))
IDENTITY_FACTORS = np.array([1.0, 1.0, 1.0, 0.0])  # three factors and a shift that change nothing
CHUNK_NUMEL = 2**20  # values of a part: 4 MiB in float32


def draw_uniforms(seed: int, step: int, view: int, positions: np.ndarray) -> np.ndarray:
    """(N, 4 * BLOCKS) float64 in [0, 1), row i for positions[i] alone.

    Philox is counter-based (Salmon et al., 2011): a row is addressed, not reached by drawing those before it.
    """

    def rows(run: np.ndarray) -> np.ndarray:
        counter = np.array([int(run[0]) * COUNTERS_PER_POSITION, view, step, 0], dtype=np.uint64)
        philox = np.random.Philox(
            key=np.array([seed, VIEW_STREAM], dtype=np.uint64), counter=counter
        )
        return np.random.Generator(philox).random((len(run), 4 * COUNTERS_PER_POSITION))

    # Neighbors have adjacent counts, so a run of consecutive positions is one call.
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return np.concatenate([rows(run) for run in runs])


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for N images: arrays of length N."""

    top: np.ndarray  # the crop, in pixels of the source image
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray  # bool
    order: np.ndarray  # (N, 4), each row a permutation of COLOR_OPS
    factors: (
        np.ndarray
    )  # (N, 4), a column for each of COLOR_OPS; IDENTITY where no jitter was drawn
    gray: np.ndarray  # bool
    sigma: np.ndarray  # of the blur, in pixels of the view; 0 is no blur
    solarize: np.ndarray  # bool

    def __getitem__(self, rows: Any) -> "ViewParams":
        """The draws of some of the images: rows is whatever indexes an array."""
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
    """Parameters for images of `sizes` (N, 2), height and width, at `positions` (N,); distributed as in torchvision."""
    u = draw_uniforms(
        seed, step, view, positions
    )  # 33 of 36 are used; a new use takes a spare, and old seeds stay valid
    u_area, u_aspect, u_factors, u = np.split(
        u, [CROP_ATTEMPTS, 2 * CROP_ATTEMPTS, 2 * CROP_ATTEMPTS + 4], axis=1
    )
    u_top, u_left, u_flip, u_jitter, u_order, u_gray, u_blur, u_sigma, u_solarize = u.T[:9]

    # RandomResizedCrop: the first attempt that fits into the image. Its fallback, the largest central crop of an
    # allowed aspect, is one attempt more, which always fits.
    area = sizes.prod(axis=1, keepdims=True) * _lerp(augmentation.crop_min, 1.0, u_area)
    aspect = np.exp(_lerp(np.log(ASPECT_RATIO[0]), np.log(ASPECT_RATIO[1]), u_aspect))
    largest = np.minimum(sizes, sizes[:, ::-1] * ASPECT_RATIO[1])
    attempts = np.concatenate(
        [np.sqrt(np.stack([area / aspect, area * aspect], axis=2)), largest[:, None]], axis=1
    )
    attempts = np.rint(attempts).astype(np.int64)  # (N, ATTEMPTS + 1, 2)
    fits = (attempts > 0) & (attempts <= sizes[:, None])
    chosen = fits.all(axis=2).argmax(axis=1)
    extent = attempts[np.arange(len(sizes)), chosen]
    slack = sizes - extent
    anywhere = np.floor(np.stack([u_top, u_left], axis=1) * (slack + 1)).astype(np.int64)
    corner = np.where((chosen < CROP_ATTEMPTS)[:, None], anywhere, slack // 2)

    strength = np.array(augmentation.jitter)
    lowest = np.maximum(
        IDENTITY_FACTORS - strength, [0.0, 0.0, 0.0, -np.inf]
    )  # a factor is not negative, a shift may be
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
    images: Tensor, view_params: ViewParams, size: int, *, compiled: bool = False
) -> Tensor:
    """uint8 images (N, C, H, W) to float32 crops (N, C, size, size) in [0, 1]: antialiased `resized_crop`, then flip.

    It is linear and separable: a matrix for the rows of each image and one for its columns. Where nothing can shrink, a
    matrix has two numbers in a row that are not 0, and to look the pixels up is a quarter of the work.
    """
    params = np.stack(
        [view_params.top, view_params.height, view_params.left, view_params.width, view_params.flip]
    )
    top, height, left, width, flip = _to_device(params, images.device)[..., None, None]
    if max(images.shape[2:]) <= size:
        y = _grid_coordinates(top, height, images.shape[2], size, torch.zeros_like(flip))
        x = _grid_coordinates(left, width, images.shape[3], size, flip).mT
        grid = torch.stack(torch.broadcast_tensors(x, y), dim=3)
        return F.grid_sample(images / 255, grid, align_corners=False).clamp_(0, 1)
    resampling = _get_kernels(images.device, compiled).resampling_matrix
    rows = resampling(top, height, images.shape[2], size, torch.zeros_like(flip)).div_(255)
    columns = resampling(left, width, images.shape[3], size, flip)
    x = images.float().flatten(1, 2) @ columns.mT  # all channels in one product
    return (rows[:, None] @ x.unflatten(1, images.shape[1:3])).clamp_(0, 1)


def resized_crop_one(
    image: np.ndarray, top: int, left: int, height: int, width: int, flip: bool, size: int
) -> Tensor:
    """The same for one image uint8 (H, W, C) of any size, in uint8 arithmetic: (C, size, size).

    It is Pillow's resize to one level of gray, in a third of its time.
    """
    box = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[
        None
    ]
    pixels = F.interpolate(box, (size, size), mode="bilinear", antialias=True)[
        0
    ]  # fast, as channels come last
    return (pixels.flip(2) if flip else pixels).contiguous()


def augment_color(x: Tensor, view_params: ViewParams, *, compiled: bool = False) -> Tensor:
    """Jitter (each image in its own order), gray, blur and solarize x (N, C, H, W), floats in [0, 1]; x may be reused.

    Without three channels there is no color: saturation, hue and gray are left out.
    """
    rgb = x.shape[1] == 3
    factors = (
        view_params.factors
        if rgb
        else np.where([True, True, False, False], view_params.factors, IDENTITY_FACTORS)
    )
    kernels = _get_kernels(x.device, compiled)
    x = _color_jitter(x, view_params.order, factors, kernels)
    if rgb:
        x = _apply_to_rows(x, view_params.gray, lambda x: x.copy_(_to_gray(x)))
    x = _apply_to_rows(
        x,
        view_params.sigma > 0,
        partial(_gaussian_blur, kernels=kernels),
        _box_radius(view_params.sigma),
    )
    return _apply_to_rows(
        x, view_params.solarize, lambda x: torch.minimum(x, 1 - x)
    )  # that is, 1 - x from 1/2 upwards


def finish_view(
    pixels: Tensor,
    view_params: ViewParams,
    *,
    size: int | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    compiled: bool = False,
) -> Tensor:
    """A view of uint8 images (N, C, H, W): (N, C, size, size) float32, normalized, channels last.

    Without a size, the pixels are crops already. `compiled`, the kernels are. Call it outside autocast, which
    would crop and blur in half precision.
    """
    n, channels, *cropped = pixels.shape
    shape = (n, channels, size, size) if size else (n, channels, *cropped)
    view = torch.empty(shape, device=pixels.device, memory_format=torch.channels_last)
    if not channels == len(mean) == len(std):
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for {channels} channels"
        )
    shifts, scales = _to_device(np.array([-np.array(mean), np.ones(channels)]) / std, pixels.device)
    for part in _chunk_slices(view):
        some = view_params[part]
        x = (
            resized_crop(pixels[part], some, size, compiled=compiled)
            if size
            else pixels[part] / 255
        )
        x, out = augment_color(x, some, compiled=compiled), view[part]
        for c in range(channels):  # all of them at once would be written three numbers at a time
            torch.addcmul(shifts[c], x[:, c], scales[c], out=out[:, c])
    return view


def make_views(
    images: Tensor,
    augmentations: tuple[Views, ...],
    *,
    view_count: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    step: int,
    positions: np.ndarray,
    compiled: bool = False,
) -> list[Tensor]:
    """`count` views of uint8 images (N, C, H, W), each as by `finish`. The last recipe serves every later view."""
    sizes = np.broadcast_to(images.shape[2:], (len(images), 2))
    views = []
    for view in range(view_count):
        recipe = augmentations[min(view, len(augmentations) - 1)]
        draws = sample_view_params(
            recipe, sizes, seed=seed, step=step, view=view, positions=positions
        )
        with torch.autocast(images.device.type, enabled=False):  # crop and blur in full precision
            x = finish_view(images, draws, size=size, mean=mean, std=std, compiled=compiled)
        views.append(x)
    return views


def describe_augmentation(augmentation: Views) -> list[str]:
    """The recipe in words: a line for each operation that is on, in order of application."""
    names = zip(("brightness", "contrast", "saturation", "hue"), augmentation.jitter, strict=True)
    jitter = ", ".join(f"{name} by {strength:g}" for name, strength in names if strength)
    lines = [
        (1, f"crop {augmentation.crop_min:.0%} to 100% of the area and resize"),
        (augmentation.flip, "flip left to right"),
        (augmentation.jitter_p if jitter else 0, f"jitter {jitter}, in random order"),
        (augmentation.gray, "turn gray"),
        (augmentation.blur, "blur with sigma {:g} to {:g} pixels".format(*augmentation.blur_sigma)),
        (augmentation.solarize, "solarize"),
    ]
    return [line if p == 1 else f"{line}, with probability {p:g}" for p, line in lines if p]


def _lerp(low, high, u):
    return low + (high - low) * u


def _to_device(values: np.ndarray, device: torch.device, dtype: type = np.float32) -> Tensor:
    """To the device; to CUDA without waiting, as what is not in pinned memory is staged before the call returns."""
    return torch.from_numpy(values.astype(dtype)).to(device, non_blocking=device.type == "cuda")


def _chunk_slices(x: Tensor) -> Iterator[slice]:
    """Equal slices of the batch, of about AT_ONCE values on a CPU; a GPU takes all at once."""
    count = min(len(x), max(1, round(x.numel() / CHUNK_NUMEL))) if x.device.type == "cpu" else 1
    ends = [len(x) * i // count for i in range(count + 1)]
    return itertools.starmap(slice, itertools.pairwise(ends))


def _select_rows(x: Tensor, rows: np.ndarray) -> Tensor:
    return x.index_select(0, _to_device(rows, x.device, np.int64))


def _apply_to_rows(
    x: Tensor, mask: np.ndarray, op: Callable[..., Tensor], *op_args: np.ndarray
) -> Tensor:
    """x with op(x[drawn], *values[drawn]) in the place of x[drawn].

    Who was drawn is known on the host, so the device is not asked how many they are, and works on nobody else.
    """
    if mask.all():
        return op(x, *op_args)
    rows = np.flatnonzero(mask)
    if len(rows):
        changed = op(_select_rows(x, rows), *(v[rows] for v in op_args))
        x.index_copy_(0, _to_device(rows, x.device, np.int64), changed)
    return x


def _color_jitter(x: Tensor, order: np.ndarray, factors: np.ndarray, kernels: "Kernels") -> Tensor:
    """The four operations on x (N, C, H, W), each image's in its row of `order` (N, 4), by its row of `factors`.

    Three of the operations are one formula, `_blend`, and only hue is another. So images are sorted: where hue comes
    last they stand first, and those without jitter at the end. Then what is due before hue, hue itself, and what is due
    after it are each for neighbors, and nobody waits.
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
    """(N, size, 1): where the pixels of a crop lie in the image, in pixels of that; arguments (N, 1, 1)."""
    target = torch.arange(size, device=start.device)[:, None] + 0.5
    return start + length / size * torch.where(flip > 0, size - target, target)


def _grid_coordinates(
    start: Tensor, length: Tensor, source_size: int, size: int, flip: Tensor
) -> Tensor:
    """The same from -1 to 1, as `grid_sample` counts; and none nearer to the crop's edge than its outermost pixels."""
    center = _pixel_centers(start, length, size, flip)
    return center.maximum(start + 0.5).minimum(start + length - 0.5).mul_(2 / source_size).sub_(1)


def _resampling_matrix(
    start: Tensor, length: Tensor, source_size: int, size: int, flip: Tensor
) -> Tensor:
    """(N, size, total): resize pixels start to start + length of `total`, mirror where asked; arguments (N, 1, 1).

    The filter is a triangle as wide as two pixels, of the input or the output, whichever are larger. It sees nothing
    outside the crop.
    """
    pixel = torch.arange(source_size, device=start.device) + 0.5
    center = _pixel_centers(start, length, size, flip)
    weight = ((length / size).clamp(min=1) - (pixel - center).abs_()).clamp_(min=0)
    weight *= (pixel > start) & (pixel < start + length)
    return weight.div_(weight.sum(2, keepdim=True))


def _to_gray(x: Tensor) -> Tensor:
    """(n, C, H, W) to (n, 1, H, W): torchvision's weights, or the mean where there is no color."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _blend(x: Tensor, weight: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """(1 - rest) * x + rest * base, in place. The base is black, mean gray for contrast, gray for saturation: 0 or 1.

    x is (n, C, H, W), the others (n, 1, 1, 1).
    """
    gray = _to_gray(x)
    base = gray.mul(saturation).add_(contrast * gray.mean((2, 3), keepdim=True))
    x.lerp_(base.expand_as(x), weight).clamp_(0, 1)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue of x (n, 3, H, W) by `shift` (n, 1, 1, 1) of a circle, in place; value and saturation stay."""
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # The usual three cases in one (to branch on pixels would take most of the time): `red` is how far red is below the
    # largest, `side` tells green (+) from blue (-). In sixths of a circle from red, the hue is |side| where red is
    # largest, 1 + red where it is in the middle, 3 - |side| where it is smallest, to the left or right by the sign.
    safe = chroma.clamp(min=torch.finfo(x.dtype).tiny)
    red, side = (value - r).div_(safe), (g - b).div_(safe)
    hue = side.abs()
    hue = torch.addcmul(hue, red, 3 - 2 * hue).copysign_(side)
    hue = hue.div_(6).add_(1 + shift % 1).frac_().mul_(6)
    # And back: how far each channel is below the value, in units of the chroma.
    below = 2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1
    for channel, units in zip((r, g, b), below, strict=True):
        channel.copy_(value - units.clamp_(0, 1).mul_(chroma))


def _box_filter(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """A box filter of x (n, C, H, W) along `dim`, edges replicated; taps (n, r + 1) by the distance to its middle."""
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
    """What `torch.compile` is for here: where many operations follow each other on every pixel, or make few of them."""

    resampling_matrix: Callable[..., Any]
    blend: Callable[..., Any]
    shift_hue: Callable[..., Any]
    box_filter: Callable[..., Any]


EAGER_KERNELS = Kernels(_resampling_matrix, _blend, _shift_hue, _box_filter)


@cache
def _get_kernels(device: torch.device, compiled: bool) -> Kernels:
    """The kernels, if `compiled` each one loop, equal up to rounding; where that fails a line on stderr, and EAGER."""
    if not compiled:
        return EAGER_KERNELS
    kernels = Kernels(*(torch.compile(kernel, dynamic=True) for kernel in EAGER_KERNELS))
    x, ones = torch.zeros(2, 3, 8, 8, device=device), torch.ones(2, 1, 1, 1, device=device)
    try:
        kernels.resampling_matrix(ones[0], ones[0], 8, 4, ones[0])
        kernels.blend(x, ones, ones, ones)
        kernels.shift_hue(x, ones)
        kernels.box_filter(x, torch.ones(2, 3, device=device), 2)
    except RuntimeError as error:  # no C++ compiler, a platform that has none, ...
        reason = str(error).strip().partition("\n")[0]
        print(f"simsiam: torch.compile fails here and is left out: {reason}", file=sys.stderr)
        return EAGER_KERNELS
    return kernels


def compile_works(device: torch.device) -> bool:
    """Whether torch.compile works there; where it fails, a line on stderr says so, once."""
    return _get_kernels(device, True) is not EAGER_KERNELS


def _box_radius(sigma: np.ndarray) -> np.ndarray:
    """Radius of the box filter that, applied three times, has standard deviation sigma (Gwosdek et al., 2011)."""
    variance = sigma**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    return whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (
        6 * (variance - (whole + 1) ** 2)
    )


def _gaussian_blur(x: Tensor, radius: np.ndarray, kernels: Kernels) -> Tensor:
    """Pillow's GaussianBlur of x (n, C, H, W): three box filters of `radius` (n,) along each side, edges replicated."""
    reach = max(
        2, int(np.ceil(radius.max()))
    )  # 2 is what most recipes need; for more, another kernel is compiled
    away, r = np.arange(reach + 1), radius[:, None]
    taps = _to_device(
        (r + 1 - away).clip(0, 1) / (2 * r + 1), x.device
    )  # the part of each pixel that lies inside
    for dim in (2, 2, 2, 3, 3, 3):
        x = kernels.box_filter(x, taps, dim)
    return x
