"""Pretraining: Algorithm 1 once a step, then its gauges and monitors."""

from collections.abc import Iterator

from torch import Tensor
from typing_extensions import override

from simsiam.data.batches import ViewBatch, iter_batches, steps_per_epoch
from simsiam.distributed.sync_batch_norm import synchronize_replicas
from simsiam.model.average import WeightAverage
from simsiam.model.optimizers import set_lr, update_weights
from simsiam.model.siamese import Siamese
from simsiam.monitoring.gauges import compute_gauges, grad_norm
from simsiam.monitoring.label_free_monitor import label_free_monitor
from simsiam.monitoring.nearest_neighbors import knn_monitor
from simsiam.monitoring.worth import measure_start
from simsiam.runs.encoder import eval_transform
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.records import TrainingState
from simsiam.runs.run_folder import Run
from simsiam.training.loop import Metrics, SkippedFiles, Training
from simsiam.training.prepare import RunData, TrainingSetup, initialize_eta, solve_clusters
from simsiam.training.step import build_gradient_step


class Pretraining(Training[ViewBatch]):
    """A run as the training loop sees it: Algorithm 1 once a step, its gauges, and its monitors.

    Args:
        run: The run folder, held by this process.
        data: The images to train on and those kept out.
        setup: Model, optimizer, device and precision.
        state: What the last checkpoint holds, or a new state.
        logger: Where records go.
    """

    model: Siamese

    def __init__(
        self,
        run: Run,
        data: RunData,
        setup: TrainingSetup,
        state: TrainingState,
        logger: MetricsLogger,
    ):
        recipe = run.recipe
        self.run, self.data, self.state, self.logger = run, data, state, logger
        self.setup = setup
        self.model, self.optimizer, self.compute = setup
        decay = recipe.average_weights
        self.average = WeightAverage(self.model, decay) if decay else None
        self.gradient_step = build_gradient_step(recipe, setup)
        self.batch_size, self.log_every = recipe.batch_size, recipe.log_every
        self.steps_per_epoch = steps_per_epoch(len(data.train), recipe.batch_size)
        self.steps = recipe.steps or recipe.epochs * self.steps_per_epoch
        self.measure_every = recipe.knn_every * self.steps_per_epoch
        self.keep_every = recipe.save_every * self.steps_per_epoch
        self.save_seconds = recipe.save_seconds
        self.step, self.seconds = state["step"], state["seconds"]

    @property
    def evaluated(self) -> Siamese | WeightAverage:
        """The weights that are measured and handed over: the average, if there is one."""
        return self.model if self.average is None else self.average

    @override
    def begin(self) -> None:
        recipe, train, compute = self.run.recipe, self.data.train, self.compute
        resumed = "model" in self.state
        if resumed and self.average is not None:
            self.average.load_checkpoint(self.state["model"])
        initialize_eta(self.model, train, recipe, compute, resumed=resumed)
        if not resumed:
            backbone, transform = self.model.backbone, eval_transform(recipe)
            self.state["start"] = measure_start(
                backbone, train, recipe, transform, self.steps, compute=compute
            )
        for part in ("model", "trained", "optimizer"):  # a second copy of what they hold now
            self.state.pop(part, None)  # type: ignore[misc]
        self.save("last")

    @override
    def batches(self) -> Iterator[ViewBatch]:
        device = self.compute.device
        return iter_batches(self.data.train, self.run.recipe, self.step, self.steps, device)

    @override
    def train_step(self, batch: ViewBatch) -> Tensor:
        recipe, index = self.run.recipe, batch.index.to(self.compute.device)
        epoch, step = divmod(batch.step, self.steps_per_epoch)
        if recipe.method.target == "kmeans" and not step:
            solve_clusters(self.setup, self.data.train, recipe, epoch)
        warmup = recipe.method.warmup_epochs * self.steps_per_epoch
        peak_lr, steps = recipe.peak_lr, self.steps
        self.lr = set_lr(
            self.optimizer, batch.step, peak_lr=peak_lr, steps=steps, warmup_steps=warmup
        )
        self.output = self.gradient_step(batch.views, index, batch.weight)
        update_weights(self.optimizer)
        self.model.after_step(self.output, batch.step, index)
        if self.average is not None:
            self.average.update(self.model, batch.step)
        return self.output.loss

    @override
    def metrics(self) -> Metrics:
        lr = {"lr": self.lr["encoder"], "lr_predictor": self.lr.get("predictor")}
        return lr | compute_gauges(self.output) | {"grad_norm": grad_norm(self.model)}

    @override
    def measure(self) -> Metrics:
        recipe, knn = self.run.recipe, self.state["knn"]
        model, transform, compute = self.evaluated, eval_transform(recipe), self.compute
        synchronize_replicas(model)
        signals = label_free_monitor(
            model, self.data.train, recipe, transform, self.state.get("neighbors"), compute=compute
        )
        self.run.quarantine(signals.skipped)
        self.state["neighbors"] = signals.neighbors
        if self.data.held_out is None:
            return signals.values
        top1, skipped = knn_monitor(
            model, self.data.bank, self.data.held_out, transform, compute=compute
        )
        self.run.quarantine(skipped)
        knn["last"] = top1["knn_top1"]
        if knn["last"] > knn.get("best", -1):
            knn |= {"best": knn["last"], "best_step": self.step}
            self.save("best")
        return signals.values | top1

    @override
    def log(self, record: Metrics) -> str | None:
        return self.logger.log(record)

    @override
    def save(self, name: str) -> None:
        weights = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            synchronize_replicas(self.average)
            weights |= self.average.checkpoint(weights["model"])
        progress = {"step": self.step, "seconds": self.seconds}
        self.run.save(name, self.state | weights | progress)

    @override
    def record_unreadable(self, files: SkippedFiles) -> None:
        total = self.data.total_images
        images_seen = min(max(self.step * self.batch_size, total // 10), total)
        self.run.quarantine(files, images_seen=images_seen)
