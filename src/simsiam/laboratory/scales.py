"""The paper's settings at three sizes: how a cell becomes a recipe. Plain data; loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, Literal

from simsiam.config import recipes
from simsiam.config.recipes import Recipe

Overrides = Mapping[str, Any]  # settings of a recipe by name
BASE_LR, WEIGHT_DECAY = 0.05, 1e-4  # the paper's baseline (section 3)
IMAGENET_STEPS_PER_EPOCH = 1281167 // 512  # steps of the baseline's epoch on ImageNet


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A size at which experiments are repeated, and how the paper's settings map to it.

    Attributes:
        name: The name for --scale.
        dataset: The images, for people.
        source: The source of the images; None if the user has to name one.
        base: The settings of SimSiam's recipe.
        method_overrides: Settings of a method besides its row of METHODS, by the method's name, or
            by name and length in the paper, as in "byol 800".
        epochs: Epochs of each run unless lengths are compared; None takes the paper's.
        epochs_per_100: What the paper's 100 epochs become where lengths are compared.
        batch_divisor: The paper's batch sizes are divided by this.
        linear_protocol: The protocol of linear evaluation.
        num_images: The number of images that a run trains on.
        num_classes: The number of classes.
        images_per_second: A first estimate of the speed of a run with two views ...
        hardware: ... on this machine.
        mapping: How settings map, for the readers of a page.
    """

    name: str
    dataset: str
    source: str | None
    base: Overrides
    method_overrides: Mapping[str, Overrides]
    epochs: int | None
    epochs_per_100: float
    batch_divisor: int
    linear_protocol: Literal["cached", "paper", "sgd"]
    num_images: int
    num_classes: int
    images_per_second: float
    hardware: str
    mapping: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The name of the main metric."""
        return f"{self.dataset}, linear top-1 (%)"

    @property
    def chance(self) -> float:
        """The accuracy of guessing, in percent."""
        return 100 / self.num_classes

    def recipe(
        self,
        cell: Overrides,
        *,
        common: Overrides,
        epochs: int,
        user_epochs: int | None = None,
        **recipe_settings: object,
    ) -> Recipe:
        """Build the recipe of a cell.

        Settings of the cell override those of the method, which override `common`. A cell that
        sets `epochs` compares lengths of training.

        Args:
            cell: The settings of the cell, as in the paper.
            common: The settings that all cells of the experiment share.
            epochs: The epochs of the experiment's runs in the paper.
            user_epochs: What 100 epochs of the paper become; None takes the scale's.
            **recipe_settings: Settings of the recipe that are used as they are.

        Returns:
            The recipe at this scale.

        Raises:
            UsageError: If settings contradict each other.
        """
        cell = dict(cell)
        compare_lengths, paper_epochs = "epochs" in cell, cell.pop("epochs", epochs)
        method = cell.pop("method", "simsiam")
        if compare_lengths:
            per_100 = self.epochs_per_100 if user_epochs is None else user_epochs
            num_epochs = round(per_100 * paper_epochs / 100)
        else:
            num_epochs = (self.epochs or paper_epochs) if user_epochs is None else user_epochs
        own = {
            **self.method_overrides.get(method, {}),
            **self.method_overrides.get(f"{method} {paper_epochs}", {}),
        }
        recipe = Recipe().replace(**self.base).replace(method=method, **own)
        cell = {name: value for name, value in common.items() if name not in own} | cell
        for name, paper in {"base_lr": BASE_LR, "weight_decay": WEIGHT_DECAY}.items():
            if name in cell:  # relative to the baseline's
                cell[name] = float(f"{cell[name] * self.base.get(name, paper) / paper:.3g}")
        if "batch_size" in cell:
            cell["batch_size"] //= self.batch_divisor
        # The same fraction of the way between a step and an epoch, on a log scale.
        if cell.get("target_steps", 0) > 1:
            per_epoch = self.num_images // recipe.batch_size
            cell["target_steps"] = round(
                per_epoch ** (log(cell["target_steps"]) / log(IMAGENET_STEPS_PER_EPOCH))
            )
        warmup = cell.pop("warmup_epochs", recipe.method.warmup_epochs)
        if warmup:
            scaled = max(1, round(warmup * num_epochs / paper_epochs))
            warmup = min(scaled, max(num_epochs, 1) - 1)
        return recipe.replace(
            **cell, epochs=max(num_epochs, 1), warmup_epochs=warmup, **recipe_settings
        )


# The paper's default (section 4.4); ours, and that of the authors' code, has no affine parameters.
OUTPUT_AFFINE = {"output_bn_affine": True}
LARGE_BATCH = {"batch_size": 4096}  # for other methods (Table 4)

TINY_MOCO = {
    "equal_terms": True, "base_lr": 0.7, "dim": 128, "proj_hidden": 512, "queue": 1024,
    "target_decay": 0.99, "head_bn": ("proj_hidden", "proj_out"),
}  # fmt: skip

TINY = Scale(
    name="tiny",
    dataset="shapes",
    source="shapes",
    base=recipes.shapes_recipe() | {"weight_decay": 1e-4, "knn_every": 3, "log_every": 5},
    method_overrides={
        "simsiam": OUTPUT_AFFINE,
        "byol": {
            "equal_terms": True, "base_lr": 0.7, "dim": 256, "proj_hidden": 512, "pred_dim": 512,
        },
        "simclr": {"equal_terms": True, "base_lr": 0.7, "dim": 128, "proj_hidden": 512, "tau": 0.5},
        "moco_v2": TINY_MOCO,
        "moco_v2_plus": TINY_MOCO,
        "swav": {
            "equal_terms": True, "base_lr": 0.7, "dim": 128, "proj_hidden": 512, "prototypes": 128,
            "freeze_prototypes": 31,
            "sinkhorn_epsilon": 0.02,  # with 0.05 most losses stay at log 128
        },
        "supervised": {"equal_terms": True, "dim": 10},
    },
    epochs=14,
    epochs_per_100=2,
    batch_divisor=4,
    linear_protocol="cached",
    num_images=4000,
    num_classes=10,
    images_per_second=830.0,
    hardware="two cores of a Xeon with AMX",
    mapping=(
        "ResNet-10 of width 16, 32 px, crops of 40 to 100 % of the area, no color and no blur",
        "batches are a quarter of the paper's: 16 to 1024",
        "14 epochs for each run; where lengths are compared (tables 4 and C.1) 100 epochs become "
        "2, 800 become 16",
        "learning rates and weight decays are the paper's relative to its baseline, times 14 and "
        "times 1",
        "d and the predictor's hidden width as in the paper; hidden projector layers 512 wide, one "
        "fewer",
        "alternation every 3 and 8 steps for 10 and 100: as far between a step and an epoch, on a "
        "log scale",
        "other methods on SimSiam's views, batch and SGD, with losses of their own scale: BYOL's "
        "is 4 times and MoCo v2+'s 2 times as large as SimSiam's, which is as if their learning "
        "rates were; MoCo v2 with a queue of 1024 and batch norm in and after the projector "
        "(without, it collapses); SwAV with 128 prototypes and Sinkhorn's epsilon 0.02 (with 0.05 "
        "its loss stays at log 128)",
    ),
)  # fmt: skip

EQUAL_TERMS = {"equal_terms": True}
CIFAR10 = Scale(
    name="cifar10",
    dataset="CIFAR-10",
    source="cifar10",
    base=recipes.cifar_recipe(),
    method_overrides={
        "simsiam": OUTPUT_AFFINE,
        "byol": EQUAL_TERMS,
        "simclr": EQUAL_TERMS | {"tau": 0.5},  # tau: SimCLR's on CIFAR-10
        "moco_v2": EQUAL_TERMS | {"queue": 4096, "target_decay": 0.99},
        "moco_v2_plus": EQUAL_TERMS | {"queue": 4096, "target_decay": 0.99},
        "swav": EQUAL_TERMS | {"prototypes": 300, "freeze_prototypes": 87},
        "supervised": EQUAL_TERMS | {"dim": 10},
    },
    epochs=800,
    epochs_per_100=100,
    batch_divisor=1,
    linear_protocol="cached",
    num_images=45000,
    num_classes=10,
    images_per_second=60.0,
    hardware="two cores of a Xeon with AMX, a rough figure; finished runs correct it",
    mapping=(
        "appendix D: ResNet-18 for 32 px, no blur, a two-layer projector, base lr 0.03, weight "
        "decay 5e-4",
        "800 epochs for each run, or --epochs N; where lengths are compared they are the paper's, "
        "or N for 100",
        "learning rates and weight decays are the paper's relative to its baseline, times 0.6 and "
        "times 5",
        "alternation every 4 and 14 steps for 10 and 100: as far between a step and an epoch, on a "
        "log scale",
        "other methods on SimSiam's views, batch and SGD (appendix D), with losses of their own "
        "scale: BYOL's is 4 times and MoCo v2+'s 2 times as large as SimSiam's, which is as if "
        "their learning rates were; tau of SimCLR 0.5, queue 4096, 300 prototypes",
    ),
)

IMAGENET = Scale(
    name="imagenet",
    dataset="ImageNet",
    source=None,
    base=recipes.imagenet_recipe(),
    method_overrides={
        "simsiam": OUTPUT_AFFINE,
        "simclr": LARGE_BATCH,
        "swav": LARGE_BATCH,
        "byol": LARGE_BATCH,
        "byol 200": {"base_lr": 0.3},  # footnote 6, as are those below
        "byol 300": {"base_lr": 0.3},
        "byol 400": {"base_lr": 0.3},
        "byol 800": {"base_lr": 0.2, "weight_decay": 1.5e-6, "target_decay": 0.996},
        "byol 1000": {"base_lr": 0.2, "weight_decay": 1.5e-6, "target_decay": 0.996},
        "moco_v2": {"batch_size": 256},
        "moco_v2_plus": {"batch_size": 256},
    },
    epochs=None,
    epochs_per_100=100,
    batch_divisor=1,
    linear_protocol="paper",
    num_images=1281167,
    num_classes=1000,
    images_per_second=137.0,  # MoCo v2, table 3: 65 hours for 200 epochs with 8 V100
    hardware="one V100 in float32",
    mapping=("as in the paper",),
)

SCALES = {scale.name: scale for scale in (TINY, CIFAR10, IMAGENET)}
