"""What verbs print."""

import os
import shutil
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

from simsiam.errors import printable
from simsiam.monitoring.verdict import features_table


def print_lines(text: object) -> None:
    """Print text with control characters made visible, so no file name can control the terminal.

    A terminal gets its lines broken between words.

    Args:
        text: Anything; it is converted to a string.
    """
    lines = [*map(printable, str(text).splitlines())]
    if sys.stdout is not None and sys.stdout.isatty():  # None if it was closed, as by >&-
        width = shutil.get_terminal_size().columns
        wrap = partial(textwrap.wrap, width=width, break_on_hyphens=False, break_long_words=False)
        lines = [part for line in lines for part in (wrap(line) if len(line) > width else [line])]
    print("\n".join(lines))


def print_run_summary(run: Path) -> None:
    """Print how a training run ended. Under torchrun only the first process prints.

    Args:
        run: The run folder.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from simsiam.utils.typed_json import read_json

    summary = read_json(run / "summary.json", dict[str, Any])
    speed = f"{summary['images_per_second']:.0f} images/s"
    print_lines(f"{summary['verdict']} after {summary['steps']} steps at {speed}")
    if knn := summary.get("knn_top1"):
        best = f"{knn['best']:.1f} % at best (step {knn['best_step']})"
        print_lines(f"kNN on held-out images: {knn['last']:.1f} % at the end, {best}")
    rows = features_table(summary)
    width = max((len(features) for features, _, _ in rows), default=0)
    for features, score, accuracy in rows:
        print_lines(f"{features:<{width}} {score:<22} {accuracy}".rstrip())
    if summary["unreadable"]:
        print_lines(f"{summary['unreadable']} unreadable files were left out: {run}/quarantine.txt")
    print_lines(summary["remedy"])
    if summary["advice"]:
        print_lines(summary["advice"])
    print_lines(f"run folder: {run}")
