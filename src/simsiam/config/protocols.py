"""The evaluation protocols and their settings, as data. Loads no torch.

A field of `Settings` is a flag of `simsiam evaluate` and a keyword argument of `simsiam.evaluate`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

from simsiam.config.settings import replace_settings, setting
from simsiam.errors import UsageError, check_ranges, truncate

# The order of results. A protocol that is not listed here comes after these.
PROTOCOL_ORDER = ("knn", "linear", "few_label", "label_free", "finetune")


def _protocol_names() -> tuple[str, ...]:
    """Names of the modules evaluation/protocol_NAME.py, found without importing them."""
    folder = Path(__file__).parents[1] / "evaluation"
    modules = [module.name for module in iter_modules([str(folder)])]
    names = {name.removeprefix("protocol_") for name in modules if name.startswith("protocol_")}
    listed = [name for name in PROTOCOL_ORDER if name in names]
    return (*listed, *sorted(names - set(listed)))


PROTOCOLS = _protocol_names()
# These leave the backbone as it is. They are the default: fine-tuning takes much longer.
FROZEN_PROTOCOLS = tuple(name for name in PROTOCOLS if name != "finetune")
# Which of these protocols use a setting. What says how long or how often something is done, `seed`
# and `baselines` may be given with any protocol.
USED_BY = {
    "features": ("knn", "linear", "few_label", "label_free"),
    "k": ("knn",),
    "tau": ("knn",),
    "linear": ("linear",),
    "base_lr": ("linear",),
    "labels": ("few_label", "finetune"),
    "few_label_list": ("few_label", "finetune"),
    "from_scratch": ("finetune",),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of all protocols."""

    features: Literal["h", "z"] = setting(
        "h",
        "features to evaluate: h, the backbone's output (if the run has a linear map, h after the "
        "map as well), or z, the projector's output",
    )
    baselines: bool = setting(
        True,
        "protocols knn, few_label, and linear (only with --linear cached): also evaluate raw "
        "pixels and the untrained network",
    )
    k: int | None = setting(
        None,
        "protocol knn: number of neighbors [200 (Wu et al., 2018), or a sixth of the mean number "
        "of images per class, if that is smaller]",
    )
    tau: float = setting(
        0.1,
        "protocol knn: temperature; a neighbor's vote has the weight exp(cosine similarity / tau). "
        "kNN measurements in pretraining use 0.1; Wu et al. (2018) use 0.07",
    )
    linear: Literal["cached", "paper", "sgd"] = setting(
        "cached",
        "protocol linear: cached: train on stored features, and choose lr and weight decay; "
        "paper: train on random crops with LARS (appendix A); sgd: the same with SGD",
    )
    base_lr: float | None = setting(
        None,
        "protocol linear, with --linear paper or sgd: peak lr for a batch of 256 [--linear "
        "paper: 0.1, from the authors' code (the text of appendix A says 0.02); --linear sgd: 30 "
        "and 100, with a result for each]",
    )
    linear_epochs: int = setting(
        90,
        "protocol linear: passes over the training images (appendix A); with --linear cached, more "
        "if the training set is small",
    )
    labels: tuple[str, ...] | None = setting(
        None,
        "protocols few_label and finetune: how many images of each class are labeled, as a number "
        "(10) or as a percentage (10%) [few_label: 1 5 10 20 1% 10%; finetune: all]",
    )
    few_label_list: str | None = setting(
        None,
        "protocols few_label and finetune: a file that lists the labeled training images; "
        "replaces the random draws",
    )
    draws: int = setting(
        5,
        "protocols few_label and finetune: number of random draws of labeled images; results are "
        "mean ± standard deviation",
    )
    finetune_epochs: int = setting(200, "protocol finetune: passes over the labeled images")
    from_scratch: bool = setting(
        False, "protocol finetune: start from random weights, for comparison"
    )
    seed: int = setting(
        0, "random seed of held-out images, draws, initial weights, and order of images"
    )

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        check_ranges(self, k=(1, inf), tau=(1e-6, inf), base_lr=(0, 1e30), linear_epochs=(1, inf))
        check_ranges(self, finetune_epochs=(1, inf), draws=(1, 10_000), seed=(0, 2**32 - 1))
        for label in self.labels or ():
            if not re.fullmatch(r"[1-9]\d*|\d*\.?\d+%", label):
                raise UsageError(
                    f"labels has {truncate(label, repr)}; it takes whole numbers (labels of each "
                    "class) and shares like 10%"
                )

    @classmethod
    def from_dict(cls, overrides: Mapping[str, object]) -> "Settings":
        """Make settings from the defaults and changes.

        Args:
            overrides: New values, by the names of fields.

        Returns:
            The settings.

        Raises:
            UsageError: An unknown name or a wrong value.
        """
        return replace_settings(cls, overrides)

    def check_effects(self, protocols: Collection[str]) -> None:
        """Refuse settings that none of the protocols uses.

        A protocol that is not listed in PROTOCOL_ORDER may use any setting.

        Args:
            protocols: The protocols that are run.

        Raises:
            UsageError: One of the settings has no effect.
        """
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if set(protocols) <= set(PROTOCOL_ORDER):
            for name in sorted(changed & USED_BY.keys()):
                if not set(USED_BY[name]) & set(protocols):
                    raise UsageError(
                        f"{name} has no effect here: it belongs to protocol "
                        f"{' and '.join(USED_BY[name])}, not to {', '.join(protocols)}"
                    )
        if "base_lr" in changed and self.linear == "cached":
            raise UsageError(
                "base_lr has no effect with linear cached, which chooses lr by itself: give linear "
                "paper or sgd too"
            )
