"""A recipe is everything that determines a run: a row of METHODS, a backbone, a source of images, and a budget.

The words are the same everywhere: a field here is a flag of `simsiam pretrain`, an argument of `simsiam.pretrain` and a
key of RUN/recipe.yaml. The named recipes below are the paper's baseline with some words changed. Loads no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import Any, Literal, get_type_hints

from typing_extensions import Self

from simsiam.config.method import BN_SPLITS, EQUAL_TERMS, SETTING_CONDITIONS, Method, Views
from simsiam.config.methods import METHODS
from simsiam.config.settings import _to_builtin_types, parse_value
from simsiam.errors import UsageError, check_ranges, unknown_name

STANDARD_SIZES = (32, 64, 96, 128, 224)  # sizes of a view that a folder's images are matched with


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of one method. None means "chosen from the images", and the run folder records what was chosen."""

    source: tuple[str, ...] = (
        "shapes",
    )  # a name, folders of images, a list, an archive, or Parquet
    method: Method = METHODS["simsiam"]
    backbone: str = "resnet50"  # resnet10 to resnet152, or any torchvision classification model
    width: int = 64  # channels of a ResNet's first stage; 64 is the standard network
    stem: Literal["small", "large"] | None = (
        None  # 3x3 without pooling up to 64 px, 7x7 with pooling above (D)
    )
    init: str | None = (
        None  # start the backbone from a run folder, a checkpoint, published weights, hf-hub:owner/name
    )
    channels: int = 3  # of an image: 3 RGB, 1 gray, 4 RGBA, or as many as NumPy and TIFF files have
    image_size: int | None = None  # side of a view in pixels
    mean: tuple[float, ...] | None = (
        None  # per channel, in 0..1; known for named sources, else measured
    )
    std: tuple[float, ...] | None = None  # likewise
    limit: int | None = None  # train on this many images, spread evenly over the source
    holdout: int | None = (
        None  # labeled images kept out of training for the kNN monitor; a tenth, at most 5000
    )
    epochs: int = 100  # passes over the training images
    steps: int | None = None  # stop after this many steps instead
    batch_size: int = 512  # images, not views; the lr is scaled with it
    seed: int = 0  # of the initialization, the order of images and every view
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto takes a GPU where there is one
    precision: Literal["auto", "bfloat16", "float32"] = (
        "auto"  # auto: bfloat16 where the device is fast at it
    )
    compile: bool = False  # torch.compile the network and the views; a minute to start, and the bits differ from eager
    sync_bn: bool = True  # several processes share batch norm's statistics (3); off, their number changes the result
    order: Literal["auto", "shuffled"] = (
        "auto"  # of images in shards: auto interleaves blocks, so each is read once
    )
    workers: int | None = None  # processes that decode images too many for memory; as many as cores
    max_unreadable: float = 0.5  # stop when more than this share of the images cannot be read
    read_timeout: float = 600.0  # seconds that a worker may take over a batch, then the run stops; 0: as long as it likes
    cache_gib: float = (
        1.0  # images of one size whose pixels fit in this many GiB stay decoded in memory
    )
    disk_cache_gib: float = (
        0.0  # keep up to so many GiB of other images decoded on disk: pays where decoding is slow
    )
    knn_every: int = 1  # epochs between measurements of the kNN monitor
    save_every: int = 100  # epochs between the checkpoints that are kept
    save_seconds: float = 60.0  # last.pt is at most this old
    log_every: int = 10  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        check_ranges(
            self,
            width=(1, inf),
            image_size=(8, 4096),
            limit=(1, inf),
            holdout=(0, inf),
            epochs=(1, inf),
        )
        check_ranges(
            self,
            steps=(1, inf),
            batch_size=(2, inf),
            seed=(0, 2**63),
            workers=(0, 1024),
            cache_gib=(0, 1e6),
        )
        check_ranges(
            self, knn_every=(1, inf), save_every=(1, inf), save_seconds=(0, inf), log_every=(1, inf)
        )
        check_ranges(
            self,
            read_timeout=(0, 1e9),
            mean=(-10, 10),
            std=(1e-6, 10),
            channels=(1, 16),
            max_unreadable=(0, 1),
        )
        check_ranges(self, disk_cache_gib=(0, 1e6))
        for name in ("mean", "std"):
            if (values := getattr(self, name)) is not None and len(values) != self.channels:
                raise UsageError(f"{name} has {len(values)} values for {self.channels} channels")
        if self.steps is None and self.method.warmup_epochs >= self.epochs:
            raise UsageError(
                f"warmup_epochs is {self.method.warmup_epochs} and epochs {self.epochs}: nothing is left"
            )
        if self.method.bn == "split" and self.batch_size < 2 * BN_SPLITS:
            raise UsageError(
                f"batch_size is {self.batch_size} and bn split: {BN_SPLITS} parts need {2 * BN_SPLITS} images"
            )

    @property
    def peak_lr(self) -> float:
        """The linear scaling rule: base_lr * batch_size / 256 (section 3)."""
        return self.method.base_lr * self.batch_size / 256

    def replace(self, **overrides: Any) -> Self:
        """A recipe with some words changed, whether of the run, of the row, or of every view's augmentation."""
        for name in overrides:
            if name not in SETTING_TYPES:
                raise unknown_name("setting", name, SETTING_TYPES)
        overrides = {
            name: parse_value(value, SETTING_TYPES[name], name) for name, value in overrides.items()
        }
        name = overrides.pop(
            "method", self.method.name
        )  # naming the row it already has keeps the cells that were moved
        if name not in METHODS and name != self.method.name:
            raise unknown_name("method", name, METHODS)
        row = self.method if name == self.method.name else METHODS[name]
        if overrides.pop("equal_terms", False):
            terms = self.method if self.method.name == "simsiam" else METHODS["simsiam"]
            row = replace(row, **{cell: vars(terms)[cell] for cell in EQUAL_TERMS})
        of_views = {f.name: overrides.pop(f.name) for f in fields(Views) if f.name in overrides}
        of_row: dict[str, Any] = {
            f.name: overrides.pop(f.name) for f in fields(Method) if f.name in overrides
        }
        row = replace(row, **of_row, views=tuple(replace(v, **of_views) for v in row.views))
        for word in of_row.keys() & SETTING_CONDITIONS.keys():
            cell, values = SETTING_CONDITIONS[word]
            if (value := vars(row)[cell]) not in values:
                raise UsageError(
                    f"{word} says nothing here: it belongs to {cell} {' or '.join(values)}, not to {value}"
                )
        return replace(self, method=row, **overrides)

    def resolve(self) -> "ResolvedRecipe":
        """Return the same recipe as one in which everything is chosen.

        Raises:
            UsageError: If the image size, the mean or the standard deviation is still None.
        """
        for name in ("image_size", "mean", "std"):
            if getattr(self, name) is None:
                raise UsageError(f"the recipe has no {name}: give --{name.replace('_', '-')}")
        return ResolvedRecipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries and scalars: what recipe.yaml and a checkpoint hold."""
        return _to_builtin_types(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of `to_dict`. Raises UsageError for an unknown key (with the nearest name) or a wrong type."""
        return parse_value(data, cls, "recipe")


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe in which nothing is left to be chosen from the images: what a run folder records.

    Attributes:
        image_size: Side of a view in pixels.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
    """

    # `field()` takes back the default None that these have in `Recipe`.
    image_size: int = field()
    mean: tuple[float, ...] = field()
    std: tuple[float, ...] = field()


def default_stem(image_size: int) -> str:
    """The stem that a ResNet takes by itself: CIFAR's for small images (D), ImageNet's for others."""
    return "small" if image_size <= 64 else "large"


def _setting_types() -> dict[str, Any]:
    """Every word of a recipe and its type; `method` is the name of a row, `equal_terms` lends it simsiam's TERMS."""
    hints = {k: v for owner in (Views, Method, Recipe) for k, v in get_type_hints(owner).items()}
    return {k: v for k, v in hints.items() if k not in ("name", "views")} | {
        "method": str,
        "equal_terms": bool,
    }


SETTING_TYPES = _setting_types()


def imagenet_recipe() -> dict[str, Any]:
    """The paper's baseline (section 3): ResNet-50, 224 px, 100 epochs, batch 512; 68.1 % linear in the paper."""
    return {"backbone": "resnet50", "image_size": 224, "knn_every": 10, "save_every": 10}


def cifar_recipe() -> dict[str, Any]:
    """Appendix D: ResNet-18 for 32 px, 800 epochs, no blur, a two-layer projector; 91.8 % linear in the paper."""
    return {
        "backbone": "resnet18", "image_size": 32, "epochs": 800, "batch_size": 512,
        "base_lr": 0.03, "weight_decay": 5e-4, "proj_layers": 2, "blur": 0.0, "knn_every": 5,
    }  # fmt: skip


def shapes_recipe() -> dict[str, Any]:
    """The demo: a small ResNet on the embedded set, two to three minutes on two cores. Gray images need no color cells.

    Few steps ask for large ones, in the predictor above all. A wide z keeps more directions than a narrow one
    (appendix B): with d = 512 some seeds end at a rank below 3 and a kNN below 80.
    """
    return {
        "backbone": "resnet10", "width": 16, "image_size": 32, "epochs": 28, "batch_size": 128, "base_lr": 0.7,
        "dim": 2048, "proj_hidden": 512, "pred_dim": 512, "proj_layers": 2, "predictor_lr_scale": 2.0,
        "crop_min": 0.4, "jitter": (0.4, 0.4, 0.0, 0.0), "gray": 0.0, "blur": 0.0, "knn_every": 4,
    }  # fmt: skip


def folder_recipe(num_images: int, median_side: int) -> dict[str, Any]:
    """A folder of photographs: the paper's baseline on a ResNet-18, sized by the images.

    A crop keeps 60 % of an image's area on average, so the largest standard size below sqrt(0.6) of the median shorter
    side asks for no upsampling; images of 96 px and less keep their own size. Images smaller than a view take larger
    crops, so that none is enlarged more than on CIFAR: 1 / sqrt(0.2) times. Few images take a smaller batch, so that an
    epoch has at least 16 steps.
    """
    wanted = median_side if median_side <= 96 else 0.6**0.5 * median_side
    size = max(s for s in STANDARD_SIZES if s <= max(wanted, 32))
    batch = next(b for b in (256, 128, 64, 32, 16) if b == 16 or num_images >= 16 * b)
    return {
        "backbone": "resnet18", "image_size": size, "epochs": 200, "batch_size": batch, "knn_every": 5,
        "blur": 0.5 if size > 32 else 0.0,  # as in appendix D
        "crop_min": round(min(0.2 * max(1.0, size / median_side) ** 2, 0.6), 2),
    }  # fmt: skip


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "imagenet": imagenet_recipe,
    "cifar": cifar_recipe,
    "shapes": shapes_recipe,
}


# Sources whose recipe is known without looking at an image.
SOURCE_RECIPES = {"shapes": "shapes", "cifar10": "cifar", "cifar100": "cifar"}


# Channel means and standard deviations of well-known training sets, in 0..1.
CHANNEL_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
