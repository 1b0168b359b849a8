"""Files of weights: safetensors with a checksum, and checkpoints read without executing code."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from simsiam.errors import UsageError, printable, truncate
from simsiam.utils.checksums import record_checksum
from simsiam.utils.read_files import open_regular

CHECKSUM_KEY = "sha256 of tensors"  # in the metadata of a safetensors file
METADATA_CHECKSUM_KEY = "crc32 of metadata"
# What programs call a state dict in a checkpoint. The first of these counts, else the largest; of
# DINO's two networks, its authors evaluate the teacher.
STATE_DICT_KEYS = ("state_dict", "model", "teacher", "student")
# Others are compressed, such as float8, or no weights, such as complex numbers.
NUMBER_TYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8,
    torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
MAX_NESTING = 4  # dictionaries in each other that a state dict is looked for in
MAX_UNKNOWN_NAMES = 100  # classes and functions of other programs in a checkpoint


class ChecksumError(ValueError):
    """The content of a file does not match the checksum in it."""


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
    with open_regular(path) as file:
        if zipfile.is_zipfile(file):  # files written by torch before 1.6 have no checksums
            with zipfile.ZipFile(file) as archive:
                if record := archive.testzip():
                    raise ChecksumError(f"{record} does not match its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_without_numbers(path: Path) -> object:
    """Load what `torch.save` wrote, with tensors whose numbers are read when they are needed.

    Args:
        path: The file.

    Returns:
        What it holds. Everything but the numbers matches its checksum.

    Raises:
        ChecksumError: It does not match, or the file was not written by torch 1.6 or later.
        Exception: Whatever a broken file makes torch raise.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        structure = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        if structure is None:
            raise ChecksumError("it is no checkpoint")
        archive.read(structure)  # which checks it
    return torch.load(path, mmap=True, map_location="cpu", weights_only=True)


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum of tensors and metadata in its metadata.

    The format itself has no checksum. `save_file` is not used because it raises an error of its own
    for a full disk.

    Args:
        tensors: The tensors, by name.
        path: The file.
        metadata: More metadata.
    """
    # A copy each: the format has no tensors that share memory, as in timm's CoaT.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    own = {CHECKSUM_KEY: tensors_sha256(plain), **(metadata or {})}
    with open(path, "wb") as file:
        file.write(serialize(plain, own | {METADATA_CHECKSUM_KEY: record_checksum(own)}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file, and verify its checksums if there are any.

    Args:
        path: The file.

    Returns:
        The tensors, by name.

    Raises:
        ChecksumError: They do not match it.
    """
    metadata = load_metadata(path)
    with open_regular(path), safe_open(path, "pt") as file:
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

    Raises:
        ChecksumError: They do not match their checksum.
        UsageError: It is not a regular file.
    """
    open_regular(path).close()
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    checksum = metadata.pop(METADATA_CHECKSUM_KEY, None)
    if checksum is not None and checksum != record_checksum(metadata):
        raise ChecksumError("its metadata do not match their checksum")
    return metadata


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


class WeightFile(NamedTuple):
    """The content of a PyTorch or safetensors file.

    Attributes:
        tensors: The state dict of a model.
        set_aside: The names of everything else.
        not_loaded: Classes and functions of other programs that the file names. None of them was
            imported or called.
        recipe: The recipe in a checkpoint of this program.
        metadata: The metadata of a safetensors file.
        wrong_types: The tensors among what was set aside, with their types.
    """

    tensors: dict[str, Tensor]
    set_aside: list[str]
    not_loaded: list[str]
    recipe: Mapping[str, object] | None = None
    metadata: Mapping[str, str] = {}
    wrong_types: Sequence[str] = ()


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the state dict of a model from a PyTorch or safetensors file, without executing code.

    Args:
        path: The file.

    Returns:
        The tensors by name, and the names of everything else in the file.

    Raises:
        UsageError: The file contains code, is damaged, or has no state dict.
    """
    content = read_weight_file(path)
    return content.tensors, content.set_aside


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch or safetensors file, without executing code.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        UsageError: The file contains code, is damaged, or has no state dict.
    """
    content, not_loaded, metadata = _read_file(path)
    if not isinstance(content, dict) or not (found := [*find_state_dicts(content)]):
        names = (
            ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        )
        objects = f", and objects of {', '.join(not_loaded)}" if not_loaded else ""
        raise UsageError(
            f"{path} holds no state dict, only {names[:160] or 'nothing'}{objects[:160]}; save "
            "model.state_dict() with the program that wrote it"
        )
    keys, state = min(found, key=_rank_state_dict)
    set_aside, level = list[str](), content
    for depth, key in enumerate(keys):
        set_aside += [".".join(map(str, (*keys[:depth], k))) for k in level if k != key]
        level = level[key]
    tensors = {
        str(key): x for key, value in dict.items(state) if (x := _to_tensor(value)) is not None
    }
    wrong_types = [
        f"{key} ({_type_name(x)})" for key, x in tensors.items() if x.dtype not in NUMBER_TYPES
    ]
    tensors = {key: x for key, x in tensors.items() if x.dtype in NUMBER_TYPES}
    if not tensors:
        raise UsageError(
            f"{path} has no tensor of a type that weights can have, such as float32: "
            f"{printable(truncate(', '.join(wrong_types)))}"
        )
    set_aside += [str(key) for key in state if str(key) not in tensors]
    for name, tensor in tensors.items():
        if not is_dense_cpu_tensor(tensor):
            raise UsageError(
                f"{path}: {truncate(name)} is not a plain array of numbers, or claims to have more "
                "numbers than the file"
            )
    recipe = dict.get(content, "recipe") if "format" in content else None
    recipe = recipe if isinstance(recipe, dict) else None
    return WeightFile(tensors, set_aside, not_loaded, recipe, metadata, wrong_types)


def _to_tensor(value: object) -> Tensor | None:
    """Return a tensor or an array of numbers as a tensor; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.itemsize <= 8:
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if not isinstance(value, Tensor):
        return None
    tensor = value.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


Level: TypeAlias = tuple[tuple[object, ...], dict[object, object]]


def find_state_dicts(content: dict[object, object]) -> Iterator[Level]:
    """Find the dictionaries in a checkpoint that hold tensors, but for those of the optimizer.

    Args:
        content: The checkpoint.

    Yields:
        The keys that lead to each dictionary, and the dictionary.
    """
    waiting: list[Level] = [((), content)]
    seen: set[int] = set()
    for keys, level in waiting:  # which grows
        if id(level) in seen or len(keys) > MAX_NESTING:
            continue
        seen.add(id(level))
        if any(isinstance(value, Tensor | np.ndarray) for value in dict.values(level)):
            yield keys, level
        for key, value in dict.items(level):
            if isinstance(value, dict) and "optim" not in str(key).lower():
                waiting.append(((*keys, key), value))


def _rank_state_dict(found: Level) -> tuple[list[int], int]:
    """Rank a state dict by the names of the keys that lead to it, then by its size."""
    keys, state = found
    last = len(STATE_DICT_KEYS)
    ranks = [STATE_DICT_KEYS.index(k) if k in STATE_DICT_KEYS else last for k in map(str, keys)]
    return ranks or [last], -len(state)


class _StandIn:
    """Stands in for a class or function of another program: its objects are empty."""

    def __new__(cls, *_: object) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


def _numpy_globals() -> list[object]:
    """What pickles of NumPy's scalars, dtypes and arrays name; none of it runs code."""
    makers = [cast(tuple, array.__reduce__())[0] for array in (np.float64(), np.empty(0))]
    named = [
        (maker, f"{package}.multiarray.{maker.__name__}")
        for maker in makers
        for package in ("numpy.core", "numpy._core")  # of NumPy 1 and 2
    ]
    return [np.ndarray, np.dtype, *named, *{type(np.dtype(code)) for code in np.typecodes["All"]}]


def load_foreign_state(path: Path) -> tuple[object, list[str]]:
    """Load what `torch.save` wrote in another program, onto the CPU, without executing code.

    Nothing that the file names is imported or called, but for what torch allows and the plain data
    of NumPy: objects of other classes, such as the arguments of a program, become empty.

    Args:
        path: The file.

    Returns:
        What it holds, and the names of what was replaced.

    Raises:
        ChecksumError: A record of the file does not match its checksum.
        Exception: Whatever a broken file makes torch raise.
    """
    names: list[str] = []
    while True:
        allowed = [*_numpy_globals(), *((_StandIn, name) for name in names)]
        try:
            with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
                return load_state(path), names
        except pickle.UnpicklingError as error:
            name = _unsupported_name(error)
            if name is None or name in names or len(names) == MAX_UNKNOWN_NAMES:
                raise
            names.append(name)


def _unsupported_name(error: Exception) -> str | None:
    """Return the class or function in torch's error about one that it does not allow."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match is None:
        return None
    return match[1] if "." in match[1] else f"builtins.{match[1]}"


def _read_file(path: Path) -> tuple[object, list[str], Mapping[str, str]]:
    """Read a PyTorch or safetensors file; an error becomes one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of others; what matters is an error
            if path.suffix == ".safetensors":
                return load_weights(path), [], load_metadata(path)
            return *load_foreign_state(path), {}
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and (name := _unsupported_name(error)):
            raise UsageError(
                f"{path} carries code ({name}): none of it was run; ask its author for "
                "model.state_dict() alone"
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
