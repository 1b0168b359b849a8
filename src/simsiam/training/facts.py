"""Facts that `inspect` and `plan` print as text in 80 columns and write as JSON."""

import json
import math
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from simsiam.errors import UsageError, printable
from simsiam.utils.files import write_text

TEXT_WIDTH = 80  # columns
INDENT = 12  # columns for the name of a fact


def check_out_file(out: str | os.PathLike[str] | None) -> Path | None:
    """Check that a file can be written.

    Args:
        out: The path of the file, or None.

    Returns:
        The path, or None.

    Raises:
        UsageError: The path is a folder, or its folder does not exist.
    """
    path = None if out is None else Path(out)
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UsageError(
            f"--out is {printable(str(path))}: give the name of a file in an existing folder"
        )
    return path


def write_facts(path: Path | None, facts: Mapping[str, object]) -> None:
    """Write facts as JSON.

    Args:
        path: The file; None writes nothing.
        facts: The facts, as JSON values.
    """
    if path:
        write_text(path, json.dumps(facts, indent=2) + "\n")


def print_fact_lines(name: str, lines: Sequence[str]) -> None:
    """Print a fact in 80 columns: its name, and its lines beside it.

    Args:
        name: The name of the fact.
        lines: The lines; one that begins with two spaces is an example of the line before.
    """
    encoding = sys.stdout.encoding or "utf-8"
    for i, line in enumerate(lines):
        first = f"{name if i == 0 else '':<{INDENT}}"
        rest = " " * (INDENT + 4 if line.startswith("  ") else INDENT + 2)
        text = textwrap.fill(
            printable(line),
            TEXT_WIDTH,
            initial_indent=first,
            subsequent_indent=rest,
            break_on_hyphens=False,
        )
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def format_bytes(size: float, digits: int = 4) -> str:
    """Format a number of bytes with a decimal unit, such as "1.5 GB".

    Args:
        size: The number of bytes.
        digits: Significant digits.
    """
    power = min(int(math.log10(max(size, 1)) / 3), 5)
    return f"{size / 1000**power:,.{digits}g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit of which there are at least two, such as "3 hours".

    Args:
        seconds: The duration in seconds.
    """
    units = {"years": 31_557_600, "days": 86_400, "hours": 3_600, "minutes": 60, "seconds": 1}
    unit = next(unit for unit, length in units.items() if seconds >= 2 * length or length == 1)
    return f"{seconds / units[unit]:,.0f} {unit}"
