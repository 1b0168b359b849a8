"""File names as data: what programs read holds the true names.

What a person reads on a terminal or a page goes through `simsiam.errors.printable` instead.
"""

import codecs
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from simsiam.errors import UsageError, printable
from simsiam.utils.files import atomic_write
from simsiam.utils.read_files import read_bytes

MAX_LIST_BYTES = 2**30  # of a list of files: ten million names of a hundred bytes
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # at the start of a file


def utf8_name(name: str) -> str:
    r"""Return a file name as text that can be written in UTF-8.

    Args:
        name: The name, as Python decodes it.

    Returns:
        The same name; bytes that are not UTF-8 become escapes such as \udce9.
    """
    return name.encode("utf-8", "backslashreplace").decode()


def normalize_name(name: str) -> str:
    """Return what two spellings of a file name have in common.

    macOS stores an accented letter as two characters, and puts special spaces into the names of
    screenshots; a name that a user types has one character and plain spaces. Windows separates
    folders by backslashes.

    Args:
        name: The name.

    Returns:
        Its Unicode normal form NFKC with "/" between folders, in which these are equal.
    """
    return unicodedata.normalize("NFKC", utf8_name(name)).replace("\\", "/")


def slashed(path: str) -> str:
    """Return a path of this system with "/" between folders: the form in which paths are compared.

    Args:
        path: The path.
    """
    return path.replace(os.sep, "/")


def find_spelling(path: str) -> str:
    """Find a file that a list spells with other Unicode characters than the disk, or backslashes.

    Args:
        path: The path in the list.

    Returns:
        The path of the file, whose Unicode normal form NFC is the same, or that has "/" for each
        backslash, as in a list that was written on Windows; `path` if there is none.
    """
    if (path.isascii() and "\\" not in path) or os.path.lexists(path):
        return path
    if "\\" in path:
        slashes = find_spelling(path.replace("\\", "/"))
        return slashes if os.path.lexists(slashes) else path
    folder, name = os.path.split(path)
    if not name:
        return path
    folder = find_spelling(folder)
    names = _names_by_form(folder)
    return os.path.join(folder, names.get(unicodedata.normalize("NFC", name), name))


@lru_cache(64)
def _names_by_form(folder: str) -> dict[str, str]:
    try:
        return {unicodedata.normalize("NFC", name): name for name in os.listdir(folder or ".")}
    except (OSError, ValueError):
        return {}


def reason_line(name: str, reason: str) -> str:
    """Format a line of a list of files that cannot be used.

    Args:
        name: The true name of the file.
        reason: What is wrong with it.

    Returns:
        Name, tab and reason. Tabs and line breaks in the name are escaped, nothing else.
    """
    escaped = name.translate({ord(c): repr(c)[1:-1] for c in "\t\n\r"})
    return f"{escaped}\t{' '.join(reason.split())}"


def write_names(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines that contain file names, as the bytes that these have on the disk.

    It appears complete or not at all.

    Args:
        path: The file.
        lines: The lines, without line breaks.

    Raises:
        WorkFailed: It cannot be written.
    """
    with atomic_write(path) as part:
        part.write_bytes(join_names(lines))


def read_names(path: Path) -> list[str]:
    """Read what `write_names` wrote.

    Args:
        path: The file.

    Returns:
        The lines.
    """
    return split_names(read_bytes(path, MAX_LIST_BYTES))


def join_names(lines: Iterable[str]) -> bytes:
    """Encode lines that contain file names.

    Args:
        lines: The lines, without line breaks.

    Returns:
        The content of a file.
    """
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def split_names(data: bytes) -> list[str]:
    """Decode what `join_names` encoded.

    Args:
        data: The content of a file.

    Returns:
        The lines.
    """
    return data.decode("utf-8", "surrogateescape").split("\n")[:-1]


def read_list(path: Path) -> list[bytes]:
    """Read a text file that a user wrote, with a file name in each line.

    Args:
        path: The file, in UTF-8 or whatever the names are in; or in UTF-16 with a byte order mark,
            as some programs on Windows write it.

    Returns:
        The lines that are not empty, encoded like file names.

    Raises:
        OSError: It cannot be read.
        UsageError: It is in another encoding, or not a regular file.
    """
    data = read_bytes(path, MAX_LIST_BYTES)
    try:
        if data.startswith(UTF16_MARKS):
            data = os.fsencode(data.decode("utf-16"))
        if data.count(0) > len(data) // 4:  # every second byte of Latin letters
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{printable(str(path))} is not a text in UTF-8: it seems to be UTF-16 or UTF-32; save "
            "it as UTF-8"
        ) from None
    lines = data.removeprefix(codecs.BOM_UTF8).splitlines()
    return [line for line in lines if line.strip()]


def hide_keys(text: str) -> str:
    """Remove user names, passwords and query strings from a URL: each may be a key.

    Args:
        text: A source, or any text.

    Returns:
        The text; after a URL with a query, nothing of it is kept.
    """
    text = re.sub("://[^/]*@", "://", text)
    return re.sub("(://[^?#]*)[?#].*", r"\1", text, flags=re.DOTALL)


def without_credentials(values: Mapping[str, object]) -> dict[str, object]:
    """Remove what may be a key from the URLs in plain data, such as a recipe; see `hide_keys`.

    Args:
        values: Texts, numbers, lists and mappings, by name.
    """
    return {name: _hide_all_keys(value) for name, value in values.items()}


def _hide_all_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return without_credentials(value)
    if isinstance(value, list | tuple):
        return [_hide_all_keys(item) for item in value]
    return hide_keys(value) if isinstance(value, str) else value
