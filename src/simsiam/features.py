"""From images to features of a frozen backbone, with the preprocessing of evaluation: no randomness at all."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from simsiam.bar import bar
from simsiam.decode import Unreadable
from simsiam.errors import WorkFailed
from simsiam.images import CORES, Images
from simsiam.precision import autocast
from simsiam.processes import count, gather, rank, share, union


@dataclass(frozen=True)
class Transform:
    """An image to what the backbone expects: shorter side to `resize` pixels (bilinear), center crop, normalization."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @property
    def resize(self) -> int:
        """256 for a crop of 224 and in proportion for others; small images are not cropped (section A, appendix D)."""
        return self.size if self.size <= 64 else round(self.size * 256 / 224)

    def __call__(self, image: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]) -> Tensor:
        """One image or several to a batch (N, C, size, size), float32. An array is uint8 (H, W, C)."""
        images = [image] if isinstance(image, Image.Image | np.ndarray) else image
        arrays = [np.asarray(i.convert("RGB")) if isinstance(i, Image.Image) else i for i in images]
        return self.normalize(torch.cat([self.crop(tensor(array)) for array in arrays]))

    def crop(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to uint8 (N, C, size, size)."""
        if pixels.shape[-2:] == (self.size, self.size) == (self.resize, self.resize):
            return pixels
        return TF.center_crop(TF.resize(pixels, [self.resize], antialias=True), [self.size, self.size])

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, size, size) to float32, (x / 255 - mean) / std."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) to (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


class Features(NamedTuple):
    """What came out for M of N images."""

    matrices: list[Tensor]  # each (M, dim), float32, on the CPU
    kept: np.ndarray  # int64 (M,), the positions of the images that could be read
    skipped: list[tuple[str, str]]  # key and reason of the others


def extract(
    model: nn.Module,
    images: Images,
    transform: Transform,
    *,
    device: torch.device,
    precision: str = "float32",
    forward: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
    words: str = "",
) -> Features:
    """Features of each readable image from `model` in eval mode (its mode is restored).

    One matrix for each tensor that `forward` returns; by default the model's own output. Of several processes each goes
    through its share of the images, and all get the features of all. `words` stand before the bar that shows how far
    the first one is; without them there is none.
    """
    training = model.training
    model.eval()
    rows: list[list[Tensor]] = []
    kept: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    mine = share(len(images))
    try:
        looked_at = images if count() == 1 else images.take(mine)
        with bar(words if rank() == 0 else "", len(looked_at)) as advance:
            for index, pixels in chunks(looked_at, transform, skipped):
                rows.append(outputs(forward or (lambda x: (model(x),)), pixels, transform, device, precision))
                kept.append(index + mine.start)
                advance(len(index))
    finally:
        model.train(training)
    skipped, widths = union(skipped), union([[m.shape[1] for m in matrices] for matrices in rows[:1]])
    if not widths:
        raise WorkFailed(f"none of the {len(images)} images can be read; the first, {skipped[0][0]}: {skipped[0][1]}")
    columns = zip([torch.empty(0, d) for d in widths[0]], *rows, strict=True)  # a share may have no readable image
    positions = torch.from_numpy(np.concatenate([np.arange(0), *kept]))
    return Features([gather(torch.cat(column)) for column in columns], gather(positions).numpy(), skipped)


def outputs(
    forward: Callable[[Tensor], tuple[Tensor, ...]],
    pixels: Tensor,
    transform: Transform,
    device: torch.device,
    precision: str,
) -> list[Tensor]:
    """What `forward` returns for cropped pixels, uint8 (N, C, size, size): float32, on the CPU, without gradients."""
    x = transform.normalize(pixels.to(device)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(device, precision):
        return [h.float().cpu() for h in forward(x)]


def chunks(
    images: Images, transform: Transform, skipped: list[tuple[str, str]], size: int = 256
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and cropped pixels, uint8, of up to `size` readable images at a time; the others go into `skipped`."""

    def read(i: int) -> Tensor | None:
        try:
            return transform.crop(tensor(near.read(i, least=2 * transform.resize)))
        except Unreadable as error:
            skipped.append((images.keys[i], str(error)))
            return None

    near = images
    with ThreadPoolExecutor(CORES) as pool:
        for start in range(0, len(images), size):
            index = np.arange(start, min(start + size, len(images)))
            if images.pixels is not None:
                yield index, transform.crop(torch.from_numpy(images.pixels[start : start + size]))
                continue
            near = near.near(index, 0.25)  # all of a block is read where much of it is asked for
            found = [(i, pixels) for i, pixels in zip(index, pool.map(read, index), strict=True) if pixels is not None]
            if found:
                kept, pixels = zip(*found, strict=True)
                yield np.array(kept), torch.cat(pixels)
