"""Protocol finetune: the whole network learns, from all labels or from few. It is the one that freezes nothing."""

from collections.abc import Iterator

import numpy as np

from simsiam.config.protocols import Settings
from simsiam.data.images import Images
from simsiam.errors import UsageError
from simsiam.evaluation.protocol_few_label import plan_draws
from simsiam.evaluation.finetune import finetune
from simsiam.evaluation.frozen import ProtocolResult
from simsiam.evaluation.scores import summarize_accuracy
from simsiam.model.precision import Compute
from simsiam.runs.run_folder import Run


def evaluate_finetune(
    run: Run,
    checkpoint: str,
    train: Images,
    test: Images,
    settings: Settings,
    *,
    compute: Compute,
) -> Iterator[ProtocolResult]:
    """End to end on all training images, or on the few that protocol few_label would label, draw by draw.

    Each fine-tuning has a folder in RUN/finetuning, with its curve, and goes on from there when asked for again.
    """
    if checkpoint != "last":
        raise UsageError(
            f"finetune starts from the run's backbone, its last checkpoint, not from {checkpoint!r}"
        )
    few = settings.labels is not None or settings.few_label_list is not None
    plan = plan_draws(train, settings) if few else {"all labels": [np.arange(len(train))]}
    kind = "from scratch" if settings.from_scratch else "pretrained"
    for name, draws in plan.items():
        found = []
        for draw, positions in enumerate(draws):
            words = f"{name.replace('%', 'percent')} {kind} {settings.finetune_epochs} epochs seed {settings.seed + draw}"
            found.append(
                finetune(
                    run.path, train.take(positions), test, out=run.path / "finetuning" / words.replace(" ", "-"),
                    epochs=settings.finetune_epochs, from_scratch=settings.from_scratch, seed=settings.seed + draw,
                    device=str(compute.device), precision=compute.precision,
                )
            )  # fmt: skip
        top1, top5 = ([one[key] for one in found] for key in ("top1", "top5"))
        yield ProtocolResult(
            name=f"{name}, {settings.finetune_epochs} epochs",
            features=kind,
            parameters=found[0]["parameters"] | {"labels": name, "draws": len(draws)},
            metrics=summarize_accuracy(top1, top5, found[0]["n"], len(train.classes))
            | {
                "val_top1": [one["val_top1"] for one in found],
                "unreadable": max(one["unreadable"] for one in found),
            },
        )
