"""The weighted k-nearest-neighbor classifier of Wu et al. (2018), the paper's monitor of progress (Figure 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.features import Transform, extract
from simsiam.images import Images
from simsiam.siamese import Siamese


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, *, classes: int, k: int = 200, tau: float = 0.1, chunk: int = 1024
) -> Tensor:
    """Votes (M, classes) of the k nearest of `bank` (N, d) for each of `queries` (M, d), weighted exp(cosine / tau).

    `labels` (N,) are int64. Queries are taken `chunk` at a time, so memory is bounded by chunk * N similarities.
    """
    bank, k = F.normalize(bank, dim=1), min(k, len(bank))
    votes = []
    for part in F.normalize(queries, dim=1).split(chunk):
        cosine, nearest = (part @ bank.T).topk(k, dim=1)
        votes.append(cosine.new_zeros(len(part), classes).scatter_add_(1, labels[nearest], (cosine / tau).exp()))
    return torch.cat(votes)


def knn_top1(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, classes: int, k: int = 200) -> float:
    """Top-1 accuracy in percent, with k capped at a sixth of an average class.

    That is the share k = 200 has on ImageNet; on a small set 200 neighbors would reach far beyond an image's own kind.
    """
    capped = max(1, min(k, len(bank) // (6 * classes)))
    predicted = knn_scores(bank, labels, queries, classes=classes, k=capped).argmax(1)
    return 100 * (predicted == truth).float().mean().item()


def knn_monitor(
    model: Siamese, bank: Images, queries: Images, transform: Transform, *, device: torch.device, precision: str
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Accuracy on h (`knn_top1`) and on z (`knn_top1_z`), in percent, and the files that could not be read.

    `bank` votes on `queries`, both labeled.
    """

    def h_and_z(x: Tensor) -> tuple[Tensor, Tensor]:
        h = model.backbone(x)
        return h, model.projector(h)

    def features(images: Images) -> tuple[list[Tensor], Tensor, list[tuple[str, str]]]:
        found = extract(model, images, transform, device=device, precision=precision, forward=h_and_z)
        assert images.labels is not None
        return [m.to(device) for m in found.matrices], torch.from_numpy(images.labels[found.kept]), found.skipped

    known, labels, skipped = features(bank)
    asked, truth, more = features(queries)
    top1 = [
        knn_top1(b, labels.to(device), q, truth.to(device), classes=len(bank.classes))
        for b, q in zip(known, asked, strict=True)
    ]
    return dict(zip(("knn_top1", "knn_top1_z"), (round(v, 3) for v in top1), strict=True)), skipped + more
