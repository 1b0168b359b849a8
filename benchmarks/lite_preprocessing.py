"""Measure which preprocessing belongs to the weights lite0 and lite2.

    python benchmarks/lite_preprocessing.py lite0 --imagenette imagenette224.tar \\
        --sets flowers.tar hand_signs.tar

The packages do not say it, but their own classifier does: it recognizes most images if they are
prepared as those that it was trained on. Then follow kNN accuracies of other labeled sources
(k = 20, tau = 0.1), of features as they are and centered on the training images. The table is in
docs/command_line.md.
"""

import argparse
from importlib import import_module
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from simsiam.data.images import Images, sample
from simsiam.data.transform import Transform
from simsiam.model.precision import Compute
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.nearest_neighbors import knn_scores
from simsiam.runs.checkpoints.timm_weights import LITE_PACKAGES, find_lite_file
from simsiam.runs.weight_files import read_state_dict
from simsiam.sources.open_source import open_source

# Imagenette's classes among the 1,000 of ImageNet, in the order of their names.
IMAGENETTE_CLASSES = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])
STATISTICS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5,) * 3, (0.5,) * 3),
    "127/255, 128/255": ((127 / 255,) * 3, (128 / 255,) * 3),
}
CPU = Compute(torch.device("cpu"), "float32")


def load_classifier(name: str) -> nn.Module:
    """Load the network of a package with its classifier."""
    import_module(LITE_PACKAGES[name].module)
    tensors, _ = read_state_dict(find_lite_file(name))
    model = timm.create_model(LITE_PACKAGES[name].network).eval()
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model.to(memory_format=torch.channels_last)


def transforms(size: int, resize: int) -> dict[str, Transform]:
    """Every preprocessing that is compared, by its name."""
    found = {}
    for name, (mean, std) in STATISTICS.items():
        cases = [("bicubic", resize)]
        if name == "0.5":
            cases += [("bilinear", resize), ("bicubic", size)]
        for interpolation, side in cases:
            key = f"mean and std {name}, {interpolation}, {side} px"
            found[key] = Transform(size, mean, std, interpolation, side)
    return found


def outputs(model: nn.Module, images: Images, transform: Transform) -> tuple[Tensor, Tensor]:
    """The outputs of a network for all images, and their labels."""
    found = extract_features(model, images, transform, compute=CPU, progress_label="images")
    return found.matrices[0], torch.from_numpy(images.labels[found.kept_indices])


def knn_line(model: nn.Module, path: Path, transform: Transform) -> str:
    """kNN accuracy of features as they are, and centered."""
    source = open_source(str(path))
    bank, labels = outputs(model, source.train, transform)
    queries, truth = outputs(model, source.test, transform)
    scores = [
        knn_scores(bank - m, labels, queries - m, classes=len(source.train.classes), k=20)
        for m in (torch.zeros(bank.shape[1]), bank.mean(0))
    ]
    plain, centered = (100 * (s.argmax(1) == truth).float().mean().item() for s in scores)
    return f"{path.stem} {plain:.1f}, centered {centered:.1f}"


def main() -> None:
    """Print one line for each preprocessing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(LITE_PACKAGES))
    parser.add_argument("--imagenette", type=Path, required=True)
    parser.add_argument("--sets", type=Path, nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=500)
    options = parser.parse_args()
    classifier, backbone = load_classifier(options.name), load_classifier(options.name)
    backbone.reset_classifier(0)
    images = sample(open_source(str(options.imagenette)).val, options.limit)
    config = classifier.pretrained_cfg
    size = config["input_size"][1]
    for name, transform in transforms(size, int(size / config["crop_pct"])).items():
        logits, labels = outputs(classifier, images, transform)
        top1 = (logits.argmax(1) == IMAGENETTE_CLASSES[labels]).float().mean().item()
        sets = [knn_line(backbone, path, transform) for path in options.sets]
        print("; ".join([name, f"own classifier {100 * top1:.1f}", *sets]), flush=True)


if __name__ == "__main__":
    main()
