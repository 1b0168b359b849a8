"""Format `torchvision`: a state dict that torchvision's model of the same name loads."""

from pathlib import Path

import torch
from torch import nn
from torchvision import models

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import Format, Network, is_standard_backbone, missing_backbone
from simsiam.model.backbones import remove_classifier
from simsiam.runs.run_folder import Run

FILE_NAME = "backbone.pth"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.pth.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.

    Raises:
        UsageError: torchvision has no such network.
    """
    recipe = run.recipe
    if recipe.backbone not in models.list_models(module=models) or not is_standard_backbone(recipe):
        raise missing_backbone("torchvision", recipe)
    state = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    with open(folder / FILE_NAME, "wb") as file:
        torch.save(state, file)


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the weights into torchvision's network.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    model = models.get_model(recipe.backbone, weights=None)
    network = remove_classifier(model, recipe.backbone, recipe.image_size).eval()
    network.load_state_dict(torch.load(folder / FILE_NAME, weights_only=True))
    return network


FORMAT = Format(
    write,
    reload,
    f'torchvision.models.{{backbone}}().load_state_dict(torch.load("{{path}}/{FILE_NAME}"), '
    "strict=False)",
)
