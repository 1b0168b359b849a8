"""A model card: what a run is, what was measured on it, and the license of its weights."""

from typing import cast

import yaml

from simsiam.errors import printable
from simsiam.model.encoder import Encoder
from simsiam.monitoring.verdict import features_table
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.records import Record
from simsiam.runs.run_folder import HEAD_FILE, ORIGIN_FILE, PATCHES_KEY, Run
from simsiam.runs.weight_files import load_metadata
from simsiam.utils.names import hide_keys


def model_card(run: Run, license: str | None = None) -> str:
    """Write the model card of a run.

    Args:
        run: The run. All numbers come from its folder; where one is missing, the card says so.
        license: The license of the weights, if it is known.

    Returns:
        Markdown, with the heading that the hub reads.
    """
    recipe, transform = run.recipe, eval_transform(run.recipe)
    origin = run.json(ORIGIN_FILE)
    heading = {
        "library_name": "simsiam",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", recipe.method.name] if recipe.method.name != "none" else [],
        "license": license or origin.get("license") or "unknown",
    }
    if recipe.channels == 3:
        preprocessing = (
            f"Upright (EXIF orientation applied), RGB in 0..1, shorter side to {transform.resize} "
            f"px ({transform.interpolation}, antialiased), center crop of {transform.size} px, "
            "then "
            f"(x - {list(transform.mean)}) / {list(transform.std)}."
        )
    else:
        preprocessing = f"{recipe.channels} channels; see preprocessing.json."
    facts = [f"| {name} | {escape_cell(text)} |" for name, text in run_facts(run).items()]
    lines = [
        "---", yaml.safe_dump(heading, sort_keys=False).strip(), "---", "",
        f"# {run.path.name}", "",
        "A vision backbone: it turns each image into one feature vector.", "",
        "| | |", "|---|---|", *facts, "",
        "## Preprocessing", "", preprocessing, "",
        "## Results", "", *results_table(run), "",
        *worth_lines(run.json("summary.json")),
        "## License", "", *license_lines(license, origin),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def license_lines(license: str | None, origin: Record) -> list[str]:
    """Say which license weights have, and which those have that they were made from.

    Args:
        license: The license of the weights, if it is known.
        origin: The content of origin.json; {} if the run started from no published weights.
    """
    lines = [f"{license}."] if license else []
    if origin:
        name = escape_cell(str(origin.get("weights")))
        license = escape_cell(origin.get("license", "unknown"))
        lines.append(f"Made from the weights {name}, whose license is: {license}.")
    return lines or ["The author has not said which license these weights have."]


def head_facts(run: Run) -> dict[str, str]:
    """Describe what the encoder has besides its backbone.

    Args:
        run: The run.

    Returns:
        Facts by name; none if it is the backbone alone.
    """
    if not run.has_head:
        return {}
    encoder = cast(Encoder, load(run.path))
    parts = {"head": encoder.head, "head of the patches": encoder.patches_head}
    facts = {
        name: f"a linear map, {layer.in_features} -> {layer.out_features}, of `head.safetensors`"
        for name, layer in parts.items()
        if layer is not None
    }
    patches = load_metadata(run.path / HEAD_FILE).get(PATCHES_KEY)
    return facts | ({"second branch": f"{patches}, of `head.safetensors`"} if patches else {})


def run_facts(run: Run) -> dict[str, str]:
    """Collect the facts about a run that go on its card.

    Args:
        run: The run.

    Returns:
        Facts by name. Of paths, only the last part: folders may contain names of people.
    """
    recipe, summary = run.recipe, run.json("summary.json")
    environment, origin = run.json("environment.json"), run.json(ORIGIN_FILE)
    source = ", ".join(hide_keys(part).rstrip("/").rpartition("/")[2] for part in recipe.source)
    labels = "with" if recipe.method.target == "labels" else "without"
    start = recipe.init or str(origin.get("weights", "random weights"))
    steps = summary.get("steps", "?")
    device, precision = (environment.get(key, "unknown") for key in ("device", "precision"))
    facts = {
        "method": f"{recipe.method.name} (Chen & He, 2021; `recipe.yaml` has every setting)",
        "images": f"{source}, {labels} labels",
    }
    if recipe.method.name == "none":  # converted from a network that no method here has trained
        facts = {"method": "not trained by this program", "images": source}
    return facts | {
        "backbone": f"{recipe.backbone}, width {recipe.width}",
        **head_facts(run),
        **({"weights": str(origin.get("origin"))} if origin else {}),
        "started from": hide_keys(start).rstrip("/").rpartition("/")[2],
        "training": f"{steps} steps of {recipe.batch_size} images, seed {recipe.seed}",
        "verdict": str(summary.get("verdict", "not finished")),
        "hardware": f"{device}, {precision}",
        "commit": str(environment.get("commit") or "unknown"),
    }


def results_table(run: Run) -> list[str]:
    """Make a table of accuracies, each with its protocol.

    Args:
        run: The run.

    Returns:
        Lines of Markdown.
    """
    rows = [
        f"| {escape_cell(r['protocol'])} | {escape_cell(r['name'])} | "
        f"{escape_cell(r['features'])} | {escape_cell(r['source'])} | "
        f"{escape_cell(r['checkpoint'])} | {r['top1']:.1f} | {format_interval(r)} | "
        f"{r.get('n', '')} |"
        for r in run.evaluations()
        if "top1" in r
    ]
    if rows:
        heading = (
            "| protocol | parameters | features | source | checkpoint | top-1 % | 95 % or ± | "
            "images |"
        )
        return [heading, "|---|---|---|---|---|---|---|---|", *rows]
    if knn := run.json("summary.json").get("knn_top1"):
        return [f"kNN on images that were not trained on: {knn['last']:.1f} % at the end."]
    return ["Nothing yet: `simsiam evaluate` measures the backbone."]


def worth_lines(summary: Record) -> list[str]:
    """Make a section with the features that were measured at the end of a run, and the advice.

    Args:
        summary: The content of summary.json.

    Returns:
        Lines of Markdown; none if nothing was measured.
    """
    if not (rows := features_table(summary)):
        return []
    heading, *others = ("| " + " | ".join(map(escape_cell, row)) + " |" for row in rows)
    advice = escape_cell(f"{summary.get('remedy', '')} {summary.get('advice', '')}")
    return ["## Features compared", "", heading, "|---|---|---|", *others, "", advice, ""]


def format_interval(record: Record) -> str:
    """Format the uncertainty of an accuracy.

    Args:
        record: An evaluation with a 95 % `interval`, or with `top1_std` over several draws.
    """
    if "interval" in record:
        return "{:.1f} to {:.1f}".format(*record["interval"])
    return f"± {record['top1_std']:.1f}" if record.get("top1_std") is not None else ""


def escape_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table.

    Args:
        text: Any text.
    """
    return printable(text.replace("\n", " ")).replace("|", "\\|").replace("<", "&lt;")
