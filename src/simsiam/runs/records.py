"""The types of what the files of a run folder hold."""

from collections.abc import Mapping
from typing import Any, TypeAlias, TypedDict

from torch import Tensor

# A JSON object or the content of a checkpoint, by key. Its values have the types that the program
# that wrote it gave them.
Record: TypeAlias = dict[str, Any]

# A line of metrics.jsonl: `step`, `epoch` and other numbers, by name. A number that was not finite
# is None, so read what may be missing with `get`.
MetricsRecord: TypeAlias = dict[str, float]


class TrainingState(TypedDict, total=False):
    """What a checkpoint of a run holds.

    Attributes:
        format: CHECKPOINT_FORMAT.
        recipe: The recipe of the run, as plain data.
        step: Steps done.
        seconds: Training time so far, without measurements and checkpoints.
        knn: kNN accuracies in percent: `last`, `best`, and `best_step`.
        images: Number of training images.
        environment: What `collect_environment` returned.
        fingerprint: That of the source; see `simsiam.sources.fingerprint`.
        start: What was measured before the first step, as `simsiam.monitoring.worth.Start`; None if
            there were too few images.
        neighbors: Nearest neighbors at the last measurement, (N, k) int32.
        model: State dict of the model.
        optimizer: State dict of the optimizer.
    """

    format: int
    recipe: Record
    step: int
    seconds: float
    knn: dict[str, float]
    images: int
    environment: Record
    fingerprint: dict[str, str]
    start: Mapping[str, Any] | None
    neighbors: Tensor
    model: dict[str, Tensor]
    optimizer: Record
