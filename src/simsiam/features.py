"""From images to features of a frozen backbone, with the preprocessing of evaluation: no randomness at all."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from simsiam.images import Images, Unreadable
from simsiam.precision import autocast


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

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> Tensor:
        """One image or several to a batch (N, 3, size, size), float32."""
        images = [image] if isinstance(image, Image.Image) else image
        return self.normalize(torch.cat([self.crop(TF.pil_to_tensor(i.convert("RGB"))[None]) for i in images]))

    def crop(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to uint8 (N, C, size, size)."""
        if pixels.shape[-2:] == (self.size, self.size) == (self.resize, self.resize):
            return pixels
        return TF.center_crop(TF.resize(pixels, [self.resize], antialias=True), [self.size, self.size])

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (N, C, size, size) to float32, (x / 255 - mean) / std."""
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def extract(
    model: nn.Module,
    images: Images,
    transform: Transform,
    *,
    device: torch.device,
    precision: str = "float32",
    forward: Callable[[Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[list[Tensor], np.ndarray]:
    """Features of each readable image from `model` in eval mode (its mode is restored), and those images' positions.

    One matrix (M, dim), float32 on the CPU, for each tensor that `forward` returns; by default the model's own output.
    """
    training = model.training
    model.eval()
    rows: list[list[Tensor]] = []
    kept: list[np.ndarray] = []
    try:
        for index, pixels in chunks(images, transform):
            x = transform.normalize(pixels.to(device)).contiguous(memory_format=torch.channels_last)
            with torch.no_grad(), autocast(device, precision):
                out = forward(x) if forward else (model(x),)
            rows.append([h.float().cpu() for h in out])
            kept.append(index)
    finally:
        model.train(training)
    return [torch.cat(column) for column in zip(*rows, strict=True)], np.concatenate(kept)


def chunks(images: Images, transform: Transform, size: int = 256) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and cropped pixels, uint8, of up to `size` readable images at a time."""

    def read(i: int) -> Tensor | None:
        try:
            return transform.crop(TF.pil_to_tensor(images.read(i))[None])
        except Unreadable:
            return None

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), size):
            index = np.arange(start, min(start + size, len(images)))
            if images.pixels is not None:
                yield index, transform.crop(images.pixels[start : start + size])
                continue
            read_pixels = list(pool.map(read, index))
            if any(p is not None for p in read_pixels):
                good = [i for i, p in zip(index, read_pixels, strict=True) if p is not None]
                yield np.array(good), torch.cat([p for p in read_pixels if p is not None])
