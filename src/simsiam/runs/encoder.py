"""The backbone of a run as a module, with its preprocessing: the public function `load`."""

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
    """Make the preprocessing that belongs to the backbone of a run.

    Args:
        recipe: The recipe of the run.
    """
    return Transform(size=recipe.image_size, mean=recipe.mean, std=recipe.std)


def build_backbone(recipe: ResolvedRecipe) -> nn.Module:
    """Build the backbone of a recipe, freshly initialized.

    Args:
        recipe: The recipe.
    """
    return create_backbone(
        recipe.backbone,
        image_size=recipe.image_size,
        width=recipe.width,
        stem=recipe.stem,
        channels=recipe.channels,
    )


def load_init_weights(model: nn.Module, recipe: ResolvedRecipe) -> None:
    """Load the weights that the setting `init` names into a backbone.

    Args:
        model: The backbone.
        recipe: The recipe.

    Raises:
        UsageError: They do not fit exactly.
    """
    weights = load_backbone_weights(recipe.init or "", recipe.backbone)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"init {recipe.init} does not fit {recipe.backbone}: {_one_line(error)}"
        ) from None


def load(run: str | os.PathLike[str]) -> nn.Module:
    """Load the backbone of a finished run.

    Args:
        run: The run folder.

    Returns:
        A module in eval mode, from normalized images (N, C, H, W) to features h (N, `.dim`). Its
        attribute `.transform` turns PIL images into such a batch.

    Raises:
        UsageError: There is no backbone, or it does not fit the recipe.
    """
    folder = Run(run)
    path = folder.path / "backbone.safetensors"
    if not path.exists():
        raise UsageError(
            f"{folder.path} has no backbone yet: `simsiam resume {folder.path}` finishes the run"
        )
    model = build_backbone(folder.recipe)
    try:
        model.load_state_dict(load_weights(path))
    except (SafetensorError, RuntimeError, ValueError) as error:
        # ValueError is raised by mnasnet itself, and by a wrong checksum.
        raise UsageError(f"{path} does not fit the recipe: {_one_line(error)}") from None
    model.transform = eval_transform(folder.recipe)  # type: ignore[assignment]
    return model.eval()


def weights_sha256(network: nn.Module) -> str:
    """Compute a digest that changes with any bit of the parameters and buffers.

    Args:
        network: Any module.

    Returns:
        sha256 in hexadecimal digits.
    """
    digest = sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
