"""What a training step takes in memory, known before it runs: tensors on the `meta` device have no bytes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from simsiam.config.recipes import ResolvedRecipe
from simsiam.distributed.process_group import world_size
from simsiam.errors import WorkFailed
from simsiam.model.siamese import Siamese, build

PEAK_MEMORY_FACTOR = 1.6  # of a step's peak over the least it takes, measured: 1.4 to 1.5 (views, the gradients of activations, ...)
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
)  # what torch's allocators say


def build_on_meta(recipe: ResolvedRecipe) -> Siamese:
    """The recipe's model without a byte."""
    with torch.device("meta"):
        return build(
            recipe.method, backbone=recipe.backbone, image_size=recipe.image_size, width=recipe.width,
            stem=recipe.stem, channels=recipe.channels,
        )  # fmt: skip


def activation_bytes(model: Siamese, recipe: ResolvedRecipe, batch_size: int) -> int:
    """Bytes that autograd keeps of a forward pass, of the recipe's model `on_meta`, for the backward pass.

    A criterion's own matrices are left out.
    """
    size, kept, values = (
        recipe.image_size,
        dict[int, Tensor](),
        4 if recipe.precision == "float32" else 2,
    )
    with torch.device("meta"):
        views = {
            i: torch.empty(batch_size, recipe.channels, size, size)
            for i in model.predicted_views + model.target.required_views
        }
    own = {tensor.untyped_storage()._cdata for tensor in model.state_dict(keep_vars=True).values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for network in (model.backbone, model.projector, model.predictor):
            views = model.forward_views(network, views)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) * values // 4


def min_step_bytes(recipe: ResolvedRecipe, batch_size: int) -> int:
    """Bytes that are all in use when a step turns back: weights, gradients, momentum, and what the backward pass needs.

    The optimizer has one momentum a parameter (AdamW two).
    """
    model, moved = build_on_meta(recipe), 3 if recipe.method.optimizer == "adamw" else 2
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    moving = moved * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return activation_bytes(model, recipe, batch_size) + weights + moving


def local_batch_size(batch_size: int) -> int:
    """Images of a batch that one of the processes has, at most."""
    return -(-batch_size // world_size())


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device, where the system says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    found = list[int]()
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(
            1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        )
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        group = Path("/sys/fs/cgroup")
        found.append(
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    return min(found, default=None) if device.type == "cpu" else None


def out_of_memory_message(recipe: ResolvedRecipe, device: torch.device, available_bytes: int | None) -> str:
    """The largest batch that fits, among the powers of two, in words."""
    words = f"batch_size {recipe.batch_size} does not fit into the memory of {device}"
    if available_bytes is not None:
        need = min_step_bytes(recipe, local_batch_size(recipe.batch_size))
        words = f"{words}: a step takes {need / 2**30:.1f} GiB at the least, and {available_bytes / 2**30:.1f} GiB are free"
        sizes = [2**k for k in range(1, 20) if 2**k < recipe.batch_size]
        fits = [
            n
            for n in sizes
            if PEAK_MEMORY_FACTOR * min_step_bytes(recipe, local_batch_size(n)) <= available_bytes
        ]
        if not fits:
            return f"{words}; not even two images fit: take a smaller --image-size or --backbone"
        return f"{words}; --batch-size {fits[-1]} should fit"
    return f"{words}: take a smaller --batch-size"


def check_memory(recipe: ResolvedRecipe, device: torch.device) -> None:
    """Raises WorkFailed, with a batch size that fits, where a step cannot.

    On a CPU alone: there the system ends a process that takes too much, and it has no last word.
    """
    there = available_memory(device)
    if (
        device.type == "cpu"
        and there is not None
        and min_step_bytes(recipe, local_batch_size(recipe.batch_size)) > there
    ):
        raise WorkFailed(out_of_memory_message(recipe, device, there))


@contextmanager
def catch_out_of_memory(recipe: ResolvedRecipe, device: torch.device) -> Iterator[None]:
    """Training in the memory there is. Raises WorkFailed, with a batch size that fits, where it runs out."""
    there = available_memory(device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(
            word in str(error) for word in OUT_OF_MEMORY_MESSAGES
        ):
            raise
        raise WorkFailed(out_of_memory_message(recipe, device, there)) from error
