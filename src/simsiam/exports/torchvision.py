"""Format `torchvision`: a state dict that torchvision's model of the same name loads."""

from pathlib import Path

import torch
from torch import nn
from torchvision import models

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import (
    Format,
    Network,
    is_standard_backbone,
    missing_backbone,
    split_encoder,
)
from simsiam.model.backbones import classifier_path, remove_classifier, torchvision_options
from simsiam.runs.run_folder import Run

FILE_NAME = "backbone.pth"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.pth; a head is the classifier in it.

    Args:
        network: The backbone, with a head or without.
        run: Its run.
        folder: Where to write.

    Raises:
        UsageError: torchvision has no such network.
    """
    recipe = run.recipe
    if recipe.backbone not in models.list_models(module=models) or not is_standard_backbone(recipe):
        raise missing_backbone("torchvision", recipe)
    backbone, head = split_encoder(network)
    state = dict(backbone.state_dict())
    if head is not None:
        path = classifier_path(models.get_model(recipe.backbone, weights=None))
        state |= {f"{path}.{name}": value for name, value in head.state_dict().items()}
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with open(folder / FILE_NAME, "wb") as file:
        torch.save(state, file)


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the weights into torchvision's network.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    state = torch.load(folder / FILE_NAME, weights_only=True)
    name, options = recipe.backbone, torchvision_options(recipe.backbone, recipe.image_size)
    model = models.get_model(name, weights=None, **options)
    weight = state.get(f"{classifier_path(model)}.weight")
    if weight is None:
        network = remove_classifier(model, name, recipe.image_size)
    else:
        network = models.get_model(name, weights=None, num_classes=len(weight), **options)
    network.load_state_dict(state)
    return network.eval()


FORMAT = Format(
    write,
    reload,
    f"torchvision.models.{{backbone}}({{arguments}}).load_state_dict(torch.load("
    f'"{{path}}/{FILE_NAME}"), strict=False)',
    holds="head",
)
