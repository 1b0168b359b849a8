"""How a detector is fine-tuned: the paper's settings and short ones for small sets, as data. Loads no torch.

A field of `Schedule` is a flag of `simsiam transfer` and an argument of `simsiam.transfer`. The values are those of
MoCo's code (configs of its detection folder), which the paper uses for all entries of Table 5.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, floor, inf, log2
from typing import Any, Literal

from simsiam.config.settings import replace_settings
from simsiam.errors import UsageError, check_ranges

PYRAMID_LEVELS = 5  # of a feature pyramid, the last one by pooling


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One fine-tuning; the defaults are VOC07+12's."""

    architecture: Literal["c4", "fpn"] = (
        "c4"  # c4 (the paper's): RPN on conv4, conv5 and a batch norm as RoI head
    )
    steps: int = 24_000  # of SGD with momentum 0.9
    batch_size: int = 16  # images
    lr: tuple[float, ...] = (
        0.02,
    )  # the peak; of several the best on val is taken, as the paper does for each method
    warmup_steps: int = 100  # in which the lr rises from a thousandth
    decay_at: tuple[float, ...] = (
        18 / 24,
        22 / 24,
    )  # shares of the steps after which the lr is a tenth
    weight_decay: float = 1e-4  # of all parameters but those of batch norms
    train_sides: tuple[int, ...] = tuple(
        range(480, 801, 32)
    )  # the shorter side of a training image is one of these
    test_side: int = 800  # and that of a test image
    longest_side: int = 1333  # of any, at most
    anchors: tuple[int, ...] = (
        32,
        64,
        128,
        256,
        512,
    )  # sides, each in three shapes; fpn: one a level
    stride: int = 16  # of conv4: 16, or 8 by dilation, for small objects (c4, and a large stem)
    proposals: int = 2000  # of an image, kept while training ...
    test_proposals: int = 1000  # ... and while testing
    regions: int = 512  # of an image that the RoI head learns from
    region_size: int = 14  # pixels a side of a region's features, before conv5 halves them (c4)
    precise_bn: int = (
        200  # batches that batch norms' averages are taken over at the end; 0 keeps the moving ones
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
                f"fpn takes {PYRAMID_LEVELS} anchors, one a level, and no stride of its own"
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Schedule":
        """The schedule with some words changed. Raises UsageError for a wrong name or value."""
        return replace_settings(cls, settings)

    def lr_factor(self, step: int) -> float:
        """Of the peak lr at a step: a linear rise from a thousandth, then a tenth from each of `decay_at` on."""
        passed = sum(step >= round(at * self.steps) for at in self.decay_at)
        rise = min(1.0, 0.001 + 0.999 * step / self.warmup_steps) if self.warmup_steps else 1.0
        return rise * 0.1**passed

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a tuple is a list."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def voc0712_schedule() -> dict[str, Any]:
    """VOC 2007 trainval + 2012 train (the paper's text; MoCo's code has 2012 trainval), tested on 2007 test."""
    return {}


def voc07_schedule() -> dict[str, Any]:
    """VOC 2007 trainval, tested on 2007 test. The paper does not say how long: as many epochs as VOC07+12, 23."""
    return {"steps": 7300}


def coco_schedule() -> dict[str, Any]:
    """COCO 2017, the 1x schedule: 90k steps, 12 epochs."""
    return {
        "steps": 90_000, "warmup_steps": 1000, "decay_at": (60 / 90, 80 / 90),
        "train_sides": tuple(range(640, 801, 32)),
    }  # fmt: skip


SCHEDULES = {"voc0712": voc0712_schedule, "voc07": voc07_schedule, "coco": coco_schedule}
LARGE_SET_IMAGES = 4000  # images from which on a set takes voc07's recipe
SMALL_SET_MAX_SIDE = (
    240  # the shorter side of a small set's images, at most: two CPU cores have to suffice
)


def auto_schedule(
    num_images: int,
    median_side: int,
    box_sides: tuple[float, float],
    stem: str,
    masks: bool = False,
) -> tuple[dict[str, Any], str]:
    """The words for a set of `count` training images with this median shorter side, and why, in words.

    A small set takes small batches of small images, anchors from the smallest to the largest of its `boxes` (the sides
    that a twentieth of them falls below and above), and stride 8 where the smallest cover less than two cells of 16.
    Boxes take many regions of an image, and small ones: with few the head hardly ever learns from rare objects
    (results/README.md: blood cells). Masks are drawn at a region's own size, and take fewer and larger ones.
    """
    if num_images >= LARGE_SET_IMAGES:
        return voc07_schedule() | {
            "steps": max(7300, round(23 * num_images / 16))
        }, f"{num_images:,} images: 23 epochs, as on VOC07+12"
    test_side = min(median_side, SMALL_SET_MAX_SIDE)
    low, high = (max(8, end * test_side / median_side) for end in box_sides)
    anchors = tuple(2**k for k in range(floor(log2(low) + 0.25), ceil(log2(high) - 0.25) + 1))[
        :PYRAMID_LEVELS
    ]
    words = {
        "steps": min(max(300, 2 * num_images), 7300), "batch_size": 4, "warmup_steps": 50,
        "train_sides": (test_side,), "test_side": test_side, "longest_side": 4 * test_side, "anchors": anchors,
        "proposals": 250, "test_proposals": 100, "precise_bn": 30,
    }  # fmt: skip
    large, small = (
        {"lr": (0.01,), "regions": 48, "region_size": 8},
        {"lr": (0.03,), "regions": 96, "region_size": 4},
    )
    words |= large if masks else small
    words |= {"stride": 8} if stem == "large" and low < 32 else {}
    return (
        words,
        f"{num_images:,} images: a short schedule for two CPU cores; more --steps and a larger side are better",
    )
