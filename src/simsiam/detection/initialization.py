"""Where the weights of a detector's backbone come from, and the preprocessing that they need."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from simsiam.detection.detector import build_detector
from simsiam.detection.schedules import Schedule
from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS
from simsiam.runs.checkpoints.convert import sibling_recipe_settings
from simsiam.runs.checkpoints.published_weights import resolve_checkpoint
from simsiam.runs.encoder import build_backbone, load, load_init_weights, weights_sha256
from simsiam.runs.run_folder import HEAD_FILE, Run


class Initialization:
    """The origin of a backbone's weights.

    Args:
        run: The run whose network is used.
        init: Other weights for this network: a run folder, a checkpoint or published weights.
        from_scratch: Whether to start from random weights.

    Attributes:
        mean: The mean of each channel that the weights were trained with.
        std: The standard deviation of each channel.
        network: The backbone and its width.
        kind: "scratch", "init" or "run".
        description: The origin under "from", and the hash of pretrained weights.
        note: A line about the weights, or "".

    Raises:
        UsageError: If the backbone is not a ResNet, or the weights do not fit.
    """

    def __init__(self, run: Run, init: str | None, from_scratch: bool):
        self.run, self.recipe, self.init, self.from_scratch = run, run.recipe, init, from_scratch
        if self.recipe.backbone not in RESNETS:
            raise UsageError(
                f"the backbone of {run.path} is {self.recipe.backbone}; "
                f"a detector is built on one of {', '.join(RESNETS)}"
            )
        self.mean: Sequence[float] = self.recipe.mean
        self.std: Sequence[float] = self.recipe.std
        self.network = f"{self.recipe.backbone}, width {self.recipe.width}"
        self.kind = "scratch" if from_scratch else "init" if init else "run"
        origin = "random weights" if from_scratch else init or "the run's backbone"
        self.description = {"from": origin}
        uses_run = self.kind == "run" and run.has_head
        self.note = f"{HEAD_FILE} is left out: a detector uses the backbone alone" * uses_run
        if init:
            path, release = rank_zero_only(resolve_checkpoint)(init)
            settings: Mapping[str, Any] = (
                release.settings if release else sibling_recipe_settings(path)
            )
            self.mean = settings.get("mean", self.mean)
            self.std = settings.get("std", self.std)
        if not from_scratch:
            self.description["backbone_sha256"] = weights_sha256(self.build_backbone())[:16]

    def build_backbone(self) -> nn.Module:
        """Build the backbone with these weights."""
        if self.init:
            backbone = build_backbone(self.recipe)
            load_init_weights(backbone, replace(self.recipe, init=self.init))
            return backbone
        return build_backbone(self.recipe) if self.from_scratch else load(self.run.path, head=False)

    def build_model(
        self, num_classes: int, schedule: Schedule, *, masks: bool, seed: int
    ) -> GeneralizedRCNN:
        """Build the detector.

        New weights depend on the seed alone, so they are the same for every origin of the backbone.

        Args:
            num_classes: The number of classes without the background.
            schedule: The architecture of the detector.
            masks: Whether to predict masks.
            seed: The seed of new weights.

        Returns:
            The detector, before any fine-tuning.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = self.build_backbone()
            torch.manual_seed(seed + 1)
            return build_detector(
                backbone, num_classes, schedule, mean=self.mean, std=self.std, masks=masks
            )
