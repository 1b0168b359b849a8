"""The encoder of a run as a module, with its preprocessing: the public function `load`."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn

from simsiam.config.recipes import ResolvedRecipe
from simsiam.errors import UsageError, printable
from simsiam.model.backbones import create_backbone
from simsiam.model.encoder import Encoder
from simsiam.runs.preprocessing import eval_transform
from simsiam.runs.run_folder import BACKBONE_FILE, BACKBONE_KEY, HEAD_FILE, PATCHES_KEY, Run
from simsiam.runs.weight_files import load_metadata, load_weights, tensors_sha256
from simsiam.utils.checksums import file_sha256


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


def load(run: str | os.PathLike[str], *, head: bool = True) -> nn.Module:
    """Load the encoder of a finished run; see `simsiam.load`, which also takes weights.

    Args:
        run: The run folder.
        head: Whether to load the head; without it, the result is the backbone alone.

    Returns:
        A module in eval mode, from normalized images (N, C, H, W) to features h (N, `.dim`).

    Raises:
        UsageError: There is no backbone, or it does not fit the recipe, or the head does not fit
            the backbone.
    """
    folder = Run(run)
    path = folder.path / BACKBONE_FILE
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
    if head and folder.has_head:
        model = add_head(folder, model)
    model.transform = eval_transform(folder.recipe)  # type: ignore[assignment]
    return model.eval().requires_grad_(False)


def add_head(run: Run, backbone: nn.Module) -> Encoder:
    """Make an encoder of a run's backbone and its head.

    Args:
        run: The run, which has a head.
        backbone: The backbone, with the weights that the head was fitted for.

    Raises:
        UsageError: The head is damaged or belongs to other weights.
    """
    if not head_fits(run, backbone):
        raise _head_error(run, "it was fitted for other weights of the backbone")
    path = run.path / HEAD_FILE
    try:
        patches = load_metadata(path).get(PATCHES_KEY)
        return build_encoder(run.recipe, backbone, load_weights(path), patches)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise _head_error(run, _one_line(error)) from None


def build_encoder(
    recipe: ResolvedRecipe, backbone: nn.Module, tensors: Mapping[str, Tensor], patches: str | None
) -> Encoder:
    """Build an encoder around a backbone.

    Args:
        recipe: The recipe of the backbone.
        backbone: The backbone.
        tensors: The tensors of the other parts, as in head.safetensors.
        patches: The name of the second branch, as `create_backbone` takes it, if there is one.

    Raises:
        RuntimeError: The tensors do not fit.
        ValueError: They do not fit.
    """
    branch = None
    if patches is not None:
        branch = create_backbone(patches, image_size=recipe.image_size, channels=recipe.channels)
    head, patches_head = (_empty_linear(tensors, name) for name in ("head", "patches_head"))
    weight = 1.0 if "patches_weight" in tensors else None  # the number itself is loaded below
    encoder = Encoder(backbone, head, branch, patches_head, weight)
    own = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    encoder.load_state_dict(own | dict(tensors))
    return encoder


def _head_error(run: Run, reason: str) -> UsageError:
    path = printable(str(run.path / HEAD_FILE))
    return UsageError(f"{path} cannot be used: {reason}; delete it to use the backbone alone")


def head_fits(run: Run, backbone: nn.Module) -> bool:
    """Tell whether the head of a run was fitted for these weights of its backbone.

    Args:
        run: The run, which has a head.
        backbone: The backbone.

    Raises:
        UsageError: The file of the head is damaged.
    """
    try:
        digest = load_metadata(run.path / HEAD_FILE).get(BACKBONE_KEY)
    except (SafetensorError, ValueError) as error:  # ValueError: a wrong checksum
        raise _head_error(run, _one_line(error)) from None
    return digest == tensors_sha256(backbone.state_dict())


def _empty_linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear | None:
    """Make the layer that a weight of this name belongs to, without its numbers."""
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        return None
    if weight.ndim != 2:
        raise ValueError(f"{name}.weight has {weight.ndim} dimensions")
    return nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])


def weight_digests(run: str | os.PathLike[str]) -> dict[str, str]:
    """Compute the digests of the files that determine the features of a run.

    Args:
        run: The run folder.

    Returns:
        "backbone_sha256", and "head_sha256" if there is a head.
    """
    files = {"backbone_sha256": BACKBONE_FILE, "head_sha256": HEAD_FILE}
    paths = {name: Path(run) / file for name, file in files.items()}
    return {name: file_sha256(path) for name, path in paths.items() if path.exists()}


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
