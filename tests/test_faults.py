"""Failures: a run loses nothing, is never trained twice at once, and reports in one line."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY, flags
from PIL import Image

import simsiam
from simsiam.commands.main import main
from simsiam.config.recipes import Recipe
from simsiam.data.batches import iter_batches
from simsiam.data.decode import Unreadable
from simsiam.data.images import Images
from simsiam.errors import UsageError, WorkFailed
from simsiam.model import memory
from simsiam.runs.recipe_file import read_recipe
from simsiam.runs.run_folder import Run
from simsiam.runs.weight_files import (
    ChecksumError,
    load_state,
    load_weights,
    save_weights,
    tensors_sha256,
)
from simsiam.sources.open_source import open_source
from simsiam.utils.files import atomic_folder, atomic_write, exclusive_lock, file_lock

CAMPAIGNS = Path(__file__).parent / "stress"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, with the checkpoint of its end and the one before."""
    run = simsiam.pretrain(
        "shapes", out=tmp_path_factory.mktemp("finished") / "run", **QUICK | {"save_seconds": 0}
    )
    assert Run(run).checkpoint("last")["step"] == 3 and Run(run).checkpoint("previous")["step"] == 2
    return run


# --- files ---


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    for error in (OSError(errno.ENOSPC, "no"), RuntimeError("torch hides it")):
        with (
            pytest.raises(WorkFailed, match=r"cannot write .*a: No space left on device") as raised,
            atomic_write(path) as part,
        ):
            part.write_text("half of")
            try:
                raise OSError(errno.ENOSPC, "full")
            except OSError:
                raise error  # noqa: B904  as libraries do: the reason is in the context
        assert "\n" not in str(raised.value)
    with pytest.raises(KeyError), atomic_write(path) as part:
        raise KeyError("ours")
    with pytest.raises(WorkFailed), atomic_folder(tmp_path / "b"):
        raise OSError(errno.EDQUOT, "quota")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    living = tmp_path / f"a.simsiam-{os.getppid()}.part"
    strays = [tmp_path / f"{name}.simsiam-{dead.pid}.part" for name in "ab"]
    for path in (living, *strays):
        path.write_text("half")
    with atomic_write(tmp_path / "a") as part:
        part.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", living.name, strays[1].name])


def test_of_two_processes_the_second_is_refused_and_a_killed_one_lets_go(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    code = (
        "import sys, time, pathlib, simsiam.utils.files\n"
        "with simsiam.utils.files.file_lock(pathlib.Path(sys.argv[1])) as locked:\n"
        "    print(locked, flush=True)\n"
        "    time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, run / ".lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    with pytest.raises(
        UsageError, match=f"run is being worked on by process {holder.pid} on .*: one at a time"
    ):
        simsiam.resume(run)
    with file_lock(run / ".lock") as locked:
        assert not locked
    holder.kill()
    holder.wait()
    simsiam.resume(run)
    with (
        pytest.raises(UsageError, match="cannot write to"),
        exclusive_lock(finished / "recipe.yaml" / ".lock", "it"),
    ):
        pass


def test_a_signal_in_the_middle_of_a_fork_is_not_lost():
    """Python drops an exception that is raised there. Work in other processes ends quietly, too."""
    code = (
        "import os, signal, time\nfrom simsiam.commands import main as cli\n"
        "from simsiam.utils import workers\nworkers.CPU_CORES = 2\n"
        "signal.signal(signal.SIGTERM, cli.raise_interrupt)\n"
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "try:\n    print(list(workers.parallel_map(time.sleep, [(5,), (5,)])))\n"
        "except KeyboardInterrupt as error:\n    print('stopped by', *error.args)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped by 15\n", "", 0)


# --- checkpoints ---


def same(a, b):
    one, other = Run(a).checkpoint(), Run(b).checkpoint()
    return one["step"] == other["step"] and all(
        torch.equal(one["model"][k], other["model"][k]) for k in one["model"]
    )


@pytest.mark.parametrize("harm", ["bit", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_it_is_said(
    harm, finished, tmp_path, capfd
):
    run = shutil.copytree(finished, tmp_path / "run")
    last = run / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    if harm == "bit":
        record = max(zipfile.ZipFile(last).infolist(), key=lambda record: record.file_size)
        # Not in the padding, where a flipped bit does no harm.
        data[record.header_offset + record.file_size // 2 + 128] ^= 1
    last.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    if harm == "gone":
        last.unlink()
    else:
        with pytest.raises(
            UsageError,
            match=r"last.pt is damaged: .*`simsiam resume .*` continues from the previous one",
        ):
            Run(run).checkpoint()
    simsiam.resume(run)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "last.pt is" in line]
    assert line.endswith("continuing from previous.pt, step 2")
    assert same(run, finished)
    assert len(Run(run).metrics()) == 3 and Run(run).checkpoint("previous")["step"] == 2


def test_every_flipped_bit_is_seen_or_harmless(tmp_path):
    """On a small file: whichever bit is flipped, the file is refused or the state is the same."""
    state = {"a": torch.arange(50.0), "b": [1, {"c": "text"}], "step": 3}
    torch.save(state, tmp_path / "a.pt")
    save_weights({"w": torch.arange(20.0), "n": torch.tensor(3)}, tmp_path / "a.safetensors")
    for name, load in (("a.pt", load_state), ("a.safetensors", load_weights)):
        data, refused = (tmp_path / name).read_bytes(), 0
        whole = load(tmp_path / name)
        rng = random.Random(0)
        for bit in rng.sample(range(8 * len(data)), 150):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            (tmp_path / name).write_bytes(flipped)
            try:
                loaded = load(tmp_path / name)
            except Exception:
                refused += 1
            else:
                assert str(loaded) == str(whole), bit
        assert refused > 15


def test_weights_carry_their_checksum(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "backbone.safetensors"
    assert tensors_sha256(load_weights(path)) in path.read_bytes()[:2000].decode(errors="replace")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError):
        load_weights(path)
    with pytest.raises(UsageError, match="do not match their checksum"):
        simsiam.load(run)


def test_a_checkpoint_that_cannot_be_written_costs_nothing(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "checkpoints" / "last.pt").read_bytes()

    def full(state, file):
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert main(["resume", str(run)]) == 1
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    monkeypatch.undo()
    simsiam.resume(run)
    assert same(run, finished)


def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(-1e9, 4e9))
    assert same(
        simsiam.pretrain("shapes", out=tmp_path / "run", **QUICK | {"save_seconds": 0}), finished
    )


# --- data and memory ---


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (32, 32 + i % 2, 3), np.uint8)).save(
            root / f"{i:02}.png"
        )
    return root


def streamed(photographs, **words):
    recipe = Recipe().replace(
        image_size=32, batch_size=8, mean=[0.5] * 3, std=[0.2] * 3, workers=2, **words
    )
    return iter_batches(open_source(str(photographs)).train, recipe, 0, 50, torch.device("cpu"))


def test_a_worker_that_hangs_is_named_with_its_file(photographs, monkeypatch):
    real = Images.read

    def read(self, i, least=0):
        if self.keys[i] == "17.png":
            time.sleep(100)
        return real(self, i, least)

    monkeypatch.setattr(Images, "read", read)
    with pytest.raises(
        WorkFailed, match=r"a data worker has not come back for 1 s from reading .*17\.png.*: "
    ):
        list(streamed(photographs, read_timeout=1.0))


def test_a_worker_that_is_killed_is_one_line(photographs, monkeypatch):
    monkeypatch.setattr(Images, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        WorkFailed, match=r"a data worker was killed, at .*png.*: perhaps memory ran out"
    ):
        list(streamed(photographs))


def test_a_folder_that_goes_away_is_one_line(photographs, tmp_path):
    folder = shutil.copytree(photographs, tmp_path / "photographs")
    made = streamed(folder)
    next(made)
    shutil.rmtree(folder)
    with pytest.raises(
        WorkFailed, match=r"none of the 40 images can be read; the first, .*\.png: No such file"
    ):
        list(made)


def test_the_least_memory_of_a_step_is_what_autograd_keeps():
    """Compared with a real forward pass on the CPU.

    Counted are every tensor that autograd saves, once, and the weights, gradients and momentum.
    """
    recipe = Recipe().replace(**TINY | {"image_size": 32, "precision": "float32"})
    model = simsiam.build(recipe.method, backbone="resnet10", width=4, image_size=32)
    own, kept = {v.data_ptr() for v in model.state_dict().values()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            # Kept alive, so that no address is used twice.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z = [model.f(view) for view in x]
        p = [model.predictor(one) for one in z]
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    weights = sum(v.nbytes for v in model.state_dict().values())
    real += weights + 2 * sum(v.nbytes for v in model.parameters())
    assert len(p) == 2 and memory.min_step_bytes(recipe, 16) == pytest.approx(real, rel=0.02)
    half = memory.min_step_bytes(replace(recipe, precision="bfloat16"), 16)
    assert half < memory.min_step_bytes(recipe, 16) < memory.min_step_bytes(recipe, 32)


def test_too_large_a_batch_is_told_the_one_that_fits(tmp_path, monkeypatch, capsys):
    recipe = Recipe().replace(**TINY | {"image_size": 32, "precision": "float32"})
    room = int(memory.PEAK_MEMORY_FACTOR * memory.min_step_bytes(recipe, 16)) + 1
    monkeypatch.setattr(memory, "available_memory", lambda device: room)
    words = TINY | {"precision": "float32", "batch_size": 64}
    assert main(["pretrain", "shapes", "--out", str(tmp_path / "run"), *flags(**words)]) == 1
    said = capsys.readouterr().err
    assert (
        "batch_size 64 does not fit into the memory of cpu" in said
        and "--batch-size 16 should fit" in said
    )
    assert not (tmp_path / "run").exists()
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory: 9"),
    ):
        with (
            pytest.raises(WorkFailed, match="--batch-size 16 should fit"),
            memory.catch_out_of_memory(replace(recipe, batch_size=64), torch.device("cpu")),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="another"),
        memory.catch_out_of_memory(recipe, torch.device("cpu")),
    ):
        raise RuntimeError("another")


# --- hostile ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x]\nsource: *a", "an alias"),
        ("[" * 100_000, "is not YAML"),
        ("!!python/object/apply:os.mkdir [executed]", "is not YAML"),
        ("seed: 2001-99-99", "is not YAML"),
        (f"epochs: {'9' * 5000}", "is not YAML"),
        (f"epochs: 0x{'f' * 5000}", "it takes a whole number"),
        (f"base_lr: 0x{'f' * 5000}", "unknown key in recipe 'base_lr'"),
        (f"backbone: {'x' * 300_000}", "a recipe has at most"),
        (f"{'x' * 900}: 3", "unknown key in recipe"),
    ],
)
def test_a_hostile_recipe_is_one_short_line(text, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        read_recipe(tmp_path / "recipe.yaml")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value) and os.listdir() == []


def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, to in {"a.png": "pipe", "b.png": "/dev/zero", "c.png": "nowhere"}.items():
        (tmp_path / name).symlink_to(to)
    images = open_source(str(tmp_path)).train
    for i, said in enumerate(["not a regular file", "not a regular file", "No such file"]):
        with pytest.raises(Unreadable, match=said):
            images.read(i)


def test_a_run_writes_through_no_link(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.move(run / "checkpoints", tmp_path / "outside")
    (run / "checkpoints").symlink_to(tmp_path / "outside")
    with pytest.raises(
        UsageError, match="checkpoints is a link, and a run writes only inside its folder"
    ):
        simsiam.resume(run)


# --- the campaigns ---


@pytest.mark.parametrize(
    "command",
    [
        "campaign.py --kills 4 --full 0 --corruptions 5 --seed 1 --only resume embed",
        "fuzz.py --images 300 --containers 16 --no-hostile --seed 1",
        pytest.param(
            "adversary.py --faults 8 --links 4 --pipes 4 --seed 1 --only resume embed",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_small_campaign(command, tmp_path):
    script, *arguments = command.split()
    if script == "adversary.py" and (sys.platform != "linux" or shutil.which("cc") is None):
        pytest.skip("needs Linux and a C compiler")
    done = subprocess.run(
        [sys.executable, CAMPAIGNS / script, *arguments, "--out", tmp_path / "found"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "found.json").read_text())["trials"]
