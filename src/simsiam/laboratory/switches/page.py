"""The interactive page of `switches`: its numbers are those of switches.json, and no others."""

from base64 import b64decode
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

from simsiam import __version__
from simsiam.data.images import Images
from simsiam.errors import WorkFailed
from simsiam.laboratory.jobs import RunRecord
from simsiam.laboratory.switches.recording import NUM_VOTERS, Recording
from simsiam.laboratory.switches.sentences import (
    KNN_MARGIN,
    RANK_FACTOR,
    Ending,
    describe_ending,
    describe_turn,
    read_ending,
)
from simsiam.pages.report import render_page
from simsiam.pages.thumbnails import build_gallery, encode_gallery

SCRIPTS = ("elements.js", "data.js", "curves.js", "images.js", "switches.js")
MAX_THUMBNAIL_BYTES = 120_000
SAME_RULE = (
    f"About the same: the effective rank changes by less than a factor of {RANK_FACTOR}, the "
    f"accuracy by less than {KNN_MARGIN:.0f} percentage points, about two standard errors of a "
    "difference between accuracies on 300 images."
)
Options: TypeAlias = dict[str, str | int]  # of a run, by switch


def read_options(recipe: Mapping[str, Any]) -> Options:
    """Read how the four switches of a run are set.

    Args:
        recipe: Its recipe as plain data.

    Returns:
        "on" or "off" for each switch, and the batch size.
    """
    method = recipe["method"]
    states = {
        "stop_gradient": method["stop_gradient"],
        "predictor": method["predictor"] != "none",
        "batch_norm": bool(method["head_bn"]),
    }
    switches: Options = {name: "on" if state else "off" for name, state in states.items()}
    return switches | {"batch_size": recipe["batch_size"]}


def render_switches(metadata: Mapping[str, Any], images: Images) -> str:
    """Render the page.

    Args:
        metadata: The content of switches.json.
        images: The images that were recorded.

    Returns:
        The HTML of the page, or "" if no run was recorded yet.

    Raises:
        WorkFailed: If these are not the images that were recorded.
    """
    cells: dict[str, dict[int, RunRecord]] = {}
    for run in metadata["runs"]:
        if run.get("recording", {}).get("steps"):
            cells.setdefault(run["cell"], {})[run["seed"]] = run
    cells = {cell: seeds for cell, seeds in cells.items() if 0 in seeds}
    if not cells:
        return ""
    gallery = encode_gallery(build_gallery(images), MAX_THUMBNAIL_BYTES)
    first = next(iter(cells.values()))[0]
    if len(b64decode(first["recording"]["points"][0])) != 2 * len(gallery["names"]):
        raise WorkFailed("these are not the images that the runs of `switches` were recorded with")
    chance = 100 / len(gallery["classes"]) if gallery["labels"] else None
    runs = [summarize_cell(seeds, chance) for seeds in cells.values()]
    batch_sizes = {int(read_options(seeds[0]["recipe"])["batch_size"]) for seeds in cells.values()}
    data = {
        "version": __version__,
        "command": metadata["command"],
        "facts": describe_campaign(metadata, list(cells.values()), len(gallery["names"])),
        "batch_sizes": sorted(batch_sizes),
        "rule": SAME_RULE,
        "num_runs": sum(len(seeds) for seeds in cells.values()),
        "runs": runs,
        "turns": collect_turns(runs, list(cells.values())),
        "gallery": gallery,
    }
    return render_page(
        data, SCRIPTS, title="What keeps SimSiam from collapsing?", command=metadata["command"]
    )


def summarize_cell(seeds: Mapping[int, RunRecord], chance: float | None) -> dict[str, object]:
    """Collect what the page shows of a cell.

    Args:
        seeds: Its runs by seed; the first is shown, of the others only the curves.
        chance: The accuracy of guessing in percent, None without labels.

    Returns:
        Data for JSON.
    """
    shown = seeds[0]["recording"]
    repeats = [run["recording"] for seed, run in seeds.items() if seed]
    columns = ("loss", "z_std_sqrt_d", "z_rank", "knn_top1")
    return {
        "options": read_options(seeds[0]["recipe"]),
        "recording": shown,
        "repeats": [{name: repeat[name] for name in columns} for repeat in repeats],
        "ending": describe_ending(read_run_ending(seeds[0]), chance),
    }


def read_run_ending(run: RunRecord) -> Ending:
    """Read how a recorded run ended.

    Args:
        run: The run.
    """
    recording: Recording = run["recording"]  # type: ignore[assignment]
    return read_ending(recording, diverged=bool(run["values"]["diverged"]))


def collect_turns(
    runs: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[int, RunRecord]]
) -> dict[str, object]:
    """Describe every turn of one switch.

    Args:
        runs: The cells as the page shows them.
        cells: The runs of each cell, by seed.

    Returns:
        The turns by "FROM-TO", positions in `runs`.
    """
    turns: dict[str, object] = {}
    endings = [{seed: read_run_ending(run) for seed, run in cell.items()} for cell in cells]
    for i, j in combinations(range(len(runs)), 2):
        a, b = runs[i]["options"], runs[j]["options"]
        changed = [name for name in a if a[name] != b[name]]
        if len(changed) != 1:
            continue
        for start, end in ((i, j), (j, i)):
            turns[f"{start}-{end}"] = describe_turn(
                changed[0],
                endings[start],
                endings[end],
                turned_on=runs[end]["options"][changed[0]] == "on",
                predictor=a["predictor"] == "on",
            )
    return turns


def describe_campaign(
    metadata: Mapping[str, Any], cells: Sequence[Mapping[int, RunRecord]], num_images: int
) -> list[str]:
    """Say how the runs were made and measured.

    Args:
        metadata: The content of switches.json.
        cells: The runs of each cell, by seed.
        num_images: The number of images that were recorded.

    Returns:
        Paragraphs.
    """
    run = cells[0][0]
    recipe, environment = run["recipe"], run["environment"]
    repeated = sum(len(seeds) > 1 for seeds in cells)
    finished = [other for other in metadata["runs"] if "values" in other]
    commits = sorted({str(other["environment"]["commit"])[:12] for other in finished})
    knn = (
        f" For kNN, {NUM_VOTERS} labeled training images vote; with more voters it is higher."
        if run["recording"]["knn_top1"][-1] is not None
        else ""
    )
    return [
        f"Each training: {recipe['backbone']} of width {recipe['width']} on "
        f"{metadata['metric'].removesuffix(', linear top-1 (%)')}, {recipe['epochs']} epochs. Of "
        f"the {len(cells)} combinations, {repeated} were trained a second time with another seed; "
        "the curves of the second training are dotted.",
        "All trainings see each image equally often, as where the paper compares batch sizes "
        "(Table 2). So all take about the same computation, but a larger batch takes fewer steps. "
        "With an equal number of steps, the largest batch would see many times as many images as "
        "the smallest. The learning rate is proportional to the batch size.",
        f"Everything was measured on the same {num_images} test images at step 0 and at steps that "
        "are evenly spaced on a log scale. As in training, batch norm takes its mean and variance "
        f"from the images that are measured.{knn}",
        "Collapsed: the standard deviation of z × √d is below 0.1, or its effective rank "
        f"at most 2. Partly collapsed: below 0.5, or at most 3. {SAME_RULE}",
        f"Written by `{metadata['command']}`; code {', '.join(commits)}; on "
        f"{environment['device']}. All numbers and recipes: switches.json.",
    ]
