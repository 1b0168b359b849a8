"""The tutorial notebook runs from top to bottom, and all its settings are in one cell."""

import ast
import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def code(cells) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_runs_from_top_to_bottom_and_again(cells):
    """Once in a new folder, and once more in the same: existing results are not made again."""
    names: dict = {}
    for text in code(cells):
        exec(text, names)
    made = Path("tutorial")
    with open(made / "all.csv", newline="") as file:
        answers = list(csv.DictReader(file))
    assert len(answers) == 600 and sum(bool(row["label"]) for row in answers) == 50
    right = sum(
        row["predicted"] == names["truth"][row["path"]] for row in answers if not row["label"]
    )
    assert right > 80  # of 550; 55 ± 7 by chance
    assert (made / "run" / "report.html").is_file() and (made / "near.html").is_file()
    weights = load_file(made / "run" / "exports" / "safetensors" / "backbone.safetensors")
    assert tuple(names["h"].shape) == (1, len(weights["bn1.weight"]) * 8)
    before = (made / "run" / "metrics.jsonl").stat().st_mtime_ns
    again: dict = {}
    for text in code(cells):
        exec(text, again)
    assert (made / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_settings_are_in_the_first_cell_and_no_output_is_kept(cells):
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    first, *rest = map(ast.parse, code(cells))
    settings = {
        node.id
        for node in ast.walk(first)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert settings == {
        *("images", "drawn_images", "labels", "labels_per_class"),
        *("work", "training", "format"),
    }
    for tree in rest:
        for node in ast.walk(tree):
            assert not (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
                and node.id in settings
            )
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), (
                "a setting outside its cell"
            )
