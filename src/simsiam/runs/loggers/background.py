"""A thread for each logger: training does not wait for it, and its errors do not end a run."""

import queue
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from simsiam.errors import printable, truncate
from simsiam.runs.loggers.loggers import LOGGERS, LoggedRun, Status
from simsiam.runs.records import MetricsRecord, Record
from simsiam.utils.names import hide_keys

# Seconds that a run waits for its loggers, all together. They open before the data workers start
# where they can, since a process that is forked during an import may hang.
OPEN_SECONDS, CLOSE_SECONDS = 30.0, 30.0


class BackgroundLogger(threading.Thread):
    """Calls a logger in a thread. If it fails, one line says so and the run goes on without it.

    Args:
        name: The name of the logger.
        run: What it knows of the run.
    """

    def __init__(self, name: str, run: LoggedRun):
        super().__init__(name=name, daemon=True)
        self.logger = LOGGERS[name](run)
        self.queue = queue.SimpleQueue[MetricsRecord | None]()
        self.opened = threading.Event()
        self.summary: Record = {}
        self.status: Status = "failed"
        self.given_up = False

    def run(self) -> None:
        """Log what is put into the queue, until it is None."""
        try:
            last_step, note = self.logger.open()
            if note:
                self.say(note)
            self.opened.set()
            ended = False
            while not ended:
                records = [self.queue.get()]
                with suppress(queue.Empty):
                    while True:
                        records.append(self.queue.get_nowait())
                ended = records[-1] is None
                new = [r for r in records if r is not None and r["step"] > last_step]
                if new:
                    self.logger.log(new)
            self.logger.close(self.summary, self.status)
        except (Exception, SystemExit) as error:
            reason = hide_keys(" ".join(str(error).split())) or type(error).__name__
            self.give_up(f"{truncate(reason)}; the run goes on without {self.name}")
            with suppress(Exception, SystemExit):  # it lets go of its files and connections
                self.logger.close({}, "failed")
        finally:
            self.opened.set()

    def give_up(self, reason: str) -> None:
        """Say once that the logger does not get all numbers.

        Args:
            reason: Why.
        """
        if not self.given_up:
            self.given_up = True
            self.say(f"{reason}; metrics.jsonl has all numbers, `simsiam resume` sends the rest")

    def say(self, text: str) -> None:
        """Print a line about the logger to stderr.

        Args:
            text: The line.
        """
        with suppress(OSError):  # nobody may be able to read it
            print(f"logger   {self.name}: {printable(text)}", file=sys.stderr)


class BackgroundLoggers:
    """The loggers of a run.

    Args:
        names: Their names.
        run: What they know of the run.
    """

    def __init__(self, names: Sequence[str], run: LoggedRun):
        self.threads = [BackgroundLogger(name, run) for name in names]
        for thread in self.threads:
            thread.start()
        deadline = time.monotonic() + OPEN_SECONDS
        for thread in self.threads:
            thread.opened.wait(max(0.0, deadline - time.monotonic()))

    def log(self, record: MetricsRecord) -> None:
        """Give a line of metrics.jsonl to the loggers; they leave out what they have.

        Args:
            record: The line.
        """
        for thread in self.threads:
            if thread.is_alive():
                thread.queue.put(record)

    def close(self, summary: Record, status: Status) -> None:
        """Let the loggers end, and wait for them for CLOSE_SECONDS.

        Args:
            summary: What summary.json holds; empty if there is none.
            status: How the run ended.
        """
        for thread in self.threads:
            thread.summary, thread.status = summary, status
            thread.queue.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                thread.give_up(f"not everything was sent within {CLOSE_SECONDS:.0f} seconds")
