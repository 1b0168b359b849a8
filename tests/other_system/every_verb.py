r"""Run every verb once, small, in a new folder, and check the names of the files that it writes.

    SIMSIAM_TEST_SYSTEM=win32 PYTHONPATH=tests/other_system \
        python tests/other_system/every_verb.py FOLDER

The last line is a list of what failed.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

SYSTEM = os.environ.get("SIMSIAM_TEST_SYSTEM", "here")
RESERVED = {"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(10))}
SMALL = (
    "--backbone|resnet10|--width|4|--dim|16|--proj-hidden|16|--pred-dim|4|--image-size|32"
    "|--batch-size|16|--holdout|8|--workers|2"
)
# "|" stands between arguments.
COMMANDS = [
    "methods",
    "inspect|photos|--out|facts.json",
    "plan|photos",
    "preview|photos|--out|views.png",
    f"pretrain|photos|--epochs|2|--out|run|{SMALL}",
    "resume|run|--epochs|3",
    "evaluate|run",
    "report|run",
    "embed|run|photos|--out|features.parquet",
    "neighbors|features.parquet|photos/first.png|--html|neighbors.html",
    "duplicates|features.parquet|--html|copies.html",
    "cluster|features.parquet|--clusters|2|--out|clusters.csv",
    "outliers|features.parquet",
    "probe|features.parquet|labels.csv|--out|predicted.csv",
    "search|photos|photos/first.png|--encoder|run",
    "search|photos|photos/first.png|--encoder|run",
    "shard|photos|--out|shards",
    "embed|run|shards|--out|features2.parquet",
    "export|run|--format|safetensors",
    "convert|run|--out|converted",
    "adapt|photos|--minutes|1|--out|adapted",
    "transfer|run|scenes|--steps|2|--batch-size|2|--precise-bn|0|--test-side|64|--train-sides|64",
    "compare|run|adapted",
    "reproduce|figure3",
]


def write_inputs(folder: Path) -> None:
    """Write drawn images, labels of some of them, and scenes with objects."""
    from simsiam.detection.scenes import write_scenes
    from simsiam.sources.shapes import draw_split

    images, labels = draw_split("train")
    table = ["path,label"]
    for i in range(48):
        name = "first.png" if i == 0 else f"class {labels[i] % 2}/{i:03}.png"
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.moveaxis(images[i], 0, -1)).save(folder / "photos" / name)
        table += [f"{name},{labels[i] % 2}"] if i % 5 == 1 else []
    (folder / "labels.csv").write_text("\n".join(table))
    write_scenes(folder / "scenes", {"train": 8, "val": 4, "test": 4})


def wrong_names(folder: Path) -> list[str]:
    """Find what cannot be a name on Windows, or differs from another name in case alone."""
    found, names = [], [path for path in folder.rglob("*") if "photos" not in path.parts]
    for path in names:
        stem = path.name.partition(".")[0].lower()
        if set('<>:"|?*\\') & set(path.name) or path.name[-1] in ". " or stem in RESERVED:
            found.append(f"cannot be a name on Windows: {path}")
    lower = [str(path).lower() for path in names]
    return found + [f"differs in case alone: {text}" for text in lower if lower.count(text) > 1]


def main(folder: Path) -> None:
    """Run the verbs."""
    from simsiam.commands.main import main as run

    os.chdir(folder)
    os.environ["SIMSIAM_CACHE"] = str(folder / "cache")
    os.environ["SIMSIAM_STATE"] = str(folder / "state")
    write_inputs(folder)
    failed = []
    for command in COMMANDS:
        code = 0
        with suppress(SystemExit):
            code = run(command.split("|"))
        print(f"{SYSTEM}: simsiam {command.replace('|', ' ')}: exit {code}", flush=True)
        failed += [command] if code else []
    print(json.dumps(failed + wrong_names(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
