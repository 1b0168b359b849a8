"""Protocol knn: the nearest training images vote."""

from collections.abc import Iterator

from simsiam.config.protocols import Settings
from simsiam.evaluation.frozen import Answer, Frozen, kinds, likeliest
from simsiam.monitoring.nearest_neighbors import knn_scores, usual_k


def by_neighbors(frozen: Frozen, how: Settings) -> Iterator[Answer]:
    """Weighted kNN (Wu et al., 2018) with all training images as the bank."""
    for kind in kinds(how):
        known = frozen.features(kind)
        k = min(how.k or usual_k(len(known.train), known.classes), len(known.train))
        bank, labels, queries = (part.to(frozen.device) for part in (known.train, known.labels, known.test))
        scores = knn_scores(bank, labels, queries, classes=known.classes, k=k, tau=how.tau)
        parameters = {"k": k, "tau": how.tau, "similarity": "cosine"}
        yield Answer(name=f"k {k}, τ {how.tau:g}", features=kind, parameters=parameters, ranked=[likeliest(scores)])
