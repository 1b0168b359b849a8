"""One line that says how a run is doing: a live bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from simsiam.distributed.process_group import rank
from simsiam.errors import printable


class ProgressLine:
    """Epochs, time left, images/s, share of time spent waiting for data, loss, z std times sqrt d, views that find each
    other, and the last kNN: 80 columns.
    """

    def __init__(self, start_step: int, steps: int, steps_per_epoch: int):
        self.start_step, self.steps, self.steps_per_epoch = start_step, steps, steps_per_epoch
        self.start_time, self.last_printed_step = time.monotonic(), start_step
        self.values: dict[str, Any] = {}
        self.console = Console(stderr=True, highlight=False, quiet=rank() != 0)
        self.progress = Progress(
            TextColumn("{task.fields[epochs]}"), BarColumn(5), TextColumn("{task.fields[words]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(
            "", total=steps, completed=start_step, epochs="", words="starting"
        )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Say where the run is; values not given keep what was said last."""
        self.values |= {k: v for k, v in values.items() if v is not None}
        left = (
            (time.monotonic() - self.start_time)
            / max(1, step - self.start_step)
            * (self.steps - step)
        )
        epochs = f"{step / self.steps_per_epoch:.4g}/{self.steps / self.steps_per_epoch:.4g}"
        words = f"{int(left // 60)}:{int(left % 60):02d} left " + " ".join(
            form.format(self.values[name])
            for name, form in {
                "images_per_second": "{:.0f}/s",
                "data_wait": "wait {:.0%}",
                "loss": "loss {:.2f}",
                "z_std_sqrt_d": "std {:.2f}",
                "view_retrieval": "views {:.0f}%",
                "knn_top1": "kNN {:.1f}",
                "val_top1": "val {:.1f}",
            }.items()
            if name in self.values
        )
        self.progress.update(self.task, completed=step, epochs=epochs, words=words)
        if not self.console.is_terminal and (
            step - self.last_printed_step >= self.steps / 10 or step == self.steps
        ):
            self.last_printed_step = step
            self.console.print(f"epoch {epochs} {words}", soft_wrap=True)

    def print_line(self, text: str) -> None:
        """A line that stays above the bar."""
        self.console.print(printable(text), soft_wrap=True, markup=False)

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def format_labeled_lines(label: str, lines: Sequence[str]) -> list[str]:
    """Lines that say one thing, its name before the first."""
    return [f"{label if i == 0 else '':<8} {line}" for i, line in enumerate(lines)]


class Stopwatch:
    """Training time: seconds, images and waiting, without what `paused` spends on measurements and checkpoints."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.images, self.wait_seconds = seconds, 0, 0.0
        self.last_save_time, self.last_time = time.monotonic(), time.monotonic()
        self.last_totals = (seconds, 0, 0.0)

    def record_step(self, images: int, wait_seconds: float) -> None:
        """One step is done."""
        clock = time.monotonic()
        self.seconds += clock - self.last_time
        self.last_time, self.images, self.wait_seconds = (
            clock,
            self.images + images,
            self.wait_seconds + wait_seconds,
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self.last_time = time.monotonic()

    def rates(self) -> dict[str, float]:
        """Images (not views) per second and the share of time spent waiting for data, since the last call."""
        (seconds, images, waited), self.last_totals = (
            self.last_totals,
            (self.seconds, self.images, self.wait_seconds),
        )
        elapsed = max(self.seconds - seconds, 1e-9)
        return {
            "images_per_second": (self.images - images) / elapsed,
            "data_wait": (self.wait_seconds - waited) / elapsed,
        }

    def save_due(self, interval: float) -> bool:
        """True, and the count starts again, if so many seconds have passed since it last was true.

        Of several processes the first one's clock counts.
        """
        if rank() != 0 or time.monotonic() - self.last_save_time < interval:
            return False
        self.last_save_time = time.monotonic()
        return True
