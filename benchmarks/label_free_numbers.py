"""Measure which label-free numbers order representations as kNN accuracy does.

    python benchmarks/label_free_numbers.py DATA [--sets NAME ...] [--decisions | --page]

DATA is as for six_sets.py; the set `shapes` is built in. For each set, at least 12 representations
are measured on the same images held out: a network before and after three lengths of training,
ImageNet's Lite0 (unchanged, centered, standardized, PCA-whitened, with the map), and patches of
several sizes with and without the map. Each set is a file in results/label_free_numbers; a set that
is there is not measured again. The page has Spearman's correlation of each number with kNN accuracy
(k limited as in `simsiam.monitoring.nearest_neighbors.cap_k`).

--decisions measures what the numbers are for instead: `adapt` chooses among closed forms by the
score, and would choose by another number.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cells import argument_parser, measure_once, write_page
from six_sets import SETS, whitened
from torch import Tensor, nn

import simsiam
from simsiam.data.transform import Transform
from simsiam.model.backbones import create_backbone
from simsiam.model.precision import Compute
from simsiam.monitoring import candidates as candidates_module
from simsiam.monitoring.candidates import (
    Branch,
    Candidate,
    Sample,
    backbone_candidates,
    learn_patches,
    make_candidate,
    measure,
    patch_candidates,
    read_sample,
)
from simsiam.monitoring.signals import (
    alignment,
    nearest_neighbors,
    neighbor_stability,
    rankme,
    uniformity,
    view_agreement,
    view_retrieval,
)
from simsiam.runs.encoder import eval_transform, load
from simsiam.runs.run_folder import Run
from simsiam.runs.weights import open_weights
from simsiam.sources.open_source import open_source
from simsiam.training.adaptation.adapt import closed_form_candidates
from simsiam.utils.files import write_text

OUT = Path(__file__).parents[1] / "results" / "label_free_numbers"
DECISIONS = OUT / "decisions.json"
LENGTHS = (100, 300, 900)  # steps of SimSiam, with a narrow ResNet-18 on views of 32 px
SETTINGS = {
    "method": "simsiam", "backbone": "resnet18", "width": 16, "image_size": 32, "batch_size": 64,
}  # fmt: skip


def d_prime(a: Tensor, b: Tensor) -> float:
    """How far the cosines of views of one image are above those of different images, in std."""
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    others = cosine[~torch.eye(len(a), dtype=torch.bool)]
    return ((cosine.diagonal().mean() - others.mean()) / others.std()).item()


def alpha_req(a: Tensor, b: Tensor) -> float:
    """Minus the slope of the log eigenvalues over the log rank (Agrawal et al., 2022)."""
    h = torch.cat([a, b])
    values = torch.linalg.svdvals(h - h.mean(0)).square()
    values = values[values > 1e-8 * values[0]][: len(a)].log().double()
    x = torch.arange(1, len(values) + 1).log().double()
    x = x - x.mean()
    return -(x @ values / (x @ x)).item()


def lidar(a: Tensor, b: Tensor) -> float:
    """Effective rank of what differs between images, whitened by view noise (Thilak, 2023)."""
    mean, noise = (a + b) / 2, (a - b) / 2**0.5
    between = torch.cov(mean.T).double()
    within = (noise.T @ noise / len(noise)).double()
    values, vectors = torch.linalg.eigh(within + 1e-4 * torch.eye(len(within)))
    root = vectors * values.rsqrt() @ vectors.T
    energy = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    share = energy / energy.sum()
    return torch.special.entr(share).sum().exp().item()


def neighbor_overlap(a: Tensor, b: Tensor) -> float:
    """Percent of the 10 nearest neighbors that two views of an image share."""
    return neighbor_stability(nearest_neighbors(a, 10), nearest_neighbors(b, 10))


def cluster_stability(a: Tensor, b: Tensor, count: int = 10) -> float:
    """Percent of images whose two views fall into the same of `count` clusters."""
    a, b = F.normalize(a - a.mean(0), dim=1), F.normalize(b - b.mean(0), dim=1)
    centers = a[:: max(1, len(a) // count)][:count]
    for _ in range(30):
        nearest = (a @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, a)
        centers = F.normalize(sums, dim=1)
    return 100 * ((a @ centers.T).argmax(1) == (b @ centers.T).argmax(1)).float().mean().item()


NUMBERS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "view retrieval": view_retrieval,
    "d′": d_prime,
    "RankMe": lambda a, b: rankme(a),
    "LiDAR": lidar,
    "α-ReQ": alpha_req,
    "alignment (negative)": lambda a, b: -alignment(a, b),
    "uniformity (negative)": lambda a, b: -uniformity(a),
    "shared neighbors": neighbor_overlap,
    "stability of clusters": cluster_stability,
}


def views_of(candidate: Candidate) -> tuple[Tensor, Tensor]:
    """Return the features of two views of the images held out, after the heads."""
    with torch.no_grad():
        a, b = (
            torch.cat(
                [
                    branch.held_out[view] if head is None else head(branch.held_out[view])
                    for branch, head in zip(candidate.branches, candidate.heads, strict=True)
                ],
                dim=1,
            )
            for view in (0, 1)
        )
    return a, b


def measure_set(name: str, source_name: str, runs: Path) -> dict[str, object]:
    """Measure all representations of a set.

    Args:
        name: The set.
        source_name: Its images.
        runs: Where the networks are trained.

    Returns:
        "rows": for each representation its kNN accuracy and all numbers.
    """
    train = open_source(source_name).train
    compute = Compute.pick("cpu")
    weights = Run(open_weights("lite0"))
    transform = eval_transform(weights.recipe)
    sample = read_sample(train, transform.resize)
    (lite0,) = measure({"lite0": load(weights.path, head=False)}, transform, sample, compute)
    patches = measure(learn_patches(sample, transform), transform, sample, compute)
    candidates = [
        *backbone_candidates(lite0, sample),
        *whitened(lite0, sample),
        *patch_candidates(patches, sample),
        *(trained_candidate(steps, name, source_name, runs, sample) for steps in (0, *LENGTHS)),
    ]
    rows = {}
    for candidate in candidates:
        a, b = views_of(candidate)
        numbers = {label: round(number(a, b), 4) for label, number in NUMBERS.items()}
        rows[candidate.name] = {
            "knn_top1": candidate.knn_top1,
            "score": round(candidate.score, 4),
            **numbers,
        }
    return {"rows": rows}


def trained_candidate(
    steps: int, name: str, source_name: str, runs: Path, sample: Sample
) -> Candidate:
    """Train a network for some steps, and measure it on the sample."""
    label = f"SimSiam, {steps} steps"
    if steps:
        run = Run(
            simsiam.pretrain(source_name, out=runs / f"{name}-{steps}", steps=steps, **SETTINGS)
        )
        network, transform = load(run.path, head=False), eval_transform(run.recipe)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network: nn.Module = create_backbone("resnet18", image_size=32, width=16)
        transform = Transform(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    float32 = Compute(torch.device("cpu"), "float32")
    branch: Branch = measure({label: network}, transform, sample, float32, noise=False)[0]
    return make_candidate(label, [branch], [None], sample)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; tied values have their mean rank."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def overlap_of_images(a: Tensor, b: Tensor) -> Tensor:
    """`neighbor_overlap` of each image, in the shape of `view_agreement`."""
    near = [nearest_neighbors(x, min(10, len(x) // 4)) for x in (a, b)]
    share = (near[0][:, :, None] == near[1][:, None, :]).any(2).float().mean(1)
    return torch.stack([share, share])


def recognition_and_overlap(a: Tensor, b: Tensor) -> Tensor:
    """The first number of `view_agreement`, and `overlap_of_images`."""
    return torch.stack([view_agreement(a, b)[0], overlap_of_images(a, b)[0]])


AGREEMENTS = {
    "score": view_agreement,
    "shared neighbors": overlap_of_images,
    "recognition and shared neighbors": recognition_and_overlap,
}


def decide(source_name: str, branches_file: Path) -> dict[str, dict[str, float]]:
    """Let each of AGREEMENTS choose as `adapt` does, with Lite0 and without weights.

    Args:
        source_name: The images.
        branches_file: Where what is measured is kept.

    Returns:
        For each number how many decisions to take or leave a candidate agree with the labels, of
        those where labels differ beyond the paired 95 % interval; the sum of what all decisions
        gained, in points of kNN accuracy; and their number.
    """
    if not branches_file.exists():
        train = open_source(source_name).train
        weights = Run(open_weights("lite0"))
        transform = eval_transform(weights.recipe)
        sample = read_sample(train, transform.resize)
        networks = {"lite0": load(weights.path, head=False), **learn_patches(sample, transform)}
        branches = measure(networks, transform, sample, Compute.pick("cpu"))
        kept = [{**vars(branch), "backbone": None} for branch in branches]
        branches_file.parent.mkdir(parents=True, exist_ok=True)
        content = {"fit": sample.fit_size, "labels": sample.labels, "branches": kept}
        torch.save(content, branches_file)
    content = torch.load(branches_file)
    branches = [Branch(**{**row, "backbone": nn.Identity()}) for row in content["branches"]]
    sample = Sample(torch.zeros(len(content["labels"])), content["fit"], content["labels"], [])
    found = {}
    for label, agreement in AGREEMENTS.items():
        candidates_module.view_agreement = agreement
        right = total = number = 0
        gained = 0.0
        for start in (True, False):
            candidates = {
                candidate.name: candidate
                for candidate in closed_form_candidates(
                    branches if start else branches[1:], sample, start=start
                )
            }
            for row in candidates_module.choose(candidates.values())[1][1:]:
                one, other = (candidates[row[k]].hits.float() for k in ("candidate", "than"))
                difference = 100 * (one - other)
                gain, error = difference.mean().item(), difference.std().item() / len(one) ** 0.5
                number, gained = number + 1, gained + gain * row["taken"]
                if abs(gain) > 1.96 * error:
                    total, right = total + 1, right + (row["taken"] == (gain > 0))
        found[label] = {"right": right, "of": total, "gained": round(gained, 2), "number": number}
    candidates_module.view_agreement = view_agreement
    return found


def decision_lines() -> list[str]:
    """Return the part of the page on decisions, if any were measured."""
    if not DECISIONS.exists():
        return []
    sets = json.loads(DECISIONS.read_text())
    lines = [
        "",
        "What the numbers are for is to choose. As `adapt` does with Lite0 and without weights,",
        "each number took or left the closed forms one after another. Right are decisions that",
        "agree with the labels, of those where labels differ beyond the paired 95 % interval;",
        "gained are points of kNN accuracy in a decision, on average.",
        f"Sets: {', '.join(sets)}; one seed.",
        "`python benchmarks/label_free_numbers.py DATA --decisions` measures it.",
        "",
        "| chosen by | right | gained |",
        "|---|---|---|",
    ]
    for label in AGREEMENTS:
        rows = [found[label] for found in sets.values()]
        right, total, gained, number = (
            sum(row[key] for row in rows) for key in ("right", "of", "gained", "number")
        )
        lines.append(f"| {label} | {right} of {total} | {gained / number:.2f} |")
    return lines


def make_page() -> None:
    """Write README.md from the sets that are there."""
    files = [path for path in sorted(OUT.glob("*.json")) if path != DECISIONS]
    sets = {path.stem: json.loads(path.read_text())["rows"] for path in files}
    lines = [
        "# Label-free numbers and kNN accuracy",
        "",
        "Spearman's correlation with kNN accuracy over the representations of a set (their number",
        "in brackets): networks untrained and trained for three lengths, Lite0 in five forms, and",
        "patches at several sizes. `python benchmarks/label_free_numbers.py DATA` makes this page.",
        "`score` is what `adapt` and the verdict use: docs/closed_form.md.",
        "",
        "| number | "
        + " | ".join(f"{name} ({len(rows)})" for name, rows in sets.items())
        + " | least |",
        "|---" * (len(sets) + 2) + "|",
    ]
    table = {}
    for number in ("score", *NUMBERS):
        table[number] = [
            spearman([r["knn_top1"] for r in rows.values()], [r[number] for r in rows.values()])
            for rows in sets.values()
        ]
    for number, values in sorted(table.items(), key=lambda item: -min(item[1], default=0)):
        cells = " | ".join(f"{value:.2f}" for value in (*values, min(values)))
        lines.append(f"| {number} | {cells} |")
    lines += decision_lines()
    write_page(OUT, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sets that are missing, and write the page."""
    parser = argument_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["shapes", *SETS])
    parser.add_argument("--runs", type=Path, default=Path("runs/label_free_numbers"))
    parser.add_argument("--decisions", action="store_true")
    options = parser.parse_args(arguments)
    for name in options.sets if options.decisions else ():
        found = json.loads(DECISIONS.read_text()) if DECISIONS.exists() else {}
        source = name if name == "shapes" else str(options.data / SETS[name])
        found[name] = decide(source, options.runs / f"{name}.pt")
        write_text(DECISIONS, json.dumps(found, indent=1) + "\n")
    for name in () if options.page or options.decisions else options.sets:
        source = name if name == "shapes" else str(options.data / SETS[name])
        measure_once(OUT / f"{name}.json", partial(measure_set, name, source, options.runs))
    make_page()


if __name__ == "__main__":
    main()
