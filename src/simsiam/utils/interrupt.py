"""Stop signals during training: the step ends and is saved before the program stops."""

import signal
import threading
from types import TracebackType
from typing import Any

from simsiam.utils.system import STOP_SIGNALS


class InterruptHandler:
    """A context in which stop signals are stored in `signum` and do not end the program.

    A second signal of the same kind has its usual effect. Outside the main thread, signals are left
    alone.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self.previous_handlers[signum] = signal.signal(signum, self._handle_signal)
        return self

    def _handle_signal(self, signum: int, frame: object) -> None:
        self.signum = signum
        signal.signal(signum, self.previous_handlers[signum])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)

    def raise_pending(self) -> None:
        """Send a stored signal to this process again, now that the work is saved."""
        if self.signum:
            signal.raise_signal(self.signum)
