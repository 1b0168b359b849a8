"""Where the weights of a detector's backbone come from, and the preprocessing that they need."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from simsiam.detection.detector import build_detector
from simsiam.detection.schedules import Schedule
from simsiam.errors import UsageError
from simsiam.model.backbones import RESNETS
from simsiam.runs.encoder import build_backbone, load, weights_sha256
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import known_preprocessing, left_out_head, open_weights


class Initialization:
    """The origin of a backbone's weights.

    Args:
        run: The run whose backbone is used.
        init: Other weights, which bring their network: a run folder, a checkpoint or published
            weights.
        from_scratch: Whether to start from random weights.
        backbone: The network of a checkpoint that is no ResNet's.

    Attributes:
        recipe: The recipe of the network.
        mean: The mean of each channel that the weights were trained with.
        std: The standard deviation of each channel.
        network: The backbone and its width.
        kind: "scratch", "init" or "run".
        description: The origin under "from", and the hash of pretrained weights.
        notes: Lines about the weights.

    Raises:
        UsageError: If the backbone is not a ResNet, or the weights cannot be used.
    """

    def __init__(self, run: Run, init: str | None, from_scratch: bool, backbone: str | None = None):
        self.folder = open_weights(init, backbone=backbone) if init else run.path
        self.recipe, self.from_scratch = Run(self.folder).recipe, from_scratch
        if self.recipe.backbone not in RESNETS:
            raise UsageError(
                f"the backbone of {init or run.path} is {self.recipe.backbone}; "
                f"a detector is built on one of {', '.join(RESNETS)}"
            )
        if self.recipe.channels != run.recipe.channels:
            raise UsageError(
                f"the weights {init} are for {self.recipe.channels} channels, and {run.path} has "
                f"images with {run.recipe.channels}"
            )
        known = known_preprocessing(self.folder)
        self.mean, self.std = (
            cast(Sequence[float], known.get(name, getattr(run.recipe, name)))
            for name in ("mean", "std")
        )
        self.network = f"{self.recipe.backbone}, width {self.recipe.width}"
        self.kind = "scratch" if from_scratch else "init" if init else "run"
        origin = "random weights" if from_scratch else init or "the run's backbone"
        self.description = {"from": origin}
        self.notes = [] if from_scratch else left_out_head(self.folder)
        if not from_scratch:
            self.description["backbone_sha256"] = weights_sha256(self.build_backbone())[:16]

    def build_backbone(self) -> nn.Module:
        """Build the backbone with these weights, all of them trained."""
        if self.from_scratch:
            return build_backbone(self.recipe)
        return load(self.folder, head=False).requires_grad_(True)

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
