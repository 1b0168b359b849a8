"""Protocol label_free: what features show by themselves."""

from collections.abc import Iterator
from typing import Any

from simsiam.config.protocols import Settings
from simsiam.data.images import spread
from simsiam.evaluation.frozen import Answer, Frozen
from simsiam.monitoring.features import extract
from simsiam.monitoring.label_free_monitor import LOOKED_AT, both_views
from simsiam.monitoring.signals import alignment, rankme, spectrum_auc, uniformity, view_retrieval
from simsiam.runs.encoder import transform_of


def without_labels(frozen: Frozen, how: Settings) -> Iterator[Answer]:
    """Signals of test images spread evenly, as they are and in two views of each."""
    images = frozen.test.take(spread(len(frozen.test), LOOKED_AT))
    where: dict[str, Any] = {"device": frozen.device, "precision": frozen.precision}
    network = frozen.network(how.features)
    found = extract(network, images, transform_of(frozen.recipe), **where)
    h = found.matrices[0].to(frozen.device)
    a, b = both_views(network, images.take(found.kept), frozen.recipe, **where)
    values = {
        "rankme": rankme(h), "spectrum_auc": spectrum_auc(h), "alignment": alignment(a, b),
        "uniformity": uniformity(h), "view_retrieval": view_retrieval(a, b),
    }  # fmt: skip
    yield Answer(
        name=f"{len(h)} images",
        features=how.features,
        parameters={"images": len(h), "views": "the run's", "alpha": 2, "t": 2},
        values={name: round(value, 4) for name, value in values.items()},
    )
