"""Settings for fine-tuning a detector: the paper's, and short ones for small sets. Loads no torch.

Each field of `Schedule` is a flag of `simsiam transfer` and an argument of `simsiam.transfer`. The
values are those of MoCo's code (the configs of its detection folder), which the paper uses for all
entries of Table 5.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, floor, inf, log2
from typing import Literal

from simsiam.config.settings import replace_settings, setting
from simsiam.errors import UsageError, check_ranges

PYRAMID_LEVELS = 5  # levels of a feature pyramid; the last one is pooled


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The settings of one fine-tuning; the defaults are those for VOC07+12."""

    architecture: Literal["c4", "fpn"] = setting(
        "c4",
        "c4 (the paper's): RPN on conv4, RoI head of conv5 and a batch norm; fpn: feature pyramid",
    )
    steps: int = setting(24_000, "steps of SGD with momentum 0.9")
    batch_size: int = setting(16, "images in a batch, over all processes")
    lr: tuple[float, ...] = setting(
        (0.02,),
        "peak lr; of several values, the best one on validation images is used",
    )
    warmup_steps: int = setting(
        100, "steps of linear lr warmup, which starts at a thousandth of the peak lr"
    )
    decay_at: tuple[float, ...] = setting(
        (18 / 24, 22 / 24), "points at which the lr is divided by 10, as fractions of --steps"
    )
    weight_decay: float = setting(1e-4, "weight decay of all parameters except those of batch norm")
    train_sides: tuple[int, ...] = setting(
        tuple(range(480, 801, 32)),
        "shorter side of a training image in pixels, chosen at random from these",
    )
    test_side: int = setting(800, "shorter side of a test image in pixels")
    longest_side: int = setting(
        1333, "limit of the longer side of an image in pixels; larger images are scaled down"
    )
    anchors: tuple[int, ...] = setting(
        (32, 64, 128, 256, 512),
        "sides of anchor boxes in pixels, each with three aspect ratios; fpn: one side per level",
    )
    stride: int = setting(
        16,
        "stride of conv4: 16, or 8 for small objects; 8 needs --architecture c4 and a large stem",
    )
    proposals: int = setting(2000, "region proposals kept per image in training")
    test_proposals: int = setting(1000, "region proposals kept per image in testing")
    regions: int = setting(512, "regions per image that the RoI head is trained on")
    region_size: int = setting(14, "output size of RoIAlign, with c4")
    precise_bn: int = setting(
        200,
        "after training, average batch norm's statistics over this many batches; 0: keep the "
        "moving averages",
    )

    def __post_init__(self) -> None:
        check_ranges(
            self,
            steps=(1, inf),
            batch_size=(1, inf),
            lr=(0, inf),
            warmup_steps=(0, inf),
            decay_at=(0, 1),
        )
        check_ranges(
            self,
            weight_decay=(0, inf),
            train_sides=(32, 4096),
            test_side=(32, 4096),
            longest_side=(32, 8192),
        )
        check_ranges(
            self, anchors=(1, 4096), proposals=(1, inf), test_proposals=(1, inf), regions=(1, inf)
        )
        check_ranges(self, region_size=(2, 64), precise_bn=(0, inf))
        for name in ("lr", "train_sides", "anchors"):
            if not getattr(self, name):
                raise UsageError(f"{name} takes at least one value")
        if self.stride not in (8, 16):
            raise UsageError(f"stride is {self.stride}; it is 8 or 16")
        if self.architecture == "fpn" and (
            len(self.anchors) != PYRAMID_LEVELS or self.stride != 16
        ):
            raise UsageError(
                f"fpn takes {PYRAMID_LEVELS} anchors, one for each level, and no --stride"
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> "Schedule":
        """Build a schedule from the settings that differ from the defaults.

        Args:
            settings: Values by field name, as in Python, in YAML or as text.

        Returns:
            The schedule.

        Raises:
            UsageError: If a name is unknown or a value is wrong.
        """
        return replace_settings(cls, settings)

    def lr_factor(self, step: int) -> float:
        """Compute the learning rate of a step relative to the peak.

        It rises linearly from a thousandth, and is divided by 10 at each of `decay_at`.

        Args:
            step: The step, from 0.

        Returns:
            The factor, between 0 and 1.
        """
        decays = sum(step >= round(at * self.steps) for at in self.decay_at)
        rise = min(1.0, 0.001 + 0.999 * step / self.warmup_steps) if self.warmup_steps else 1.0
        return rise * 0.1**decays

    def to_dict(self) -> dict[str, object]:
        """Return the settings as plain data; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def voc0712_schedule() -> dict[str, object]:
    """Return the settings for VOC 2007 trainval + 2012 train, tested on 2007 test.

    This is the paper's text; MoCo's code trains on 2012 trainval.
    """
    return {}


def voc07_schedule() -> dict[str, object]:
    """Return the settings for VOC 2007 trainval, tested on 2007 test.

    The paper does not give the length; this is 23 epochs, as on VOC07+12.
    """
    return {"steps": 7300}


def coco_schedule() -> dict[str, object]:
    """Return the settings for COCO 2017: the 1x schedule of 90,000 steps, 12 epochs."""
    return {
        "steps": 90_000,
        "warmup_steps": 1000,
        "decay_at": (60 / 90, 80 / 90),
        "train_sides": tuple(range(640, 801, 32)),
    }


SCHEDULES = {"voc0712": voc0712_schedule, "voc07": voc07_schedule, "coco": coco_schedule}
LARGE_SET_IMAGES = 4000  # sets of at least this many images take voc07's settings
SMALL_SET_MAX_SIDE = (
    240  # pixels, shorter side of small sets' images, so that two CPU cores suffice
)


def auto_schedule(
    num_images: int,
    median_side: int,
    box_sides: tuple[float, float],
    stem: str,
    masks: bool = False,
) -> tuple[dict[str, object], str]:
    """Choose settings by the size of the set.

    A small set takes small batches of small images, anchors between the smallest and the largest
    boxes, and stride 8 if the smallest boxes cover less than two cells of 16 pixels. Detection
    takes many small regions: with few, the head hardly ever learns from rare objects
    (results/README.md, blood cells). Masks have the resolution of their region, so segmentation
    takes fewer and larger regions.

    Args:
        num_images: The number of training images.
        median_side: The median of their shorter sides in pixels.
        box_sides: The 5 % and 95 % quantiles of the boxes' sides in pixels.
        stem: "large" or "small", the stem of the ResNet.
        masks: Whether masks are learned.

    Returns:
        The settings, and the reason for them.
    """
    if num_images >= LARGE_SET_IMAGES:
        steps = max(7300, round(23 * num_images / 16))
        reason = f"{num_images:,} images: 23 epochs, as on VOC07+12"
        return voc07_schedule() | {"steps": steps}, reason
    test_side = min(median_side, SMALL_SET_MAX_SIDE)
    low, high = (max(8, end * test_side / median_side) for end in box_sides)
    powers = range(floor(log2(low) + 0.25), ceil(log2(high) - 0.25) + 1)
    settings: dict[str, object] = {
        "steps": min(max(300, 2 * num_images), 7300),
        "batch_size": 4,
        "warmup_steps": 50,
        "train_sides": (test_side,),
        "test_side": test_side,
        "longest_side": 4 * test_side,
        "anchors": tuple(2**k for k in powers)[:PYRAMID_LEVELS],
        "proposals": 250,
        "test_proposals": 100,
        "precise_bn": 30,
    }
    if masks:
        settings |= {"lr": (0.01,), "regions": 48, "region_size": 8}
    else:
        settings |= {"lr": (0.03,), "regions": 96, "region_size": 4}
    if stem == "large" and low < 32:
        settings["stride"] = 8
    return settings, (
        f"{num_images:,} images: a short schedule for two CPU cores; "
        "more --steps and a larger --test-side give better results"
    )
