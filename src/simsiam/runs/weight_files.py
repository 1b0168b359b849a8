"""Files of weights: safetensors with a checksum, and checkpoints read without executing code."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialized
from torch import Tensor

from simsiam.errors import UsageError, truncate

CHECKSUM_KEY = "sha256 of tensors"  # its key in a safetensors file's metadata


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class ChecksumError(ValueError):
    """A file's content does not match the checksum in it."""


def load_state(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU, each record held against its checksum in the file. Runs no code.

    Raises Damaged, or whatever a broken pickle makes torch raise.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):  # what torch wrote before 1.6 has no checksums
            with zipfile.ZipFile(file) as archive:
                if record := archive.testzip():
                    raise ChecksumError(f"{record} does not match its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file with `about` and a checksum of its tensors in the metadata; the format itself has none.

    Not by `save_file`, which has an error of its own for a full disk.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        file.write(serialized(plain, {CHECKSUM_KEY: tensors_sha256(plain), **(metadata or {})}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, held against the checksum in it where there is one. Raises Damaged."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    if CHECKSUM_KEY in about and about[CHECKSUM_KEY] != tensors_sha256(tensors):
        raise ChecksumError("its tensors do not match their checksum")
    return tensors


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, kinds, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The model's tensors in a PyTorch or safetensors file, and the names of what else is in it.

    Runs nothing that the file holds. Raises UsageError for code, damage, or no state dict.
    """
    content: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles; what matters becomes an error
            content = load_weights(path) if path.suffix == ".safetensors" else load_state(path)
    except Exception as error:  # a damaged pickle can raise anything
        code = (
            re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        if code:
            advice = "none of it was run; where you trust the file, save its state dict alone"
            raise UsageError(f"{path} carries code ({code[1]}): {advice}") from None
        known = f": {error}" if isinstance(error, ChecksumError) else f" ({type(error).__name__})"
        raise UsageError(f"{path} is no checkpoint that can be read{known}") from None
    aside: list[str] = []
    inner = (
        [key for key, value in content.items() if holds_tensors(value)]
        if isinstance(content, Mapping)
        else []
    )
    if inner:
        chosen = next(key for key in ("state_dict", "model", *inner) if key in inner)
        aside = [str(key) for key in content if key != chosen]
        content = content[chosen]
    if not holds_tensors(content):
        held = (
            ", ".join(map(str, content))[:160]
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise UsageError(f"{path} holds no state dict, only {held or 'nothing'}")
    for key, value in content.items():
        if isinstance(value, Tensor) and not is_dense_cpu_tensor(value):
            raise UsageError(
                f"{path}: {truncate(key)} is no plain array of numbers, or has more of them than the file"
            )
    aside += [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    return {
        str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)
    }, aside


def is_dense_cpu_tensor(tensor: Tensor) -> bool:
    """Whether each of its numbers is in memory: no sparse, quantized or meta tensor, and no one number seen as many."""
    ordinary = (
        tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    )
    return ordinary and tensor.nbytes <= tensor.untyped_storage().nbytes()


def holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
