"""Candidates: encoders in closed form, compared without labels.

Everything is fitted on some images of a source and compared on others, on which nothing was fitted.
A `Branch` is a backbone with its features of these images; a `Candidate` is an encoder made of one
or two branches; `choose` takes a candidate only if it is better than the best one before it by more
than the noise of the measurement, but for one that is taken by rule (`beside_patches`).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.methods import Views
from simsiam.data.images import Images, measure_sizes
from simsiam.data.transform import Transform, iter_crops
from simsiam.data.views import make_views
from simsiam.errors import UsageError
from simsiam.model.encoder import Encoder, join_features
from simsiam.model.patches import PATCHES_PREFIX, Patches, fit_patches
from simsiam.model.precision import Compute
from simsiam.model.view_noise import center, fit_map, view_noise_covariance
from simsiam.monitoring.nearest_neighbors import cap_k, knn_scores
from simsiam.monitoring.signals import view_agreement, view_retrieval
from simsiam.utils.progress_bar import progress_bar

FIT_SIZE, HELD_OUT_SIZE = 1000, 600  # images that encoders are fitted on, and compared on
MIN_IMAGES = 24  # fewer leave too few to compare on
VIEWS_PER_IMAGE = 4  # of the images that view noise is estimated from
PATCH_SIZES = (32, 24, 64, 48)  # sizes in pixels, in the order in which they are tried
SHRINKAGES = (0.1, 0.3, 1.0)
PATCH_WEIGHTS = (0.5, 1.0, 2.0)  # of patches beside a network, relative to equal view noise
COSINE_WEIGHT = 1.0  # of patches beside a network that was trained on views: `beside_patches`
SIGNIFICANT = 1.64  # standard errors by which a candidate has to be better: one-sided 95 %
# A network that was trained on views has been fitted to what the score measures, so that a small
# rise means little: a map raised the score of a network that SimSiam had trained by exp(0.14), and
# cost 13 points of kNN accuracy.
MARGIN = 0.2  # of the logarithm of the score, for changes of such a network, and for its training
CHUNK = 100  # images that are computed at a time
# The method's views without blur, which removes what patches see at these sizes.
NOISE_VIEWS = Views(blur=0.0)


class Sample(NamedTuple):
    """Images of a source, cropped to squares.

    Attributes:
        pixels: uint8 (N, C, S, S); the first `fit_size` are for fitting, the rest is held out.
        fit_size: Number of images for fitting.
        labels: (N,) int64, or None.
        skipped: Key and reason of each image that cannot be read.
    """

    pixels: Tensor
    fit_size: int
    labels: Tensor | None
    skipped: list[tuple[str, str]]

    def reduce(self, limit: int) -> "Sample":
        """Keep so many images, of those for fitting and those held out in equal proportion.

        Args:
            limit: Number of images, at most.
        """
        if limit >= (n := len(self.pixels)):
            return self
        fit = self.fit_size * limit // n
        kept = torch.cat([torch.arange(fit), torch.arange(self.fit_size, n)[: limit - fit]])
        labels = None if self.labels is None else self.labels[kept]
        return Sample(self.pixels[kept], fit, labels, self.skipped)


def read_sample(
    images: Images, side: int, *, seed: int = 0, limit: int = FIT_SIZE + HELD_OUT_SIZE
) -> Sample:
    """Read a random sample of images.

    Args:
        images: The images.
        side: Side of the squares in pixels.
        seed: Seed of the choice.
        limit: Number of images, at most.

    Returns:
        The images; a third of them, at most HELD_OUT_SIZE, is held out.

    Raises:
        UsageError: There are fewer than MIN_IMAGES readable images.
    """
    order = np.random.default_rng(seed).permutation(len(images))[:limit]
    chosen, skipped = images.take(order), list[tuple[str, str]]()
    transform = Transform(size=side, mean=(), std=(), shorter_side=side)
    parts = list(iter_crops(chosen, transform, skipped, chunk_size=CHUNK))
    n = sum(len(index) for index, _ in parts)
    if n < MIN_IMAGES:
        first = f"; the first unreadable one, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise UsageError(f"{n} readable images: at least {MIN_IMAGES} are needed{first}")
    kept = np.concatenate([index for index, _ in parts])
    labels = None if chosen.labels is None else torch.from_numpy(chosen.labels[kept])
    pixels = torch.cat([pixels for _, pixels in parts])
    return Sample(pixels, n - min(HELD_OUT_SIZE, n // 3), labels, skipped)


def learn_patches(
    sample: Sample, transform: Transform, sizes: Sequence[int] = PATCH_SIZES
) -> dict[str, Patches]:
    """Learn a dictionary of patches for each image size.

    Args:
        sample: The images.
        transform: The preprocessing of the images that the backbones will be given.
        sizes: Image sizes in pixels; those above the input's are left out.

    Returns:
        Backbones by their names.
    """
    parts = sample.pixels[: sample.fit_size].split(CHUNK)
    pixels = torch.cat([transform.crop(x).float() / 255 for x in parts])
    backbones = {}
    for size in (s for s in sizes if s <= transform.size):
        backbone = backbones[f"{PATCHES_PREFIX}{size}"] = fit_patches(pixels, (size,))
        backbone.mean.copy_(torch.tensor(transform.mean).view(-1, 1, 1))
        backbone.std.copy_(torch.tensor(transform.std).view(-1, 1, 1))
    return backbones


@dataclass(frozen=True)
class Branch:
    """A backbone and its features of the sample.

    Attributes:
        name: The name of the backbone.
        backbone: The module, in eval mode.
        h: (N, d) features of the images.
        mean: (d,), their mean over the images for fitting.
        noise: Sw (d, d), the covariance of view noise over the images for fitting; None if it was
            not measured.
        held_out: (2, M, d) features of two views of the images held out.
    """

    name: str
    backbone: nn.Module
    h: Tensor
    mean: Tensor
    noise: Tensor | None
    held_out: Tensor


def measure(
    backbones: Mapping[str, nn.Module],
    transform: Transform,
    sample: Sample,
    compute: Compute,
    *,
    noise: bool = True,
    label: str = "",
    deadline: float | None = None,
) -> list[Branch]:
    """Compute the features of backbones that take the same images.

    Args:
        backbones: The backbones by their names; they are moved to the device.
        transform: Their preprocessing.
        sample: The images.
        compute: Where to compute, and in which precision.
        noise: Whether to measure the view noise, which the map is made from.
        label: The text before a progress bar; "" shows none.
        deadline: The end, in seconds of `time.monotonic`; None for no limit.

    Returns:
        A branch for each backbone.

    Raises:
        TimeoutError: It takes longer.
    """
    for backbone in backbones.values():
        compute.place(backbone.eval())

    def features(views: Sequence[Tensor]) -> list[Tensor]:
        """(views, n, d) for each backbone."""
        with torch.no_grad(), compute.autocast():
            return [
                torch.stack([net(compute.place(x)).float().cpu() for x in views])
                for net in backbones.values()
            ]

    def prepare(part: Tensor, start: int, count: int) -> list[Tensor]:
        if not count:
            return [transform.normalize(transform.crop(part))]
        return make_views(
            part,
            (NOISE_VIEWS,),
            view_count=count,
            size=transform.size,
            mean=transform.mean,
            std=transform.std,
            seed=0,
            step=0,
            positions=np.arange(start, start + len(part)),
        )

    fit, n = sample.fit_size, len(sample.pixels)
    jobs = [(0, n, 0), (fit, n, 2), *([(0, fit, VIEWS_PER_IMAGE)] if noise else [])]
    results = []
    with progress_bar(label, sum((stop - start) * max(c, 1) for start, stop, c in jobs)) as advance:
        for begin, end, count in jobs:
            chunks = []
            for start in range(begin, end, CHUNK):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                part = sample.pixels[start : min(start + CHUNK, end)]
                chunks.append(features(prepare(part, start, count)))
                advance(len(part) * max(count, 1))
            results.append([torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)])
    return [
        Branch(
            name,
            net,
            h=h[0],
            mean=h[0, :fit].mean(0),
            noise=view_noise_covariance(views[0].transpose(0, 1)) if views else None,
            held_out=held_out,
        )
        for (name, net), h, held_out, *views in zip(backbones.items(), *results, strict=True)
    ]


@dataclass(frozen=True)
class Candidate:
    """An encoder, and what was measured of it.

    Attributes:
        name: What it is, in words.
        branches: One or two backbones.
        heads: A linear map for each branch; None leaves features as they are.
        agreement: (2, M), `view_agreement` of the images held out.
        retrieval: Percent of their views that find the other view of the same image.
        hits: (M,) bool, whether kNN with the images for fitting classifies them correctly; None
            without labels. It is not used to choose.
        margin: By how much the logarithm of the score has to rise for it to be taken, at least.
        patches_weight: How much the cosine of the second branch counts; see `join_features`.
        by_rule: Whether it is taken whatever the scores are; see `beside_patches`.
    """

    name: str
    branches: tuple[Branch, ...]
    heads: tuple[nn.Linear | None, ...]
    agreement: Tensor = field(repr=False)
    retrieval: float
    hits: Tensor | None
    margin: float = 0.0
    patches_weight: float | None = None
    by_rule: bool = False

    @property
    def knn_top1(self) -> float | None:
        """Accuracy of kNN in percent on the images held out; None without labels."""
        return None if self.hits is None else 100 * self.hits.float().mean().item()

    @property
    def score(self) -> float:
        """The geometric mean of the two numbers of `view_agreement`, averaged over images first."""
        recognition, nearness = self.agreement.mean(1).clamp_min(1e-6).tolist()
        return float((recognition * nearness) ** 0.5)

    def gain(self, other: "Candidate") -> tuple[float, float]:
        """Compare with another candidate on the same images.

        Args:
            other: The other candidate.

        Returns:
            The logarithm of the ratio of the scores, and its standard error (delta method; the
            images are paired).
        """
        difference = self.influence() - other.influence()
        error = difference.std().item() / len(difference) ** 0.5
        return math.log(self.score / other.score), error

    def score_interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Return the confidence interval of the score over images, 95 % by default.

        It is that of the delta method, or, if a number may be 0, of both numbers apart.

        Args:
            z: Quantile of the normal distribution.
        """
        mean, spread = self.agreement.mean(1), self.agreement.std(1)
        error = z * spread / self.agreement.shape[1] ** 0.5
        if (mean <= error).any():  # the delta method needs means that are above 0
            low, high = ((mean + e).clamp_min(0).prod().sqrt().item() for e in (-error, error))
            return low, high
        influence = self.influence()
        half = self.score * z * influence.std().item() / len(influence) ** 0.5
        return max(self.score - half, 0.0), self.score + half

    def describe(self) -> str:
        """Say in words how good it is: kNN accuracy where there are labels, else the score."""
        if self.knn_top1 is None:
            return f"label-free score {self.score:.3f}"
        return f"kNN {self.knn_top1:.1f} %"

    def influence(self) -> Tensor:
        """What each image adds to the logarithm of the score, up to a constant: (M,)."""
        return (self.agreement / self.agreement.mean(1, keepdim=True).clamp_min(1e-6)).mean(0)


def make_candidate(
    name: str,
    branches: Sequence[Branch],
    heads: Sequence[nn.Linear | None],
    sample: Sample,
    patches_weight: float | None = None,
) -> Candidate:
    """Apply heads to the features of branches, and measure the result.

    Args:
        name: What it is, in words.
        branches: The backbones.
        heads: A linear map for each.
        sample: The images, for their labels.
        patches_weight: How much the cosine of the second branch counts; see `join_features`.

    Returns:
        The candidate.
    """

    @torch.no_grad()
    def joined(features: Callable[[Branch], Tensor]) -> Tensor:
        pairs = zip(map(features, branches), heads, strict=True)
        h, *second = (h if head is None else head(h) for h, head in pairs)
        return join_features(h, second[0], patches_weight) if second else h

    a, b = joined(lambda branch: branch.held_out[0]), joined(lambda branch: branch.held_out[1])
    hits = None
    if (labels := sample.labels) is not None:
        h, n, classes = joined(lambda branch: branch.h), sample.fit_size, int(labels.max()) + 1
        votes = knn_scores(h[:n], labels[:n], h[n:], classes=classes, k=cap_k(n, classes))
        hits = votes.argmax(1) == labels[n:]
    return Candidate(
        name,
        tuple(branches),
        tuple(heads),
        view_agreement(a, b),
        view_retrieval(a, b),
        hits,
        patches_weight=patches_weight,
    )


def best_candidate(candidates: Iterable[Candidate]) -> Candidate:
    """Return the candidate with the highest score.

    Args:
        candidates: At least one.
    """
    return max(candidates, key=lambda candidate: candidate.score)


def map_candidate(branch: Branch, sample: Sample, name: str | None = None) -> Candidate:
    """Add the map of view noise to a branch, with the best of SHRINKAGES.

    Args:
        branch: The backbone.
        sample: The images.
        name: What the backbone is called in the candidate's name; by default its own name.
    """
    return best_candidate(
        make_candidate(
            f"{name or branch.name} + map",
            [branch],
            [fit_map(branch.mean, _noise(branch), shrinkage)],
            sample,
        )
        for shrinkage in SHRINKAGES
    )


def backbone_candidates(
    branch: Branch, sample: Sample, *, margin: float = 0.0
) -> Iterator[Candidate]:
    """Make candidates of a network: unchanged, centered, and with its map.

    Args:
        branch: The network.
        sample: The images.
        margin: Of the last two; MARGIN for a network that was trained on views.

    Yields:
        The three candidates.
    """
    yield make_candidate(f"{branch.name} unchanged", [branch], [None], sample)
    centered = make_candidate(f"{branch.name} centered", [branch], [center(branch.mean)], sample)
    for candidate in (centered, map_candidate(branch, sample)):
        yield replace(candidate, margin=margin)


def join_candidates(
    first: Candidate, second: Candidate, sample: Sample, weights: Sequence[float] = (1.0,)
) -> Candidate:
    """Put the features of two candidates side by side.

    Each is divided by the root of its mean squared view noise, so that a weight of 1 gives both the
    same noise.

    Args:
        first: The first candidate, of one branch with a head.
        second: The second candidate, of one branch with a head.
        sample: The images.
        weights: Factors of the second one's features; the best one is taken.
    """

    def scaled(candidate: Candidate, weight: float) -> nn.Linear:
        branch = candidate.branches[0]
        head, noise = candidate.heads[0] or center(branch.mean), _noise(branch)
        matrix = head.weight.double()
        scale = weight / ((matrix @ noise) * matrix).sum().clamp_min(1e-30).sqrt().float()
        linear = nn.utils.skip_init(nn.Linear, head.in_features, head.out_features)
        linear.load_state_dict({name: x * scale for name, x in head.state_dict().items()})
        return linear.requires_grad_(False)

    name = f"{first.name}, {second.name}"
    branches = [*first.branches, *second.branches]
    return best_candidate(
        make_candidate(name, branches, [scaled(first, 1.0), scaled(second, weight)], sample)
        for weight in weights
    )


def beside_patches(network: Branch, patches: Candidate, sample: Sample) -> Candidate:
    """Put patches beside a network that was trained on views: taken by rule, not by its score.

    Such a network was fitted to what the score measures, and patches were not, so the score cannot
    compare them. docs/closed_form.md says what the mean of their cosines is worth.

    Args:
        network: The network. Its features stay as they are: with its map the mean is worse.
        patches: The best patches.
        sample: The images.
    """
    branches, heads = [network, *patches.branches], [None, *patches.heads]
    name = f"{network.name} beside {patches.name}"
    joined = make_candidate(name, branches, heads, sample, COSINE_WEIGHT)
    return replace(joined, by_rule=True)


def _noise(branch: Branch) -> Tensor:
    """The view noise of a branch, which must have been measured."""
    if branch.noise is None:
        raise ValueError(f"the view noise of {branch.name} was not measured")
    return branch.noise


def patch_candidates(branches: Sequence[Branch], sample: Sample) -> Iterator[Candidate]:
    """Make candidates of patches: each size centered, and with its map.

    Args:
        branches: Patches of one size each.
        sample: The images.

    Yields:
        The candidates, in the order of the branches.
    """
    for branch in branches:
        yield make_candidate(branch.name, [branch], [center(branch.mean)], sample)
        yield map_candidate(branch, sample)


def best_patches(
    sample: Sample, transform: Transform, *, label: str = ""
) -> tuple[Candidate, list[dict[str, object]]]:
    """Learn patches at all sizes that fit, and choose the best.

    Args:
        sample: The images.
        transform: The preprocessing of the images that the backbone will be given.
        label: The text before a progress bar; "" shows none.

    Returns:
        The best patches, and the table of what was tried, as `choose` returns them.
    """
    learned = learn_patches(sample, transform)
    compute = Compute.pick(precision="float32")
    return choose(
        patch_candidates(measure(learned, transform, sample, compute, label=label), sample)
    )


def choose(candidates: Iterable[Candidate]) -> tuple[Candidate, list[dict[str, object]]]:
    """Take each candidate that is better than the best before it by more than noise and its margin.

    One that is taken by rule is taken in any case.

    Args:
        candidates: At least one; the first is taken to begin with.

    Returns:
        The best one, and a row of the table of what was tried for each.

    Raises:
        ValueError: There is none.
    """
    best, rows = None, []
    for candidate in candidates:
        row: dict[str, object] = {
            "candidate": candidate.name,
            "score": round(candidate.score, 4),
            "view_retrieval": round(candidate.retrieval, 2),
        }
        if candidate.knn_top1 is not None:
            row["knn_top1"] = round(candidate.knn_top1, 2)
        taken = best is None
        if best is not None:
            gain, error = candidate.gain(best)
            taken = candidate.by_rule or gain > max(SIGNIFICANT * error, candidate.margin)
            row |= {"than": best.name, "gain": round(gain, 4), "error": round(error, 4)}
        rows.append(row | ({"by_rule": True} if candidate.by_rule else {}) | {"taken": taken})
        best = candidate if taken else best
    if best is None:
        raise ValueError("no candidates")
    return best, rows


def build_encoder(candidate: Candidate) -> tuple[str, Encoder, str | None]:
    """Make the module of a candidate.

    Patches of two sizes become one backbone with both; patches beside a network become the second
    branch of the encoder.

    Args:
        candidate: The candidate.

    Returns:
        The name of its backbone, the encoder, and the name of its second branch if there is one.
    """
    first, *second = candidate.branches
    if not second:
        return first.name, Encoder(first.backbone, candidate.heads[0]), None
    if not isinstance(first.backbone, Patches) or not isinstance(second[0].backbone, Patches):
        parts = (first.backbone, candidate.heads[0], second[0].backbone, candidate.heads[1])
        return first.name, Encoder(*parts, candidate.patches_weight), second[0].name
    backbone = first.backbone.join(second[0].backbone)
    joined = nn.utils.skip_init(nn.Linear, backbone.dim, backbone.dim)
    heads = [head for head in candidate.heads if head is not None]
    weight = torch.block_diag(*(head.weight for head in heads))
    joined.load_state_dict({"weight": weight, "bias": torch.cat([head.bias for head in heads])})
    name = f"{first.name}+{second[0].name.removeprefix(PATCHES_PREFIX)}"
    return name, Encoder(backbone, joined.requires_grad_(False)), None


def sample_for_patches(images: Images, *, seed: int = 0) -> tuple[Sample, Transform]:
    """Read a sample at a size that suits patches.

    Args:
        images: The images.
        seed: Seed of the choice.

    Returns:
        The sample, and the preprocessing for patches: no image is enlarged, but for those below
        the smallest of PATCH_SIZES.
    """
    sizes = measure_sizes(images)
    median = int(np.median(sizes.min(1))) if len(sizes) else max(PATCH_SIZES)
    usable = [size for size in PATCH_SIZES if size <= median] or [min(PATCH_SIZES)]
    sample = read_sample(images, min(2 * max(PATCH_SIZES), max(median, *usable)), seed=seed)
    zeros, ones = (0.0,) * images.channels, (1.0,) * images.channels
    return sample, Transform(size=max(usable), mean=zeros, std=ones)
