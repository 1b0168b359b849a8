"""Starting, continuing and finishing a pretraining run: `pretrain` and `resume`."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from simsiam.config.keyword_settings import PretrainSettings
from simsiam.config.method import FIXED_TARGETS
from simsiam.config.recipes import CONVERTED_SOURCES, RECIPE_NAMES, Recipe, ResolvedRecipe
from simsiam.distributed.process_group import (
    distributed_entry_point,
    rank_zero_only,
    under_torchrun,
    world_size,
)
from simsiam.errors import UsageError, WorkFailed, printable, truncate
from simsiam.model.memory import catch_out_of_memory
from simsiam.model.targets import eta_bytes
from simsiam.runs.choose import held_out_count
from simsiam.runs.compose import PLACES, compose_recipe, open_run_source
from simsiam.runs.environment import collect_environment
from simsiam.runs.journal import MetricsLogger
from simsiam.runs.loggers.choice import choose_loggers, parse_loggers, read_choice
from simsiam.runs.recipe_file import read_recipe, write_recipe
from simsiam.runs.records import TrainingState
from simsiam.runs.run_folder import Run, reserved_run_path
from simsiam.runs.weights import record_origin
from simsiam.sources.open_source import absolute_sources, source_names
from simsiam.sources.own_marks import is_named, mark_places, unnamed_places_error
from simsiam.training.budget import (
    CHOSEN_METHOD_SETTINGS,
    CHOSEN_SETTINGS,
    fit_to_minutes,
)
from simsiam.training.finish import finish
from simsiam.training.loop import run_training
from simsiam.training.prepare import RunData, TrainingSetup, build_training_setup, prepare_data
from simsiam.training.pretrain import Pretraining
from simsiam.training.progress import format_labeled_lines


@distributed_entry_point
def pretrain(
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    recipe: str | Recipe | None = None,
    out: str | os.PathLike[str] | None = None,
    minutes: float | None = None,
    logger: str | Sequence[str] = "tensorboard",
    training_class: type[Pretraining] = Pretraining,
    **overrides: Unpack[PretrainSettings],
) -> Path:
    """Pretrain a backbone on images without labels.

    Under torchrun all processes make one run, and continue it when they are started again.

    Args:
        source: A name, a folder, a list, an archive or shards; several folders are one set. The
            default is the recipe's own source, else the built-in data set "shapes".
        recipe: The name of a recipe, a YAML file, or a `Recipe`. By default the source decides.
        out: The run folder; it must not exist. The default is runs/SOURCE-METHOD-N.
        minutes: Time from start to end on this machine, evaluation included. It chooses the number
            of steps, and the size of views, the width and the batch unless these are given, or all
            of them by a file or a `Recipe`.
        logger: Where the numbers of metrics.jsonl are shown besides: "tensorboard", "wandb" or
            "mlflow", several of them, or "none".
        training_class: A subclass can measure more, in `observe`.
        **overrides: Any setting of the recipe, under the name of its flag with underscores.

    Returns:
        The path of the run folder.

    Raises:
        UsageError: If the request is wrong. Nothing has been written then.
        WorkFailed: If the loss diverged or no image can be read.
        Stopped: After SIGINT or SIGTERM; the run is saved.
    """
    begun = time.monotonic()
    loggers = parse_loggers(logger)
    command = ["pretrain", *(["--out", str(out)] if out else [])]
    complete, opened, reasons = compose_recipe(source, recipe, overrides, command)
    if minutes is not None and (before := restarted_recipe(out, complete)):
        complete = before
        reasons = [
            *reasons,
            f"{minutes:g} minutes: the settings that were chosen at the first start",
        ]
    elif minutes is not None:
        count = min(len(opened.train), complete.limit or len(opened.train))
        complete, lines = fit_to_minutes(
            complete,
            opened.train,
            overrides,
            minutes=minutes,
            elapsed=time.monotonic() - begun,
            processes=world_size(),
            held_out=held_out_count(complete, opened, count),
            keep_settings=recipe is not None and recipe not in RECIPE_NAMES,
        )
        reasons = [*reasons, *lines]
    with reserved_run_path(out, f"{opened.name}-{complete.method.name}", complete) as path:
        data, setup = prepare_data(complete, opened), build_training_setup(complete)
        messages = format_labeled_lines("recipe", reasons)
        messages += format_labeled_lines("run", [str(path)])
        init, teacher = ([name] if name else [] for name in (complete.init, complete.teacher))
        run = Run.create(path, complete, init=init, teacher=teacher, loggers=loggers)
        with run.lock():
            record_origin(run)
            choose_loggers(run, loggers)
            train_run(run, data, setup, messages, training_class=training_class)
    return path


@rank_zero_only
def restarted_recipe(
    out: str | os.PathLike[str] | None, complete: ResolvedRecipe
) -> ResolvedRecipe | None:
    """Return a recipe with what a time limit chose before torchrun started the command again.

    The speed is measured once: measured again, it would choose another number of steps.

    Args:
        out: The run folder.
        complete: The recipe of the command, without what the limit chooses.

    Returns:
        The recipe; None if this is no restart, or the run has no recipe yet.
    """
    file = Path(out or "") / "recipe.yaml"
    if out is None or not under_torchrun() or not file.is_file():
        return None
    recipe = read_recipe(file)
    chosen = {name: getattr(recipe, name) for name in CHOSEN_SETTINGS}
    method = {name: getattr(recipe.method, name) for name in CHOSEN_METHOD_SETTINGS}
    return complete.replace(**chosen, **method)


@distributed_entry_point
def resume(
    path: str | os.PathLike[str],
    *,
    epochs: int | None = None,
    source: str | os.PathLike[str] | Sequence[str] | None = None,
    logger: str | Sequence[str] | None = None,
    accept_changed_source: bool = False,
    training_class: type[Pretraining] = Pretraining,
) -> Path:
    """Continue a run bit for bit from its last checkpoint.

    Args:
        path: The run folder.
        epochs: A larger number of epochs extends the run; its learning rate schedule is stretched,
            which is printed.
        source: Where the run's images are now, if they have moved; it is kept in the recipe.
        logger: As in `pretrain`; by default the loggers that the run has. They are sent what they
            lack, also of a run that is complete.
        accept_changed_source: Whether the run goes on if its images have changed: if some are
            missing, new, renamed, labeled otherwise or have another content.
        training_class: That of `pretrain`.

    Returns:
        The path of the run folder.

    Raises:
        UsageError: If there is no run, it cannot be extended, its images have changed, or only its
            recipe names them.
        WorkFailed: If the loss diverged or no image can be read.
        Stopped: After SIGINT or SIGTERM; the run is saved.
    """
    loggers = None if logger is None else parse_loggers(logger)
    with rank_zero_only(Run)(path).lock() as run:
        if epochs is not None:
            if epochs < run.recipe.epochs or run.recipe.steps is not None:
                raise UsageError(
                    f"a run can only be extended: its epochs are {run.recipe.epochs}, "
                    "its steps not set"
                )
            run.recipe = run.recipe.replace(epochs=epochs)
        check_named(run, source, loggers)
        if source is not None:
            run.recipe = run.recipe.replace(source=absolute_sources(source))
        # The checkpoint holds all weights, so `init` is needed only before the first one.
        recipe = run.recipe.replace(init=None) if run.has_checkpoint else run.recipe
        opened = open_run_source(run, place=source, command=list)
        data = prepare_data(run.recipe, opened)
        setup = build_training_setup(recipe)
        if loggers is not None:
            choose_loggers(run, loggers)
            mark_places(run.path, loggers=loggers)
        train_run(
            run,
            data,
            setup,
            [],
            named_source=source is not None,
            accept_changed_source=accept_changed_source,
            training_class=training_class,
        )
    return run.path


def restore(model: nn.Module, optimizer: Optimizer, state: TrainingState, run: Run) -> None:
    """Load the state of a checkpoint into model and optimizer.

    Args:
        model: The model.
        optimizer: Its optimizer.
        state: What the checkpoint holds.
        run: The run, for the error.

    Raises:
        UsageError: The state does not fit.
    """
    try:
        model.load_state_dict(state["model"] | state.get("trained", {}))
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = truncate(" ".join(str(error).split()))
        raise UsageError(
            f"the checkpoint of {run.path} does not fit its recipe: {printable(reason)}"
        ) from None


def check_named(
    run: Run,
    source: str | os.PathLike[str] | Sequence[str] | None,
    loggers: Sequence[str] | None,
) -> None:
    """Check that the user has named all places that a run needs to go on; see `own_marks`.

    Args:
        run: The run folder.
        source: The images, if this command names them.
        loggers: The loggers, if this command names them.

    Raises:
        UsageError: Only the run names them; the message has the command that does.
    """
    recipe, chosen, folder = run.recipe, read_choice(run).names, run.path
    unnamed = dict[str, list[str]]()
    known = recipe.source in CONVERTED_SOURCES or is_named(folder, "source", recipe.source)
    if source is None and not known:
        unnamed["images"] = ["--source", *recipe.source]
    if loggers is None and not is_named(folder, "loggers", chosen):
        unnamed["loggers"] = ["--logger", *chosen]
    command = ["resume", str(folder), *(word for words in unnamed.values() for word in words)]
    weights = {"init": None if run.has_checkpoint else recipe.init, "teacher": recipe.teacher}
    flags = {name: [f"--{name}", place] for name, place in weights.items() if place}
    missing = [name for name in flags if not is_named(folder, name, flags[name][1:])]
    if missing:
        unnamed |= {PLACES[name]: flags[name] for name in missing}
        names = source_names(recipe.source if source is None else source)
        file = str(folder / "recipe.yaml")
        words = [word for flag in flags.values() for word in flag]
        command = ["pretrain", *names, "--recipe", file, *words]
    if unnamed:
        raise unnamed_places_error(folder, " and ".join(unnamed), command)


def train_run(
    run: Run,
    data: RunData,
    setup: TrainingSetup,
    messages: list[str],
    *,
    named_source: bool = False,
    accept_changed_source: bool = False,
    training_class: type[Pretraining] = Pretraining,
) -> None:
    """Train a run from its last checkpoint, or from the start, to its end; finish its folder.

    Args:
        run: The run folder, held by this process.
        data: The images to train on and those kept out.
        setup: Model, optimizer, device and precision.
        messages: Lines to print first.
        named_source: Whether the user has named the images in this command; that is kept.
        accept_changed_source: Whether other images than before are accepted.
        training_class: That of `pretrain`.

    Raises:
        UsageError: If the images have changed.
        WorkFailed: If the loss diverged.
        Stopped: After a signal.
    """
    recipe, method, num_images = run.recipe, run.recipe.method, len(data.train)
    model, optimizer, compute = setup
    state, changes = run.load_or_create_state(
        collect_environment(compute),
        num_images,
        data.fingerprint,
        accept_changed_source=accept_changed_source,
    )
    write_recipe(run.path, recipe)  # with what `resume` changes, now that the images are accepted
    if named_source:
        mark_places(run.path, source=recipe.source)
    with MetricsLogger(
        run,
        state["step"],
        warn=method.target not in (*FIXED_TARGETS, "kmeans"),  # their z are predictions of it
        choice=read_choice(run),
        recipe=recipe,
    ) as logger:
        training = training_class(run, data, setup, state, logger)
        if training.step:
            messages = [*messages, f"from     step {training.step} of {training.steps}"]
        if eta := eta_bytes(method, num_images):
            shards = f", sharded over {world_size()} processes" if world_size() > 1 else ""
            place = f"{compute.device.type}{shards}"
            messages = [
                *messages, f"eta      {eta / 2**20:,.2f} MiB on {place}; and in every checkpoint"
            ]  # fmt: skip
        if method.warmup_epochs * training.steps_per_epoch >= training.steps:
            note = "note     all steps are warm-up: the learning rate does not reach its peak"
            messages = [*messages, note]
        labels = None if data.train.labels is None else torch.from_numpy(data.train.labels)
        model.begin(
            images=num_images,
            labels=labels,
            steps=training.steps,
            per_epoch=training.steps_per_epoch,
        )
        if "model" in state:
            restore(model, optimizer, state, run)
        run.quarantine(data.unreadable, images_seen=data.total_images)
        with catch_out_of_memory(recipe.replace(precision=compute.precision), compute.device):
            outcome = run_training(training, messages + changes)

        verdict = finish(run, training, outcome, logger.lines, data)
        logger.summary = run.json("summary.json")
        if outcome.diverged:
            raise WorkFailed(
                f"diverged: loss and weights were finite at step {outcome.last_finite_step} and "
                f"are no longer at step {outcome.step}. {verdict.remedy}"
            )
        outcome.raise_if_stopped(f"saved; `simsiam resume {run.path}` continues the run")
