"""What the long measurements share: each result is a file, and what has a file is not repeated.

So every program that uses this can be stopped and started at any time.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simsiam.runs.run_folder import Run
from simsiam.training.launch import pretrain, resume
from simsiam.utils.files import write_text

SHOWN = ("settings", "knn", "verdict", "seconds")  # of a cell's content, when it is measured


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of a program, and that has `--page`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write only the page")
    return parser


def train_or_resume(source: str, run: Path, **settings: Any) -> Run:
    """Train a run, or the rest of it if it was begun."""
    if (run / "recipe.yaml").exists():
        resume(run, source=source, logger="none")
    else:
        pretrain(source, out=run, logger="none", **settings)
    return Run(run)


def measure_once(path: Path, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of a cell's file, which is measured and written if there is none.

    Args:
        path: The JSON file.
        measure: Returns the content; what it has no value for is added: "seconds" that it took,
            and "threads" of torch.
    """
    if not path.exists():
        begun = time.monotonic()
        content = dict(measure())
        content.setdefault("seconds", round(time.monotonic() - begun))
        content.setdefault("threads", torch.get_num_threads())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content) + "\n")
        shown = [f"{key} {content[key]}" for key in SHOWN if key in content]
        print(f"{path.stem}: {', '.join(shown)}", flush=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_page(folder: Path, lines: Sequence[str]) -> None:
    """Write README.md of a folder: lines, and what README.reading.md concludes from them."""
    reading = folder / "README.reading.md"
    text = ["", reading.read_text(encoding="utf-8").rstrip()] if reading.exists() else []
    write_text(folder / "README.md", "\n".join([*lines, *text]) + "\n")
