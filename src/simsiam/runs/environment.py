"""What the numbers and bits of a run depend on besides its recipe: versions, commit, device, threads."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from simsiam.distributed.process_group import world_size
from simsiam.model.precision import Compute


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of the code, with "-dirty" where the package differs from it; None where it is no checkout.

    What else has changed does not count: results are often written beside the code that makes them.
    """
    package = Path(__file__).parents[1]
    if not (package.parents[1] / ".git").exists():
        return None

    def git(*words: str) -> str:
        how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *words], cwd=package, **how).stdout

    try:
        return git("rev-parse", "HEAD").strip() + (
            "-dirty" if git("status", "--porcelain", ".") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def collect_environment(compute: Compute) -> dict[str, Any]:
    """What a run's numbers and bits depend on besides its recipe."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    packages = ("simsiam", "torchvision", "numpy", "pillow", "pyarrow")
    return {
        "versions": versions | {name: version(name) for name in packages},
        "commit": git_commit(),
        "command": sys.argv,
        "device": torch.cuda.get_device_name(compute.device)
        if compute.device.type == "cuda"
        else _cpu_name(),
        "device_type": compute.device.type,
        "precision": compute.precision,
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def numerical_conditions(env: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that changes the bits of a run."""
    names = ("device_type", "precision", "threads", "processes")
    return {name: env[name] for name in names} | {"torch": env["versions"]["torch"]}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
