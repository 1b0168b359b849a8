"""The protocol knn: the nearest training images vote."""

from collections.abc import Iterator

from simsiam.config.protocols import Settings
from simsiam.evaluation.frozen import FrozenNetwork, ProtocolResult, feature_kinds, top5_classes
from simsiam.monitoring.nearest_neighbors import cap_k, knn_scores


def evaluate_frozen(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Classify test images by weighted kNN among all training images (Wu et al., 2018).

    Args:
        frozen: The network and the images.
        settings: `k`, `tau`, `features` and `baselines` are used.

    Yields:
        One result for each kind of features.
    """
    device = frozen.compute.device
    for kind in feature_kinds(frozen, settings):
        features = frozen.features(kind)
        num_train = len(features.train_features)
        k = min(settings.k or cap_k(num_train, features.classes), num_train)
        scores = knn_scores(
            features.train_features.to(device),
            features.train_labels.to(device),
            features.test_features.to(device),
            classes=features.classes,
            k=k,
            tau=settings.tau,
        )
        yield ProtocolResult(
            name=f"k {k}, τ {settings.tau:g}",
            features=kind,
            parameters={"k": k, "tau": settings.tau, "similarity": "cosine"},
            predictions=[top5_classes(scores)],
        )
