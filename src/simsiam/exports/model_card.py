"""A model card: what a run is, what was measured on it, and under which license its weights are."""

from typing import Any

import yaml

from simsiam.runs.encoder import eval_transform
from simsiam.runs.run_folder import Run


def model_card(run: Run, license: str | None = None) -> str:
    """Markdown with the hub's heading. Numbers are those of the run folder; where there is none, it says so."""
    recipe, summary, transform = run.recipe, run.json("summary.json"), eval_transform(run.recipe)
    here = run.json("environment.json")
    heading = {
        "library_name": "simsiam",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised", recipe.method.name],
        "license": license or "unknown",
    }
    source = ", ".join(
        part.rstrip("/").rpartition("/")[2] for part in recipe.source
    )  # folders may name people
    facts = {
        "method": f"{recipe.method.name} (Chen & He, 2021; `recipe.yaml` has every setting)",
        "images": f"{source}, without labels"
        if recipe.method.target != "labels"
        else f"{source}, with labels",
        "backbone": f"{recipe.backbone}, width {recipe.width}",
        "started from": (recipe.init or "random weights").rstrip("/").rpartition("/")[2],
        "training": f"{summary.get('steps', '?')} steps of {recipe.batch_size} images, seed {recipe.seed}",
        "verdict": str(summary.get("verdict", "not finished")),
        "hardware": f"{here.get('device', 'unknown')}, {here.get('precision', 'unknown')}",
        "commit": str(here.get("commit") or "unknown"),
    }
    lines = [
        "---",
        yaml.safe_dump(heading, sort_keys=False).strip(),
        "---",
        "",
        f"# {run.path.name}",
        "",
    ]
    lines += [
        "A vision backbone: images in, one feature vector each out.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {escape_cell(text)} |" for name, text in facts.items()]
    lines += ["", "## Images in", ""]
    lines += [
        f"RGB in 0..1, shorter side to {transform.resize} px ({transform.interpolation}, antialiased), center crop of "
        f"{transform.size} px, then (x - {list(transform.mean)}) / {list(transform.std)}."
        if recipe.channels == 3
        else f"{recipe.channels} channels; preprocessing.json has the rest."
    ]
    lines += ["", "## Measured", "", *results_table(run, summary), "", "## License", ""]
    lines += [
        f"{license}."
        if license
        else "Its maker has not said under which license these weights are."
    ]
    return "\n".join(lines) + "\n"


def results_table(run: Run, summary: dict[str, Any]) -> list[str]:
    """A table of accuracies, each with its protocol."""
    lines = [
        f"| {r['protocol']} | {escape_cell(r['name'])} | {r['features']} | {escape_cell(r['source'])} | {r['checkpoint']} "
        f"| {r['top1']:.1f} | {format_interval(r)} | {r['n']} |"
        for r in run.evaluations()
        if "top1" in r
    ]
    if lines:
        heading = "| protocol | parameters | features | source | checkpoint | top-1 % | 95 % or ± | images |"
        return [heading, "|---|---|---|---|---|---|---|---|", *lines]
    if knn := summary.get("knn_top1"):
        return [f"kNN on images held out of training: {knn['last']:.1f} % at the end."]
    return ["Nothing yet: `simsiam evaluate` measures what a backbone is worth."]


def format_interval(record: dict[str, Any]) -> str:
    if "interval" in record:
        return "{:.1f} to {:.1f}".format(*record["interval"])
    return f"± {record['top1_std']:.1f}"


def escape_cell(text: str) -> str:
    """As it stands in a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
