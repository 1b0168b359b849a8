"""What types of devices can do: the one table in which they differ."""

from typing import NamedTuple

import torch


class DeviceTraits(NamedTuple):
    """What a type of device can do.

    Attributes:
        memory_format: In which convolutions are fastest and right.
        bfloat16: Whether autocast to bfloat16 works. Features and statistics that need float64 are
            computed on the CPU for every device, so no device has to have it.
        trusted: Whether results were compared with those of the CPU on real hardware. On other
            devices, each run compares its first step.
    """

    memory_format: torch.memory_format
    bfloat16: bool
    trusted: bool


DEVICE_TRAITS = {
    "cpu": DeviceTraits(torch.channels_last, bfloat16=True, trusted=True),
    "cuda": DeviceTraits(torch.channels_last, bfloat16=True, trusted=True),
    "mps": DeviceTraits(torch.contiguous_format, bfloat16=False, trusted=False),
}
OTHER_DEVICE = DeviceTraits(torch.contiguous_format, bfloat16=False, trusted=False)


def device_traits(device: torch.device) -> DeviceTraits:
    """Return what a device can do.

    Args:
        device: The device.
    """
    return DEVICE_TRAITS.get(device.type, OTHER_DEVICE)
