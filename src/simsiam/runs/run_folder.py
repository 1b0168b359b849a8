"""The run folder: everything a run leaves behind.

Training writes it, and everything after training reads it; they share nothing else. Files appear
complete or not at all. Only metrics.jsonl grows, one line at a time; resuming a run cuts it back to
the checkpoint that the run continues from, so no step is ever in it twice. With several processes,
only rank 0 reads and writes a run folder; it broadcasts what it read.
"""

import io
import json
import os
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simsiam.config.recipes import CONVERTED_SOURCES, ResolvedRecipe
from simsiam.config.settings import MAX_INT
from simsiam.distributed.process_group import (
    rank,
    rank_zero_context,
    rank_zero_only,
    under_torchrun,
)
from simsiam.errors import UsageError, WorkFailed, printable, say_once, truncate
from simsiam.model.encoder import Encoder
from simsiam.runs.environment import numerical_conditions, utc_now
from simsiam.runs.preprocessing import described_weights, weights_metadata
from simsiam.runs.recipe_file import describe_differences, read_recipe, write_recipe
from simsiam.runs.records import (
    EVALUATION_DEFAULTS,
    SCHEMAS,
    TRANSFER_DEFAULTS,
    CheckpointHead,
    Evaluation,
    MetricsExtent,
    MetricsRecord,
    Record,
    TrainingState,
    Transfer,
)
from simsiam.runs.weight_files import (
    ChecksumError,
    load_metadata,
    load_state,
    load_without_numbers,
    save_weights,
    tensors_sha256,
)
from simsiam.sources.fingerprint import compare_sources
from simsiam.sources.own_marks import MARKS_FILE, mark_places
from simsiam.utils.checksums import is_intact, read_with_checksum, seal, write_with_checksum
from simsiam.utils.files import (
    atomic_write,
    exclusive_lock,
    remove_stale_parts,
    stale_parts,
    write_text,
)
from simsiam.utils.names import join_names, reason_line, split_names
from simsiam.utils.read_files import open_regular, read_bytes, read_text
from simsiam.utils.system import guard_folder, open_own, replace_path
from simsiam.utils.typed_json import check_type, read_json, to_json

CHECKPOINT_FORMAT = 1  # the version that is stored in a checkpoint
SUBFOLDERS = ("checkpoints", "evaluations")
BACKBONE_FILE = "backbone.safetensors"
HEAD_FILE = "head.safetensors"  # what the encoder has besides its backbone
ORIGIN_FILE = "origin.json"  # where published weights come from, and their license
# In its metadata: the digest of the backbone that it belongs to, and the name of the second branch.
BACKBONE_KEY, PATCHES_KEY = "backbone", "patches"
METRIC_NAMES = ("loss", "lr", "z_std", "z_std_sqrt_d", "z_rank", "images_per_second")
MAX_METRICS_BYTES = 2**28  # of metrics.jsonl: a million lines
AVERAGED_PARTS = ("backbone.", "projector.")  # of a model, with `average_weights`
MIN_IMAGES_SEEN = 20  # with fewer images, the share of unreadable ones says little

# The settings in which a checkpoint's recipe may differ from the run's: where things are, and how
# long to train. They are set to these values before the two are compared.
CHANGEABLE_SETTINGS = {
    "source": (), "init": None, "device": "auto", "workers": None, "epochs": 10**9,
    "save_seconds": 0, "read_timeout": 0,
}  # fmt: skip


def _parse_metrics(line: str) -> MetricsRecord | None:
    """Read a line of metrics.jsonl; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not is_intact(record) or type(record.get("step")) is not int:
        return None
    kinds = (int, float, type(None))
    fine = all(
        isinstance(value, str if name == "warning" else kinds)
        and not (isinstance(value, int) and abs(value) > MAX_INT)
        for name, value in record.items()
    )
    return record if fine else None


class TrainingFolder:
    """A folder with metrics.jsonl and JSON files: a run folder, or that of another training in it.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def own_file(self, name: str) -> Path:
        """Find a file that a file of the folder names.

        Args:
            name: Its path in the folder.

        Returns:
            The path of the file.

        Raises:
            UsageError: It leads out of the folder, by itself or through links.
        """
        try:
            path = (self.path / name).resolve()
            if path.is_relative_to(self.path.resolve()):
                return path
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, circular links
            pass
        raise UsageError(
            f"{printable(truncate(name))} is no file of {printable(str(self.path))}: a run names "
            "only files in its own folder"
        )

    @rank_zero_only
    def metrics(self) -> list[MetricsRecord]:
        """Read metrics.jsonl; a line that is damaged, or cut short, is left out, and this is said.

        Raises:
            UsageError: It is not a regular file, or too large.
        """
        path, records, damaged = self.path / "metrics.jsonl", list[MetricsRecord](), list[str]()
        text = read_text(path, MAX_METRICS_BYTES, errors="replace") if path.exists() else ""
        lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if (record := _parse_metrics(line)) is not None:
                records.append(record)
            elif line:
                damaged.append(str(number))
        if damaged:
            numbers = f"{', '.join(damaged[:5])}{', ...' if len(damaged) > 5 else ''}"
            say_once(
                f"note     {path}: {len(damaged)} of {len(records) + len(damaged)} lines are "
                f"damaged or cut short, and are left out (line {numbers})"
            )
        return records

    @rank_zero_only
    def json(self, name: str) -> Record:
        """Read one of the JSON files of the folder.

        Args:
            name: The name of the file.

        Returns:
            The object in it, or {} if there is no such file.

        Raises:
            UsageError: The file is damaged.
        """
        path = self.path / name
        return read_json(path, SCHEMAS.get(name, Record)) if path.exists() else {}

    @rank_zero_only
    def read_records(self, name: str) -> list[Record]:
        """Read a file of evaluations/ or transfers/.

        Args:
            name: The path of the file in the folder.

        Returns:
            Its records, or [] if there is no such file.

        Raises:
            UsageError: The file is damaged, or holds something else.
        """
        path = self.path / name
        schema: type = list[Transfer] if name.startswith("transfers/") else list[Evaluation]
        return read_json(path, schema) if path.exists() else []

    @rank_zero_only
    def write(
        self, name: str, content: Mapping[str, object] | Sequence[Mapping[str, object]] | str
    ) -> None:
        """Write a file, completely or not at all.

        Args:
            name: The path of the file in the folder.
            content: Text, or an object or a list of objects to be written as JSON, each with its
                checksum.

        Raises:
            WorkFailed: The file cannot be written.
        """
        write_text(self.path / name, content if isinstance(content, str) else to_json(content))

    def sync_metrics(self) -> MetricsExtent:
        """Bring metrics.jsonl to the disk.

        Returns:
            How long it is, for the checkpoint that is saved next.

        Raises:
            WorkFailed: The disk refuses.
        """
        path, data = self.path / "metrics.jsonl", b""
        if path.exists():
            try:
                with open_own(path, "rb+") as file:
                    os.fsync(file.fileno())
                    data = file.read()
            except OSError as error:
                raise WorkFailed(
                    f"cannot write metrics.jsonl in {self.path}: {error.strerror or error}; "
                    "`simsiam resume` continues the run"
                ) from error
        return {"bytes": len(data), "lines": data.count(b"\n"), "crc32": f"{crc32(data):08x}"}

    def missing_metrics(self, state: Mapping[str, Any]) -> list[str]:
        """Say what metrics.jsonl lacks of what it was when a checkpoint was saved.

        Args:
            state: What the checkpoint holds.

        Returns:
            One line, or none.
        """
        before, path = state.get("metrics"), self.path / "metrics.jsonl"
        if before is None:  # of an older version
            return []
        data = read_bytes(path, MAX_METRICS_BYTES) if path.exists() else b""
        if f"{crc32(data[: before['bytes']]):08x}" == before["crc32"]:
            return []
        steps = [record["step"] for record in self.metrics() if record["step"] <= state["step"]]
        return [
            f"note     {path} is not what it was when the checkpoint of step {state['step']} was "
            f"saved: it has {len(steps)} of {before['lines']} lines, the last one of step "
            f"{max(steps, default=0)}; curves and verdict are made of what is there"
        ]


class Run(TrainingFolder):
    """A run folder. `Run.create` makes one, `Run(path)` opens one.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        recipe: What recipe.yaml says.

    Raises:
        UsageError: It is not a run folder, its recipe is wrong, or it contains links.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        if not (self.path / "recipe.yaml").is_file():
            raise UsageError(f"{self.path} is not a run folder: it has no recipe.yaml")
        for entry in os.scandir(self.path):
            if entry.is_symlink():
                raise UsageError(
                    f"{printable(entry.path)} is a link, and a run writes only inside its folder: "
                    "link the whole folder instead"
                )
        guard_folder(self.path)
        self.recipe = read_recipe(self.path / "recipe.yaml").resolve()
        if rank() == 0:
            self._name_edits()

    def _name_edits(self) -> None:
        """Say how recipe.yaml, which people may edit, differs from its copy in the checkpoint.

        Without a checkpoint, it is compared with what backbone.safetensors says of the images.
        """
        recipe, backbone = self.path / "recipe.yaml", self.path / BACKBONE_FILE
        paths = [self.path / "checkpoints" / f"{name}.pt" for name in ("last", "previous")]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            if (saved := _saved_recipe(path)) is not None:
                before, now = saved.to_dict(), self.recipe.to_dict()
                break
        else:
            if paths:
                say_once(f"note     {recipe} cannot be compared with {paths[0]}: it is damaged")
            path, now = backbone, described_weights(weights_metadata(self.recipe))
            before = _described_weights(backbone) or now
        if differences := describe_differences(before, now):
            say_once(
                f"note     {recipe} was changed after {path.name} was saved: "
                f"{'; '.join(differences)}"
            )

    @classmethod
    @rank_zero_only
    def create(
        cls, path: str | os.PathLike[str], recipe: ResolvedRecipe, **places: Sequence[str]
    ) -> "Run":
        """Create a run folder, or open the run that `check_vacant` allows to continue.

        Its source is marked as named by the user; see `simsiam.sources.own_marks`.

        Args:
            path: The folder.
            recipe: The recipe of the run.
            **places: Other places to mark, by their setting, such as `init`.

        Raises:
            UsageError: The folder exists or cannot be created.
        """
        path = check_vacant(path, recipe)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {path}: {error.strerror or error}") from None
        if recipe.source not in CONVERTED_SOURCES:
            places["source"] = recipe.source
        # Before the recipe: a process that is killed between leaves no run without marks.
        mark_places(path, **places)
        write_recipe(path, recipe)
        for name in SUBFOLDERS:
            (path / name).mkdir(exist_ok=True)
        return cls(path)

    @property
    @rank_zero_only
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        folder = self.path / "checkpoints"
        return any((folder / f"{name}.pt").exists() for name in ("last", "previous"))

    @property
    def has_head(self) -> bool:
        """Whether the encoder has more than its backbone."""
        return (self.path / HEAD_FILE).exists()

    @contextmanager
    def lock(self) -> Iterator["Run"]:
        """Keep other processes from training the run, until the context ends.

        Yields:
            The run.

        Raises:
            UsageError: Another process is training it.
        """
        with rank_zero_context(exclusive_lock(self.path / ".lock", str(self.path))):
            yield self

    # --- reading ---

    def evaluations(self) -> list[Record]:
        """Read the records of all files in evaluations/, in the order of the files' names.

        What a record of an older version lacks is empty.
        """
        return self._read_all_records("evaluations", EVALUATION_DEFAULTS)

    def transfers(self) -> list[Record]:
        """Read the records of all files in transfers/, as `evaluations` does."""
        return self._read_all_records("transfers", TRANSFER_DEFAULTS)

    def _read_all_records(self, folder: str, defaults: Record) -> list[Record]:
        names = sorted(path.name for path in (self.path / folder).glob("*.json"))
        return [
            defaults | record for name in names for record in self.read_records(f"{folder}/{name}")
        ]

    @rank_zero_only
    def checkpoint(self, name: str = "last") -> TrainingState | None:
        """Load a checkpoint onto the CPU, without executing code that it may contain.

        Args:
            name: Its name, without ".pt".

        Returns:
            The state, or None if there is no such checkpoint.

        Raises:
            UsageError: The file is damaged, or belongs to another recipe or version.
        """
        path = self.path / "checkpoints" / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state = read_checkpoint(path)
        except UsageError as error:
            if name != "last" or not path.with_name("previous.pt").exists():
                raise
            raise UsageError(
                f"{error}; `simsiam resume {self.path}` continues from the previous one"
            ) from None
        check_type(state, CheckpointHead, printable(str(path)))
        if state["format"] != CHECKPOINT_FORMAT:
            raise UsageError(
                f"{path} has format {state['format']}; this version reads {CHECKPOINT_FORMAT}"
            )
        recipe = ResolvedRecipe.from_dict(state["recipe"])
        if recipe.replace(**CHANGEABLE_SETTINGS) != self.recipe.replace(**CHANGEABLE_SETTINGS):
            raise UsageError(
                f"{path} belongs to another recipe than {self.path}/recipe.yaml: "
                f"{'; '.join(describe_differences(recipe.to_dict(), self.recipe.to_dict()))}"
            )
        return cast(TrainingState, state)

    @rank_zero_only
    def read_quarantine(self) -> list[str]:
        """Read quarantine.txt: one line for each unreadable image, key and reason.

        Raises:
            UsageError: It is damaged.
        """
        path = self.path / "quarantine.txt"
        return split_names(read_with_checksum(path)) if path.exists() else []

    # --- writing ---

    @rank_zero_only
    def load_or_create_state(
        self,
        env: Record,
        num_images: int,
        fingerprint: dict[str, str],
        *,
        accept_changed_source: bool = False,
    ) -> tuple[TrainingState, list[str]]:
        """Load the state to continue from: that of the last checkpoint, or a new one.

        Args:
            env: What `collect_environment` returned.
            num_images: Number of training images.
            fingerprint: That of the source.
            accept_changed_source: Whether the run goes on with other images than it began with.

        Returns:
            The state, and lines that say what has changed since the checkpoint.

        Raises:
            UsageError: The run cannot be continued: its checkpoint is missing, or the images have
                changed.
        """
        messages = self._repair()
        saved = self.checkpoint()
        if saved is not None:
            messages += self.missing_metrics(saved)
        elif self.metrics():
            raise UsageError(
                f"{self.path} has logged steps and no checkpoints/last.pt to continue from"
            )
        state = new_state(env, num_images) if saved is None else saved
        if saved is not None:
            messages += self._compare_images(state, num_images, fingerprint, accept_changed_source)
        state["images"], state["fingerprint"] = num_images, fingerprint
        start = self.json("environment.json").get("start", utc_now())
        self.write(
            "environment.json", env | {"seed": self.recipe.seed, "start": start, "end": None}
        )
        epochs = state.get("recipe", {}).get("epochs", self.recipe.epochs)
        if epochs != self.recipe.epochs:
            messages += [
                f"epochs   {epochs} -> {self.recipe.epochs}: the schedule is stretched, so the "
                "learning rate",
                "         jumps up here, and the result differs from that of a run planned for "
                "this length",
            ]
        before, now = numerical_conditions(state["environment"]), numerical_conditions(env)
        messages += [
            f"note     {name} is {now[name]} now and was {before[name]}: from here on, the bits "
            "differ from those of an uninterrupted run"
            for name in now
            if now[name] != before[name]
        ]
        state["environment"] = env
        return state, messages

    def _compare_images(
        self, state: TrainingState, num_images: int, fingerprint: dict[str, str], accept: bool
    ) -> list[str]:
        """Compare the images with those of a checkpoint; see `load_or_create_state`."""
        advice = (
            f"`simsiam resume {shlex.quote(str(self.path))} --accept-changed-source` goes on with "
            "the images as they are, and --source PLACE with those at another place"
        )
        before = state.get("fingerprint", {})
        lines = compare_sources(before, fingerprint, advice=advice, accept=accept)
        if state["images"] != num_images:
            counts = f"{num_images} images to train on, and there were {state['images']} before"
            if not accept:
                raise UsageError(f"there are {counts}; {advice}")
            kept = {"moving_average": "a vector", "kmeans": "the cluster"}
            if (target := self.recipe.method.target) in kept:
                raise UsageError(
                    f"there are {counts}: target {target} keeps {kept[target]} of each image, so "
                    "this run cannot go on; start a new one"
                )
        if accept:
            state.pop("neighbors", None)  # of the images as they were
        return [f"note     {line}" for line in lines]

    def _repair(self) -> list[str]:
        """Repair what a kill or a bad disk left: unfinished files, a damaged or missing last.pt."""
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
            replace_path(previous, last)
            return [f"note     {error}; continuing from previous.pt, step {step}"]

    @rank_zero_only
    def save(self, name: str, state: Mapping[str, object]) -> None:
        """Write a checkpoint.

        Args:
            name: Its name, without ".pt". The checkpoint that "last" replaces is kept as
                previous.pt, which costs a renaming and the space.
            state: What it holds besides `format` and `recipe`.

        Raises:
            WorkFailed: It cannot be written; the one before is untouched.
        """
        path = self.path / "checkpoints" / f"{name}.pt"
        backup = path.with_name("previous.pt") if name == "last" else None
        head = {"format": CHECKPOINT_FORMAT, "recipe": self.recipe.to_dict()}
        metrics = {"metrics": self.sync_metrics()}
        with atomic_write(path, backup=backup) as part, open(part, "wb") as file:
            torch.save({**state, **head, **metrics}, file)

    @rank_zero_only
    def finish(self, backbone: Mapping[str, Tensor], summary: Mapping[str, object]) -> None:
        """Write backbone.safetensors, summary.json, and the time of the end.

        The head of an earlier backbone is deleted.

        Args:
            backbone: State dict of the backbone.
            summary: What summary.json says.
        """
        (self.path / HEAD_FILE).unlink(missing_ok=True)
        with atomic_write(self.path / BACKBONE_FILE) as part:
            save_weights(backbone, part, weights_metadata(self.recipe))
        self.write("summary.json", summary)
        self.write("environment.json", self.json("environment.json") | {"end": utc_now()})

    @rank_zero_only
    def write_head(self, encoder: Encoder, *, patches: str | None = None) -> None:
        """Write head.safetensors: what an encoder has besides its backbone.

        Call it after `finish`, which deletes the head of an earlier backbone.

        Args:
            encoder: The encoder, with the backbone of this run.
            patches: The name of its second branch, as `create_backbone` takes it, if there is one.

        Raises:
            WorkFailed: It cannot be written.
        """
        digest = tensors_sha256(encoder.backbone.state_dict())
        metadata = {BACKBONE_KEY: digest} | ({PATCHES_KEY: patches} if patches else {})
        with atomic_write(self.path / HEAD_FILE) as part:
            save_weights(encoder.head_state(), part, metadata)

    @rank_zero_only
    def quarantine(
        self, unreadable: Sequence[tuple[str, str]], images_seen: int | None = None
    ) -> None:
        """Add unreadable images to quarantine.txt, each one once.

        Args:
            unreadable: Key and reason of each image.
            images_seen: Number of images read so far; None does not check the limit.

        Raises:
            WorkFailed: More than `max_unreadable` of the images seen are unreadable.
        """
        if not unreadable:
            return
        known = self.read_quarantine()
        lines = [reason_line(key, reason) for key, reason in unreadable]
        new = dict.fromkeys([*lines, *known])
        if len(new) > len(known):
            write_with_checksum(self.path / "quarantine.txt", join_names(sorted(new)))
        limit = max(images_seen or 0, MIN_IMAGES_SEEN) * self.recipe.max_unreadable
        if images_seen and len(new) > limit:
            raise WorkFailed(
                f"{len(new)} of {images_seen} images cannot be read, more than --max-unreadable "
                f"{self.recipe.max_unreadable:g} allows: {self.path}/quarantine.txt lists them "
                "with the reasons"
            )


def new_state(env: Record, num_images: int) -> TrainingState:
    """Make the state of a run before its first step.

    Args:
        env: What `collect_environment` returned.
        num_images: Number of training images.
    """
    return {"step": 0, "seconds": 0.0, "knn": {}, "images": num_images, "environment": env}


def write_untrained(
    run: Run, model: Mapping[str, Tensor], env: Record, summary: Mapping[str, object]
) -> None:
    """Write the files of a run that took no step and measured nothing on the way.

    Args:
        run: The run folder, just created.
        model: State dict of the model; the names of its backbone begin with "backbone.".
        env: What `collect_environment` returned.
        summary: What summary.json says besides the numbers of steps, which are zero.
    """
    environment = env | {"seed": run.recipe.seed, "start": utc_now(), "end": None}
    run.write("environment.json", environment)
    metrics = {"step": 0, "epoch": 0.0, **dict.fromkeys(METRIC_NAMES)}
    run.write("metrics.jsonl", json.dumps(seal(metrics)) + "\n")
    run.save("last", {**new_state(env, num_images=0), "model": dict(model)})
    prefix = "backbone."
    backbone = {k.removeprefix(prefix): x for k, x in model.items() if k.startswith(prefix)}
    run.finish(backbone, {"steps": 0, "images_per_second": 0.0, **summary})


def read_checkpoint(path: Path) -> Record:
    """Load a file that `torch.save` wrote, onto the CPU, without executing code.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        UsageError: It is missing or damaged.
    """
    try:
        with open_regular(path) as file:
            if not zipfile.is_zipfile(file):
                raise ChecksumError("it is cut short, or not a checkpoint")
        return cast(Record, load_state(path))
    except UsageError:
        raise
    except FileNotFoundError:
        reason = "is missing"
    except ChecksumError as error:
        reason = f"is damaged: {error}"
    except Exception as error:  # for a damaged file, pickle and zipfile can raise anything
        detail = (str(error).splitlines() or ["no message"])[0][:100]
        reason = f"is not a readable checkpoint: {type(error).__name__}, {detail}"
    raise UsageError(f"{path} {reason}")


def _saved_recipe(path: Path) -> ResolvedRecipe | None:
    """Read the recipe in a checkpoint; None if it is missing, or cannot be read."""
    try:
        status = path.stat()
        return _read_saved_recipe(path.absolute(), (status.st_mtime_ns, status.st_size))
    except Exception:  # whoever needs the checkpoint itself says what is wrong
        return None


def _described_weights(path: Path) -> dict[str, object]:
    """Read what a backbone's file says of its images; {} if it is missing or cannot be read."""
    try:
        return described_weights(load_metadata(path))
    except Exception:  # whoever needs the backbone says what is wrong
        return {}


@lru_cache(maxsize=100)
def _read_saved_recipe(path: Path, version: tuple[int, int]) -> ResolvedRecipe:
    state = check_type(load_without_numbers(path), Record, str(path))
    return ResolvedRecipe.from_dict(state["recipe"])


def checkpoint_bytes(
    recipe: ResolvedRecipe, model: nn.Module, optimizer: Optimizer, env: Record
) -> int:
    """Compute the size of a checkpoint, as `Run.save` would write it.

    Args:
        recipe: The recipe of the run.
        model: The model.
        optimizer: The optimizer, with its state.
        env: What `collect_environment` returned.

    Returns:
        Bytes.
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "environment": env}
    if recipe.average_weights:
        averaged = [name for name in state["model"] if name.startswith(AVERAGED_PARTS)]
        state["trained"] = {name: state["model"][name].clone() for name in averaged}
    file = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, "recipe": recipe.to_dict(), **state}, file)
    return len(file.getbuffer())


@rank_zero_only
def choose_run_path(
    out: str | os.PathLike[str] | None, name: str, recipe: ResolvedRecipe | None
) -> Path:
    """Choose where a run goes.

    Args:
        out: The folder that was asked for. The default is runs/NAME-N, with a free number N.
        name: The name in the default.
        recipe: The recipe of the run.

    Returns:
        The folder; the default is created, empty.

    Raises:
        UsageError: There is something else in it, or torchrun may restart the command and would not
            find the run again.
    """
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UsageError(
            "torchrun may restart this command: give --out, so that it continues the run it started"
        )
    return check_vacant(out, recipe) if out else _claim_run_path(name)


@contextmanager
def reserved_run_path(
    out: str | os.PathLike[str] | None, name: str, recipe: ResolvedRecipe | None
) -> Iterator[Path]:
    """Choose where a run goes, and keep the place until the context ends.

    The folder with the default name is created at once, so that runs that are started at the same
    time get different numbers. It is removed if it is still empty at the end.

    Args:
        out: As in `choose_run_path`, like the other arguments.
        name: The name in the default.
        recipe: The recipe of the run.

    Yields:
        The folder.

    Raises:
        UsageError: As in `choose_run_path`.
    """
    existed = Path("runs").exists()
    path = choose_run_path(out, name, recipe)
    try:
        yield path
    finally:
        if out is None:
            with suppress(OSError):
                path.rmdir()
                if not existed:
                    path.parent.rmdir()


def check_vacant(path: str | os.PathLike[str], recipe: ResolvedRecipe | None = None) -> Path:
    """Check that a run folder can be made at a path: nothing is there, or an empty folder.

    torchrun starts the same command again after a crash, and so do the queues of clusters. So under
    torchrun the folder of a run with the same recipe is accepted, to be continued.

    Args:
        path: The folder.
        recipe: The recipe of the run, if it may be continued.

    Returns:
        The path.

    Raises:
        UsageError: There is something else.
    """
    path = Path(path)
    if not path.exists():
        return path
    # A process may have been killed before it had written the recipe.
    if path.is_dir() and set(path.iterdir()) <= {path / MARKS_FILE, *stale_parts(path)}:
        remove_stale_parts(path)
        return path
    restarted = recipe is not None and under_torchrun()
    if not restarted or not (path / "recipe.yaml").is_file():
        raise UsageError(
            f"{path} exists and is not written over: choose another --out, or continue it with "
            f"`simsiam resume {path}`"
        )
    if read_recipe(path / "recipe.yaml").resolve() == recipe:
        return path
    raise UsageError(
        f"{path} holds a run of another recipe than this command's: choose another --out"
    )


def _claim_run_path(name: str) -> Path:
    """Create the first free folder of runs/NAME-1, runs/NAME-2, ..., empty."""
    number = 1
    while True:
        path = Path("runs") / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except (PermissionError, NotADirectoryError) as error:
            raise UsageError(f"cannot write to {path}: {error.strerror}") from None
