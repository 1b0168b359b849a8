"""Files of weights: safetensors with a checksum, and checkpoints read without executing code."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from simsiam.errors import UsageError, truncate

CHECKSUM_KEY = "sha256 of tensors"  # in the metadata of a safetensors file


class ChecksumError(ValueError):
    """The content of a file does not match the checksum in it."""


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, in hexadecimal digits.

    Args:
        path: The file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_state(path: Path) -> object:
    """Load what `torch.save` wrote, onto the CPU, without executing code.

    Args:
        path: The file.

    Returns:
        What it holds.

    Raises:
        ChecksumError: A record of the file does not match its checksum.
        Exception: Whatever a broken file makes torch raise.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):  # files written by torch before 1.6 have no checksums
            with zipfile.ZipFile(file) as archive:
                if record := archive.testzip():
                    raise ChecksumError(f"{record} does not match its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum of the tensors in its metadata.

    The format itself has no checksum. `save_file` is not used because it raises an error of its own
    for a full disk.

    Args:
        tensors: The tensors, by name.
        path: The file.
        metadata: More metadata.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with open(path, "wb") as file:
        file.write(serialize(plain, {CHECKSUM_KEY: tensors_sha256(plain), **(metadata or {})}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file, and verify their checksum if there is one.

    Args:
        path: The file.

    Returns:
        The tensors, by name.

    Raises:
        ChecksumError: They do not match it.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    if CHECKSUM_KEY in metadata and metadata[CHECKSUM_KEY] != tensors_sha256(tensors):
        raise ChecksumError("its tensors do not match their checksum")
    return tensors


def load_metadata(path: Path) -> dict[str, str]:
    """Load the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        Texts, by name.
    """
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of names, types, shapes and values, in hexadecimal digits.

    Args:
        tensors: Tensors, by name.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the state dict of a model from a PyTorch or safetensors file, without executing code.

    Args:
        path: The file.

    Returns:
        The tensors by name, and the names of everything else in the file.

    Raises:
        UsageError: The file contains code, is damaged, or has no state dict.
    """
    content = _read_file(path)
    set_aside: list[str] = []
    if isinstance(content, Mapping):
        nested = [key for key, value in content.items() if holds_tensors(value)]
        if nested:
            chosen = next(key for key in ("state_dict", "model", *nested) if key in nested)
            set_aside = [str(key) for key in content if key != chosen]
            content = content[chosen]
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds no state dict, only {type(content).__name__}")
    if not holds_tensors(content):
        names = ", ".join(map(str, content))[:160]
        raise UsageError(f"{path} holds no state dict, only {names or 'nothing'}")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            set_aside.append(str(key))
        elif is_dense_cpu_tensor(value):
            tensors[str(key)] = value.detach()
        else:
            raise UsageError(
                f"{path}: {truncate(key)} is not a plain array of numbers, or claims to have more "
                "numbers than the file"
            )
    return tensors, set_aside


def _read_file(path: Path) -> object:
    """Read the content of a PyTorch or safetensors file; an error becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of others; what matters is an error
            return load_weights(path) if path.suffix == ".safetensors" else load_state(path)
    except Exception as error:  # a damaged pickle can raise anything
        is_unpickling = isinstance(error, pickle.UnpicklingError)
        code = re.search(r"GLOBAL (\S+)", str(error)) if is_unpickling else None
        if code:
            raise UsageError(
                f"{path} carries code ({code[1]}): none of it was run; if you trust the file, save "
                "its state dict alone"
            ) from None
        detail = f": {error}" if isinstance(error, ChecksumError) else f" ({type(error).__name__})"
        raise UsageError(f"{path} is no checkpoint that can be read{detail}") from None


def is_dense_cpu_tensor(tensor: Tensor) -> bool:
    """Tell whether each number of a tensor has its own place in memory.

    This excludes sparse, quantized and meta tensors, and expanded ones, in which a few numbers
    stand for many.

    Args:
        tensor: Any tensor.
    """
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    on_cpu = tensor.device.type == "cpu"
    return dense and on_cpu and tensor.nbytes <= tensor.untyped_storage().nbytes()


def holds_tensors(value: object) -> bool:
    """Tell whether a value is a mapping with at least one tensor.

    Args:
        value: Any value.
    """
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
