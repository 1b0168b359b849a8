"""JSON in files that others may have written or damaged: checked when it is read.

What is read must have the type that the program declares for it, and match its checksum if it has
one: `to_json` gives each object, or each of a list, its checksum as one more key.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from simsiam.errors import UsageError, printable, truncate
from simsiam.utils.checksums import CHECKSUM_KEY, is_intact, seal
from simsiam.utils.read_files import read_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_DIGITS = 20  # of a whole number
# Half of a character beyond the first 65,536: of names that are not UTF-8. Pydantic refuses it.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")

T = TypeVar("T")


def read_json(path: str | os.PathLike[str], schema: type[T]) -> T:
    """Read a JSON file of a known type.

    Args:
        path: The file.
        schema: The type: a TypedDict, a list of one, or another type that pydantic knows. Keys that
            a TypedDict does not name may have any value.

    Returns:
        The content, without checksums.

    Raises:
        OSError: There is no such file, or the system refuses.
        UsageError: The content has another type, or does not match its checksum.
    """
    name = printable(os.fspath(path))
    try:
        return parse_json(read_text(path), schema, name)
    except UsageError as error:
        raise UsageError(f"{error}; restore the file, or move it away") from None


def read_untyped_json(path: str | os.PathLike[str], limit: int) -> object:
    """Read a large JSON file whose parts the caller checks one by one.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Returns:
        The content.

    Raises:
        OSError: There is no such file, or the system refuses.
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
        UsageError: It is too large, or not a regular file.
    """
    return json.loads(read_text(path, limit))


def parse_json(text: str | bytes, schema: type[T], name: str) -> T:
    """Read a text in JSON of a known type.

    Args:
        text: The text.
        schema: The type, as in `read_json`.
        name: What the text is, for the error.

    Returns:
        The content, without checksums.

    Raises:
        UsageError: The content has another type, or does not match its checksum.
    """
    try:
        content = json.loads(text, parse_int=_parse_int)
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        _adapter(schema).validate_json(  # type: ignore[arg-type]
            SURROGATE.sub(r"\\u0020", text), strict=True
        )
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is damaged: {_reason(error)}") from None
    if isinstance(content, dict):
        _check_sum(content, name)
    for item in content if isinstance(content, list) else ():
        if isinstance(item, dict):
            _check_sum(item, name)
    return content  # type: ignore[no-any-return]


def check_type(value: object, schema: type[T], name: str) -> T:
    """Check that a value of another format than JSON has a type, such as the state in a checkpoint.

    Args:
        value: The value.
        schema: The type.
        name: What the value is, for the error.

    Returns:
        The value, as it is.

    Raises:
        UsageError: It has another type.
    """
    try:
        _adapter(schema).validate_python(value, strict=True)  # type: ignore[arg-type]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is damaged: {_reason(error)}") from None
    return value  # type: ignore[return-value]


@cache
def _adapter(schema: object) -> "TypeAdapter":
    from pydantic import TypeAdapter  # takes 0.1 s

    return TypeAdapter(schema)  # type: ignore[arg-type]


def _parse_int(digits: str) -> int:
    """Refuse what does not fit into 64 bits: it could not be turned into a float."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _reason(error: Exception) -> str:
    """Say in one line where a content is wrong."""
    from pydantic import ValidationError

    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, ValidationError):
        return printable(truncate(" ".join(str(error).split())))
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = printable(truncate(".".join(map(str, first["loc"])))) or "its content"
    message = printable(truncate(" ".join(first["msg"].split())))
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place}: {message}".replace(": Input should", " should")


def _check_sum(record: dict[str, object], name: str) -> None:
    """Take the checksum out of a record, after checking it."""
    if not is_intact(record):
        raise UsageError(
            f"{name} is damaged: its content does not match its checksum ({CHECKSUM_KEY}, which "
            "must be deleted if you have changed the file on purpose)"
        )


def to_json(content: Mapping[str, object] | Sequence[Mapping[str, object]]) -> str:
    """Format a record or a list of records for a file, each with its checksum.

    Args:
        content: What JSON can express.

    Returns:
        The text.
    """
    sealed = seal(content) if isinstance(content, Mapping) else [seal(item) for item in content]
    return json.dumps(sealed, indent=2) + "\n"
