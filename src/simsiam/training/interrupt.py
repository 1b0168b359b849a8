"""SIGINT and SIGTERM during training: the step ends and is saved first."""

import signal
import threading
from typing import Any


class Interrupt:
    """Remembers SIGINT or SIGTERM instead of obeying at once, so that a step can end and be saved; twice, it obeys."""

    def __init__(self) -> None:
        self.signum = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _remember(self, number: int, frame: object) -> None:
        self.signum = number
        signal.signal(number, self.before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Obey now, at the end of the work, a signal that came too late to stop it: more may follow."""
        if self.signum:
            signal.raise_signal(self.signum)
