"""Counting floating-point operations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def count_flops() -> Iterator["FlopCounterMode"]:
    """Count the floating-point operations of the body.

    Yields:
        torch's counter; `get_total_flops` returns the number.
    """
    # Where triton is missing, the import warns that its kernels cannot be counted; none are used.
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield counter
