"""What every protocol is given, a network that nothing moves and its features of a source, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.protocols import Settings
from simsiam.data.images import Images, hold_out
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import feature_dim
from simsiam.model.heads import build_projector
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features, standardization_stats
from simsiam.runs.encoder import build_backbone, eval_transform
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import Source

RAW_PIXELS, UNTRAINED_NETWORK = "raw pixels", "untrained network"  # what features have to beat


STANDARDIZATION = "mean 0 and variance 1 / d over all training images, labeled or not"


MAX_RAW_SIDE = 32  # raw pixels are averaged down to this many a side


class FeatureSet(NamedTuple):
    """Features (N, d) and labels (N,) to learn from, features (M, d) to classify: float32 and int64, on the CPU."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    classes: int
    train_indices: np.ndarray  # of the N among the training images, for some cannot be read

    def standardize(self) -> "FeatureSet":
        """STANDARDIZED features, so that one setting of a classifier fits networks of all widths and scales."""
        mean, scale = standardization_stats(self.train_features)
        return self._replace(
            train_features=(self.train_features - mean) / scale,
            test_features=(self.test_features - mean) / scale,
        )


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """What a protocol says: the classes of the M test images, or numbers that ask for no label."""

    name: str  # of these parameters, for people
    features: str
    parameters: dict[str, Any]  # all that was given
    selected: dict[str, Any] = field(
        default_factory=dict
    )  # all that was found out, from training images alone
    predictions: Sequence[Tensor] = ()  # classes (M, at most 5), likeliest first; one tensor a draw
    metrics: dict[str, float] = field(default_factory=dict)


class FrozenNetwork:
    """A run's network at a checkpoint, and what it makes of training images with labels and test images without.

    Raises UsageError for a checkpoint that is not there.
    """

    def __init__(self, run: Run, checkpoint: str, train: Images, test: Images, *, compute: Compute):
        names = sorted(path.stem for path in (run.path / "checkpoints").glob("*.pt"))
        if not names:
            raise UsageError(f"{run.path} has no checkpoint: `simsiam resume {run.path}` makes one")
        state = run.checkpoint(checkpoint) if checkpoint in names else None
        if state is None:
            raise unknown_name("checkpoint", checkpoint, names)
        assert test.labels is None, "a protocol sees no test label"
        self.recipe, self.checkpoint, self.step, self.weights = (
            run.recipe,
            checkpoint,
            state["step"],
            state["model"],
        )
        self.train, self.test = train, test
        self.compute = compute
        self.backbone = self.load_part(build_backbone(self.recipe), "backbone")
        self.test_indices: np.ndarray = np.arange(
            len(test)
        )  # positions of the test images that features are of
        self.unreadable: list[tuple[str, str]] = []
        self.feature_cache: dict[str, FeatureSet] = {}

    def load_part(self, part: nn.Module, name: str) -> nn.Module:
        """A part of the network with the checkpoint's weights, in eval mode and without gradients."""
        weights = {
            k.removeprefix(name + "."): v
            for k, v in self.weights.items()
            if k.startswith(name + ".")
        }
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UsageError(
                f"checkpoint {self.checkpoint!r} does not fit the recipe: {reason}"
            ) from None
        return self.freeze_part(part)

    def freeze_part(self, part: nn.Module) -> nn.Module:
        return self.compute.place(part.eval().requires_grad_(False))

    def network(self, kind: str) -> nn.Module:
        """Normalized images to the features of a kind: h, z, RAW or UNTRAINED."""
        if kind == "h":
            return self.backbone
        if kind == "z":
            z = build_projector(self.recipe.method, feature_dim(self.backbone))
            return nn.Sequential(self.backbone, self.load_part(z, "projector"))
        if kind == RAW_PIXELS:
            return nn.Sequential(
                nn.AdaptiveAvgPool2d(min(self.recipe.image_size, MAX_RAW_SIDE)), nn.Flatten()
            )
        assert kind == UNTRAINED_NETWORK, kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                self.recipe.seed
            )  # the weights that pretraining starts from (siamese.build)
            return self.freeze_part(build_backbone(self.recipe))

    def features(self, kind: str) -> FeatureSet:
        """Features of a kind of all images that can be read, computed once."""
        if kind not in self.feature_cache:
            self.feature_cache[kind] = self.extract_features(kind)
        return self.feature_cache[kind]

    def extract_features(self, kind: str) -> FeatureSet:
        network, transform = self.network(kind), eval_transform(self.recipe)
        train, test = (
            extract_features(
                network,
                images,
                transform,
                compute=self.compute,
                progress_label=f"features, {kind}",
            )
            for images in (self.train, self.test)
        )
        self.test_indices, self.unreadable = test.kept_indices, train.skipped + test.skipped
        assert self.train.labels is not None
        labels = torch.from_numpy(self.train.labels[train.kept_indices])
        return FeatureSet(
            train.matrices[0], labels, test.matrices[0], len(self.train.classes), train.kept_indices
        )


def feature_kinds(settings: Settings) -> tuple[str, ...]:
    """The features a protocol works on: those in question, and those they have to beat."""
    return (
        (settings.features, RAW_PIXELS, UNTRAINED_NETWORK)
        if settings.baselines
        else (settings.features,)
    )


def top5_classes(scores: Tensor) -> Tensor:
    """The at most five classes with the highest scores (M, classes), best first; of equal ones, the first."""
    return scores.cpu().sort(dim=1, descending=True, stable=True).indices[:, :5]


def sample_per_class(labels: np.ndarray, counts: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Positions, in order, of counts[c] images of each class c: the first ones of an order that the seed decides.

    So the draws of one seed are nested: few labels are among many.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(
        np.concatenate([order[labels[order] == c][:count] for c, count in enumerate(counts)])
    )


def split_train_test(
    source: Source, *, require_labels: bool
) -> tuple[Images, Images, dict[str, str]]:
    """The images to learn from, those to test on, and in words which they are.

    Its test split if there is one, else val, else a fifth of the training images. Raises UsageError without labels.
    """
    usable = {
        name: images
        for name, images in source.splits.items()
        if images.labels is not None or not require_labels
    }
    if not usable:
        raise UsageError(
            f"{source.name} has no labels to evaluate with; `--protocol label_free` needs none"
        )
    first = next(iter(usable))  # the labeled images of STL-10 are its val
    for name in ("test", "val"):
        if name in usable and name != first:
            return usable[first], usable[name], {"train": first, "test": name}
    rest, held = hold_out(usable[first], max(1, len(usable[first]) // 5))
    return (
        rest,
        held,
        {
            "train": f"four fifths of {first}",
            "test": f"a fifth of {first}, each class in proportion",
        },
    )
