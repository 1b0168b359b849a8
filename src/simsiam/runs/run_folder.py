"""The run folder: all that a run leaves behind, and the only thing that training and everything after it both know.

Files appear whole or not at all. metrics.jsonl grows a line at a time; whoever resumes a run cuts it back to the
checkpoint that the run goes on from, so it never holds a step twice. Of several processes the first alone reads and
writes a run folder, and tells the others.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from simsiam.config.recipes import ResolvedRecipe
from simsiam.distributed.process_group import rank_zero_context, rank_zero_only
from simsiam.errors import UsageError, WorkFailed, printable
from simsiam.runs.environment import numerical_conditions, utc_now
from simsiam.runs.recipe_file import read_recipe, write_recipe
from simsiam.runs.weight_files import ChecksumError, load_state, save_weights
from simsiam.utils.files import atomic_write, exclusive_lock, remove_stale_parts

CHECKPOINT_FORMAT = 1  # of a checkpoint


SUBFOLDERS = ("checkpoints", "evaluations")


MIN_IMAGES_SEEN = 20  # images; among fewer, the share of unreadable ones says little


# What may differ between a checkpoint's recipe and the run's: where things are, and how far to go.
CHANGEABLE_SETTINGS = {
    "source": (), "init": None, "device": "auto", "workers": None, "epochs": 10**9, "save_seconds": 0,
    "read_timeout": 0,
}  # fmt: skip


class TrainingFolder:
    """A folder with a journal and JSON files: a run's, or one in it for a training of its own."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @rank_zero_only
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a crash cut short is left out."""
        path, lines = self.path / "metrics.jsonl", []
        for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or "step" not in line:
                break
            lines.append(line)
        return lines

    @rank_zero_only
    def json(self, name: str) -> dict[str, Any]:
        """One of the folder's JSON files, {} where there is none."""
        found = self._read_json(name)
        if not isinstance(found, dict):
            raise UsageError(f"{self.path / name} is damaged: it holds no mapping")
        return found

    @rank_zero_only
    def read_records(self, name: str) -> list[dict[str, Any]]:
        """The records in a file of evaluations/ or transfers/, [] where there is none. Raises UsageError."""
        found = self._read_json(name) or []
        if not (
            isinstance(found, list) and all(isinstance(r, dict) and "protocol" in r for r in found)
        ):
            raise UsageError(
                f"{printable(str(self.path / name))} is not a list of records: move it away"
            )
        return found

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{printable(str(path))} is damaged: {error}") from None

    @rank_zero_only
    def write(self, name: str, content: Mapping[str, Any] | str) -> None:
        with atomic_write(self.path / name) as part:
            part.write_text(
                content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            )


class Run(TrainingFolder):
    """A run folder. `Run.create` makes one, `Run(path)` opens one; both raise UsageError in one line."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        if not (self.path / "recipe.yaml").is_file():
            raise UsageError(f"{self.path} is not a run folder: it has no recipe.yaml")
        for entry in os.scandir(self.path):
            if entry.is_symlink():
                where = printable(entry.path)
                raise UsageError(
                    f"{where} is a link, and a run writes only inside its folder: link the whole folder"
                )
        self.recipe = read_recipe(self.path / "recipe.yaml").resolve()

    @classmethod
    @rank_zero_only
    def create(cls, path: str | os.PathLike[str], recipe: ResolvedRecipe) -> "Run":
        """A new run folder, or that of a run to go on with: one that `vacant` lets pass."""
        path = check_vacant(path, recipe)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {path}: {error.strerror or error}") from None
        write_recipe(path, recipe)
        for name in SUBFOLDERS:
            (path / name).mkdir(exist_ok=True)
        return cls(path)

    @property
    @rank_zero_only
    def has_checkpoint(self) -> bool:
        """Whether it has a checkpoint to go on from."""
        return any(
            (self.path / "checkpoints" / f"{name}.pt").exists() for name in ("last", "previous")
        )

    @contextmanager
    def lock(self) -> Iterator["Run"]:
        """The run for this process alone, however that ends. Raises UsageError where another one trains it."""
        with rank_zero_context(exclusive_lock(self.path / ".lock", str(self.path))):
            yield self

    # --- what is read back ---

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of every file in evaluations/, in order of names. Raises UsageError for another file."""
        return self.read_all_records("evaluations")

    def transfers(self) -> list[dict[str, Any]]:
        """Those of transfers/, likewise."""
        return self.read_all_records("transfers")

    def read_all_records(self, folder: str) -> list[dict[str, Any]]:
        names = sorted(path.name for path in (self.path / folder).glob("*.json"))
        return [record for name in names for record in self.read_records(f"{folder}/{name}")]

    @rank_zero_only
    def checkpoint(self, name: str = "last") -> dict[str, Any] | None:
        """The state saved under a name, on the CPU; None where there is none yet. Executes no code (weights_only)."""
        path = self.path / "checkpoints" / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state = read_checkpoint(path)
        except UsageError as error:
            if name != "last" or not path.with_name("previous.pt").exists():
                raise
            raise UsageError(
                f"{error}; `simsiam resume {self.path}` goes on from the one before"
            ) from None
        try:
            made_with = ResolvedRecipe.from_dict(state["recipe"])
            if state["format"] != CHECKPOINT_FORMAT:
                raise UsageError(
                    f"{path} has format {state['format']}; this version reads {CHECKPOINT_FORMAT}"
                )
        except (LookupError, TypeError) as error:
            raise UsageError(
                f"{path} is not a run's checkpoint: {type(error).__name__}, {error}"
            ) from None
        if made_with.replace(**CHANGEABLE_SETTINGS) != self.recipe.replace(**CHANGEABLE_SETTINGS):
            raise UsageError(f"{path} belongs to another recipe than {self.path}/recipe.yaml")
        return state

    # --- what is written ---

    @rank_zero_only
    def load_or_create_state(
        self, env: dict[str, Any], num_images: int
    ) -> tuple[dict[str, Any], list[str]]:
        """The state to go on from, the last checkpoint's or a new one, and what has changed around it, in words."""
        said = self._repair()
        fresh: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "knn": {},
            "images": num_images,
            "environment": env,
        }
        state = self.checkpoint()
        if state is None and self.metrics():
            raise UsageError(
                f"{self.path} has logged steps and no checkpoints/last.pt to go on from"
            )
        state = state or fresh
        if state["images"] != num_images:
            raise UsageError(
                f"the source has {num_images} images now and had {state['images']} at the start"
            )
        start = self.json("environment.json").get("start", utc_now())
        self.write(
            "environment.json", env | {"seed": self.recipe.seed, "start": start, "end": None}
        )
        if state.get("recipe", {}).get("epochs", self.recipe.epochs) != self.recipe.epochs:
            said += [
                f"epochs   {state['recipe']['epochs']} -> {self.recipe.epochs}: the cosine is stretched, so the lr",
                "         jumps up from where it was, and the result is not that of a run planned for this length",
            ]
        said += [
            f"note     {name} is {new} now and was {old}: from here on the bits differ from an uninterrupted run's"
            for name, new in numerical_conditions(env).items()
            if new != (old := numerical_conditions(state["environment"])[name])
        ]
        return state | {"environment": env}, said

    def _repair(self) -> list[str]:
        """Make good what a kill or a bad disk left: unfinished files, and a last.pt that is damaged or gone."""
        folder = self.path / "checkpoints"
        for name in SUBFOLDERS:
            (self.path / name).mkdir(exist_ok=True)
            remove_stale_parts(self.path / name)
        remove_stale_parts(self.path)
        last, previous = folder / "last.pt", folder / "previous.pt"
        if not previous.exists():
            return []
        try:
            read_checkpoint(last)
            return []
        except UsageError as error:
            step = read_checkpoint(previous)["step"]
            os.replace(previous, last)
            return [f"note     {error}; going on from previous.pt, step {step}"]

    @rank_zero_only
    def finish(self, backbone: Mapping[str, torch.Tensor], summary: Mapping[str, Any]) -> None:
        """The backbone alone, the summary, and the time of the end."""
        with atomic_write(self.path / "backbone.safetensors") as part:
            save_weights(backbone, part)
        self.write("summary.json", summary)
        self.write("environment.json", self.json("environment.json") | {"end": utc_now()})

    @rank_zero_only
    def quarantine(
        self, unreadable: Sequence[tuple[str, str]], images_seen: int | None = None
    ) -> None:
        """List files that do not decode, each once, with the reason.

        Raises WorkFailed when they are more than the recipe's share of the images `seen` so far.
        """
        if not unreadable:
            return
        known = self.read_quarantine()
        new = dict.fromkeys(
            f"{printable(key)}\t{reason}" for key, reason in unreadable
        ) | dict.fromkeys(known)
        if len(new) > len(known):
            self.write("quarantine.txt", "".join(f"{line}\n" for line in sorted(new)))
        if (
            images_seen
            and len(new) > max(images_seen, MIN_IMAGES_SEEN) * self.recipe.max_unreadable
        ):
            raise WorkFailed(
                f"{len(new)} of {images_seen} images cannot be read, more than --max-unreadable "
                f"{self.recipe.max_unreadable:g} allows: {self.path}/quarantine.txt lists them with the reasons"
            )

    @rank_zero_only
    def read_quarantine(self) -> list[str]:
        path = self.path / "quarantine.txt"
        return path.read_text().splitlines() if path.exists() else []

    @rank_zero_only
    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep a state under a name; of `last` the one before too, as previous.pt: it costs a rename and its size."""
        path = self.path / "checkpoints" / f"{name}.pt"
        backup = path.with_name("previous.pt") if name == "last" else None
        with atomic_write(path, backup=backup) as part, open(part, "wb") as file:
            torch.save(
                {"format": CHECKPOINT_FORMAT, "recipe": self.recipe.to_dict(), **state}, file
            )


def checkpoint_bytes(
    recipe: ResolvedRecipe, model: nn.Module, optimizer: Optimizer, env: dict[str, Any]
) -> int:
    """The size of a checkpoint that `Run.save` would write."""
    moved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "environment": env}
    file = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, "recipe": recipe.to_dict(), **moved}, file)
    return len(file.getbuffer())


@rank_zero_only
def choose_run_path(out: str | os.PathLike[str] | None, name: str, recipe: ResolvedRecipe) -> Path:
    """Where a run goes: `out`, or else a new runs/NAME-N. Raises UsageError where it cannot."""
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UsageError(
            "torchrun may start this command again: give --out, so that it finds the run it began"
        )
    return check_vacant(out or next_run_path(name), recipe)


def check_vacant(path: str | os.PathLike[str], recipe: ResolvedRecipe | None = None) -> Path:
    """The path, if a run folder can be made there. An existing folder with anything in it is refused.

    But torchrun starts the same command again after a crash, and so does a cluster's queue: under torchrun the folder
    of a run with this very `recipe` is the one to go on with.
    """
    path = Path(path)
    remove_stale_parts(path)  # a process killed before there was a recipe leaves a part of it
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if (
            recipe is not None
            and "TORCHELASTIC_RUN_ID" in os.environ
            and (path / "recipe.yaml").is_file()
        ):
            if read_recipe(path / "recipe.yaml").resolve() == recipe:
                return path
            raise UsageError(
                f"{path} holds a run of another recipe than this command's: choose another --out"
            )
        raise UsageError(
            f"{path} exists and is not written over: choose another --out, or `simsiam resume {path}`"
        )
    return path


def next_run_path(name: str) -> Path:
    """runs/NAME-1, or the first number that is free."""
    number = 1
    while (path := Path("runs") / f"{name}-{number}").exists():
        number += 1
    return path


def read_checkpoint(path: Path) -> Any:
    """What a file of checkpoints/ holds, if it is whole. Raises UsageError in one line. Runs no code."""
    try:
        if not zipfile.is_zipfile(path) and path.exists():
            raise ChecksumError("it is cut short, or something else")
        return load_state(path)
    except FileNotFoundError:
        reason = "is gone"
    except ChecksumError as error:
        reason = f"is damaged: {error}"
    except Exception as error:  # what is broken makes pickle and zipfile raise anything
        reason = f"is not a readable checkpoint: {type(error).__name__}, {(str(error).splitlines() or ['empty'])[0][:100]}"
    raise UsageError(f"{path} {reason}")
