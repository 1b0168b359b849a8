"""A progress bar with the time left, on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr while the body runs.

    Args:
        description: The text before the bar. There is no bar if it is empty, or if stderr is not a
            terminal.
        total: Number of items.

    Yields:
        A function to call with the number of items that have been done since the last call.
    """
    console = Console(stderr=True)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    hidden = not (description and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
