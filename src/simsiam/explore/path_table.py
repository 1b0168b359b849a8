"""A text for each of some images, in a CSV file that is written after every change."""

import csv
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from threading import Lock

from simsiam.errors import UsageError, printable
from simsiam.utils.files import plain_text, spreadsheet_text, write_csv
from simsiam.utils.names import MAX_LIST_BYTES
from simsiam.utils.read_files import read_bytes

MAX_TEXT = 100  # characters of a label


class PathTable:
    """Texts by the path of an image, such as labels; on the disk after every change.

    Another program may change the file too: it is read again before a change if it is not as this
    program wrote it.

    Args:
        file: The CSV file; it is created by the first change.
        column: The name of the column of texts.
        find_path: From a path or a file name in the file to the path of the image.

    Attributes:
        values: The text of each path.
        version: The number of changes.
    """

    def __init__(self, file: Path, column: str, find_path: Callable[[str], str] = str):
        self.file, self.column, self.find_path = file, column, find_path
        self.version = 0
        self._lock = Lock()
        self._history: list[dict[str, str]] = []
        self._content = self._read_file()
        self.values = self._parse(self._content)

    @property
    def undo_count(self) -> int:
        """The number of changes that can be undone."""
        return len(self._history)

    def change(self, new: Mapping[str, str]) -> None:
        """Set texts, and write the file.

        Args:
            new: The text of each path that changes; "" removes it.

        Raises:
            UsageError: A text is too long, or someone else has put another content into the file.
            WorkFailed: The file cannot be written; then nothing has changed.
        """
        cleaned = {path: clean_text(text) for path, text in new.items()}
        with self._lock:
            self._refresh()
            old = {path: self.values.get(path, "") for path in cleaned}
            self._write(cleaned)
            self._history.append(old)

    def undo(self) -> None:
        """Take back the last change that was not taken back yet, if there is one.

        Raises:
            WorkFailed: The file cannot be written; then nothing has changed.
        """
        with self._lock:
            if self._history:
                self._refresh()
                self._write(self._history[-1])
                self._history.pop()

    def _write(self, new: dict[str, str]) -> None:
        # In the order of the file: the folds of cross-validation depend on it.
        rows = sorted((path, text) for path, text in (self.values | new).items() if text)
        write_csv(self.file, ("path", self.column), rows)
        self._content = self._read_file()
        self.values = dict(rows)
        self.version += 1

    def _refresh(self) -> None:
        """Read the file again if it has changed."""
        content = self._read_file()
        if content != self._content:
            self.values = self._parse(content)
            self._content = content

    def _read_file(self) -> bytes:
        return read_bytes(self.file, MAX_LIST_BYTES) if self.file.exists() else b""

    def _parse(self, content: bytes) -> dict[str, str]:
        if not content:
            return {}
        name = printable(str(self.file))
        try:
            rows = csv.reader(StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
            header, *lines = [row for row in rows if row]
        except (UnicodeDecodeError, csv.Error, ValueError) as error:
            raise UsageError(
                f"{name} is no table in UTF-8 ({error}): repair it, or move it away"
            ) from None
        if header != ["path", self.column] or any(len(line) != 2 for line in lines):
            raise UsageError(
                f"{name} does not have the columns path and {self.column} alone, and explore would "
                "write it anew: move it away"
            )
        return {
            self.find_path(plain_text(path)): plain_text(text.strip())
            for path, text in lines
            if text.strip()
        }


def clean_text(text: str) -> str:
    """Bring a label into the form in which it is read from a file.

    Args:
        text: What someone typed.

    Returns:
        The text without spaces around it.

    Raises:
        UsageError: It is too long.
    """
    text = printable(" ".join(text.split()))
    if len(text) > MAX_TEXT:
        raise UsageError(f"the label has {len(text)} characters: at most {MAX_TEXT}")
    return plain_text(spreadsheet_text(text))
