"""Table 5: every run of an experiment fine-tuned as a detector, each on the annotated sets that the user has."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from simsiam.detection.annotations import find_voc_folders
from simsiam.detection.transfer import transfer
from simsiam.errors import UsageError
from simsiam.laboratory.claims import MetricValues
from simsiam.laboratory.experiment_page import PAPER_RESULTS, format_mean_std
from simsiam.runs.run_folder import Run

AP_METRICS = ("AP50", "AP", "AP75")  # in the paper's order


class FineTuning(NamedTuple):
    """One fine-tuning, and the columns of the table that it fills: heading to metric."""

    source: tuple[str, ...]
    task: str
    schedule: str
    columns: Mapping[str, str]
    overrides: Mapping[str, Any] = {}  # of the schedule, moved


def list_fine_tunings(annotated: Sequence[str]) -> list[FineTuning]:
    """What is fine-tuned on: VOCdevkit as VOC07 and VOC07+12, a folder of COCO's, shapes; another VOC set as it is.

    Raises UsageError for what is none of these.
    """
    found = []
    for text in annotated:
        if text == "shapes":
            columns = {"shapes detection": "coco_box", "shapes instance segmentation": "coco_mask"}
            found.append(FineTuning((text,), "segmentation", "auto", columns))
            continue
        folders = {folder.name: str(folder) for folder, _ in find_voc_folders(text)}
        if "VOC2007" in folders:
            seven = folders["VOC2007"]
            found.append(FineTuning((seven,), "detection", "voc07", {"VOC07 detection": "voc_box"}))
            if "VOC2012" in folders:
                both = (seven, f"{folders['VOC2012']}:train")
                found.append(
                    FineTuning(both, "detection", "voc0712", {"VOC07+12 detection": "voc_box"})
                )
        elif folders:
            found.append(
                FineTuning(
                    (text,), "detection", "auto", {f"{Path(text).name} detection": "voc_box"}
                )
            )
        elif (Path(text) / "annotations" / "instances_train2017.json").is_file():
            columns = {"COCO detection": "coco_box", "COCO instance segmentation": "coco_mask"}
            found.append(FineTuning((text,), "segmentation", "coco", columns))
        else:
            raise UsageError(
                f"annotated is {text}; it takes VOCdevkit, a folder of COCO 2017, or shapes"
            )
    return found


def measure_detectors(
    run: Run, fine_tunings: Sequence[FineTuning], *, from_scratch: bool, device: str
) -> dict[str, Any]:
    """`detectors`, AP50, AP and AP75 by column, and `ap50`, its mean over columns. What is there is not done again."""
    seed = run.recipe.seed
    columns: dict[str, list[float]] = {}
    for tuning in fine_tunings:
        how: dict[str, Any] = {"schedule": tuning.schedule, "from_scratch": from_scratch}
        asked = how | {"source": list(tuning.source), "init": None, "words": dict(tuning.overrides)}
        known = [
            r
            for r in run.transfers()
            if (r["task"], r["seed"], r["asked"]) == (tuning.task, seed, asked)
        ]
        if not known:
            how |= {"task": tuning.task, "seed": seed, "device": device, **tuning.overrides}
            with redirect_stdout(io.StringIO()):
                known = [transfer(run.path, tuning.source, **how)]
        for column, metric in tuning.columns.items():
            columns[column] = [known[0]["metrics"][metric][key] for key in AP_METRICS]
    return {"detectors": columns, "ap50": fmean(values[0] for values in columns.values())}


def detector_table(name: str, values: MetricValues) -> list[list[str]]:
    """The heading, then a row for each cell: our columns, AP50 / AP / AP75 in each, and then the paper's."""
    seen = [v["detectors"] for seeds in values.values() for v in seeds.values() if "detectors" in v]
    ours, paper = list(seen[0]) if seen else [], PAPER_RESULTS[name]["columns"]
    order = " / ".join(AP_METRICS)
    rows = [
        [
            "",
            *(f"ours: {column}, {order}" for column in ours),
            "seeds",
            *(f"paper: {column}" for column in paper),
        ]
    ]
    for cell, seeds in values.items():
        cells = []
        for column in ours:
            numbers = {
                seed: dict(zip(AP_METRICS, v["detectors"][column], strict=True))
                for seed, v in seeds.items()
                if "detectors" in v
            }
            cells.append(" / ".join(format_mean_std(numbers, key, 1) for key in AP_METRICS))
        printed = PAPER_RESULTS[name]["cells"].get(cell, {})
        there = [
            " / ".join(f"{v:.1f}" for v in printed[column]) if column in printed else ""
            for column in paper
        ]
        rows.append([cell, *cells, str(len(seeds)), *there])
    return rows
