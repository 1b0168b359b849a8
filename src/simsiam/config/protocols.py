"""How a backbone is evaluated: the protocols and their settings, as data. Loads no torch.

A field of `Settings` is a flag of `simsiam evaluate` and an argument of `simsiam.evaluate`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from simsiam.config.settings import replace_settings
from simsiam.errors import UsageError, check_ranges

FROZEN_PROTOCOLS = ("knn", "linear", "few_label", "label_free")
PROTOCOLS = (*FROZEN_PROTOCOLS, "finetune")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of all protocols."""

    features: Literal["h", "z"] = "h"  # what is classified: the backbone's h, or the projector's z
    baselines: bool = (
        True  # the same for raw pixels and for the network before training (knn, cached, few_label)
    )
    k: int | None = (
        None  # knn: neighbors; 200 (Wu et al., 2018), but at most a sixth of an average class
    )
    tau: float = (
        0.1  # knn: a neighbor's vote is exp(cosine / tau); the usual monitor's, Wu et al. have 0.07
    )
    linear: Literal["cached", "paper", "sgd"] = (
        "cached"  # cached: many lr on stored features; paper: LARS on crops (A)
    )
    base_lr: float | None = (
        None  # linear: paper 0.1, times batch/256 (the authors' code; 0.02 in A); sgd 30 and 100
    )
    linear_epochs: int = 90  # linear: passes over the training images (A)
    labels: tuple[str, ...] | None = (
        None  # few_label: 1 5 10 20 a class, 1% and 10% of each; finetune: all of them
    )
    few_label_list: str | None = (
        None  # the same: a file that names the labeled training images, in place of drawing
    )
    draws: int = 5  # the same: how often labels are drawn; mean ± std of them
    finetune_epochs: int = (
        200  # finetune: passes over the labeled images: all of them, or those of labels and draws
    )
    from_scratch: bool = (
        False  # finetune: forget what was learned, and see what the labels alone give
    )
    seed: int = 0  # of what is held out or drawn, of initial weights and of the order of images

    def __post_init__(self) -> None:
        check_ranges(self, k=(1, inf), tau=(1e-6, inf), base_lr=(0, 1e30), linear_epochs=(1, inf))
        check_ranges(self, finetune_epochs=(1, inf), draws=(1, 10_000), seed=(0, 2**32 - 1))
        for label in self.labels or ():
            if not re.fullmatch(r"[1-9]\d*|\d*\.?\d+%", label):
                raise UsageError(
                    f"labels has {label!r}; it takes whole numbers, so many a class, and shares like 10%"
                )

    @classmethod
    def from_dict(cls, overrides: Mapping[str, Any]) -> "Settings":
        """The settings with some words changed. Raises UsageError for a wrong name or value."""
        return replace_settings(cls, overrides)
