"""Protocol label_free: what features show by themselves."""

from collections.abc import Iterator

from simsiam.config.protocols import Settings
from simsiam.data.images import evenly_spaced
from simsiam.evaluation.frozen import FrozenNetwork, ProtocolResult
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.label_free_monitor import MONITOR_SAMPLE_SIZE, two_view_features
from simsiam.monitoring.signals import alignment, rankme, spectrum_auc, uniformity, view_retrieval
from simsiam.runs.encoder import eval_transform


def evaluate_label_free(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Signals of test images spread evenly, as they are and in two views of each."""
    images = frozen.test.take(evenly_spaced(len(frozen.test), MONITOR_SAMPLE_SIZE))
    network = frozen.network(settings.features)
    found = extract_features(network, images, eval_transform(frozen.recipe), compute=frozen.compute)
    h = found.matrices[0].to(frozen.compute.device)
    a, b = two_view_features(
        network, images.take(found.kept_indices), frozen.recipe, compute=frozen.compute
    )
    values = {
        "rankme": rankme(h), "spectrum_auc": spectrum_auc(h), "alignment": alignment(a, b),
        "uniformity": uniformity(h), "view_retrieval": view_retrieval(a, b),
    }  # fmt: skip
    yield ProtocolResult(
        name=f"{len(h)} images",
        features=settings.features,
        parameters={"images": len(h), "views": "the run's", "alpha": 2, "t": 2},
        metrics={name: round(value, 4) for name, value in values.items()},
    )
