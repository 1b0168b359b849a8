"""Progress of a training: a live line on a terminal, plain lines in a file; and its clock."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from simsiam.distributed.process_group import rank
from simsiam.errors import printable
from simsiam.utils.system import is_broken_pipe

# What the line shows after the time left, in this order, where it is known.
FORMATS = {
    "images_per_second": "{:.0f}/s",
    "loss": "loss {:.2f}",
    "z_std_sqrt_d": "std {:.2f}",
    "view_retrieval": "views {:.0f}%",
    "knn_top1": "kNN {:.1f}",
    "val_top1": "val {:.1f}",
    "data_wait": "wait {:.0%}",
}
MIN_BAR = 8  # columns of the bar; values that leave it less are not shown
MIN_WAIT = 0.1  # share of the time; below this, waiting for data is not shown
PRINT_SECONDS = 60  # between two lines in a file, at most


class ProgressLine:
    """A line of 80 columns with epochs, time left, and the values named in `FORMATS`.

    Args:
        start_step: Steps that were done before.
        steps: Steps of the whole training.
        steps_per_epoch: Steps in an epoch.
    """

    def __init__(self, start_step: int, steps: int, steps_per_epoch: int):
        self.start_step, self.steps, self.steps_per_epoch = start_step, steps, steps_per_epoch
        self.start_time, self.last_printed_step = time.monotonic(), start_step
        self.last_printed_time = self.start_time
        self.values: dict[str, float] = {}
        self.console = Console(stderr=True, highlight=False, quiet=rank() != 0)
        whole, rest = Column(no_wrap=True), Column(ratio=1, min_width=MIN_BAR)
        self.progress = Progress(
            TextColumn("epoch {task.fields[epochs]}", table_column=whole),
            BarColumn(None, table_column=rest),
            TextColumn("{task.fields[text]}", table_column=whole),
            console=self.console,
            disable=not self.console.is_terminal,
            expand=True,
        )
        self.task = self.progress.add_task(
            "", total=steps, completed=start_step, epochs="", text="starting"
        )

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show a step and new values; in a file, every tenth of the training and every minute.

        Args:
            step: Steps done so far.
            values: New values by name; values that are missing or None keep what was shown last.
        """
        self.values |= {name: value for name, value in values.items() if value is not None}
        now = time.monotonic()
        left = (now - self.start_time) / max(1, step - self.start_step) * (self.steps - step)
        epochs = f"{step / self.steps_per_epoch:.1f}/{self.steps / self.steps_per_epoch:.4g}"
        text = f"{timedelta(seconds=int(left))} left"
        room = self.console.width - len(f"epoch {epochs}  ") - MIN_BAR
        for name, form in FORMATS.items():
            if name in self.values and (name != "data_wait" or self.values[name] >= MIN_WAIT):
                longer = f"{text} {form.format(self.values[name])}"
                if self.console.is_terminal and len(longer) > room:
                    break
                text = longer
        self.progress.update(self.task, completed=step, epochs=epochs, text=text)
        tenth_done = step - self.last_printed_step >= self.steps / 10
        due = tenth_done or step == self.steps or now - self.last_printed_time >= PRINT_SECONDS
        if not self.console.is_terminal and due:
            self.last_printed_step, self.last_printed_time = step, now
            self._print(f"epoch {epochs} {text}", soft_wrap=True)

    def print_line(self, text: str) -> None:
        """Print a line above the progress line.

        Args:
            text: The line.
        """
        wrap = self.console.is_terminal  # between words
        self._print(printable(text), soft_wrap=not wrap, markup=False)

    def _print(self, text: str, *, soft_wrap: bool, markup: bool = True) -> None:
        """Print a line; where that is not possible, as on a full disk, the training goes on."""
        try:
            self.console.print(text, soft_wrap=soft_wrap, markup=markup)
        except OSError as error:
            if is_broken_pipe(error):
                raise

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def format_labeled_lines(label: str, lines: Sequence[str]) -> list[str]:
    """Put a label before the first line and indent the others.

    Args:
        label: Up to eight characters.
        lines: The lines.

    Returns:
        The lines, aligned.
    """
    return [f"{label if i == 0 else '':<8} {line}" for i, line in enumerate(lines)]


def print_labeled(label: str, text: str) -> None:
    """Print a line with its label to stderr.

    Args:
        label: Up to eight characters.
        text: The text.
    """
    print(*format_labeled_lines(label, [printable(text)]), sep="\n", file=sys.stderr)


class Stopwatch:
    """Training time, images and waiting, without the time spent inside `paused`.

    Args:
        seconds: Training time so far.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.images, self.wait_seconds = seconds, 0, 0.0
        self.last_save_time, self.last_time = time.monotonic(), time.monotonic()
        self.last_totals = (seconds, 0, 0.0)

    def record_step(self, images: int, wait_seconds: float) -> None:
        """Count one step.

        Args:
            images: Images in its batch.
            wait_seconds: Seconds that it waited for the batch.
        """
        now = time.monotonic()
        self.seconds += now - self.last_time
        self.last_time = now
        self.images += images
        self.wait_seconds += wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent in this context."""
        yield
        self.last_time = time.monotonic()

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call.

        Returns:
            `images_per_second` counts images, not views; `data_wait` is the share of time spent
            waiting for data.
        """
        totals = (self.seconds, self.images, self.wait_seconds)
        (seconds, images, wait), self.last_totals = self.last_totals, totals
        elapsed = max(self.seconds - seconds, 1e-9)
        return {
            "images_per_second": (self.images - images) / elapsed,
            "data_wait": (self.wait_seconds - wait) / elapsed,
        }

    def save_due(self, interval: float) -> bool:
        """Return whether a checkpoint is due, and start the interval again if so.

        Args:
            interval: Seconds between checkpoints.

        Returns:
            Whether so much time has passed on rank zero; False on other ranks.
        """
        if rank() != 0 or time.monotonic() - self.last_save_time < interval:
            return False
        self.last_save_time = time.monotonic()
        return True
