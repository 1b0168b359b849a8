"""The protocol label_free: signals of feature quality that need no labels."""

from collections.abc import Iterator

from simsiam.config.protocols import Settings
from simsiam.data.images import evenly_spaced
from simsiam.errors import UsageError
from simsiam.evaluation.frozen import FrozenNetwork, ProtocolResult, feature_kinds
from simsiam.monitoring.features import extract_features
from simsiam.monitoring.label_free_monitor import MONITOR_SAMPLE_SIZE, two_view_features
from simsiam.monitoring.signals import alignment, rankme, spectrum_auc, uniformity, view_retrieval
from simsiam.runs.encoder import eval_transform


def evaluate_frozen(frozen: FrozenNetwork, settings: Settings) -> Iterator[ProtocolResult]:
    """Compute the signals on evenly spaced test images: on the images, and on two views of each.

    Args:
        frozen: The network and the images.
        settings: `features` is used.

    Yields:
        One result for each kind of features; there are no baselines.
    """
    for kind in feature_kinds(frozen, settings, baselines=False):
        yield compute_label_free(frozen, kind)


def compute_label_free(frozen: FrozenNetwork, kind: str) -> ProtocolResult:
    """Compute the signals of one kind of features.

    Args:
        frozen: The network and the images.
        kind: The kind of features.

    Returns:
        The signals.
    """
    images = frozen.test.take(evenly_spaced(len(frozen.test), MONITOR_SAMPLE_SIZE))
    network, recipe, compute = frozen.network(kind), frozen.recipe, frozen.compute
    features = extract_features(network, images, eval_transform(recipe), compute=compute)
    h = features.matrices[0].to(compute.device)
    if len(h) < 2:
        raise UsageError("label_free compares images, and there is one test image")
    readable = images.take(features.kept_indices)
    a, b = two_view_features(network, readable, recipe, compute=compute)
    signals = {
        "rankme": rankme(h),
        "spectrum_auc": spectrum_auc(h),
        "alignment": alignment(a, b),
        "uniformity": uniformity(h),
        "view_retrieval": view_retrieval(a, b),
    }
    return ProtocolResult(
        name=f"{len(h)} images",
        features=kind,
        parameters={"images": len(h), "views": "the run's", "alpha": 2, "t": 2},
        metrics={name: round(value, 4) for name, value in signals.items()},
    )
