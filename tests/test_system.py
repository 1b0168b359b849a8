"""The package on other systems and with other ways to start processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image

import simsiam
from simsiam.runs.weight_files import load_weights
from simsiam.utils import system

HERE = Path(__file__).parent
OTHER_SYSTEM = HERE / "other_system"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(64):
        pixels = rng.integers(0, 255, (32, 32 + i % 2, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    return root


def environment(name: str) -> dict[str, str]:
    paths = os.pathsep.join([str(OTHER_SYSTEM), str(Path(simsiam.__file__).parents[1])])
    return os.environ | {"SIMSIAM_TEST_SYSTEM": name, "PYTHONPATH": paths}


@pytest.mark.parametrize("name", ["win32", pytest.param("darwin", marks=pytest.mark.long)])
def test_every_verb_runs_as_if_on(name, tmp_path):
    """And what it writes has names that are possible on Windows."""
    command = [sys.executable, str(OTHER_SYSTEM / "every_verb.py"), str(tmp_path)]
    result = subprocess.run(command, env=environment(name), capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1]) == [], result.stderr


def test_a_file_of_the_cache_that_is_in_use_can_be_replaced_as_if_on_windows(tmp_path):
    code = (
        "import sys, pyarrow as pa\nfrom pathlib import Path\n"
        "from simsiam.data.arrow_files import open_arrow_file, write_arrow_file\n"
        "path, schema = Path(sys.argv[1]), pa.schema({'a': pa.int64()})\n"
        "batch = pa.record_batch([pa.array([1, 2])], schema)\n"
        "write_arrow_file(path, schema, [batch])\n"
        "kept = open_arrow_file(path)\n"
        "write_arrow_file(path, schema, [batch, batch])\n"
        "print(kept.num_record_batches, open_arrow_file(path).num_record_batches)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.arrow")]
    done = subprocess.run(command, env=environment("win32"), capture_output=True, text=True)
    assert done.stdout.split() == ["1", "2"], done.stderr


@pytest.mark.parametrize("name", ["win32", "darwin"])
def test_the_stand_ins_are_seen_by_the_package_alone(name):
    code = (
        "import os, sys, json\nfrom simsiam.utils import system\n"
        "print(json.dumps([system.sys.platform, hasattr(system.os, 'sched_yield'), sys.platform, "
        "hasattr(os, 'sched_yield'), hasattr(system, 'fcntl')]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(name), capture_output=True, text=True
    )
    has_it = hasattr(os, "sched_yield")
    assert json.loads(result.stdout) == [name, False, sys.platform, has_it, name == "darwin"]


SCRIPT = """
import multiprocessing, sys, simsiam
{guard}
    {indent}multiprocessing.set_start_method({method!r}, force=True)
    {indent}run = simsiam.pretrain(sys.argv[1], out=sys.argv[2], **{settings!r})
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_make_the_same_run(method, tmp_path, photographs):
    settings = QUICK | {"workers": 2, "image_size": 16, "device": "cpu", "precision": "float32"}
    forked = simsiam.pretrain(photographs, out=tmp_path / "forked", **settings)
    script = tmp_path / "script.py"
    guard = 'if __name__ == "__main__":'
    script.write_text(SCRIPT.format(guard=guard, indent="", method=method, settings=settings))
    out = tmp_path / "other"
    subprocess.run([sys.executable, str(script), str(photographs), str(out)], check=True)
    a, b = (load_weights(run / "backbone.safetensors") for run in (forked, out))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_guard_is_told_so_in_one_line(method, tmp_path, photographs):
    """Each new process would run it again."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    settings = QUICK | {"workers": 2, "image_size": 16}
    script.write_text(SCRIPT.format(guard="if True:", indent="", method=method, settings=settings))
    command = [sys.executable, str(script), str(photographs), str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("simsiam.errors.UsageError") and f"{script} starts will import it" in last
    )
    assert 'if __name__ == "__main__":' in last and "bootstrapping" not in result.stderr


def test_a_lock_excludes_other_handles_and_ends_with_the_file(tmp_path):
    code = (
        "import sys\nfrom simsiam.utils.system import try_lock\n"
        "a, b = (open(sys.argv[1], 'a', encoding='utf-8') for _ in range(2))\n"
        "print(try_lock(a), try_lock(b))\na.close()\nprint(try_lock(b), try_lock(b, wait=True))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    result = subprocess.run(command, env=environment("win32"), capture_output=True, text=True)
    assert result.stdout.split() == ["True", "False", "True", "True"], result.stderr


def test_a_part_of_a_file_is_read_the_same_with_and_without_pread(tmp_path, monkeypatch):
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        parts = [system.read_at(file, start, 30) for start in (0, 50, 90)]
        monkeypatch.setattr(system.sys, "platform", "win32")
        assert [system.read_at(file, start, 30) for start in (0, 50, 90)] == parts
    assert parts == [bytes(range(30)), bytes(range(50, 80)), bytes(range(90, 100))]
