"""What a protocol is given, a frozen network and its features of a source, and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from simsiam.config.protocols import Settings
from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.images import Images, hold_out
from simsiam.errors import UsageError, unknown_name
from simsiam.model.backbones import feature_dim
from simsiam.model.encoder import Encoder
from simsiam.model.heads import build_projector
from simsiam.model.patches import ClosedFormStart
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features, standardization_stats
from simsiam.runs.encoder import (
    add_head,
    build_backbone,
    eval_transform,
    head_fits,
    weights_sha256,
)
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import Source
from simsiam.training.prepare import prepare_data

# Kinds of features of the whole encoder: with a map alone, and joined with those of patches.
WITH_HEAD, WITH_PATCHES = "h after the map", "h beside patches"
# Kinds of features that the features of a good backbone must beat.
RAW_PIXELS, UNTRAINED_NETWORK = "raw pixels", "untrained network"
STANDARDIZATION = "mean 0 and variance 1 / d over all training images, labeled or not"
MAX_RAW_SIDE = 32  # pixels; raw pixels are averaged down to at most this side


class FeatureSet(NamedTuple):
    """Features of the training and of the test images that could be read, on the CPU.

    Attributes:
        train_features: (N, d) float32.
        train_labels: (N,) int64.
        test_features: (M, d) float32.
        classes: The number of classes.
        train_indices: (N,) int64, the positions of the N images among all training images.
    """

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    classes: int
    train_indices: np.ndarray

    def standardize(self) -> "FeatureSet":
        """Return features of mean 0 and variance 1 / d over the training images.

        Then one setting of a classifier fits networks of all widths and scales.
        """
        mean, scale = standardization_stats(self.train_features)
        return self._replace(
            train_features=(self.train_features - mean) / scale,
            test_features=(self.test_features - mean) / scale,
        )

    @torch.no_grad()
    def apply(self, network: nn.Module, device: torch.device) -> "FeatureSet":
        """Return the features that a network computes from these.

        Args:
            network: The network, from (N, d) to (N, e).
            device: Where it is.
        """
        return self._replace(
            train_features=network(self.train_features.to(device)).cpu(),
            test_features=network(self.test_features.to(device)).cpu(),
        )


@dataclass(frozen=True, kw_only=True)
class ProtocolResult:
    """One result of a protocol: predicted classes of the M test images, or metrics.

    Attributes:
        name: The parameters in short, for people.
        features: The kind of features.
        parameters: Everything that was set.
        selected: Everything that was chosen, on training images alone.
        predictions: For each draw of labels, the most probable classes of each test image, the most
            probable first: (M, at most 5) int64.
        metrics: Named numbers, of a protocol that needs no test labels or scores itself.
    """

    name: str
    features: str
    parameters: dict[str, object]
    selected: dict[str, object] = field(default_factory=dict)
    predictions: Sequence[Tensor] = ()
    metrics: dict[str, object] = field(default_factory=dict)


class FrozenNetwork:
    """A run's network at a checkpoint, and its features of training and test images.

    Args:
        run: The run.
        checkpoint: The name of the checkpoint.
        train: The training images; labeled, unless no protocol needs labels.
        test: The test images, without labels.
        compute: Where to compute, and in which precision.

    Attributes:
        step: The step of the checkpoint.
        backbone: The backbone, in eval mode and without gradients.
        encoder: The backbone with the run's head; None if there is none for these weights.
        backbone_sha256: The hash of its weights.
        test_indices: (M,) int64, the positions of the test images that features were computed of.
        unreadable: Key and reason of each image that could not be read.

    Raises:
        UsageError: If there is no such checkpoint, or it does not fit the recipe.
    """

    def __init__(self, run: Run, checkpoint: str, train: Images, test: Images, *, compute: Compute):
        names = sorted(path.stem for path in (run.path / "checkpoints").glob("*.pt"))
        if not names:
            raise UsageError(
                f"{run.path} has no checkpoint: `simsiam resume {run.path}` trains the run"
            )
        state = run.checkpoint(checkpoint) if checkpoint in names else None
        if state is None:
            raise unknown_name("checkpoint", checkpoint, names)
        assert test.labels is None, "a protocol is not given test labels"
        self.recipe, self.checkpoint = run.recipe, checkpoint
        self.step, self.weights = state["step"], state["model"]
        self.train, self.test, self.compute = train, test, compute
        self.backbone = self._load_part(build_backbone(self.recipe), "backbone")
        self.backbone_sha256 = weights_sha256(self.backbone)
        self.encoder: Encoder | None = None
        if run.has_head and head_fits(run, self.backbone):
            self.encoder = add_head(run, self.backbone)
            self._freeze(self.encoder)
        self.test_indices: np.ndarray = np.arange(len(test))
        self.unreadable: list[tuple[str, str]] = []
        self._features: dict[str, FeatureSet] = {}

    def _load_part(self, part: nn.Module, name: str) -> nn.Module:
        """Load the checkpoint's weights into a part of the network, and freeze it."""
        prefix = f"{name}."
        weights = {
            key.removeprefix(prefix): tensor
            for key, tensor in self.weights.items()
            if key.startswith(prefix)
        }
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UsageError(
                f"checkpoint {self.checkpoint!r} does not fit the recipe: {reason}"
            ) from None
        return self._freeze(part)

    def _freeze(self, part: nn.Module) -> nn.Module:
        return self.compute.place(part.eval().requires_grad_(False))

    @property
    def encoder_kind(self) -> str | None:
        """WITH_HEAD or WITH_PATCHES, the kind of the encoder's features; None without one."""
        if self.encoder is None:
            return None
        return WITH_HEAD if self.encoder.patches is None else WITH_PATCHES

    def network(self, kind: str) -> nn.Module:
        """Build the network that computes a kind of features.

        Args:
            kind: "h", "z", that of the encoder, RAW_PIXELS or UNTRAINED_NETWORK.

        Returns:
            A module: normalized images (N, C, size, size) to features (N, d).
        """
        if kind == "h":
            return self.backbone
        if kind == self.encoder_kind and self.encoder is not None:
            return self.encoder
        if kind == "z":
            projector = build_projector(self.recipe.method, feature_dim(self.backbone))
            return nn.Sequential(self.backbone, self._load_part(projector, "projector"))
        if kind == RAW_PIXELS:
            side = min(self.recipe.image_size, MAX_RAW_SIDE)
            return nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
        assert kind == UNTRAINED_NETWORK, kind
        with torch.random.fork_rng(devices=[]):
            # The weights that pretraining starts from: model.siamese builds the backbone first.
            torch.manual_seed(self.recipe.seed)
            untrained = build_backbone(self.recipe)
        if isinstance(untrained, ClosedFormStart):
            untrained.copy_fixed(self.backbone)
        return self._freeze(untrained)

    def features(self, kind: str) -> FeatureSet:
        """Compute the features of all images that can be read, once for each kind.

        Args:
            kind: "h", "z", that of the encoder, RAW_PIXELS or UNTRAINED_NETWORK.

        Returns:
            The features and the training labels.

        Raises:
            WorkFailed: If no image can be read.
        """
        if kind not in self._features:
            self._features[kind] = self._extract(kind)
        return self._features[kind]

    def _extract(self, kind: str) -> FeatureSet:
        if kind == WITH_HEAD and self.encoder is not None:
            assert self.encoder.head is not None
            return self.features("h").apply(self.encoder.head, self.compute.device)
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


def feature_kinds(
    frozen: FrozenNetwork, settings: Settings, *, baselines: bool = True
) -> tuple[str, ...]:
    """List the kinds of features to evaluate: those that were asked for, and the baselines.

    Args:
        frozen: The network. If it has a head, h is also evaluated with it.
        settings: `features` and `baselines` are used.
        baselines: Whether the protocol evaluates baselines at all.

    Returns:
        The kinds.
    """
    encoder = (frozen.encoder_kind,) if settings.features == "h" and frozen.encoder_kind else ()
    others = (RAW_PIXELS, UNTRAINED_NETWORK) if baselines and settings.baselines else ()
    return (settings.features, *encoder, *others)


def top5_classes(scores: Tensor) -> Tensor:
    """Sort classes by score and keep the first five; of equal scores, the first class wins.

    Args:
        scores: (M, classes).

    Returns:
        (M, min(5, classes)) int64 on the CPU, the class with the highest score first.
    """
    return scores.cpu().sort(dim=1, descending=True, stable=True).indices[:, :5]


def sample_per_class(labels: np.ndarray, counts: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """Draw a number of images of each class.

    The draws of one seed are nested: a larger draw contains the smaller ones.

    Args:
        labels: (N,) int64.
        counts: (classes,) int, how many images of each class to draw.
        seed: The seed of the order from which the first images of each class are taken.

    Returns:
        Positions of the drawn images, sorted.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(
        np.concatenate([order[labels[order] == c][:count] for c, count in enumerate(counts)])
    )


def split_train_test(
    source: Source, *, require_labels: bool
) -> tuple[Images, Images, dict[str, str]]:
    """Choose the images to learn from and the images to test on.

    Training images are the first split (with labels, if they are required). Test images are the
    test split if there is one, else the val split, else a fifth of the training images, which are
    then not trained on.

    Args:
        source: The images.
        require_labels: Whether to use only splits with labels.

    Returns:
        Training images, test images, and a description of both under "train" and "test".

    Raises:
        UsageError: If labels are required and the source has none.
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
    first = next(iter(usable))  # of STL-10 it is val, whose images are labeled
    for name in ("test", "val"):
        if name in usable and name != first:
            return usable[first], usable[name], {"train": first, "test": name}
    if len(usable[first]) < 2:
        raise UsageError(f"{source.name} has one image: evaluation compares at least two")
    train, test = hold_out(usable[first], max(1, len(usable[first]) // 5))
    description = {
        "train": f"four fifths of {first}",
        "test": f"a fifth of {first}, each class in proportion",
    }
    return train, test, description


def split_beside_training(
    source: Source, recipe: ResolvedRecipe, checkpoint: str
) -> tuple[Images, Images, dict[str, str]]:
    """Choose labeled images of the source that a run was trained on, as `split_train_test` does.

    If there is no other split to test on, a run that was trained with labels is tested on the
    images that training held out. The description says how many test images chose the checkpoint
    `best`.

    Args:
        source: The images.
        recipe: The recipe of the run.
        checkpoint: The name of the checkpoint.

    Returns:
        Training images, test images, and a description of both under "train" and "test".

    Raises:
        UsageError: If the source has no labels, or training held out no image.
    """
    train, test, description = split_train_test(source, require_labels=True)
    name = description["test"]
    trained_on = recipe.method.target == "labels" and name not in source.splits
    if not trained_on and (name == "test" or checkpoint != "best"):
        return train, test, description
    held_out = prepare_data(replace(recipe, disk_cache_gib=0.0), source).held_out
    held_out_keys = set(() if held_out is None else held_out.keys)
    if trained_on:
        if not held_out_keys:
            raise UsageError(
                f"the run was trained with the labels of all images of {source.name}: to measure "
                "its accuracy, name a SOURCE with other labeled images"
            )
        is_test = np.array([key in held_out_keys for key in source.train.keys])
        train, test = source.train.take(~is_test), source.train.take(is_test)
        description = {
            "train": "train without the test images",
            "test": "the images of train that training held out",
        }
    if checkpoint == "best" and (count := len(held_out_keys.intersection(test.keys))):
        description["test"] += f" ({count} of its {len(test)} images chose the checkpoint)"
    return train, test, description
