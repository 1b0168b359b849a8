"""The choice of loggers. It is in RUN/loggers.json, not in the recipe: no number depends on it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, cast
from uuid import uuid4

from simsiam.config.settings import parse_value
from simsiam.errors import UsageError, printable, truncate
from simsiam.runs.run_folder import Run

LOGGERS_FILE = "loggers.json"
NAMES = tuple[Literal["tensorboard", "wandb", "mlflow", "none"], ...]


@dataclass(frozen=True)
class LoggerChoice:
    """The loggers of a run.

    Attributes:
        names: Their names.
        id: A random name of the run, under which they find what they have of it.
    """

    names: tuple[str, ...] = ("tensorboard",)
    id: str = ""


def parse_loggers(loggers: str | Sequence[str]) -> tuple[str, ...]:
    """Check the names of loggers, and that their packages are installed.

    Args:
        loggers: One name or several; "none" alone for none.

    Returns:
        The names, each once.

    Raises:
        UsageError: A name is unknown, or its package is not installed.
    """
    values = [loggers] if isinstance(loggers, str) else list(loggers)
    names = tuple(dict.fromkeys(cast(tuple[str, ...], parse_value(values, NAMES, "logger"))))
    if "none" in names:
        if len(names) > 1:
            raise UsageError(f"logger {' '.join(names)}: none stands alone")
        return ()
    for name in names:
        spec = find_spec(name)
        if (
            spec is None or spec.origin is None
        ):  # a folder of this name, such as W&B's, is no package
            raise UsageError(
                f'logger {name} needs the package {name}: pip install "simsiam[{name}]"'
            )
    return names


def choose_loggers(run: Run, names: tuple[str, ...]) -> None:
    """Store the loggers of a run, where they are others than before.

    Args:
        run: The run folder.
        names: Their names.
    """
    choice = read_choice(run)
    if names != choice.names:
        record = {"loggers": list(names), "id": choice.id or uuid4().hex}
        run.write(LOGGERS_FILE, record)


def read_choice(run: Run) -> LoggerChoice:
    """Read the loggers of a run.

    Args:
        run: The run folder.

    Returns:
        The choice; TensorBoard if nothing else was chosen.

    Raises:
        UsageError: The file is damaged.
    """
    record = run.json(LOGGERS_FILE)
    if not record:
        return LoggerChoice()
    try:
        names, run_id = parse_value(record["loggers"], NAMES, "loggers"), record["id"]
        if not re.fullmatch("[0-9a-f]{32}", run_id):
            raise ValueError(f"id is {truncate(run_id, repr)}")
    except (LookupError, TypeError, ValueError) as error:
        path = printable(str(run.path / LOGGERS_FILE))
        raise UsageError(f"{path} is damaged: {error}; delete it, and give --logger") from None
    return LoggerChoice(tuple(n for n in cast(tuple[str, ...], names) if n != "none"), run_id)
