"""Format `safetensors`: the weights, with the preprocessing in the metadata."""

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.exports.format import Format, Network
from simsiam.model.encoder import Encoder
from simsiam.runs.encoder import build_backbone, build_encoder
from simsiam.runs.preprocessing import weights_metadata
from simsiam.runs.run_folder import HEAD_FILE, PATCHES_KEY, Run
from simsiam.runs.weight_files import load_metadata, save_weights

FILE_NAME = "backbone.safetensors"


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write backbone.safetensors, with head.* and the second branch in it where there are any.

    Args:
        network: The backbone or encoder.
        run: Its run.
        folder: Where to write.
    """
    metadata = weights_metadata(run.recipe)
    state = network.state_dict()
    if isinstance(network, Encoder):
        state = network.backbone.state_dict() | network.head_state()
        if patches := load_metadata(run.path / HEAD_FILE).get(PATCHES_KEY):
            metadata[PATCHES_KEY] = patches
    save_weights(state, folder / FILE_NAME, metadata)


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the weights into a new network of this package.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.
    """
    path = folder / FILE_NAME
    state, backbone = load_file(path), build_backbone(recipe)
    names = backbone.state_dict().keys()
    backbone.load_state_dict({name: state[name] for name in names})
    rest = {name: tensor for name, tensor in state.items() if name not in names}
    if not rest:
        return backbone.eval()
    return build_encoder(recipe, backbone, rest, load_metadata(path).get(PATCHES_KEY)).eval()


FORMAT = Format(write, reload, f'safetensors.torch.load_file("{{path}}/{FILE_NAME}")')
