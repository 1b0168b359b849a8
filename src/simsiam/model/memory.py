"""The memory of a training step, computed before it runs.

Tensors on the `meta` device have shapes and no data, so the model runs there without memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from simsiam.config.recipes import ResolvedRecipe
from simsiam.distributed.process_group import world_size
from simsiam.errors import WorkFailed
from simsiam.model.heads import forward_by_size
from simsiam.model.siamese import Siamese, build
from simsiam.utils import system

# A step's peak memory divided by `min_step_bytes`: 1.4 to 1.5 was measured. Views, gradients of
# activations and so on make the difference.
PEAK_MEMORY_FACTOR = 1.6
# How PyTorch's allocators word it.
OUT_OF_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


def build_on_meta(recipe: ResolvedRecipe) -> Siamese:
    """Build a recipe's model on the `meta` device, where it takes no memory.

    Args:
        recipe: The recipe.

    Returns:
        The model.
    """
    with torch.device("meta"):
        return build(
            recipe.method, backbone=recipe.backbone, image_size=recipe.image_size,
            width=recipe.width, stem=recipe.stem, channels=recipe.channels,
        )  # fmt: skip


def activation_bytes(model: Siamese, recipe: ResolvedRecipe, batch_size: int) -> int:
    """Return the memory of the activations that a forward pass saves for the backward pass.

    The matrices of the criterion are left out.

    Args:
        model: The recipe's model as `build_on_meta` returns it.
        recipe: The recipe.
        batch_size: Images in the batch.

    Returns:
        Bytes.
    """
    bytes_per_value = 4 if recipe.precision == "float32" else 2
    sizes, shape = recipe.view_sizes, (batch_size, recipe.channels)
    with torch.device("meta"):
        views = {i: torch.empty(*shape, sizes[i], sizes[i]) for i in model.encoded_views}
    weight_storages = {tensor.untyped_storage()._cdata for tensor in _weights(model)}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weight_storages:
            saved[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        views = forward_by_size(model.forward_views, model.backbone, views)
        for network in (model.projector, model.predictor):
            views = model.forward_views(network, views)
    float32_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return float32_bytes * bytes_per_value // 4


def min_step_bytes(recipe: ResolvedRecipe, batch_size: int) -> int:
    """Return the memory that is in use when the backward pass begins.

    These are weights, gradients, momentum and saved activations.

    Args:
        recipe: The recipe.
        batch_size: Images in the batch.

    Returns:
        Bytes.
    """
    model = build_on_meta(recipe)
    weights = sum(tensor.nbytes for tensor in _weights(model))
    copies = 3 if recipe.method.optimizer == "adamw" else 2  # the gradient and one or two momenta
    trained = copies * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    if recipe.average_weights:
        weights += sum(tensor.nbytes for tensor in model.f.state_dict().values())
    return activation_bytes(model, recipe, batch_size) + weights + trained


def _weights(model: Siamese) -> list[Tensor]:
    """Parameters and buffers. A state dict may gather rows of all processes, which needs data."""
    return [*model.parameters(), *model.buffers()]


def local_batch_size(batch_size: int) -> int:
    """Return how many images of a batch one process has at most."""
    return -(-batch_size // world_size())


def available_memory(device: torch.device) -> int | None:
    """Return the memory that this process can still allocate on a device.

    Args:
        device: The device.

    Returns:
        Bytes; None if the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return system.available_memory() if device.type == "cpu" else None


def out_of_memory_message(
    recipe: ResolvedRecipe, device: torch.device, available_bytes: int | None
) -> str:
    """Return an error message with the largest batch size, a power of two, that fits.

    Args:
        recipe: The recipe, whose batch does not fit.
        device: The device.
        available_bytes: Memory available on the device, if known.

    Returns:
        One line.
    """
    message = f"batch_size {recipe.batch_size} does not fit into the memory of {device}"
    if available_bytes is None:
        return f"{message}: take a smaller --batch-size"
    needed_bytes = min_step_bytes(recipe, local_batch_size(recipe.batch_size))
    message += (
        f": a step needs at least {needed_bytes / 2**30:.1f} GiB, "
        f"and {available_bytes / 2**30:.1f} GiB are free"
    )
    for size in (2**k for k in range(19, 0, -1) if 2**k < recipe.batch_size):
        step_bytes = min_step_bytes(recipe, local_batch_size(size))
        if step_bytes * PEAK_MEMORY_FACTOR <= available_bytes:
            return f"{message}; --batch-size {size} should fit"
    return f"{message}; not even two images fit: take a smaller --image-size or --backbone"


def check_memory(recipe: ResolvedRecipe, device: torch.device) -> None:
    """Check that a step fits into memory; only on a CPU.

    There the operating system kills a process that allocates too much, without a message.

    Args:
        recipe: The recipe.
        device: The device.

    Raises:
        WorkFailed: If a step does not fit; the message states a batch size that does.
    """
    available = available_memory(device)
    if device.type != "cpu" or available is None:
        return
    if min_step_bytes(recipe, local_batch_size(recipe.batch_size)) > available:
        raise WorkFailed(out_of_memory_message(recipe, device, available))


@contextmanager
def catch_out_of_memory(recipe: ResolvedRecipe, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of the body into WorkFailed.

    Args:
        recipe: The recipe that is trained.
        device: The device.

    Yields:
        Nothing.

    Raises:
        WorkFailed: If memory runs out; the message states a batch size that fits.
    """
    available = available_memory(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES)
        if not isinstance(error, MemoryError) and not known:
            raise
        raise WorkFailed(out_of_memory_message(recipe, device, available)) from error
