"""Format `huggingface`: a folder for the hub that `simsiam.load` and --init read.

timm reads it as well if it has the network.
"""

import os
import shutil
from pathlib import Path

from torch import nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.errors import WorkFailed
from simsiam.exports import safetensors, timm
from simsiam.exports.format import Format, Network, max_difference
from simsiam.model.encoder import Encoder
from simsiam.runs.compose import WEIGHT_SETTINGS
from simsiam.runs.encoder import load
from simsiam.runs.recipe_file import write_recipe
from simsiam.runs.run_folder import HEAD_FILE, ORIGIN_FILE, Run
from simsiam.utils.names import without_credentials
from simsiam.utils.read_files import open_regular


def write(network: nn.Module, run: Run, folder: Path) -> None:
    """Write the files of a run folder, and those of timm if it has the network.

    Args:
        network: The backbone or encoder.
        run: Its run.
        folder: Where to write.
    """
    write_recipe(folder, _public_recipe(run.recipe))
    backbone = network.backbone if isinstance(network, Encoder) else network
    safetensors.write(backbone, run, folder)
    for name in (HEAD_FILE, ORIGIN_FILE):
        if (run.path / name).exists():
            with open_regular(run.path / name) as file, open(folder / name, "wb") as copy:
                shutil.copyfileobj(file, copy)
    if timm.holds(network, run.recipe):
        timm.write(network, run, folder)


def _public_recipe(recipe: ResolvedRecipe) -> ResolvedRecipe:
    """Return the recipe with the last part of each path alone: folders may name people."""
    places: dict[str, object] = {"source": [*map(_last_part, recipe.source)]}
    for name in WEIGHT_SETTINGS:
        if place := getattr(recipe, name):
            places[name] = _last_part(place)
    return ResolvedRecipe.from_dict(without_credentials(recipe.to_dict() | places))


def _last_part(place: str) -> str:
    return os.path.basename(place) if os.path.isabs(place) else place


def reload(folder: Path, recipe: ResolvedRecipe) -> Network:
    """Load the folder with this package; if timm has the network, compare it with timm's.

    Args:
        folder: What `write` wrote.
        recipe: The recipe of the run.

    Raises:
        WorkFailed: The two disagree.
    """
    network = load(folder)
    if (folder / "config.json").exists():
        max_difference(network, timm.reload(folder, recipe), recipe)
    return network


def upload_to_hub(folder: Path, name: str) -> None:
    """Upload a folder to the hub: a new private repository, or a commit to an existing one.

    Args:
        folder: The export.
        name: "owner/name" of the repository.

    Raises:
        WorkFailed: The upload failed.
    """
    import huggingface_hub

    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the hub's package, its HTTP library, or the system
        reason = " ".join(str(error).split())
        raise WorkFailed(f"{folder} is written, but not pushed to {name}: {reason}") from None


FORMAT = Format(write, reload, 'simsiam.load("{path}")')
