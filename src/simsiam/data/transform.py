"""The preprocessing of evaluation: an image to the tensor that a backbone expects, without randomness."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.utils.workers import CPU_CORES


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

    def __call__(
        self, image: Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
    ) -> Tensor:
        """One image or several to a batch (N, C, size, size), float32. An array is uint8 (H, W, C)."""
        images = [image] if isinstance(image, Image.Image | np.ndarray) else image
        arrays = [np.asarray(i.convert("RGB")) if isinstance(i, Image.Image) else i for i in images]
        return self.normalize(torch.cat([self.crop(image_to_tensor(array)) for array in arrays]))

    def crop(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to uint8 (N, C, size, size)."""
        if pixels.shape[-2:] == (self.size, self.size) == (self.resize, self.resize):
            return pixels
        return TF.center_crop(
            TF.resize(pixels, [self.resize], antialias=True), [self.size, self.size]
        )

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, size, size) to float32, (x / 255 - mean) / std."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (pixels.float() / 255 - mean) / std


def image_to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) to (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def iter_crops(
    images: Images, transform: Transform, skipped: list[tuple[str, str]], chunk_size: int = 256
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and cropped pixels, uint8, of up to `size` readable images at a time; the others go into `skipped`."""

    def read(i: int) -> Tensor | None:
        try:
            return transform.crop(image_to_tensor(near.read(i, min_side=2 * transform.resize)))
        except Unreadable as error:
            skipped.append((images.keys[i], str(error)))
            return None

    near = images
    with ThreadPoolExecutor(CPU_CORES) as pool:
        for start in range(0, len(images), chunk_size):
            index = np.arange(start, min(start + chunk_size, len(images)))
            if images.pixels is not None:
                yield (
                    index,
                    transform.crop(torch.from_numpy(images.pixels[start : start + chunk_size])),
                )
                continue
            near = near.prefetch(
                index, 0.25
            )  # all of a block is read where much of it is asked for
            found = [
                (i, pixels)
                for i, pixels in zip(index, pool.map(read, index), strict=True)
                if pixels is not None
            ]
            if found:
                kept, pixels = zip(*found, strict=True)
                yield np.array(kept), torch.cat(pixels)
