"""Patches: features in closed form, learned from small pieces of images by k-means.

Coates, Lee and Ng (2011): the patches of an image are contrast-normalized and whitened, compared
with a dictionary of centers, and the responses are averaged over the quarters of the image. Nothing
is trained by gradients and nothing is downloaded, so these features exist for any kind of image
after a few seconds. `fit_patches` learns the dictionary; `Patches` is a backbone like any other.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.errors import UsageError, truncate
from simsiam.model.precision import at_least_float32, without_autocast
from simsiam.utils.devices import device_traits

# Begins the names of these backbones: "patches/32", "patches/24+48"; with a network beside them
# "patches/24+48+resnet18".
PATCHES_PREFIX = "patches/"
PATCH_SIDE = 6  # pixels
CENTERS = 400  # size of the dictionary
MAX_SIZES = 8
GRID = 2  # responses are averaged over GRID x GRID parts of the image
THRESHOLD = 0.25  # of a response: smaller inner products count as zero
CONTRAST_FLOOR = 10 / 255**2  # added to a patch's variance, so that flat patches stay small
WHITENING_FLOOR = 0.1  # added to the eigenvalues of the patches' covariance
ROOT_FLOOR = 1e-8  # below the square root, so that its gradient is finite
FIT_PATCHES = 100_000  # patches that the dictionary is learned from
FIT_ROUNDS = 10  # of spherical k-means


def parse_patches(name: str) -> tuple[tuple[int, ...], str | None]:
    """Read the image sizes in the name of a backbone, and the network beside the patches.

    Args:
        name: Such as "patches/32", "patches/24+48" or "patches/32+resnet18".

    Returns:
        The sizes in pixels, and the name of the network; None if there is none.

    Raises:
        UsageError: The name has another form.
    """
    parts = name.removeprefix(PATCHES_PREFIX).split("+")
    network = None if parts[-1].isdigit() or len(parts) == 1 else parts.pop()
    if network is not None and network.startswith(PATCHES_PREFIX):
        raise UsageError(
            f"backbone {truncate(name)}: a network may be beside patches, and no others"
        )
    are_sizes = all(part.isascii() and part.isdigit() and len(part) < 4 for part in parts)
    if len(parts) > MAX_SIZES or not are_sizes or not all(12 <= int(p) <= 512 for p in parts):
        raise UsageError(
            f"backbone {truncate(name)}: give at most {MAX_SIZES} sizes between 12 and 512 pixels, "
            f"such as {PATCHES_PREFIX}32 or {PATCHES_PREFIX}24+48"
        )
    return tuple(map(int, parts)), network


def resize_matrix(source_size: int, size: int) -> Tensor:
    """Make the matrix that resizes a line of pixels, by a triangle filter with antialiasing.

    Args:
        source_size: Length of the line in pixels.
        size: Length of the result; at most source_size.

    Returns:
        (size, source_size), equal to torch's bilinear interpolation with antialiasing.
    """
    scale = source_size / size
    center = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    distance = (torch.arange(source_size, dtype=torch.float64) + 0.5 - center).abs()
    weight = (1 - distance / max(scale, 1.0)).clamp(min=0)
    return (weight / weight.sum(1, keepdim=True)).float()


def pooling_matrix(side: int) -> Tensor:
    """Make the matrix that averages over the parts of a square map, as adaptive pooling does.

    Args:
        side: Side of the map.

    Returns:
        (GRID ** 2, side ** 2).
    """
    line = torch.zeros(GRID, side)
    for part in range(GRID):
        start, stop = part * side // GRID, -(-(part + 1) * side // GRID)
        line[part, start:stop] = 1 / (stop - start)
    return torch.einsum("ih,jw->ijhw", line, line).reshape(GRID**2, side**2)


class PatchResponses(nn.Module):
    """The responses of one dictionary to an image at one size.

    With p a patch minus its mean, over the root of its variance plus CONTRAST_FLOOR, the response
    of center c is max(0, c' W (p - m) - THRESHOLD), where m and W are mean and ZCA whitening of the
    patches. The product c' W is a convolution. Patches have zero mean, and so have centers and
    kernels: the mean of a patch need not be subtracted.
    """

    resize: Tensor
    pooling: Tensor

    def __init__(self, size: int, image_size: int, channels: int):
        """Make the module; its dictionary is zero until `fit`.

        Args:
            size: Side of the image that the patches are cut from, in pixels.
            image_size: Side of the input images; larger ones are shrunk to `size`.
            channels: Channels of the images.
        """
        super().__init__()
        self.size = size
        self.stride = 1 if size < 48 else 2
        side = (size - PATCH_SIDE) // self.stride + 1
        self.weight = nn.Parameter(torch.zeros(CENTERS, channels, PATCH_SIDE, PATCH_SIDE))
        self.bias = nn.Parameter(torch.zeros(CENTERS))
        self.register_buffer("resize", resize_matrix(image_size, size), persistent=False)
        self.register_buffer("pooling", pooling_matrix(side), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (N, GRID ** 2 * CENTERS) for pixels (N, C, image_size, image_size) in 0..1."""
        x = self.shrink(pixels)
        mean = F.avg_pool2d(x, PATCH_SIDE, self.stride).mean(1, keepdim=True)
        square = F.avg_pool2d(x * x, PATCH_SIDE, self.stride).mean(1, keepdim=True)
        contrast = ((square - mean * mean).clamp(min=0) + CONTRAST_FLOOR).rsqrt()
        product = F.conv2d(x, self.weight, stride=self.stride)
        response = product.mul_(contrast).add_(self.bias[:, None, None]).relu_()
        pooled = self.pooling @ response.permute(0, 2, 3, 1).flatten(1, 2)
        return pooled.flatten(1).clamp_min(ROOT_FLOOR).sqrt()

    def shrink(self, pixels: Tensor) -> Tensor:
        """Return the images at the size of this module, (N, C, size, size)."""
        same_size = pixels.shape[-1] == self.size
        x = pixels if same_size else self.resize @ pixels @ self.resize.T
        return x.contiguous(memory_format=device_traits(x.device).memory_format)


class Patches(nn.Module):
    """A backbone of one or several dictionaries, each at its own image size.

    Attributes:
        dim: Width of the feature h: GRID ** 2 * CENTERS for each size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, sizes: Sequence[int], *, image_size: int, channels: int = 3):
        """Make the backbone; its dictionaries are zero until `fit_patches`.

        Args:
            sizes: Side of the image for each dictionary, in pixels; at most image_size.
            image_size: Side of the input images, in pixels.
            channels: Channels of the images.

        Raises:
            UsageError: A size is above image_size.
        """
        super().__init__()
        if max(sizes) > image_size:
            raise UsageError(f"patches of {max(sizes)} px images need --image-size {max(sizes)}")
        self.dim = len(sizes) * GRID**2 * CENTERS
        self.scales = nn.ModuleList(PatchResponses(size, image_size, channels) for size in sizes)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return h (N, dim) for normalized images x (N, C, image_size, image_size)."""
        pixels = at_least_float32(x) * self.std + self.mean
        with without_autocast(x):  # bfloat16 would change features by 5 %
            return torch.cat([scale(pixels) for scale in self.scales], dim=1)

    def join(self, other: "Patches") -> "Patches":
        """Make a backbone with the dictionaries of both, for the same images.

        Args:
            other: A backbone for images of the same size and normalization.
        """
        both = copy.copy(self)
        both._modules = {"scales": nn.ModuleList([*self.scales, *other.scales])}
        both.dim = self.dim + other.dim
        return both


class ClosedFormStart(nn.Module):
    """Patches with their map, which no step changes, beside a network that begins at zero.

    h is a linear layer of the network's features, and the mapped features of the patches after it.
    The weights of this layer are zero before the first step: then cosines of h are those of the
    patches with their map, and training adds to them.

    Attributes:
        dim: Width of the feature h.
    """

    def __init__(self, patches: Patches, network: nn.Module):
        """Put both together; dictionaries and map are zero until `fill`.

        Args:
            patches: The patches.
            network: The network, for the same images, with the attribute `dim`.
        """
        super().__init__()
        width = int(network.dim)  # type: ignore[arg-type]
        self.network, self.patches = network, patches.requires_grad_(False)
        self.gate = nn.Linear(width, width, bias=False)
        self.map = nn.Linear(patches.dim, patches.dim).requires_grad_(False)
        for p in (self.gate.weight, self.map.weight, self.map.bias):
            nn.init.zeros_(p)
        self.dim = width + patches.dim

    def forward(self, x: Tensor) -> Tensor:
        """Return h (N, dim) for normalized images x (N, C, image_size, image_size)."""
        learned = at_least_float32(self.network(x))
        with without_autocast(x):
            return torch.cat([self.gate(learned), self.map(self.patches(x))], dim=1)

    @torch.no_grad()
    def fill(
        self,
        patches: Patches,
        linear: nn.Linear | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """Take over dictionaries and map.

        Args:
            patches: Patches of the same sizes.
            linear: The map of their features; None leaves them as they are.
            mean: Mean of each channel in the normalization of x.
            std: Its standard deviation.
        """
        self.patches.load_state_dict(patches.state_dict())
        self.patches.mean.copy_(torch.tensor(mean).view(-1, 1, 1))
        self.patches.std.copy_(torch.tensor(std).view(-1, 1, 1))
        # View noise has variance 1 in each mapped direction. Scaled like this, the noise of both
        # branches is equal when each feature of the network has noise of variance 1.
        scale = (self.gate.out_features / patches.dim) ** 0.5
        if linear is None:
            self.map.weight.copy_(scale * torch.eye(patches.dim))
            return
        self.map.weight.copy_(scale * linear.weight)
        self.map.bias.copy_(scale * linear.bias)

    def copy_fixed(self, other: nn.Module) -> None:
        """Take over what no step changes.

        Args:
            other: A `ClosedFormStart` of the same parts.
        """
        for name in ("patches", "map"):
            self.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())


@torch.no_grad()
def fit_patches(pixels: Tensor, sizes: Sequence[int], *, seed: int = 0) -> Patches:
    """Learn dictionaries from images.

    Args:
        pixels: (N, C, S, S), values in 0..1; S is the size of the images that the backbone takes.
        sizes: Side of the image for each dictionary, in pixels.
        seed: Seed of the choice of patches and first centers.

    Returns:
        The backbone, in eval mode.
    """
    backbone = Patches(sizes, image_size=pixels.shape[-1], channels=pixels.shape[1])
    for scale in cast(Iterable[PatchResponses], backbone.scales):
        generator = torch.Generator().manual_seed(seed)
        patches = sample_patches(scale.shrink(pixels), generator)
        m, whitening = zca(patches)
        centers = spherical_kmeans((patches - m) @ whitening, generator)
        kernels = whitening @ centers.T
        scale.weight.copy_(kernels.T.reshape(scale.weight.shape))
        scale.bias.copy_(-(m @ kernels) - THRESHOLD)
    return backbone.eval()


def sample_patches(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut about FIT_PATCHES patches at random places, and normalize their contrast.

    Args:
        images: (N, C, size, size), values in 0..1.
        generator: Draws the places.

    Returns:
        (n, C * PATCH_SIDE ** 2) float32; every image gives the same number of patches.
    """
    n, size = len(images), images.shape[-1]
    per_image = -(-FIT_PATCHES // n)
    corner = torch.randint(size - PATCH_SIDE + 1, (2, n, per_image, 1, 1), generator=generator)
    offset = torch.arange(PATCH_SIDE)
    rows, columns = corner[0] + offset[:, None], corner[1] + offset
    index = torch.arange(n)[:, None, None, None]
    patches = images.permute(0, 2, 3, 1)[index, rows, columns]  # (N, per_image, 6, 6, C)
    patches = patches.permute(0, 1, 4, 2, 3).flatten(2).flatten(0, 1)
    patches = patches - patches.mean(1, keepdim=True)
    variance = patches.square().mean(1, keepdim=True)
    return patches * (variance + CONTRAST_FLOOR).rsqrt()


def zca(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean m and the symmetric whitening matrix W of rows; (x - m) W is white.

    Args:
        x: (n, d).

    Returns:
        m (d,) and W (d, d) = (covariance + WHITENING_FLOOR * I) ** (-1/2).
    """
    m = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0).double())
    scale = (values.clamp(min=0) + WHITENING_FLOOR).rsqrt()
    return m, ((vectors * scale) @ vectors.T).float()


def spherical_kmeans(x: Tensor, generator: torch.Generator) -> Tensor:
    """Find CENTERS directions that the rows of x cluster around (Coates & Ng, 2012).

    Each round assigns a row to the center with the largest inner product, and replaces a center by
    the normalized sum of its rows, weighted by that product. A center without rows becomes a row
    drawn at random.

    Args:
        x: (n, d).
        generator: Draws the first centers.

    Returns:
        (CENTERS, d), rows of unit length.
    """

    def draw(count: int) -> Tensor:
        return x[torch.randint(len(x), (count,), generator=generator)]

    centers = F.normalize(draw(CENTERS), dim=1)
    for _ in range(FIT_ROUNDS):
        new, empty = torch.zeros_like(centers), torch.ones(CENTERS, dtype=torch.bool)
        for rows in x.split(16_384):
            product, nearest = (rows @ centers.T).max(1)
            new.index_add_(0, nearest, rows * product[:, None])
            empty[nearest] = False
        new[empty] = draw(int(empty.sum()))
        centers = F.normalize(new, dim=1)
    return centers
