"""Format `safetensors`: the weights, with the preprocessing in the metadata."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import Format, Network, preprocessing_config
from simsiam.runs.encoder import build_backbone
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import save_weights

FILE_NAME = "backbone.safetensors"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.safetensors.

    Args:
        network: The backbone.
        run: Its run.
        folder: Where to write.
    """
    metadata = {
        "backbone": run.recipe.backbone,
        "preprocessing": json.dumps(preprocessing_config(run.recipe)),
    }
    save_weights(network.state_dict(), folder / FILE_NAME, metadata)


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the weights into a new network of this package.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    network = build_backbone(recipe).eval()
    network.load_state_dict(load_file(folder / FILE_NAME))
    return network


FORMAT = Format(write, reload, f'safetensors.torch.load_file("{{path}}/{FILE_NAME}")')
