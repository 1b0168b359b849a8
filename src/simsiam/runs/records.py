"""The types of what the files of a run folder hold; `simsiam.utils.typed_json` checks them.

A key that is not named here may have any value. Old files lack some of the keys.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor
from typing_extensions import Required, TypedDict

# A JSON object or the content of a checkpoint, by key. Its values have the types that the program
# that wrote it gave them.
Record: TypeAlias = dict[str, Any]

# A line of metrics.jsonl: `step`, `epoch` and other numbers, by name. A number that was not finite
# is None, so read what may be missing with `get`.
MetricsRecord: TypeAlias = dict[str, float]


class KnnAccuracy(TypedDict):
    """The accuracy on images that were not trained on, in percent."""

    last: float
    best: float
    best_step: int


class NothingYet(TypedDict):
    """What stands in its place before the first measurement: no key."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]  # noqa: RUF012


class MeasuredFeatures(TypedDict, total=False):
    """A row of the table of features in summary.json."""

    features: Required[str]
    score: Required[float]
    score_interval: Required[tuple[float, float]]
    view_retrieval: float
    knn_top1: float
    interval: tuple[float, float]
    n: int


class MeasuredEnd(TypedDict, total=False):
    """The same measurements before the first step, or after the last one."""

    score: float | None
    view_retrieval: float | None
    knn_top1: float | None


class Summary(TypedDict, total=False):
    """summary.json."""

    verdict: str
    remedy: str
    advice: str
    steps: int
    epochs: float
    knn_top1: KnnAccuracy | None
    start: MeasuredEnd | None
    end: MeasuredEnd | None
    features: list[MeasuredFeatures]
    images_per_second: float | None
    training_seconds: float | None
    unreadable: int


class Environment(TypedDict, total=False):
    """environment.json, and the environment in a checkpoint."""

    versions: dict[str, str]
    commit: str | None
    command: list[str]
    device: str
    device_type: str
    precision: str
    threads: int
    processes: int
    seed: int
    start: str
    end: str | None


class CandidateRow(TypedDict, total=False):
    """An encoder that was compared with others."""

    candidate: Required[str]
    score: float | None
    view_retrieval: float | None
    knn_top1: float | None
    than: str
    gain: float | None
    error: float | None
    by_rule: bool
    taken: bool


class Candidates(TypedDict, total=False):
    """adapt.json or head.json."""

    chosen: str
    candidates: list[CandidateRow]


class Origin(TypedDict, total=False):
    """origin.json: where published weights come from, and their license."""

    weights: str
    origin: str
    license: str
    sha256: str


class ConversionReport(TypedDict, total=False):
    """converted.json: what became of each tensor of a checkpoint."""

    checkpoint: str
    url: str | None
    sha256: str
    layout: str
    parts: list[str]
    placed: int
    absorbed: list[str]
    left_over: list[str]
    set_aside: list[str]
    assumed: list[str]
    notes: list[str]


class ChosenLoggers(TypedDict):
    """loggers.json."""

    loggers: list[str]
    id: str


class Evaluation(TypedDict, total=False):
    """What is read of a record in evaluations/."""

    protocol: Required[str]
    name: str
    features: str
    parameters: dict[str, object]
    chosen: dict[str, object]
    checkpoint: str
    step: int
    source: str
    train: str
    test: str
    train_images: int
    classes: int
    unreadable: int
    frozen: bool
    environment: dict[str, object]
    measured: str
    seconds: float
    top1: float
    top5: float | None
    top1_std: float | None
    interval: tuple[float, float]
    n: int
    view_retrieval: float | None
    rankme: float | None
    spectrum_auc: float | None
    alignment: float | None
    uniformity: float | None


class AveragePrecisions(TypedDict, total=False):
    """Average precisions of a detector in percent."""

    AP50: float | None
    AP: float | None
    AP75: float | None
    AP50_of_class: dict[str, float | None]


class Transfer(TypedDict, total=False):
    """What is read of a record in transfers/."""

    protocol: Required[str]
    task: str
    source: str
    train: str
    test: str
    init: dict[str, str]
    chosen: dict[str, object]
    tested_by: str
    metrics: dict[str, AveragePrecisions]
    n: int
    folder: str
    picture: str
    environment: dict[str, object]
    measured: str


class MetricsExtent(TypedDict):
    """How long metrics.jsonl was when a checkpoint was saved."""

    bytes: int
    lines: int
    crc32: str  # of its bytes


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
        metrics: How long metrics.jsonl was; older checkpoints do not have it.
        fingerprint: That of the source; see `simsiam.sources.fingerprint`.
        start: What was measured before the first step, as `simsiam.monitoring.worth.Start`; None if
            there were too few images.
        neighbors: Nearest neighbors at the last measurement, (N, k) int32.
        model: State dict of the model. With `average_weights`, backbone and projector are averages.
        trained: Then backbone and projector as they are without averaging, to continue from.
        optimizer: State dict of the optimizer.
    """

    format: int
    recipe: Record
    step: int
    seconds: float
    knn: dict[str, float]
    images: int
    environment: Record
    metrics: MetricsExtent
    fingerprint: dict[str, str]
    start: Mapping[str, Any] | None
    neighbors: Tensor
    model: dict[str, Tensor]
    trained: dict[str, Tensor]
    optimizer: Record


class CheckpointHead(TypedDict, total=False):
    """What is checked of a checkpoint before it is used; its tensors are checked by torch."""

    format: Required[int]
    recipe: Required[dict[str, object]]
    step: Required[int]
    seconds: Required[float]
    knn: Required[KnnAccuracy | NothingYet]
    images: Required[int]
    environment: Required[Environment]
    metrics: MetricsExtent
    fingerprint: dict[str, str]
    start: dict[str, object] | None
    model: Required[dict[str, object]]
    trained: dict[str, object]
    optimizer: dict[str, object]


class SavedTraining(TypedDict, total=False):
    """What is checked of the state of another training in a run folder, FOLDER/last.pt."""

    settings: Required[dict[str, object]]
    step: Required[int]
    seconds: Required[float]
    metrics: MetricsExtent
    model: dict[str, object]
    optimizer: dict[str, object]


class PredictorCosines(TypedDict):
    """What the experiments of section 5.1 measure of a run; see `laboratory.measure`."""

    cos_p_mean: float
    cos_z_mean: float
    h_gain: float


# The type of each JSON object that has a name of its own in a run folder.
SCHEMAS: Mapping[str, type] = {
    "summary.json": Summary,
    "environment.json": Environment,
    "adapt.json": Candidates,
    "head.json": Candidates,
    "origin.json": Origin,
    "converted.json": ConversionReport,
    "loggers.json": ChosenLoggers,
    "laboratory.json": PredictorCosines,
}
# What a record lacks that an older version wrote.
EVALUATION_DEFAULTS: Record = {
    "name": "", "features": "", "parameters": {}, "chosen": {}, "checkpoint": "", "source": "",
}  # fmt: skip
TRANSFER_DEFAULTS: Record = {
    "source": "", "test": "", "init": {}, "chosen": {}, "metrics": {}, "tested_by": "",
}  # fmt: skip
