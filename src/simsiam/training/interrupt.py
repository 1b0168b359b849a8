"""SIGINT and SIGTERM during training: the step ends and is saved first."""

import signal
import threading
from typing import Any


class InterruptHandler:
    """Remembers SIGINT or SIGTERM instead of obeying at once, so that a step can end and be saved; twice, it obeys."""

    def __init__(self) -> None:
        self.signum = 0
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "InterruptHandler":
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {
                number: signal.signal(number, self._handle_signal)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def _handle_signal(self, signum: int, frame: object) -> None:
        self.signum = signum
        signal.signal(signum, self.previous_handlers[signum])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def raise_pending(self) -> None:
        """Obey now, at the end of the work, a signal that came too late to stop it: more may follow."""
        if self.signum:
            signal.raise_signal(self.signum)
