"""SimSiam in a plain loop, as a user of lightly writes it after the example in its documentation.

Modules, loss and transform are lightly's where it is installed; otherwise the same layers and
operations of torch and torchvision, which `MODULES` says. The network is that of the other
contestants.
"""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images
from simsiam.laboratory.bench_cases import (
    PillowTransform,
    is_installed,
    torchvision_transform,
)
from simsiam.model.backbones import feature_dim
from simsiam.model.precision import Compute
from simsiam.runs.encoder import build_backbone
from simsiam.runs.run_folder import read_checkpoint
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

# Of the example in lightly's documentation.
PROJECTION, PREDICTION, LEARNING_RATE, WORKERS = (512, 128), 64, 0.06, 8
MODULES = "lightly" if is_installed("lightly.models.modules") else "torch and torchvision"


class PlainSimSiam(nn.Module):
    """The model of lightly's example, on any backbone.

    Args:
        backbone: Images (N, C, H, W) to h (N, backbone.dim).
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        width, (hidden, out) = feature_dim(backbone), PROJECTION
        if MODULES == "lightly":
            from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

            self.projection_head = SimSiamProjectionHead(width, hidden, out)
            self.prediction_head = SimSiamPredictionHead(out, PREDICTION, out)
        else:
            self.projection_head = nn.Sequential(
                *(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()),
                *(nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()),
                *(nn.Linear(hidden, out, bias=False), nn.BatchNorm1d(out, affine=False)),
            )
            self.prediction_head = nn.Sequential(
                *(nn.Linear(out, PREDICTION, bias=False), nn.BatchNorm1d(PREDICTION), nn.ReLU()),
                nn.Linear(PREDICTION, out),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z without gradient and p, (N, 128) each, of views x (N, C, H, W)."""
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)


def plain_criterion() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the negative cosine similarity: lightly's, or torch's."""
    if MODULES == "lightly":
        from lightly.loss import NegativeCosineSimilarity

        criterion: Callable[[Tensor, Tensor], Tensor] = NegativeCosineSimilarity()
        return criterion
    return lambda a, b: -F.cosine_similarity(a, b).mean()


def two_views(recipe: ResolvedRecipe) -> Callable[[Image.Image], Sequence[Tensor]]:
    """Return what makes two views of an image: lightly's transform, or the recipe's in torchvision.

    Args:
        recipe: Gives the side of a view, mean and standard deviation.
    """
    size, views = recipe.image_size, recipe.method.views[0]
    if MODULES == "lightly":
        from lightly.transforms import SimSiamTransform

        normalize = {"mean": list(recipe.mean), "std": list(recipe.std)}
        transform: Callable[[Image.Image], Sequence[Tensor]] = SimSiamTransform(
            input_size=size, normalize=normalize
        )
        return transform
    return TwoViews(torchvision_transform(views, size, recipe.mean, recipe.std))


class TwoViews:
    """A transform, applied twice.

    Args:
        transform: Makes a view.
    """

    def __init__(self, transform: PillowTransform):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Sequence[Tensor]:
        """Return two views of an image."""
        return self.transform(image), self.transform(image)


class ImageFiles(Dataset):
    """Two views of each image, made anew from its file each time.

    Args:
        files: Paths or contents of image files.
        transform: Makes the views.
    """

    def __init__(
        self,
        files: list[str | bytes],
        transform: Callable[[Image.Image], Sequence[Tensor]],
    ):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Sequence[Tensor]:
        file = self.files[i]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        return self.transform(image)


def image_files(images: Images) -> list[str | bytes]:
    """Return the files of images; of images that are drawn, PNG files made here.

    Args:
        images: The images.
    """
    if images.pixels is None:
        return [images.file(i) for i in range(len(images))]
    files = list[str | bytes]()
    for pixels in images.pixels:
        buffer = io.BytesIO()
        Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def train_plain_loop(
    recipe: ResolvedRecipe,
    images: Images,
    measure: Callable[[nn.Module], float],
    state_file: Path,
    *,
    compute: Compute,
    fast: bool,
) -> list[tuple[float, float]]:
    """Train, and measure after each epoch; goes on after the last epoch that is saved.

    Args:
        recipe: Gives network, views, size of a batch, epochs and seed.
        images: The training images.
        measure: Computes the kNN accuracy of a backbone in percent; its time does not count.
        state_file: Where the state is kept.
        compute: Device and precision; the loop as documented uses only the device.
        fast: Whether to use the precision and the memory format of this program.

    Returns:
        Seconds of training and the accuracy after each epoch, the untrained network first.
    """
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe)
    model = PlainSimSiam(backbone).to(compute.device)
    if fast:
        compute.place(model)
    loader = DataLoader(
        ImageFiles(image_files(images), two_views(recipe)),
        batch_size=recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=min(WORKERS, CPU_CORES),
    )
    criterion = plain_criterion()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    curve = [(0.0, measure(backbone))]
    if state_file.exists():
        state = read_checkpoint(state_file)
        model.load_state_dict(state["model"])
        curve = [(seconds, accuracy) for seconds, accuracy in state["curve"]]
    for epoch in range(len(curve) - 1, recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch)
        begun = time.monotonic()
        for batch in loader:
            x0, x1 = (compute.place(x) if fast else x.to(compute.device) for x in batch)
            with compute.autocast() if fast else nullcontext():
                (z0, p0), (z1, p1) = model(x0), model(x1)
                loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = curve[-1][0] + time.monotonic() - begun
        curve.append((seconds, measure(backbone)))
        with atomic_write(state_file) as part:
            torch.save({"model": model.state_dict(), "curve": curve}, part)
    return curve
