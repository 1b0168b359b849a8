"""Where to compute and in which precision.

bfloat16 is used where the device is fast at it, float32 elsewhere; losses take at least float32.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from math import inf
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from simsiam.config.recipes import SETTING_TYPES
from simsiam.config.settings import parse_value
from simsiam.distributed.process_group import world_size
from simsiam.errors import UsageError
from simsiam.utils.devices import device_traits

MEASURED_TURNS = 8  # of a convolution in each precision
MIN_SPEEDUP = 1.5  # from which on bfloat16 is worth its rounding, beyond the noise of a measurement
P = ParamSpec("P")
Placed = TypeVar("Placed", nn.Module, Tensor)


def pick_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: "auto", "cpu", "cuda", "cuda:1", "mps", ...; "auto" is a GPU if there is one. Of
            several processes on a host, each takes the GPU of its local rank.

    Returns:
        The device.

    Raises:
        UsageError: If the device cannot be used.
    """
    if name == "auto":
        alone_on_mps = torch.backends.mps.is_available() and world_size() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if alone_on_mps else "cpu"
    if name.startswith("cuda") and (processes := world_size()) > 1:
        if name != "cuda":
            raise UsageError(
                f"device {name!r} is one GPU and there are {processes} processes: "
                "use cuda, which takes one GPU for each"
            )
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= (gpus := torch.cuda.device_count()):
            raise UsageError(
                f"a host has {gpus} GPUs and needs one for its process {local + 1}: "
                "use a smaller --nproc-per-node"
            )
    if name.startswith("mps") and world_size() > 1:
        raise UsageError("Apple's GPU takes one process: leave out torchrun, or use --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the "meta" device fails here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from None
    # A resumed run continues bit for bit; a step takes as long with and without.
    torch.backends.cudnn.deterministic = True
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Return the precision of a name.

    Args:
        name: "bfloat16", "float32" or "auto"; "auto" is bfloat16 on GPUs that support it, on CPUs
            with AMX or AVX512-BF16, and on others where it is measured to be faster.
        device: The device to compute on.

    Returns:
        "bfloat16" or "float32".

    Raises:
        UsageError: If the device cannot compute in it.
    """
    able = device_traits(device).bfloat16
    if name == "bfloat16" and not able:
        raise UsageError(f"{device.type} computes in float32: leave out --precision bfloat16")
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = able and (
            torch.cpu._is_amx_tile_supported()
            or torch.cpu._is_avx512_bf16_supported()
            or bfloat16_speedup() > MIN_SPEEDUP
        )
    return "bfloat16" if fast else "float32"


@cache
def bfloat16_speedup() -> float:
    """Measure how many times as fast a convolution with its gradient is on this CPU in bfloat16.

    The fastest of several turns counts: other programs only make a turn slower.
    """
    cpu = Compute(torch.device("cpu"), "float32")
    convolution = cpu.place(nn.Conv2d(32, 32, 3, padding=1))
    x = cpu.place(torch.ones(16, 32, 16, 16))
    seconds = {True: inf, False: inf}
    for turn in range(2 * MEASURED_TURNS):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=turn % 2 == 0):
            convolution(x).float().sum().backward()
        seconds[turn % 2 == 0] = min(seconds[turn % 2 == 0], time.perf_counter() - start)
    return seconds[False] / seconds[True]


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
            device: "auto", "cpu", "cuda", "cuda:1", "mps", ...; "auto" takes a GPU where there is
                one.
            precision: "auto", "bfloat16" or "float32"; "auto" takes bfloat16 where it is fast.

        Returns:
            The chosen pair.

        Raises:
            UsageError: If the device cannot be used here or the precision is unknown.
        """
        precision = str(parse_value(precision, SETTING_TYPES["precision"], "precision"))
        chosen = pick_device(device)
        return cls(chosen, pick_precision(precision, chosen))

    def place(self, item: Placed) -> Placed:
        """Move a module or images to the device, in the memory format of its convolutions.

        Args:
            item: Any module, which is changed in place, or images (N, C, H, W).

        Returns:
            The same module, or the images there.
        """
        return item.to(  # type: ignore[call-overload]
            device=self.device, memory_format=device_traits(self.device).memory_format
        )

    def autocast(self) -> torch.autocast:
        """Return the context in which the network computes."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert 16-bit numbers to float32; float32 and float64 stay as they are.

    Args:
        x: Any tensor of floating-point numbers.

    Returns:
        `x` in float32 or float64.
    """
    return x if x.element_size() >= 4 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for the device of a tensor.

    Where it is off already, the context does nothing, so that it is in no exported graph.

    Args:
        x: The tensor; one without data (device "meta") has no autocast.
    """
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def in_full_precision(loss_fn: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compute a loss in at least float32, outside autocast.

    Autocast would compute the loss's matrix products in bfloat16.

    Args:
        loss_fn: A function of tensors and numbers.

    Returns:
        The function; it converts its tensors with `at_least_float32` first.
    """

    @wraps(loss_fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss_fn(*map(_convert, args), **{k: _convert(x) for k, x in kwargs.items()})

    return wrapper


def _convert(x: object) -> Any:
    return at_least_float32(x) if isinstance(x, Tensor) else x
