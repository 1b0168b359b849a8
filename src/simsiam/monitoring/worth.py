"""What a run is worth: its features beside those of simpler encoders, on the same images.

The network before its first step and after its last one, raw pixels, a color histogram, and patches
are measured as `simsiam.monitoring.candidates` says, on a sample of the training images. If these
have labels, kNN accuracy decides which features are better, else the label-free score. A difference
within noise decides nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images
from simsiam.data.transform import Transform
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError
from simsiam.model.precision import Compute
from simsiam.monitoring.candidates import (
    MARGIN,
    PATCH_SIZES,
    SIGNIFICANT,
    Branch,
    Candidate,
    Sample,
    backbone_candidates,
    beside_patches,
    choose,
    learn_patches,
    make_candidate,
    map_candidate,
    measure,
    read_sample,
)
from simsiam.monitoring.verdict import COLOR, END, MIN_VERDICT_STEPS, PIXELS, START
from simsiam.utils.intervals import wilson_interval

SIMPLE = (START, PIXELS, COLOR)  # what a run has to be better than
MAX_SAMPLE = 1600  # images
MIN_SAMPLE = 150
# Measuring an image at the start and at the end takes about as long as training on it twice. So a
# sample of this share of all training images takes 5 % of the training time.
SAMPLE_SHARE = 0.025
PIXEL_SIDE = 16
COLOR_LEVELS = 4  # of each of three channels: 64 bins
ONE_SIZE_SECONDS, ALL_SIZES_SECONDS = 60, 600  # training time from which patches are learned
# Images in all training steps up to which it was measured that patches beside a network are better
# than the network. With many more, a network alone must be better some day.
MAX_BESIDE_PATCHES = 2_000_000


class Pixels(nn.Module):
    """The image itself, averaged down to 16 x 16 pixels.

    Args:
        transform: The preprocessing of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transform: Transform):
        super().__init__()
        self.register_buffer("mean", torch.tensor(transform.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(transform.std).view(-1, 1, 1))

    def pixels(self, x: Tensor) -> Tensor:
        """Undo the normalization.

        Args:
            x: Normalized images.

        Returns:
            Values from 0 to 1.
        """
        return (x * self.std + self.mean).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Average.

        Args:
            x: (N, C, H, W), normalized.

        Returns:
            (N, C * 256).
        """
        return F.adaptive_avg_pool2d(self.pixels(x), PIXEL_SIDE).flatten(1)


class ColorHistogram(Pixels):
    """The share of the pixels in each of 64 colors; 64 levels of gray if there is one channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Count.

        Args:
            x: (N, 1 or 3, H, W), normalized.

        Returns:
            (N, 64).
        """
        levels = 64 if x.shape[1] == 1 else COLOR_LEVELS
        level = (self.pixels(x) * levels).long().clamp_max(levels - 1)
        weights = torch.tensor([levels**i for i in range(x.shape[1])], device=x.device)
        bins = (level * weights.view(-1, 1, 1)).sum(1).flatten(1)
        counts = torch.zeros(len(x), 64, device=x.device)
        return counts.scatter_add_(
            1, bins, torch.ones_like(bins, dtype=counts.dtype) / bins.shape[1]
        )


class Start(TypedDict):
    """What was measured before the first step; a checkpoint keeps it.

    Attributes:
        agreement: (2, M), as in `Candidate`.
        retrieval: As in `Candidate`.
        hits: As in `Candidate`.
        size: Number of images in the sample that could be read.
        limit: How many images were to be read; older checkpoints have none.
    """

    agreement: Tensor
    retrieval: float
    hits: Tensor | None
    size: int
    limit: NotRequired[int]


def sample_size(samples: int) -> int:
    """Choose how many images are measured.

    Args:
        samples: Images in all training steps, counting repetitions.
    """
    return max(MIN_SAMPLE, min(MAX_SAMPLE, int(SAMPLE_SHARE * samples)))


def goes_beside_patches(recipe: ResolvedRecipe, steps: int) -> bool:
    """Tell whether patches are put beside the network of a run by rule: see `beside_patches`.

    Args:
        recipe: The recipe.
        steps: Number of its steps.

    Returns:
        True for a network that was trained without labels, from random weights, for at least
        MIN_VERDICT_STEPS, and with at most MAX_BESIDE_PATCHES images.
    """
    random_weights = recipe.init is None and recipe.method.name != "none"
    trained = MIN_VERDICT_STEPS <= steps <= MAX_BESIDE_PATCHES / recipe.batch_size
    return random_weights and recipe.method.target != "labels" and trained


@rank_zero_only
def measure_start(
    backbone: nn.Module,
    images: Images,
    recipe: ResolvedRecipe,
    transform: Transform,
    steps: int,
    *,
    compute: Compute,
) -> Start | None:
    """Measure a network before its first step.

    Args:
        backbone: The backbone; its training mode is restored.
        images: The training images.
        recipe: The recipe, for its seed and the size of a batch.
        transform: The preprocessing of evaluation.
        steps: Number of training steps; fewer than MIN_VERDICT_STEPS are not worth measuring.
        compute: Where to compute, and in which precision.

    Returns:
        What was measured; None if there are too few steps or images.
    """
    if steps < MIN_VERDICT_STEPS:
        return None
    try:
        limit = sample_size(steps * recipe.batch_size)
        sample = read_sample(images, transform.resize, seed=recipe.seed, limit=limit)
    except UsageError:
        return None
    (branch,) = _measure({START: backbone}, transform, sample, compute, noise=False)
    start = make_candidate(START, [branch], [None], sample)
    return {
        "agreement": start.agreement,
        "retrieval": start.retrieval,
        "hits": start.hits,
        "size": len(sample.pixels),
        "limit": limit,
    }


def measure_end(
    start: Start,
    backbone: nn.Module,
    images: Images,
    recipe: ResolvedRecipe,
    transform: Transform,
    steps: int,
    seconds: float,
    *,
    compute: Compute,
) -> tuple[list[Candidate], list[Candidate]]:
    """Measure a network after its last step, and the encoders to compare it with.

    Args:
        start: What was measured before the first step.
        backbone: The backbone; its training mode is restored.
        images: The training images.
        recipe: The recipe.
        transform: The preprocessing of evaluation.
        steps: Number of training steps.
        seconds: Training time. After less than a minute, patches are left out; after less than ten,
            they are learned at one size.
        compute: Where to compute, and in which precision.

    Returns:
        The network unchanged, centered and with its map; and the network beside patches, if it goes
        there by rule, patches with their map, the start if the same images could be read, pixels,
        and the color histogram, unless images have 2 or more than 3 channels. Nothing if there are
        too few images.
    """
    try:
        limit = start.get("limit", start["size"])  # the size, in checkpoints of older versions
        sample = read_sample(images, transform.resize, seed=recipe.seed, limit=limit)
    except UsageError:
        return [], []
    simple: dict[str, nn.Module] = {PIXELS: Pixels(transform)}
    if images.channels in (1, 3):
        simple[COLOR] = ColorHistogram(transform)
    count = (seconds >= ONE_SIZE_SECONDS) + (len(PATCH_SIZES) - 1) * (seconds >= ALL_SIZES_SECONDS)
    patches = learn_patches(sample, transform, PATCH_SIZES[:count])
    float32 = Compute(compute.device, "float32")
    (end,) = _measure({END: backbone}, transform, sample, compute)
    others = _measure(simple, transform, sample, float32, noise=False)
    learned = _measure(patches, transform, sample, float32) if patches else []
    before = Candidate(START, (), (), start["agreement"], start["retrieval"], start["hits"])
    unchanged, *changed = backbone_candidates(end, sample, margin=MARGIN)
    mapped, joined = [map_candidate(branch, sample) for branch in learned], list[Candidate]()
    if mapped and goes_beside_patches(recipe, steps):
        joined.append(beside_patches(end, choose(mapped)[0], sample))
    return [replace(unchanged, name=END), *changed], [
        *joined,
        *mapped,
        *([before] if start["size"] == len(sample.pixels) else []),
        *(make_candidate(other.name, [other], [None], sample) for other in others),
    ]


def _measure(
    backbones: Mapping[str, nn.Module],
    transform: Transform,
    sample: Sample,
    compute: Compute,
    *,
    noise: bool = True,
) -> list[Branch]:
    """`measure`, which leaves networks in evaluation mode; restore their mode."""
    training = {name: backbone.training for name, backbone in backbones.items()}
    branches = measure(backbones, transform, sample, compute, noise=noise)
    for name, backbone in backbones.items():
        backbone.train(training[name])
    return branches


def is_better(candidate: Candidate, other: Candidate) -> bool:
    """Tell whether an encoder is better than another by more than noise.

    Args:
        candidate: The encoder.
        other: The other one, measured on the same images.
    """
    if candidate.hits is None and candidate.by_rule != other.by_rule:
        return candidate.by_rule
    gain, error = candidate.gain(other)
    if candidate.hits is not None and other.hits is not None:
        difference = candidate.hits.float() - other.hits.float()
        gain, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
    return gain > SIGNIFICANT * error


def not_beaten(candidates: Sequence[Candidate], name: str) -> list[str]:
    """List the simple encoders that an encoder is not better than.

    Args:
        candidates: The encoders.
        name: The name of the encoder in question.

    Returns:
        Names of SIMPLE.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    return [
        other
        for other in SIMPLE
        if other in by_name and not is_better(by_name[name], by_name[other])
    ]


def worse_than(candidates: Sequence[Candidate], name: str, other: str) -> str:
    """Say how much worse an encoder is than another one.

    Args:
        candidates: The encoders.
        name: The name of the encoder in question.
        other: The name of the other one.

    Returns:
        Both values in words; "" if one was not measured, or it is not worse beyond noise.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if not {name, other} <= by_name.keys() or not is_better(by_name[other], by_name[name]):
        return ""
    return f"{by_name[name].describe()} instead of {by_name[other].describe()}"


def best_features(candidates: Sequence[Candidate]) -> Candidate:
    """Find the best encoder: of those before it in the list, each must be beaten beyond noise.

    Args:
        candidates: At least one, the preferred ones first.
    """
    best, *others = candidates
    for candidate in others:
        if is_better(candidate, best):
            best = candidate
    return best


def table_row(candidate: Candidate) -> dict[str, object]:
    """Describe an encoder for summary.json.

    Args:
        candidate: The encoder.

    Returns:
        `features`, `score` and `score_interval`, `view_retrieval` in percent, and, where there are
        labels, `knn_top1` in percent, its `interval`, and `n`. Intervals are of 95 %.
    """
    low, high = candidate.score_interval()
    row: dict[str, object] = {
        "features": candidate.name,
        "score": round(candidate.score, 4),
        "score_interval": [round(low, 4), round(high, 4)],
        "view_retrieval": round(candidate.retrieval, 2),
    }
    if candidate.hits is not None:
        n, correct = len(candidate.hits), int(candidate.hits.sum())
        interval = [round(100 * end, 2) for end in wilson_interval(correct, n)]
        row |= {"knn_top1": round(100 * correct / n, 2), "interval": interval, "n": n}
    return row
