"""A run's backbone and the preprocessing that belongs to it."""

import os
from hashlib import sha256

from safetensors import SafetensorError
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.data.transform import Transform
from simsiam.errors import UsageError
from simsiam.model.backbones import create_backbone
from simsiam.runs.foreign_checkpoints import load_backbone_weights
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import load_weights


def eval_transform(recipe: ResolvedRecipe) -> Transform:
    """The preprocessing that belongs to a run's backbone."""
    return Transform(size=recipe.image_size, mean=recipe.mean, std=recipe.std)


def build_backbone(recipe: ResolvedRecipe) -> nn.Module:
    """The recipe's backbone, freshly initialized."""
    size, name = recipe.image_size, recipe.backbone
    return create_backbone(
        name, image_size=size, width=recipe.width, stem=recipe.stem, channels=recipe.channels
    )


def load_init_weights(model: nn.Module, recipe: ResolvedRecipe) -> None:
    """Give a backbone the weights that `init` names, strictly; raises UsageError where they do not fit."""
    weights = load_backbone_weights(recipe.init or "", recipe.backbone)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"init {recipe.init} does not fit {recipe.backbone}: {reason}") from None


def load(run: str | os.PathLike[str]) -> nn.Module:
    """The backbone of a run in eval mode: normalized images (N, 3, H, W) in, features h (N, `.dim`) out.

    `.transform` turns PIL images into what it expects. Raises UsageError where there is no finished backbone.
    """
    folder = Run(run)
    weights = folder.path / "backbone.safetensors"
    if not weights.exists():
        raise UsageError(
            f"{folder.path} has no backbone yet: `simsiam resume {folder.path}` finishes the run"
        )
    model = build_backbone(folder.recipe)
    try:
        model.load_state_dict(load_weights(weights))
    except (
        SafetensorError,
        RuntimeError,
        ValueError,
    ) as error:  # ValueError: mnasnet's own, and Damaged
        raise UsageError(
            f"{weights} does not fit the recipe: {' '.join(str(error).split())[:160]}"
        ) from None
    model.transform = eval_transform(folder.recipe)  # type: ignore[assignment]
    return model.eval()


def weights_sha256(network: nn.Module) -> str:
    """What changes when any bit of a parameter or of a batch norm's statistics does."""
    digest = sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
