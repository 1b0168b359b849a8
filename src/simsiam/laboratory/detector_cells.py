"""Table 5: every run of an experiment is fine-tuned as a detector on the user's annotated sets."""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from simsiam.detection.annotations import find_voc_folders
from simsiam.detection.transfer import transfer
from simsiam.errors import UsageError
from simsiam.laboratory.claims import MetricValues
from simsiam.laboratory.experiment_page import PAPER_RESULTS, format_mean_std
from simsiam.runs.run_folder import Run

AP_METRICS = ("AP50", "AP", "AP75")  # in the paper's order


class DetectorSetting(NamedTuple):
    """One fine-tuning of a run, and the columns of the table that it fills."""

    source: tuple[str, ...]
    task: Literal["detection", "segmentation"]
    schedule: str
    columns: Mapping[str, str]  # metric by heading
    overrides: Mapping[str, Any] = {}  # of the schedule


def list_detector_settings(annotated: Sequence[str]) -> list[DetectorSetting]:
    """Choose how detectors are fine-tuned.

    Args:
        annotated: Annotated sets: VOCdevkit (used as VOC07 and VOC07+12), another VOC set, a folder
            in COCO format, or "shapes".

    Returns:
        The fine-tunings.

    Raises:
        UsageError: If a set is none of these.
    """
    settings = []
    for text in annotated:
        if text == "shapes":
            columns = {"shapes detection": "coco_box", "shapes instance segmentation": "coco_mask"}
            settings.append(DetectorSetting((text,), "segmentation", "auto", columns))
            continue
        folders = {folder.name: str(folder) for folder, _ in find_voc_folders(text)}
        if "VOC2007" in folders:
            voc07 = (folders["VOC2007"],)
            columns = {"VOC07 detection": "voc_box"}
            settings.append(DetectorSetting(voc07, "detection", "voc07", columns))
            if "VOC2012" in folders:
                voc0712 = (*voc07, f"{folders['VOC2012']}:train")
                columns = {"VOC07+12 detection": "voc_box"}
                settings.append(DetectorSetting(voc0712, "detection", "voc0712", columns))
        elif folders:
            columns = {f"{Path(text).name} detection": "voc_box"}
            settings.append(DetectorSetting((text,), "detection", "auto", columns))
        elif (Path(text) / "annotations" / "instances_train2017.json").is_file():
            columns = {"COCO detection": "coco_box", "COCO instance segmentation": "coco_mask"}
            settings.append(DetectorSetting((text,), "segmentation", "coco", columns))
        else:
            raise UsageError(
                f"annotated is {text}; it takes VOCdevkit, a folder of COCO 2017, or shapes"
            )
    return settings


def measure_detectors(
    run: Run, settings: Sequence[DetectorSetting], *, from_scratch: bool, device: str
) -> dict[str, object]:
    """Fine-tune a run as a detector in every setting, unless that was done before.

    Args:
        run: The run.
        settings: The fine-tunings.
        from_scratch: Whether to start from random weights instead of the run's.
        device: "auto", "cpu", "cuda", ...

    Returns:
        `detectors`, with AP50, AP and AP75 in percent by column, and `ap50`, the mean of AP50 over
        columns.
    """
    columns: dict[str, list[float]] = {}
    for setting in settings:
        record = _find_record(run, setting, from_scratch)
        if record is None:
            with redirect_stdout(io.StringIO()):
                transfer(
                    run.path,
                    setting.source,
                    task=setting.task,
                    schedule=setting.schedule,
                    from_scratch=from_scratch,
                    seed=run.recipe.seed,
                    device=device,
                    **setting.overrides,
                )
            record = _find_record(run, setting, from_scratch)
            assert record is not None
        for column, metric in setting.columns.items():
            columns[column] = [record["metrics"][metric][key] for key in AP_METRICS]
    return {"detectors": columns, "ap50": fmean(values[0] for values in columns.values())}


def _find_record(run: Run, setting: DetectorSetting, from_scratch: bool) -> dict[str, Any] | None:
    """Look for the record of a fine-tuning.

    Args:
        run: The run.
        setting: The fine-tuning.
        from_scratch: Whether it started from random weights.

    Returns:
        The record, or None if there is none with these arguments.
    """
    arguments = {
        "source": list(setting.source),
        "schedule": setting.schedule,
        "init": None,
        "from_scratch": from_scratch,
        "words": dict(setting.overrides),
    }
    for record in run.transfers():
        same_task = (record["task"], record["seed"]) == (setting.task, run.recipe.seed)
        if same_task and record.get("asked") == arguments:
            return record
    return None


def detector_table(name: str, values: MetricValues) -> list[list[str]]:
    """Build the main table: AP50 / AP / AP75 in each of our columns, and then the paper's.

    Args:
        name: The experiment.
        values: The measured metrics.

    Returns:
        The heading, then a row for each cell.
    """
    first: Mapping[str, object] = next(
        (v["detectors"] for seeds in values.values() for v in seeds.values() if "detectors" in v),
        {},
    )
    ours, paper = list(first), PAPER_RESULTS[name]["columns"]
    headings = [f"ours: {column}, {' / '.join(AP_METRICS)}" for column in ours]
    rows = [["", *headings, "seeds", *(f"paper: {column}" for column in paper)]]
    for cell, seeds in values.items():
        cells = []
        for column in ours:
            numbers = {
                seed: dict(zip(AP_METRICS, v["detectors"][column], strict=True))
                for seed, v in seeds.items()
                if "detectors" in v
            }
            cells.append(" / ".join(format_mean_std(numbers, key, 1) for key in AP_METRICS))
        numbers_of = PAPER_RESULTS[name]["cells"].get(cell, {})
        published = [" / ".join(f"{x:.1f}" for x in numbers_of.get(column, ())) for column in paper]
        rows.append([cell, *cells, str(len(seeds)), *published])
    return rows
