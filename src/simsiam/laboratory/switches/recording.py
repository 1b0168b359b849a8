"""What a network makes of the same images at about a dozen steps of its training.

Everything is measured on images that the run never trains on, cropped at their center and not
augmented, except for the loss, which needs two views. As in training, batch norm takes its mean and
variance from these images. The network itself is not changed.
"""

import base64
from collections.abc import Sequence
from copy import deepcopy
from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes
from torch import Tensor
from typing_extensions import TypedDict, override

from simsiam.config.recipes import Recipe
from simsiam.data.batches import make_training_views
from simsiam.data.images import Images, load_into_memory, sample
from simsiam.data.transform import iter_crops
from simsiam.evaluation.frozen import split_train_test
from simsiam.monitoring.gauges import all_finite, effective_rank, z_std
from simsiam.monitoring.nearest_neighbors import knn_top1
from simsiam.runs.compose import open_run_source
from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import Source
from simsiam.training.pretrain import Pretraining
from simsiam.utils.typed_json import read_json

NUM_IMAGES, NUM_VOTERS = 300, 500  # test images, and labeled training images that vote in kNN
NUM_RECORDS = 12
FIRST_SHARE = 1 / 60  # of the steps of a run: the first record after step 0
NUM_EIGENVALUES = 32  # of the spectrum that are kept
VIEW_STEP = 2**62  # the step whose random numbers draw the views; no run gets there
FILE = "recording.json"  # in the run folder


class Outputs(TypedDict):
    """What is measured of the features h and the projections z of N images."""

    z_std_sqrt_d: float
    z_rank: float
    h_rank: float
    spectrum: list[float]  # at most NUM_EIGENVALUES, the largest first
    points: list[list[float]]  # N pairs: h/|h| along its first two principal axes


class StepRecord(Outputs):
    """What is measured at one step."""

    step: int
    loss: float
    knn_top1: float | None  # percent; None without labels


class SavedRecords(TypedDict):
    """The content of RUN/recording.json."""

    records: list[StepRecord]


class Recording(TypedDict):
    """All records of a run as columns, and the maps in little space."""

    steps: list[int]
    loss: list[float]
    z_std_sqrt_d: list[float]
    z_rank: list[float]
    h_rank: list[float]
    knn_top1: list[float | None]
    spectrum: list[list[float]]
    extent: float  # the largest coordinate of a point, without its sign
    points: list[str]  # for each step base64 of N pairs of bytes: 0 is -extent, 255 is +extent


def steps_to_record(steps: int) -> list[int]:
    """Choose steps that are evenly spaced on a log scale.

    Runs of different lengths are recorded after the same shares of their training, so that records
    of the same position belong together.

    Args:
        steps: The number of steps of the run.

    Returns:
        Step 0, the last step, and the steps between; NUM_RECORDS if there are as many as that.
    """
    shares = np.geomspace(FIRST_SHARE, 1, NUM_RECORDS - 1)
    return sorted({0, *np.ceil((shares * steps).round(6)).astype(int).tolist()})


def choose_images(source: Source, recipe: Recipe) -> tuple[Images, Images]:
    """Choose the images that are recorded, and those that vote in kNN.

    Args:
        source: The source of the run.
        recipe: Its recipe.

    Returns:
        NUM_IMAGES test images, and NUM_VOTERS training images.
    """
    train, test, _ = split_train_test(source, require_labels=not recipe.no_labels)
    train = sample(train, recipe.limit)
    images, _ = load_into_memory(sample(test, NUM_IMAGES), int(recipe.cache_gib * 2**30))
    return images, sample(train, NUM_VOTERS)


def describe_outputs(h: Tensor, z: Tensor) -> Outputs:
    """Measure what a network makes of images.

    Args:
        h: (N, d) features.
        z: (N, d) projections.

    Returns:
        Of z its standard deviation, effective rank and spectrum, of h its effective rank and
        "points".
    """
    h, z = h.double(), z.double()
    centered = z - z.mean(0)
    # Those of the covariance, and zeros, all times N.
    eigenvalues = torch.linalg.eigvalsh(centered @ centered.T).clamp_min(0).flip(0)
    kept = eigenvalues[: min(NUM_EIGENVALUES, z.shape[1])]
    spectrum = kept / eigenvalues.sum().clamp_min(1e-30)
    unit = F.normalize(h, dim=1)
    unit = unit - unit.mean(0)
    axes = torch.linalg.svd(unit, full_matrices=False).Vh[:2]
    return {
        "z_std_sqrt_d": z_std(z).item() * sqrt(z.shape[1]),
        "z_rank": effective_rank(z).item(),
        "h_rank": effective_rank(h).item(),
        "spectrum": [float(f"{value:.3g}") for value in spectrum.tolist()],
        "points": (unit @ axes.T).round(decimals=5).tolist(),
    }


class RecordedPretraining(Pretraining):
    """Pretraining that records what the network makes of the same images, in RUN/recording.json."""

    @override
    def begin(self) -> None:
        super().begin()
        recipe, device = self.run.recipe, self.compute.device
        source = open_run_source(
            self.run, command=lambda names: ["evaluate", str(self.run.path), *names]
        )
        images, voters = choose_images(source, recipe)
        self.views = make_training_views(images, np.arange(len(images)), recipe, VIEW_STEP, device)
        (x, self.labels), (voters_x, self.voter_labels) = self.load(images), self.load(voters)
        self.x, self.num_images = torch.cat([x, voters_x]), len(x)
        self.num_classes = len(images.classes)
        self.record_steps = steps_to_record(self.steps)
        if self.step == 0:
            self.observe()

    def load(self, images: Images) -> tuple[Tensor, Tensor | None]:
        """Read images.

        Args:
            images: The images; unreadable ones are left out.

        Returns:
            The pixels (N, C, size, size), normalized, and the labels (N,), if there are any.
        """
        transform, device = eval_transform(self.run.recipe), self.compute.device
        index, pixels = zip(*iter_crops(images, transform, []), strict=True)
        x = transform.normalize(torch.cat(pixels).to(device))
        if images.labels is None:
            return x, None
        return x, torch.from_numpy(images.labels[np.concatenate(index)]).long().to(device)

    @override
    def observe(self) -> None:
        if self.step in self.record_steps and all_finite(self.x, self.model):
            earlier = [record for record in read_records(self.run) if record["step"] < self.step]
            self.run.write(FILE, {"records": [*earlier, self.record()]})

    @torch.no_grad()
    def record(self) -> StepRecord:
        """Measure the network as it is now, in float32, and leave it as it is."""
        model, n = deepcopy(self.model).train(), self.num_images
        loss = model(*self.views).loss.item()
        h = model.backbone(self.x)
        z, top1 = model.projector(h[:n]), None
        if self.labels is not None and self.voter_labels is not None:
            classes = self.num_classes
            top1 = round(knn_top1(h[n:], self.voter_labels, h[:n], self.labels, classes=classes), 3)
        return {
            "step": self.step, "loss": loss, "knn_top1": top1,
            **describe_outputs(h[:n].cpu(), z.cpu()),
        }  # fmt: skip


def read_records(run: Run) -> list[StepRecord]:
    """Read what was recorded of a run so far.

    Args:
        run: The run.

    Returns:
        The records by step; none if the run was not recorded.

    Raises:
        UsageError: If the file is damaged.
    """
    path = run.path / FILE
    return read_json(path, SavedRecords)["records"] if path.exists() else []


def align(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Turn each map so that its points are as close as possible to those of the map before.

    A map is turned or mirrored as a whole, so all distances between its points stay the same.

    Args:
        maps: Points (N, 2) of the same images, centered.

    Returns:
        The maps; the first one as it is.
    """
    aligned = list(maps[:1])
    for points in maps[1:]:
        rotation, _ = orthogonal_procrustes(points, aligned[-1])
        aligned.append(points @ rotation)
    return aligned


def collect_recording(run: Run) -> Recording:
    """Collect all records of a run in little space, the maps aligned from step to step.

    Args:
        run: A run that `RecordedPretraining` trained.

    Returns:
        The recording.

    Raises:
        UsageError: If the file is damaged.
    """
    records = read_records(run)
    maps = align([np.array(record["points"]) for record in records])
    extent = max((float(np.abs(points).max()) for points in maps), default=0.0)
    levels = [((points / (extent or 1) + 1) * 127.5).round().astype(np.uint8) for points in maps]
    return {
        "steps": [record["step"] for record in records],
        "loss": [round(record["loss"], 4) for record in records],
        "z_std_sqrt_d": [round(record["z_std_sqrt_d"], 4) for record in records],
        "z_rank": [round(record["z_rank"], 3) for record in records],
        "h_rank": [round(record["h_rank"], 3) for record in records],
        "knn_top1": [record["knn_top1"] for record in records],
        "spectrum": [record["spectrum"] for record in records],
        "extent": round(extent, 4),
        "points": [base64.b64encode(map_levels.tobytes()).decode() for map_levels in levels],
    }
