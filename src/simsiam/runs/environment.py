"""The environment of a run: what its numbers and bits depend on besides the recipe.

These are the versions of packages, the commit, the device, and how many threads and processes.
"""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from simsiam.distributed.process_group import world_size
from simsiam.model.precision import Compute
from simsiam.runs.records import Record
from simsiam.utils.names import hide_keys
from simsiam.utils.system import cpu_name

PACKAGES = ("simsiam", "torchvision", "numpy", "pillow", "pyarrow")  # besides Python and torch
# What changes the bits of a run, besides the version of torch.
NUMERICAL_KEYS = ("device_type", "precision", "threads", "processes")


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """Return the commit of the code, or None if the package is not in a git checkout.

    The commit ends in "-dirty" if files of the package differ from it. Other files do not count:
    results are often written next to the code that produces them.
    """
    package = Path(__file__).parents[1]
    if not (package.parents[1] / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]  # it takes no lock of the repository
        return subprocess.run(
            command, cwd=package, capture_output=True, encoding="utf-8", timeout=10, check=True
        ).stdout

    try:
        dirty = "-dirty" if git("status", "--porcelain", ".") else ""
        return git("rev-parse", "HEAD").strip() + dirty
    except (OSError, subprocess.SubprocessError):
        return None


def collect_environment(compute: Compute) -> Record:
    """Collect the environment of this process.

    Args:
        compute: Where to compute, and in which precision.

    Returns:
        `versions` (a dictionary), `commit`, `command` (a list; its URLs are without keys), `device`
        (its name), `device_type`, `precision`, `threads` and `processes`.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    on_gpu = compute.device.type == "cuda"
    if on_gpu:
        device = torch.cuda.get_device_name(compute.device)
    else:
        device = f"{cpu_name()}, {os.cpu_count()} cores"
    return {
        "versions": versions | {name: version(name) for name in PACKAGES},
        "commit": git_commit(),
        "command": [hide_keys(word) for word in sys.argv],
        "device": device,
        "device_type": compute.device.type,
        "precision": compute.precision,
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def numerical_conditions(env: Record) -> Record:
    """Return the part of an environment that changes the bits of a run.

    Args:
        env: What `collect_environment` returned.
    """
    values = {name: env.get(name) for name in NUMERICAL_KEYS}
    return values | {"torch": env.get("versions", {}).get("torch")}
