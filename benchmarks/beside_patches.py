"""Measure networks beside patches, and make the page results/beside_patches.

    python benchmarks/beside_patches.py [RUN SOURCE ...] [--page]

Each RUN is a run folder that was trained on SOURCE, which has labels. For each, the kNN accuracy of
its network, of the patches that `adapt` would choose, and of both beside each other is measured on
the test split (or val, or what the run held out), with several weights of the patches. Each run is
a file in results/beside_patches/cells; what is there is not measured again. `--page` writes only
the page.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import argument_parser, measure_once, write_page

from simsiam.data.images import Images, load_into_memory, sample
from simsiam.model.encoder import join_features
from simsiam.model.precision import Compute
from simsiam.monitoring.candidates import best_patches, make_candidate, measure, read_sample
from simsiam.monitoring.nearest_neighbors import knn_top1, labeled_features
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run
from simsiam.sources.open_source import open_source
from simsiam.training.prepare import prepare_data

OUT = Path(__file__).parents[1] / "results" / "beside_patches"
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the cosine of patches, relative to that of the network
MAX_TRAIN, MAX_TEST = 5000, 2000  # images that vote, and that are classified


def split(run: Run, source: str) -> tuple[Images, Images, Images]:
    """Return the training images, those that vote and those that are classified."""
    opened = open_source(source)
    data = prepare_data(run.recipe, opened)
    test = opened.test if opened.test is not None else opened.val
    voters, test = (data.bank, data.held_out) if test is None else (opened.train, test)
    return data.train, sample(voters, MAX_TRAIN), sample(test, MAX_TEST)


def row(path: str, source: str) -> dict[str, Any]:
    """Measure one run."""
    run, compute = Run(path), Compute.pick("cpu")
    train, *both = split(run, source)
    bank, queries = (load_into_memory(images, 2**31)[0] for images in both)
    transform, network = eval_transform(run.recipe), load(run.path, head=False)
    chosen = read_sample(train, transform.resize, seed=run.recipe.seed)

    def features(encoder) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        both = [labeled_features(encoder, x, transform, compute=compute) for x in (bank, queries)]
        return [matrices[0] for matrices, _, _ in both], [labels for _, labels, _ in both]

    def knn(h: Sequence[torch.Tensor]) -> float:
        return round(knn_top1(h[0], labels[0], h[1], labels[1], classes=len(bank.classes)), 2)

    with torch.no_grad():
        best, _ = best_patches(chosen, transform)  # which takes a GPU if there is one
        patches, head = map(compute.place, (best.branches[0].backbone, best.heads[0]))
        (branch,) = measure({"network": network}, transform, chosen, compute, noise=False)
        alone = make_candidate("network", [branch], [None], chosen)
        h, labels = features(network)
        p = [head(x) for x in features(patches)[0]]
        joined = {w: knn([join_features(*pair, w) for pair in zip(h, p)]) for w in WEIGHTS}
    summary = run.json("summary.json")
    return {
        "run": run.path.name,
        "set": Path(source).name.partition(".")[0],
        "method": run.recipe.method.name,
        "images_seen": summary["steps"] * run.recipe.batch_size,
        "network": knn(h),
        "patches": knn(p),
        "best patches": best.name,
        "joined": joined,
        "scores": [round(alone.score, 4), round(best.score, 4)],
        "n": len(labels[1]),
    }


def make_page() -> None:
    """Write README.md from the cells that are there."""
    rows = [json.loads(path.read_text()) for path in sorted((OUT / "cells").glob("*.json"))]
    gains = [row["joined"]["1.0"] - max(row["network"], row["patches"]) for row in rows]
    above = sum(gain > 0 for gain in gains)
    alone = [row["joined"]["1.0"] - row["network"] for row in rows]
    lines = [
        "# Networks beside patches", "",
        "Written by `python benchmarks/beside_patches.py RUN SOURCE ...`; cells/ has each run. "
        "kNN accuracy in percent of the network's features h, of the best patches with their map "
        "(chosen without labels), and of both beside each other, where the cosine is "
        "(cos h + w cos p) / (1 + w). `adapt --init RUN` takes w = 1, in bold "
        "([why](../../docs/closed_form.md#a-trained-network-beside-them)). "
        f"At most {MAX_TRAIN:,} images vote and {MAX_TEST:,} are classified. Runs on one set with "
        "one method are not independent.", "",
        "Runs are named as on the pages that they are from: SET-default_20-SEED of "
        "[six_sets](../six_sets/README.md), SET-sprint-5-SEED and SET-folder-5-SEED of "
        "[equal_time](../sprint/equal_time/README.md), METHOD, seed SEED of the "
        "[race](../../docs/performance.md#time-to-accuracy), and shapes, CELL of "
        "[plateau](../plateau/README.md). w = 1 was chosen with all of them but those on "
        "`brain_mri` and `solar_cells`, which tested it.", "",
        f"With w = 1, both together are above the better of the two on {above} of {len(rows)} "
        f"runs; the difference is {min(gains):+.1f} to {max(gains):+.1f} points. The difference to "
        f"the network alone is {min(alone):+.1f} to {max(alone):+.1f}.", "",
        "| set | run | method | images seen | n | h | p | "
        + " | ".join(f"w = {w:g}" for w in WEIGHTS) + " |",
        "|---" * (7 + len(WEIGHTS)) + "|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: (row["set"], row["method"], row["images_seen"])):
        cells = [f"{row['joined'][str(w)]:.1f}" for w in WEIGHTS]
        cells[WEIGHTS.index(1.0)] = f"**{cells[WEIGHTS.index(1.0)]}**"
        lines.append(
            f"| {row['set']} | {row['run']} | {row['method']} | {row['images_seen']:,} | "
            f"{row['n']} | {row['network']:.1f} | {row['patches']:.1f} | {' | '.join(cells)} |"
        )
    write_page(OUT, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN SOURCE")
    options = parser.parse_args(arguments)
    if len(options.runs) % 2:
        parser.error("give a SOURCE after each RUN")
    for path, source in () if options.page else zip(options.runs[::2], options.runs[1::2]):
        name = f"{Path(source).name.partition('.')[0]}-{Path(path).name.replace(' ', '_')}"
        measure_once(OUT / "cells" / f"{name}.json", partial(row, path, source))
    make_page()


if __name__ == "__main__":
    main()
