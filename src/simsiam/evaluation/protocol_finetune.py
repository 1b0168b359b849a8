"""The protocol finetune: train the whole network, with all labels or with a few.

It is the only protocol that changes the backbone, and the only one that is given test labels.
"""

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from simsiam.config.protocols import Settings
from simsiam.data.images import Images
from simsiam.errors import UsageError
from simsiam.evaluation.finetune import describe_weights, finetune
from simsiam.evaluation.frozen import ProtocolResult
from simsiam.evaluation.protocol_few_label import plan_draws
from simsiam.evaluation.scores import summarize_accuracy
from simsiam.model.precision import Compute
from simsiam.runs.run_folder import Run
from simsiam.sources.fingerprint import digest_images


def evaluate_finetune(
    run: Run,
    checkpoint: str,
    train: Images,
    test: Images,
    settings: Settings,
    *,
    compute: Compute,
) -> Iterator[ProtocolResult]:
    """Fine-tune on all training images, or on each draw of a few labeled ones.

    Each fine-tuning has a folder in RUN/finetuning, named by everything that determines it. If it
    was interrupted, it is continued.

    Args:
        run: The run.
        checkpoint: The name of the checkpoint; it must be "last".
        train: The training images.
        test: The test images, with labels.
        settings: `labels`, `few_label_list`, `draws`, `finetune_epochs`, `from_scratch` and `seed`
            are used.
        compute: Where to compute, and in which precision.

    Yields:
        One result for each number of labels.

    Raises:
        UsageError: If the checkpoint is another one, or the labels cannot be drawn or read.
        WorkFailed: If the loss diverged.
        Stopped: After SIGINT or SIGTERM; the state is saved.
    """
    if checkpoint != "last":
        raise UsageError(
            f"finetune starts from the run's backbone, which is its last checkpoint, "
            f"not from {checkpoint!r}"
        )
    few = settings.labels is not None or settings.few_label_list is not None
    plan = plan_draws(train, settings) if few else {"all labels": [np.arange(len(train))]}
    kind = "from scratch" if settings.from_scratch else "pretrained"
    start = kind if settings.from_scratch else describe_weights(run)
    epochs = settings.finetune_epochs
    for name, draws in plan.items():
        results = []
        for seed, positions in enumerate(draws, settings.seed):
            text = f"{name.replace('%', 'percent')} {kind} {epochs} epochs seed {seed}"
            images = train.take(positions)
            determining = [start, digest_images(images), compute.precision]
            text += f" {sha256(' '.join(determining).encode()).hexdigest()[:8]}"
            results.append(
                finetune(
                    run.path,
                    images,
                    test,
                    out=run.path / "finetuning" / text.replace(" ", "-"),
                    epochs=epochs,
                    from_scratch=settings.from_scratch,
                    seed=seed,
                    device=str(compute.device),
                    precision=compute.precision,
                )
            )
        top1, top5 = ([result[key] for result in results] for key in ("top1", "top5"))
        accuracy = summarize_accuracy(top1, top5, results[0]["n"], len(train.classes))
        yield ProtocolResult(
            name=f"{name}, {epochs} epochs",
            features=kind,
            parameters=results[0]["parameters"] | {"labels": name, "draws": len(draws)},
            metrics=accuracy
            | {
                "val_top1": [result["val_top1"] for result in results],
                "unreadable": max(result["unreadable"] for result in results),
            },
        )
