"""Where to compute and in which precision: bfloat16 where the device is fast at it, float32 otherwise."""

import os
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simsiam.config.recipes import SETTING_TYPES
from simsiam.config.settings import parse_value
from simsiam.distributed.process_group import world_size
from simsiam.errors import UsageError


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is a GPU where there is one. Raises UsageError for one that is not there.

    Of several processes on a host each has the GPU of its local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and world_size() > 1:
        if name != "cuda":
            raise UsageError(
                f"device {name!r} is one GPU and there are {world_size()} processes: take cuda, one for each"
            )
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= (gpus := torch.cuda.device_count()):
            raise UsageError(
                f"a host has {gpus} GPUs, and its process {local + 1} none: a smaller --nproc-per-node"
            )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the "meta" device fails here
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    torch.backends.cudnn.deterministic = (
        True  # a run goes on bit for bit; a step takes as long either way
    )
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "bfloat16" or "float32"; "auto" takes bfloat16 on a GPU and on CPUs with AMX or AVX512-BF16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


class Compute(NamedTuple):
    """Where to compute and in which precision.

    Attributes:
        device: The device of model and batches.
        precision: "bfloat16" or "float32", of the network; losses take at least float32.
    """

    device: torch.device
    precision: str

    @classmethod
    def pick(cls, device: str = "auto", precision: str = "auto") -> "Compute":
        """Choose a device and a precision by name.

        Args:
            device: "auto", "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU where there is one.
            precision: "auto", "bfloat16" or "float32"; "auto" takes bfloat16 where it is fast.

        Returns:
            The chosen pair.

        Raises:
            UsageError: If the device cannot be used here or the precision is unknown.
        """
        precision = str(parse_value(precision, SETTING_TYPES["precision"], "precision"))
        chosen = pick_device(device)
        return cls(chosen, pick_precision(precision, chosen))

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in the memory format in which convolutions are fastest.

        Args:
            module: Any module; it is changed in place.

        Returns:
            The same module.
        """
        return module.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def autocast(self) -> torch.autocast:
        """Return the context in which the network computes."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def at_least_float32(x: Tensor) -> Tensor:
    """x in at least float32: losses are not computed in bfloat16, and float64 is not lowered."""
    return x if x.element_size() >= 4 else x.float()


def in_full_precision(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """D on precise tensors and outside autocast, which would take its matrix products in bfloat16."""

    @wraps(loss_fn)
    def computed(*tensors: Tensor, **settings: float) -> Tensor:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss_fn(*map(at_least_float32, tensors), **settings)

    return computed
