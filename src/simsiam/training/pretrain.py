"""Pretraining: the loop. It reads downward once, and whatever it learns goes into the run folder."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simsiam.config.recipes import Recipe
from simsiam.data.batches import iter_batches, steps_per_epoch
from simsiam.distributed.collectives import all_gather_objects, all_reduce_max
from simsiam.distributed.process_group import distributed_entry_point, rank_zero_only, world_size
from simsiam.distributed.sync_batch_norm import synchronize_replicas
from simsiam.errors import Stopped, UsageError, WorkFailed
from simsiam.model.memory import catch_out_of_memory
from simsiam.model.optimizers import set_lr
from simsiam.model.targets import eta_bytes
from simsiam.monitoring.gauges import all_finite, compute_gauges, grad_norm
from simsiam.monitoring.label_free_monitor import advise_training_length, label_free_monitor
from simsiam.monitoring.nearest_neighbors import knn_monitor
from simsiam.monitoring.verdict import judge_run
from simsiam.runs.compose import compose_recipe
from simsiam.runs.encoder import eval_transform
from simsiam.runs.environment import collect_environment
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.recipe_file import write_recipe
from simsiam.runs.run_folder import Run, choose_run_path
from simsiam.sources.open_source import open_source
from simsiam.training.interrupt import InterruptHandler
from simsiam.training.prepare import (
    RunData,
    TrainingSetup,
    build_training_setup,
    initialize_eta,
    prepare_data,
)
from simsiam.training.progress import ProgressLine, Stopwatch, format_labeled_lines
from simsiam.training.step import build_gradient_step


@distributed_entry_point
def pretrain(
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    recipe: str | Recipe | None = None,
    out: str | os.PathLike[str] | None = None,
    **overrides: Any,
) -> Path:
    """Pretrain on images without labels; returns the run folder.

    The source chooses the recipe unless one is given (a name, a YAML file or a Recipe), and `words` change single
    settings: every flag of the command line, with underscores. Raises UsageError for a wrong request, WorkFailed for a
    diverged loss, and Stopped after SIGINT or SIGTERM, with the run saved. Under torchrun all its processes make one
    run, and go on with it when they are started again.
    """
    complete, opened, why = compose_recipe(source, recipe, overrides)
    path = choose_run_path(out, f"{opened.name}-{complete.method.name}", complete)
    data, parts = prepare_data(complete, opened), build_training_setup(complete)
    with Run.create(
        path, complete
    ).lock() as run:  # only now: a wrong request leaves nothing behind
        train_run(
            run,
            data,
            parts,
            messages=[
                *format_labeled_lines("recipe", why),
                *format_labeled_lines("run", [str(path)]),
            ],
        )
    return path


@distributed_entry_point
def resume(path: str | os.PathLike[str], *, epochs: int | None = None) -> Path:
    """Continue a run bit for bit from its last checkpoint; more `epochs` stretch its schedule, and it is said how."""
    with rank_zero_only(Run)(path).lock() as run:
        if epochs is not None:
            if epochs < run.recipe.epochs or run.recipe.steps is not None:
                raise UsageError(
                    f"a run can only be extended: its epochs are {run.recipe.epochs}, its steps not set"
                )
            run.recipe = run.recipe.replace(epochs=epochs)
        recipe = (
            run.recipe.replace(init=None) if run.has_checkpoint else run.recipe
        )  # the checkpoint has all weights
        data, parts = (
            prepare_data(run.recipe, open_source(run.recipe.source, run.recipe.channels)),
            build_training_setup(recipe),
        )
        write_recipe(run.path, run.recipe)
        train_run(run, data, parts, messages=[])
    return run.path


def train_run(run: Run, data: RunData, setup: TrainingSetup, messages: list[str]) -> None:
    """From the run's last checkpoint, or from the start, to its last step."""
    recipe, method = run.recipe, run.recipe.method
    model, optimizer, compute = setup
    device, precision = compute
    gradients = build_gradient_step(recipe, setup)
    per_epoch = steps_per_epoch(len(data.train), recipe.batch_size)
    steps = recipe.steps or recipe.epochs * per_epoch
    warmup = method.warmup_epochs * per_epoch

    state, changed = run.load_or_create_state(
        collect_environment(compute), num_images=len(data.train)
    )
    if state["step"]:
        messages = [*messages, f"from     step {state['step']} of {steps}"]
    if eta := eta_bytes(method, len(data.train)):
        where = (
            f"{device.type}, dealt to {world_size()} processes" if world_size() > 1 else device.type
        )
        messages = [
            *messages,
            f"eta      {eta / 2**20:,.2f} MiB on {where}; and in every checkpoint",
        ]
    labels = None if data.train.labels is None else torch.from_numpy(data.train.labels)
    model.begin(images=len(data.train), labels=labels, steps=steps, per_epoch=per_epoch)
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = step = state["step"]
    diverged, stopping = "", False
    run.quarantine(data.unreadable, images_seen=data.total_images)

    def save(name: str) -> None:
        moved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        run.save(name, state | moved | {"step": step, "seconds": watch.seconds})

    def measure() -> dict[str, float]:
        found = label_free_monitor(
            model,
            data.train,
            recipe,
            eval_transform(recipe),
            state.get("neighbors"),
            compute=compute,
        )
        run.quarantine(found.skipped)
        state["neighbors"] = found.neighbors
        if data.held_out is None:
            return found.values
        top1, skipped = knn_monitor(
            model, data.bank, data.held_out, eval_transform(recipe), compute=compute
        )
        run.quarantine(skipped)
        state["knn"] |= {"last": top1["knn_top1"]}
        if top1["knn_top1"] > state["knn"].get("best", -1):
            state["knn"] |= {"best": top1["knn_top1"], "best_step": step}
            save("best")
        return found.values | top1

    room = catch_out_of_memory(recipe.replace(precision=precision), device)
    with (
        MetricsLogger(run, start) as journal,
        ProgressLine(start, steps, per_epoch) as line,
        InterruptHandler() as interrupt,
        room,
    ):
        for text in messages + changed:
            line.print_line(text)
        if "model" not in state:
            initialize_eta(model, data.train, recipe, compute)
        watch = Stopwatch(state["seconds"])
        save("last")
        for batch in iter_batches(data.train, recipe, start, steps, device):
            step, index = batch.step + 1, batch.index.to(device)
            lr = set_lr(
                optimizer, batch.step, peak_lr=recipe.peak_lr, steps=steps, warmup_steps=warmup
            )
            output = gradients(batch.views, index, batch.weight)
            optimizer.step()
            model.after_step(output, batch.step, index)

            # What one process is told or meets, all act on at this same step.
            signum, stale, broken = all_reduce_max(
                interrupt.signum, watch.save_due(recipe.save_seconds), len(batch.skipped)
            )
            last, stopping = step == steps, bool(signum)
            logged = last or step == 1 or step % recipe.log_every == 0
            measured = last or step % (per_epoch * recipe.knn_every) == 0
            kept = step % (per_epoch * recipe.save_every) == 0
            saved = last or kept or stopping or bool(stale)
            if (logged or saved or measured) and not all_finite(
                output.loss, model if saved or measured else None
            ):
                diverged = f"loss and weights were finite at step {journal.step} and no longer are at step {step}"
                break
            watch.record_step(recipe.batch_size, batch.wait)
            with watch.paused():
                found: dict[str, Any] = {}
                if logged:
                    found = {
                        "lr": lr["encoder"],
                        "lr_predictor": lr.get("predictor"),
                        **compute_gauges(output),
                    }
                    found |= {"grad_norm": grad_norm(model), **watch.rates()}
                if measured or saved:
                    synchronize_replicas(model)
                if measured:
                    found |= measure()
                if found:
                    journal.log({"step": step, "epoch": round(step / per_epoch, 4)} | found)
                    line.update(step, found)
                if kept:
                    save(f"epoch-{step // per_epoch:04d}")
                if saved:
                    save("last")
                if broken:
                    seen = min(
                        max(step * recipe.batch_size, data.total_images // 10), data.total_images
                    )
                    run.quarantine(all_gather_objects(batch.skipped), images_seen=seen)
            if stopping:
                break

    high, labeled = model.high_loss_threshold(recipe.batch_size), method.target == "labels"
    verdict = judge_run(
        journal.lines, step, diverged=bool(diverged), high_loss_threshold=high, supervised=labeled
    )
    if diverged and (good := run.checkpoint()):
        model.load_state_dict(good["model"])
    knn = {"knn_top1": state["knn"]} if state["knn"] else {}
    run.finish(
        model.backbone.state_dict(),
        {
            "verdict": verdict.verdict,
            "remedy": verdict.remedy,
            "advice": advise_training_length(journal.lines),
            "steps": step,
            "epochs": round(step / per_epoch, 4),
            **knn,
            "images_per_second": round(step * recipe.batch_size / max(watch.seconds, 1e-9), 1),
            "training_seconds": round(watch.seconds, 1),
            "unreadable": len(run.read_quarantine()),
        },
    )
    if diverged:
        raise WorkFailed(f"diverged: {diverged}. {verdict.remedy}")
    if stopping and step < steps:
        message = f"stopped at step {step} of {steps}, saved; `simsiam resume {run.path}` goes on"
        raise Stopped(message, signum)
    interrupt.raise_pending()
