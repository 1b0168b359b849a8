"""A recipe is everything that determines a run: a method, a backbone, a source of images, a budget.

A field of `Recipe` is a flag of `simsiam pretrain`, a keyword argument of `simsiam.pretrain` and a
key of RUN/recipe.yaml. The named recipes below are the paper's baseline with some settings changed.
Loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import Any, Literal, cast, get_type_hints

from typing_extensions import Self

from simsiam.config.keyword_settings import PretrainSettings
from simsiam.config.method import (
    BN_SPLITS,
    EQUAL_TERMS,
    Method,
    Views,
    check_setting_conditions,
)
from simsiam.config.methods import METHODS
from simsiam.config.settings import parse_value, setting, to_builtin_types
from simsiam.errors import UsageError, check_ranges, unknown_name

UNKNOWN_SOURCE = ("unknown",)  # the source of a run that was converted, not trained
CONVERTED_SOURCES = (UNKNOWN_SOURCE, ("imagenet",))  # names that cannot be opened
# What determines how an image is prepared for a backbone; weights bring their own.
PREPROCESSING_SETTINGS = ("image_size", "mean", "std", "eval_resize", "eval_interpolation")
STANDARD_SIZES = (32, 64, 96, 128, 224)  # view sizes in pixels that a folder's recipe chooses from


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of one method. None means "chosen from the images"; RUN records the choice."""

    source: tuple[str, ...] = setting(
        ("shapes",), "a name, folders of images, a list of files, an archive, or shards"
    )
    method: Method = setting(METHODS["simsiam"], "name of a method; `simsiam methods` lists them")
    backbone: str = setting(
        "resnet50",
        "a ResNet (resnet10, 18, 34, 50, 101 or 152), a classification model of torchvision, or "
        "timm/NAME for one of timm (only the network; for its weights, --init timm:NAME)",
    )
    width: int = setting(64, "with a ResNet: channels of its first stage; 64 is standard")
    stem: Literal["small", "large"] | None = setting(
        None,
        "with a ResNet: its first layers; small: 3x3 convolution; large: 7x7 convolution and "
        "pooling [small for views up to 64 px (appendix D), else large]",
    )
    init: str | None = setting(
        None,
        "initial weights, which also determine the network: a run folder, timm:NAME, "
        "hf-hub:OWNER/NAME, lite0, lite2, weights of torchvision such as "
        "ResNet50_Weights.IMAGENET1K_V2, or a file (with --backbone, "
        "unless its network is a ResNet); patches: --backbone begins at zero, beside patches "
        "learned from these images and their map, which stay as they are [random]",
    )
    teacher: str | None = setting(
        None,
        "with --target teacher: the frozen network whose features are predicted; as for --init, or "
        "patches, learned from these images",
    )
    channels: int = setting(
        3,
        "number of channels that images are decoded to: 1 (gray), 3 (RGB), 4 (RGBA); NumPy and "
        "multichannel TIFF files must have exactly N, up to 16",
    )
    image_size: int | None = setting(
        None,
        "side of an image in pixels, in evaluation and embedding, and of a view in training "
        "[chosen from the images or the backbone]",
    )
    view_ratio: float = setting(
        1.0,
        "side of a view in training, as a fraction of image_size; with less than 1 a step is "
        "faster, and objects in random crops are not larger than in whole images (FixRes; Touvron "
        "et al., 2019)",
    )
    mean: tuple[float, ...] | None = setting(
        None,
        "mean of each channel, from 0 to 1 [that of the initial weights, if known; else, for "
        "CIFAR, the published values; else measured on the images]",
    )
    std: tuple[float, ...] | None = setting(
        None,
        "standard deviation of each channel, from 0 to 1 [as for mean]",
    )
    eval_resize: int | None = setting(
        None,
        "for evaluation and embedding, not for the views of training: the shorter side of an image "
        "is resized to N pixels, then its center is cropped to image_size [the value stored with "
        "the initial weights, if their image_size is that of this run; otherwise 8/7 of image_size "
        "if image_size is above 64, else image_size]",
    )
    eval_interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear",
        "how images are resized for evaluation and embedding; --interpolation is for views",
    )
    limit: int | None = setting(None, "use only N images, evenly spaced in the source [all]")
    no_labels: bool = setting(
        False, "ignore the labels of the source: folder names are then not used as classes"
    )
    splits: tuple[str, ...] | None = setting(
        None,
        "the folder or shard of each split, as in train=A test=B; * in a name stands for any "
        "characters, and train=. uses the whole source for training [decided by names such as "
        "train and test]",
    )
    holdout: int | None = setting(
        None,
        "labeled images kept out of training, to measure kNN accuracy during training "
        "[a tenth, at most 5000; if the source has val and test splits, val is used instead]",
    )
    epochs: int = setting(100, "passes over the training images")
    steps: int | None = setting(None, "number of training steps; replaces --epochs")
    batch_size: int = setting(
        512,
        "images (not views) in a batch, over all processes; the peak lr is proportional to it "
        "(section 3)",
    )
    seed: int = setting(0, "random seed of the initial weights, the order of images and all views")
    device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto uses a GPU if there is one")
    precision: Literal["auto", "bfloat16", "float32"] = setting(
        "auto",
        "precision of training; auto: bfloat16 on devices that compute it fast, else float32",
    )
    compile: bool = setting(
        False,
        "compile network and views with torch.compile: starts a minute later, and results "
        "change by rounding errors",
    )
    sync_bn: bool = setting(
        True,
        "compute batch norm's statistics over all processes (section 3); without it, results "
        "depend on the number of processes",
    )
    order: Literal["auto", "shuffled"] = setting(
        "auto",
        "order of the images of shards; auto: shards are read in blocks, each once per epoch, "
        "and a batch mixes images of several blocks; shuffled: fully random, which reads slower",
    )
    workers: int | None = setting(
        None,
        "worker processes that decode images during training; not used for images in memory "
        "[number of CPU cores]",
    )
    max_unreadable: float = setting(
        0.5, "stop if more than this fraction of the images cannot be read"
    )
    read_timeout: float = setting(
        600.0, "stop if a worker needs more than this many seconds for a batch; 0: no limit"
    )
    cache_gib: float = setting(
        1.0,
        "if all images have the same size and fit in this many GiB, keep them decoded in memory",
    )
    disk_cache_gib: float = setting(
        0.0,
        "if images are not kept in memory, keep them decoded on disk, up to this many GiB; 0: off",
    )
    average_weights: float = setting(
        0.0,
        "keep a moving average of the weights besides, of which each step keeps at most this "
        "share, such as 0.99; monitors, evaluation, embedding and exports use the average; 0: off",
    )
    knn_every: int = setting(
        1, "epochs between two measurements of kNN accuracy and of signals that need no labels"
    )
    save_every: int = setting(100, "epochs between two checkpoints that are kept, epoch-NNNN.pt")
    save_seconds: float = setting(
        60.0, "seconds between two saves of last.pt, the checkpoint to resume from"
    )
    log_every: int = setting(10, "steps between two lines of metrics.jsonl")

    def __post_init__(self) -> None:
        """Check the ranges of all fields, and refuse settings that contradict each other."""
        count = (1, inf)
        check_ranges(self, width=count, image_size=(8, 4096), limit=count, holdout=(0, inf))
        check_ranges(self, view_ratio=(0.1, 1))
        check_ranges(self, eval_resize=(self.image_size or 8, 8192))
        check_ranges(self, epochs=count, steps=count, batch_size=(2, inf), seed=(0, 2**63))
        check_ranges(self, workers=(0, 1024), cache_gib=(0, 1e6), disk_cache_gib=(0, 1e6))
        check_ranges(self, knn_every=count, save_every=count, save_seconds=(0, inf))
        check_ranges(
            self,
            average_weights=(0, 1),
            log_every=count,
            read_timeout=(0, 1e9),
            max_unreadable=(0, 1),
        )
        check_ranges(self, mean=(-10, 10), std=(1e-6, 10), channels=(1, 16))
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None and len(values) != self.channels:
                raise UsageError(f"{name} has {len(values)} values for {self.channels} channels")
        warmup = self.method.warmup_epochs
        if self.steps is None and warmup >= self.epochs:
            raise UsageError(
                f"warmup_epochs is {warmup} and epochs {self.epochs}: "
                "epochs must be greater than warmup_epochs"
            )
        if self.method.bn == "split" and self.batch_size < self.method.min_batch:
            raise UsageError(
                f"batch_size is {self.batch_size} and bn is split: "
                f"{BN_SPLITS} parts need {self.method.min_batch} images"
            )

    @property
    def peak_lr(self) -> float:
        """The linear scaling rule: base_lr * batch_size / 256 (section 3)."""
        return self.method.base_lr * self.batch_size / 256

    @property
    def resnet_stem(self) -> str:
        """A ResNet's stem, "small" or "large"; only if image_size is chosen."""
        assert self.image_size is not None
        return self.stem or default_stem(self.image_size)

    @property
    def view_size(self) -> int:
        """Side of a full view of a training step in pixels; only if image_size is chosen."""
        assert self.image_size is not None
        return max(8, round(self.image_size * self.view_ratio))

    @property
    def small_crop_size(self) -> int:
        """Side of a small crop in pixels; only if image_size is chosen."""
        assert self.image_size is not None
        return self.method.small_crop_size or max(8, round(self.image_size * 3 / 7))

    @property
    def view_sizes(self) -> list[int]:
        """Side of each view of a training step in pixels; only if image_size is chosen."""
        full, small = self.method.full_view_count, self.method.small_crops
        return [self.view_size] * full + [self.small_crop_size] * small

    def replace(self, **overrides: object) -> Self:
        """Make a recipe with some settings changed.

        Args:
            **overrides: New values: of the recipe, of the method, or of the augmentation of every
                view. `method` is a name; if it is not the recipe's own, all settings of the method
                are replaced. `equal_terms` copies EQUAL_TERMS from simsiam.

        Returns:
            The new recipe.

        Raises:
            UsageError: An unknown name, a wrong value, or a setting that has no effect.
        """
        for name in overrides:
            if name not in SETTING_TYPES:
                raise unknown_name("setting", name, SETTING_TYPES)
        values: dict[str, Any] = {
            name: parse_value(value, SETTING_TYPES[name], name) for name, value in overrides.items()
        }
        name = values.pop("method", self.method.name)
        if name not in METHODS and name != self.method.name:
            raise unknown_name("method", name, METHODS)
        # Naming the method that the recipe has keeps the settings that were changed.
        method = self.method if name == self.method.name else METHODS[name]
        if values.pop("equal_terms", False):
            terms = self.method if self.method.name == "simsiam" else METHODS["simsiam"]
            method = replace(method, **{cell: vars(terms)[cell] for cell in EQUAL_TERMS})
        view_values = {f.name: values.pop(f.name) for f in fields(Views) if f.name in values}
        method_values = {f.name: values.pop(f.name) for f in fields(Method) if f.name in values}
        views = tuple(replace(v, **view_values) for v in method.views)
        method = replace(method, **method_values, views=views)
        check_setting_conditions(method, set(method_values))
        return replace(self, method=method, **values)

    def resolve(self) -> "ResolvedRecipe":
        """Return the same recipe as one in which everything is chosen.

        Raises:
            UsageError: If the image size, the mean or the standard deviation is still None.
        """
        for name in ("image_size", "mean", "std"):
            if getattr(self, name) is None:
                raise UsageError(f"the recipe has no {name}: give --{name.replace('_', '-')}")
        return ResolvedRecipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    def to_dict(self) -> dict[str, object]:
        """Convert to plain dictionaries, lists and scalars, as in recipe.yaml and checkpoints."""
        return cast(dict[str, object], to_builtin_types(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Make a recipe from what `to_dict` returns.

        Args:
            data: The dictionary; missing keys get their defaults.

        Returns:
            The recipe.

        Raises:
            UsageError: An unknown key (the message names the nearest) or a wrong value.
        """
        return cast(Self, parse_value(data, cls, "recipe"))


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe in which nothing is left to be chosen from the images: what a run folder records.

    Attributes:
        image_size: Side of an image in pixels.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
    """

    # `field()` takes back the default None that these have in `Recipe`.
    image_size: int = field()
    mean: tuple[float, ...] = field()
    std: tuple[float, ...] = field()


def default_stem(image_size: int) -> str:
    """Choose a ResNet's stem by the size of a view: CIFAR's for small ones (appendix D).

    Args:
        image_size: Side of a view in pixels.

    Returns:
        "small" or "large".
    """
    return "small" if image_size <= 64 else "large"


def _setting_types() -> dict[str, object]:
    """Collect the names and types of all settings of a run; `method` is given by its name."""
    hints = {k: v for owner in (Views, Method, Recipe) for k, v in get_type_hints(owner).items()}
    settings = {k: v for k, v in hints.items() if k not in ("name", "views")}
    return settings | {"method": str, "equal_terms": bool}


SETTING_TYPES = _setting_types()
# What makes up a method, without how it is optimized: who changes it starts from SimSiam.
COMPONENTS = {"method", "equal_terms", *(f.name for f in fields(Method))} - {"name", *EQUAL_TERMS}


def imagenet_recipe() -> PretrainSettings:
    """Return the paper's baseline (section 3): ResNet-50, 224 px, 100 epochs, batch 512.

    In the paper it reaches 68.1 % in linear evaluation.
    """
    return {"backbone": "resnet50", "image_size": 224, "knn_every": 10, "save_every": 10}


def cifar_recipe() -> PretrainSettings:
    """Return appendix D: ResNet-18 for 32 px, 800 epochs, no blur, a two-layer projector.

    In the paper it reaches 91.8 % in linear evaluation.
    """
    return {
        "backbone": "resnet18", "image_size": 32, "epochs": 800, "batch_size": 512,
        "base_lr": 0.03, "weight_decay": 5e-4, "proj_layers": 2, "blur": 0.0, "knn_every": 5,
    }  # fmt: skip


def shapes_recipe() -> PretrainSettings:
    """Return the recipe of the demo: a small ResNet on the built-in data set `shapes`.

    It takes two to three minutes on two cores. Gray images need no changes of color. Few steps
    require a large lr, most of all for the predictor. A wide z keeps more directions than a narrow
    one (appendix B): with d = 512 some seeds end at a rank below 3 and a kNN accuracy below 80 %.
    The weight decay is that of appendix D; results/plateau compares it with that of section 3.
    """
    return {
        "backbone": "resnet10", "width": 16, "image_size": 32, "epochs": 28, "batch_size": 128,
        "base_lr": 0.7, "weight_decay": 5e-4, "dim": 2048, "proj_hidden": 512, "pred_dim": 512,
        "proj_layers": 2, "predictor_lr_scale": 2.0, "crop_min": 0.4,
        "jitter": (0.4, 0.4, 0.0, 0.0), "gray": 0.0, "blur": 0.0, "knn_every": 4,
    }  # fmt: skip


def folder_recipe(num_images: int, median_side: int) -> PretrainSettings:
    """Choose the recipe of a folder of photographs: the baseline with a ResNet-18.

    A crop keeps 60 % of an image's area on average, so the largest standard size below sqrt(0.6) of
    the median shorter side needs no upsampling; images of 96 px and less keep their own size.
    Images smaller than a view get larger crops, so that none is enlarged more than on CIFAR-10:
    1 / sqrt(0.2) times. Few images get a smaller batch, so that an epoch has at least 16 steps.

    Args:
        num_images: Number of training images.
        median_side: Median of their shorter sides in pixels.

    Returns:
        The settings that differ from the baseline.
    """
    target_size = median_side if median_side <= 96 else 0.6**0.5 * median_side
    size = max(s for s in STANDARD_SIZES if s <= max(target_size, 32))
    batch = next(b for b in (256, 128, 64, 32, 16) if b == 16 or num_images >= 16 * b)
    return {
        "backbone": "resnet18", "image_size": size, "epochs": 200, "batch_size": batch,
        "knn_every": 5, "blur": 0.5 if size > 32 else 0.0,  # as in appendix D
        "crop_min": round(min(0.2 * max(1.0, size / median_side) ** 2, 0.6), 2),
    }  # fmt: skip


def sprint_recipe(batch_size: int, image_size: int) -> PretrainSettings:
    """Return what the recipe `sprint` changes in the recipe of a source, to learn fast.

    It is SimCLR with SimSiam's optimizer and augmentations; of images of 32 px it has smaller
    views. It was found on CIFAR-10 by `benchmarks/sprint.py`, for few steps from random weights;
    results/sprint compares it with SimSiam on other images.

    Args:
        batch_size: That of the recipe that is changed.
        image_size: Side of its images in pixels.

    Returns:
        The settings that differ.
    """
    return {
        "method": "simclr", "equal_terms": True, "dim": 128, "proj_layers": 2, "tau": 0.2,
        "batch_size": min(batch_size, 128), "base_lr": 0.4, "weight_decay": 5e-4,
        "view_ratio": 0.75 if image_size <= 32 else 1.0,
    }  # fmt: skip


RECIPES: dict[str, Callable[[], PretrainSettings]] = {
    "imagenet": imagenet_recipe,
    "cifar": cifar_recipe,
    "shapes": shapes_recipe,
}
SPRINT = "sprint"  # the name of the recipe that changes the one of the source
RECIPE_NAMES = (*RECIPES, SPRINT)


# Sources whose recipe does not depend on their images.
SOURCE_RECIPES = {"shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}


# Mean and standard deviation of each channel of well-known training sets, from 0 to 1.
CHANNEL_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
