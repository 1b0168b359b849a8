"""SimSiam in a plain loop, as a user of lightly writes it after the documentation.

Heads, optimizer, batches and views are those of SimSiam in lightly's benchmark on CIFAR-10
(docs/source/getting_started/benchmarks). Its shorter example has SGD without momentum and hardly
learns in so few epochs. Modules, loss and transform are lightly's where it is installed; otherwise
the same layers and operations of torch and torchvision, which `MODULES` says. The network is that
of the other contestants.
"""

import io
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simsiam.config.method import Views
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images
from simsiam.laboratory.bench_cases import (
    PillowTransform,
    is_installed,
    lightly_transform,
    torchvision_transform,
)
from simsiam.model.backbones import feature_dim
from simsiam.model.precision import Compute
from simsiam.runs.encoder import build_backbone
from simsiam.runs.run_folder import read_checkpoint
from simsiam.utils.files import atomic_write
from simsiam.utils.workers import CPU_CORES

# Of lightly's benchmark on CIFAR-10.
DIM, HIDDEN, BATCH_SIZE, WORKERS = 2048, 512, 128, 8
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.06, 0.9, 5e-4
VIEWS = Views(crop_min=0.08, blur=0.0)
LIGHTLY = is_installed("lightly.models.modules")
MODULES = f"lightly {version('lightly')}" if LIGHTLY else "torch and torchvision"


class PlainSimSiam(nn.Module):
    """The model of lightly's benchmark, on any backbone.

    Args:
        backbone: Images (N, C, H, W) to h (N, backbone.dim).
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        width = feature_dim(backbone)
        if LIGHTLY:
            from lightly.models.modules.heads import ProjectionHead, SimSiamPredictionHead

            self.projection_head = ProjectionHead(
                [
                    (width, DIM, nn.BatchNorm1d(DIM), nn.ReLU()),
                    (DIM, DIM, nn.BatchNorm1d(DIM), None),
                ]
            )
            self.prediction_head = SimSiamPredictionHead(DIM, HIDDEN, DIM)
        else:
            self.projection_head = nn.Sequential(
                *(nn.Linear(width, DIM, bias=False), nn.BatchNorm1d(DIM), nn.ReLU()),
                *(nn.Linear(DIM, DIM, bias=False), nn.BatchNorm1d(DIM)),
            )
            self.prediction_head = nn.Sequential(
                *(nn.Linear(DIM, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU()),
                nn.Linear(HIDDEN, DIM),
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z without gradient and p, (N, 2048) each, of views x (N, C, H, W)."""
        z = self.projection_head(self.backbone(x))
        return z.detach(), self.prediction_head(z)


def plain_criterion() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the negative cosine similarity: lightly's, or torch's."""
    if LIGHTLY:
        from lightly.loss import NegativeCosineSimilarity

        criterion: Callable[[Tensor, Tensor], Tensor] = NegativeCosineSimilarity()
        return criterion
    return lambda a, b: -F.cosine_similarity(a, b).mean()


class ImageFiles(Dataset):
    """Two views of each image, made anew from its file each time.

    Args:
        files: Paths or contents of image files.
        transform: Makes a view.
    """

    def __init__(self, files: list[str | bytes], transform: PillowTransform):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        file = self.files[i]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            image = opened.convert("RGB")
        return self.transform(image), self.transform(image)


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
        recipe: Gives network, side of a view, mean and standard deviation, epochs and seed.
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
    make_transform = lightly_transform if LIGHTLY else torchvision_transform
    transform = make_transform(VIEWS, recipe.image_size, recipe.mean, recipe.std)
    loader = DataLoader(
        ImageFiles(image_files(images), transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=min(WORKERS, CPU_CORES),
    )
    criterion = plain_criterion()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    curve = [(0.0, measure(backbone))]
    if state_file.exists():
        state = read_checkpoint(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
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
        schedule.step()
        seconds = curve[-1][0] + time.monotonic() - begun
        curve.append((seconds, measure(backbone)))
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "curve": curve,
        }
        with atomic_write(state_file) as part:
            torch.save(state, part)
    return curve
