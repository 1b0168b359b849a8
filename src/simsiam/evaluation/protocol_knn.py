"""Protocol knn: the nearest training images vote."""

from collections.abc import Iterator

from simsiam.config.protocols import Settings
from simsiam.evaluation.frozen import FrozenNetwork, ProtocolResult, feature_kinds, top5_classes
from simsiam.monitoring.nearest_neighbors import cap_k, knn_scores


def evaluate_knn(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Weighted kNN (Wu et al., 2018) with all training images as the bank."""
    for kind in feature_kinds(settings):
        known = frozen.features(kind)
        k = min(
            settings.k or cap_k(len(known.train_features), known.classes), len(known.train_features)
        )
        bank, labels, queries = (
            part.to(frozen.compute.device)
            for part in (known.train_features, known.train_labels, known.test_features)
        )
        scores = knn_scores(bank, labels, queries, classes=known.classes, k=k, tau=settings.tau)
        parameters = {"k": k, "tau": settings.tau, "similarity": "cosine"}
        yield ProtocolResult(
            name=f"k {k}, τ {settings.tau:g}",
            features=kind,
            parameters=parameters,
            predictions=[top5_classes(scores)],
        )
