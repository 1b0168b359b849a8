"""Measure what features are worth on six sets of images, and make the page results/six_sets.

    python benchmarks/six_sets.py DATA [--sets NAME ...] [--cells NAME ...] [--seeds N] [--page]

DATA is a folder with flowers.tar, brain_mri.tar, solar_cells.tar, hand_signs.tar,
imagenette224.tar and cifar10-jpeg/. Each cell is a file in results/six_sets/cells; a cell that is
there is not measured again, so the command can be stopped and started at any time. default_20 is
`simsiam pretrain --minutes 20`, default_20_adapt is `simsiam adapt --init` with that run, the
others are what their names say; minutes are those of one core if it is started with
OMP_NUM_THREADS=1. `--page` writes only the page. Accuracies are kNN with k = 20 and tau = 0.1 on
the test split (val of Imagenette).
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cells import argument_parser, measure_once, write_page
from torch import Tensor, nn

import simsiam
from simsiam.data.images import Images, sample
from simsiam.data.transform import Transform
from simsiam.model.backbones import create_backbone
from simsiam.model.precision import Compute
from simsiam.model.view_noise import make_linear
from simsiam.monitoring.candidates import (
    SIGNIFICANT,
    Branch,
    Candidate,
    choose,
    learn_patches,
    make_candidate,
    measure,
    read_sample,
)
from simsiam.monitoring.nearest_neighbors import knn_scores, labeled_features
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.open_source import Source, open_source
from simsiam.training.adaptation.adapt import closed_form_candidates

OUT = Path(__file__).parents[1] / "results" / "six_sets"
SETS = {
    "flowers": "flowers.tar",
    "brain_mri": "brain_mri.tar",
    "solar_cells": "solar_cells.tar",
    "hand_signs": "hand_signs.tar",
    "imagenette": "imagenette224.tar",
    "cifar10": "cifar10-jpeg",
}
CELLS = (
    "closed_forms",
    "default_20",
    "default_20_adapt",
    "adapt_3",
    "adapt_20",
    "adapt_lite0_5",
    "adapt_lite0_20",
)
# Minutes of larger sets, where they are not those in the name of the cell.
MINUTES = {
    ("adapt_3", "cifar10"): 6,
    ("adapt_lite0_5", "imagenette"): 10,
    ("adapt_lite0_5", "cifar10"): 20,
    ("adapt_lite0_20", "cifar10"): 60,
}
MAX_TRAIN, MAX_TEST = 4000, 2000  # images that vote, and that are classified, in closed_forms


def knn(train: Tensor, test: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """Return which test images the 20 nearest training images classify rightly, (M,) bool."""
    votes = knn_scores(train, labels, test, classes=int(labels.max()) + 1, k=20, tau=0.1)
    return votes.argmax(1) == truth


class ColorHistogram(nn.Module):
    """64 bins of color: a baseline that anyone can compute."""

    dim = 64

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 64) for pixels (N, 3, H, W) in 0..1."""
        level = (x * 3.999).long()
        bins = (level[:, 0] * 16 + level[:, 1] * 4 + level[:, 2]).flatten(1)
        return torch.zeros(len(x), 64).scatter_add_(1, bins, torch.ones(bins.shape)) / bins.shape[1]


class Pixels(nn.Module):
    """The image itself at 16 x 16 pixels."""

    dim = 768

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 768) for pixels (N, 3, H, W)."""
        return F.adaptive_avg_pool2d(x, 16).flatten(1)


def closed_forms(source: str, seed: int) -> dict[str, object]:
    """Measure everything that needs no training, with one sample, and the choices made on it.

    Args:
        source: The set.
        seed: Seed of the sample.

    Returns:
        For each candidate its accuracy, its label-free score and which test images are right; and
        the table of the choice.
    """
    train, test = splits(open_source(source))
    compute = Compute.pick("cpu")
    run = Run(open_weights("lite0"))
    transform = eval_transform(run.recipe)
    chosen = read_sample(train, transform.resize, seed=seed)
    backbones: dict[str, nn.Module] = {
        "lite0": load(run.path, head=False),
        **learn_patches(chosen, transform),
    }
    branches = measure(backbones, transform, chosen, compute, label="lite0 and patches")
    features = {
        branch.name: split_features(branch.backbone, train, test, transform, compute)
        for branch in branches
    }
    closed = list(closed_form_candidates(branches, chosen, start=True))
    candidates = [*closed, *whitened(branches[0], chosen)]
    rows = {candidate.name: evaluate(candidate, features) for candidate in candidates}
    unit = Transform(size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    random_network = create_backbone("resnet18", image_size=64)
    for name, network in {
        "pixels": Pixels(),
        "color": ColorHistogram(),
        "random": random_network,
    }.items():
        small = split_features(network, train, test, unit, Compute(compute.device, "float32"))
        rows[name] = accuracy_row(*small)
    _, table = choose(closed)
    return {"rows": rows, "choice": table}


def split_features(
    network: nn.Module, train: Images, test: Images, transform: Transform, compute: Compute
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the features of both splits, and the labels of the images that could be read."""
    compute.place(network)
    (a, train_labels, _), (b, test_labels, _) = (
        labeled_features(network, x, transform, compute=compute) for x in (train, test)
    )
    return a[0], b[0], train_labels, test_labels


def whitened(branch: Branch, chosen) -> list[Candidate]:
    """Two usual alternatives to the map: standardized channels, and PCA whitening."""
    h = branch.h[: len(branch.h) - branch.held_out.shape[1]]
    scale = torch.diag(1 / h.std(0).clamp_min(1e-6)).double()
    values, vectors = torch.linalg.eigh(torch.cov(h.T).double())
    pca = (values + 1e-3 * values.mean()).rsqrt()[:, None] * vectors.T
    heads = {"standardized": scale, "PCA-whitened": pca}
    return [
        make_candidate(
            f"{branch.name} {name}", [branch], [make_linear(branch.mean, matrix)], chosen
        )
        for name, matrix in heads.items()
    ]


def evaluate(candidate: Candidate, features) -> dict[str, object]:
    """Apply the heads of a candidate to the features of both splits, and classify."""
    with torch.no_grad():
        joined = [
            torch.cat(
                [
                    features[branch.name][split]
                    if head is None
                    else head(features[branch.name][split])
                    for branch, head in zip(candidate.branches, candidate.heads, strict=True)
                ],
                dim=1,
            )
            for split in (0, 1)
        ]
    labels = features[candidate.branches[0].name][2:]
    return accuracy_row(*joined, *labels) | {"score": candidate.score}


def accuracy_row(a: Tensor, b: Tensor, labels: Tensor, truth: Tensor) -> dict[str, object]:
    """Return the accuracy in percent, n, and which images are right, as a string of 0 and 1."""
    right = knn(a, b, labels, truth)
    bits = "".join("01"[int(x)] for x in right)
    return {"knn_top1": 100 * right.float().mean().item(), "n": len(right), "right": bits}


def trained(kind: str, name: str, path: Path, source: str, seed: int) -> dict[str, object]:
    """Run the command of a cell, and classify the same images as in the cell closed_forms.

    Args:
        kind: One of CELLS.
        name: One of SETS.
        path: The run folder to write.
        source: The images.
        seed: Seed of training.
    """
    if kind == "default_20":
        run = simsiam.pretrain(source, minutes=20, seed=seed, out=path)
    elif kind == "default_20_adapt":
        before = path.with_name(f"{name}-default_20-{seed}")
        run = simsiam.adapt(source, init=before, seed=seed, out=path)
    else:
        init = "lite0" if "lite0" in kind else None
        minutes = MINUTES.get((kind, name), int(kind.split("_")[-1]))
        run = simsiam.adapt(source, init=init, minutes=minutes, seed=seed, out=path)
    train, test = splits(open_source(source))
    encoder = load(run, head=kind != "default_20")
    transform, compute = eval_transform(Run(run).recipe), Compute.pick("cpu")
    features = split_features(encoder, train, test, transform, compute)
    table = Run(run).json("adapt.json")
    return accuracy_row(*features) | {
        "chosen": table.get("chosen"),
        "choice": table.get("candidates"),
    }


def splits(source: Source) -> tuple[Images, Images]:
    """Return the images that vote and those that are classified."""
    test = source.test if source.test is not None else source.val
    return sample(source.train, MAX_TRAIN), sample(test, MAX_TEST)


def make_page(cells: Path) -> None:
    """Write README.md from the cells that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(cells.glob("*.json"))}
    names = [name for name in SETS if any(key.startswith(f"{name}-") for key in found)]
    lines = [
        "# Six sets: what features are worth",
        "",
        "kNN accuracy (k = 20, τ = 0.1) in percent on the test split; the mean over seeds, with",
        "their number in brackets. `python benchmarks/six_sets.py DATA` measures what is missing",
        "and writes this page; cells/ has each measurement. Of large sets, at most "
        f"{MAX_TRAIN:,} images vote and {MAX_TEST:,} are classified, so CIFAR-10 has lower numbers "
        "than with all images.",
        "",
        "`default_20` is the network of `simsiam pretrain --minutes 20`, on one core;",
        "`default_20_adapt` is `simsiam adapt --init` with that run, which puts patches beside it;",
        "`adapt_3` is `simsiam adapt --minutes 3`, and `adapt_lite0_5` the same with 5 minutes and",
        "`--init lite0`.",
        "",
    ]
    lines += ["| features | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table: dict[str, dict[str, list[float]]] = {}
    for key, cell in found.items():
        name, kind, _ = key.split("-")
        if kind == "closed_forms":
            for row, value in cell["rows"].items():
                table.setdefault(row, {}).setdefault(name, []).append(value["knn_top1"])
            taken = [row for row in cell["choice"] if row["taken"]][-1]["candidate"]
            table.setdefault("**label-free choice**", {}).setdefault(name, []).append(
                cell["rows"][taken]["knn_top1"]
            )
            best = max(cell["rows"].values(), key=lambda row: row["knn_top1"])
            table.setdefault("choice by labels", {}).setdefault(name, []).append(best["knn_top1"])
        else:
            table.setdefault(kind, {}).setdefault(name, []).append(cell["knn_top1"])
    for row, values in table.items():
        text = [
            f"{np.mean(values[name]):.1f} ({len(values[name])})" if name in values else ""
            for name in names
        ]
        lines.append(f"| {row} | " + " | ".join(text) + " |")
    for part in (decisions(found), gains_over_unchanged(found)):
        lines += ["", *part] if part else []
    write_page(OUT, lines)


def gains_over_unchanged(found: dict[str, dict]) -> list[str]:
    """Compare what `adapt` made of lite0 with lite0 unchanged, image by image."""
    lines = []
    for key, cell in found.items():
        name, kind, seed = key.split("-")
        before = found.get(f"{name}-closed_forms-{seed}")
        if "lite0" not in kind or before is None:
            continue
        bits = [
            np.array(list(row["right"]), int) for row in (cell, before["rows"]["lite0 unchanged"])
        ]
        difference = 100 * (bits[0] - bits[1])
        half = 1.96 * difference.std() / len(difference) ** 0.5
        lines.append(
            f"- {name}, {kind}, seed {seed}: {difference.mean():+.1f} ± {half:.1f} points over "
            f"unchanged weights ({(difference > 0).sum()} images gained, "
            f"{(difference < 0).sum()} lost, of {len(difference)}); chosen: {cell['chosen']}."
        )
    return lines and ["What `adapt --init lite0` brought (paired 95 % intervals):", "", *lines]


def decisions(found: dict[str, dict]) -> list[str]:
    """Compare each decision to take or leave with the labels, where these differ beyond noise."""
    right, total, costly, lines = 0, 0, [], []
    gains = {"as chosen": [], "always taken": [], "always left": []}
    for key, cell in found.items():
        if "rows" not in cell:
            continue
        for row in cell["choice"][1:]:
            bits = [
                np.array(list(cell["rows"][row[k]]["right"]), int) for k in ("candidate", "than")
            ]
            difference = 100 * (bits[0] - bits[1])
            gain, error = difference.mean(), difference.std() / len(difference) ** 0.5
            gains["as chosen"].append(gain if row["taken"] else 0)
            gains["always taken"].append(gain)
            gains["always left"].append(0)
            if abs(gain) > 1.96 * error:
                total += 1
                right += row["taken"] == (gain > 0)
                if row["taken"] and gain < -1:
                    costly.append(f"{key}: {row['candidate']} ({gain:.1f} points)")
    if total:
        share = right / total
        half = 1.96 * (share * (1 - share) / total) ** 0.5
        means = ", ".join(f"{name} {np.mean(values):.2f}" for name, values in gains.items())
        lines = [
            f"Of the decisions to take or leave a candidate where labels differ beyond the paired "
            f"95 % interval, {right} of {total} agree with the labels ({100 * share:.0f} % ± "
            f"{100 * half:.0f}); {SIGNIFICANT} standard errors are needed to take one.",
            f"Mean gain of a decision in points: {means}. Taken although they cost over 1 point "
            f"beyond noise: {'; '.join(costly) or 'none'}.",
        ]
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cells that are missing."""
    parser = argument_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/six_sets"))
    options = parser.parse_args(arguments)
    cells = OUT / "cells"
    for seed in range(0 if options.page else options.seeds):
        for name in options.sets:
            for kind in options.cells:
                path, source = cells / f"{name}-{kind}-{seed}.json", str(options.data / SETS[name])
                if kind == "closed_forms":
                    measure_once(path, partial(closed_forms, source, seed))
                else:
                    run = options.runs / path.stem
                    measure_once(path, partial(trained, kind, name, run, source, seed))
    make_page(cells)


if __name__ == "__main__":
    main()
