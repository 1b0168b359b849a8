"""What a stress program prints and writes at its end: how many trials ended how, what was wrong."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from simsiam.model.precision import Compute
from simsiam.runs.environment import collect_environment
from simsiam.utils.files import write_text


def report(
    ends: Mapping[tuple[str, str], int],
    wrongs: Sequence[object],
    *,
    started: str,
    meaning: str,
    heading: str,
    out: str | None,
) -> int:
    """Print a table of the trials and, if `out` is given, write PATH.md and PATH.json.

    Args:
        ends: The number of trials by their kind and end.
        wrongs: What was wrong.
        started: When the program was started.
        meaning: What counts as wrong.
        heading: What the kinds are.
        out: PATH.

    Returns:
        The exit code.
    """
    environment = collect_environment(Compute(torch.device("cpu"), "float32"))
    command = f"python tests/stress/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
    rows = "\n".join(f"| {kind} | {end} | {n:,} |" for (kind, end), n in sorted(ends.items()))
    summary = (
        f"`{command.strip()}`\n\ncommit {environment['commit']}, {started}. "
        f"{sum(ends.values()):,} trials, {len(wrongs)} wrong: {meaning}.\n\n"
        f"| {heading} | end | trials |\n| --- | --- | --- |\n{rows}\n"
    )
    print(summary)
    if out:
        write_text(Path(f"{out}.md"), summary)
        record = {"command": command, "environment": environment, "started": started}
        counts = [[*key, n] for key, n in sorted(ends.items())]
        write_text(
            Path(f"{out}.json"),
            json.dumps(record | {"ends": counts, "wrong": wrongs}, indent=2) + "\n",
        )
    return 1 if wrongs else 0
