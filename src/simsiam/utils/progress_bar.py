"""A bar on a terminal, with the time left, while something is done many times."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is told of each few that are done. Without words there is no bar, nor is there one in a file."""
    console = Console(stderr=True)
    columns = *Progress.get_default_columns(), MofNCompleteColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not (description and console.is_terminal)
    ) as shown:
        task = shown.add_task(description, total=total)
        yield lambda done: shown.advance(task, done)
