"""The marks of a run folder: which of the places that it names its user has named before.

A run names places: its images, its initial weights, its loggers. A run folder that comes from
somebody else may name any place on this machine or in the network. So when a command names a place
for a run, it leaves a mark of it in the run folder, made with a key that only this user has. Other
commands open a place that a run names only if it is marked; else the user has to name it.

The key is in the user's state folder. Several machines that share a home share the key.
"""

import hmac
import json
import os
import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_state_dir

from simsiam.distributed.process_group import rank_zero_only
from simsiam.errors import UsageError, WorkFailed, printable, say_once
from simsiam.utils.files import file_lock, write_text
from simsiam.utils.read_files import read_text

MARKS_FILE = "own_marks.txt"  # in a run folder: a line for each marked setting, its name and mark
KEY_FILE = "run_key.txt"
KEY_BYTES = 32
MAX_BYTES = 2**14  # of either file
# What leads neither into the network nor to a file, by setting.
HARMLESS = {"source": ("shapes",), "loggers": ("tensorboard", "none")}


@rank_zero_only
def mark_places(folder: Path, **places: Sequence[str]) -> None:
    """Mark places that the user has named for a run, unless they are marked or lead nowhere.

    Args:
        folder: The run folder.
        **places: The places by their setting, such as `source`. Other settings keep their marks.
    """
    new = {
        setting: make_mark(setting, names)
        for setting, names in places.items()
        if not is_named(folder, setting, names)
    }
    if new and all(new.values()):
        lines = [f"{name} {mark}\n" for name, mark in (_read_marks(folder) | new).items()]
        write_text(folder / MARKS_FILE, "".join(lines))


@rank_zero_only
def is_named(folder: Path, setting: str, names: Sequence[str]) -> bool:
    """Tell whether the user of this process has named the places that a run names.

    Args:
        folder: The run folder.
        setting: The setting, such as `source`.
        names: The places.

    Returns:
        Whether they are marked, or lead nowhere.
    """
    return is_mark_of(_read_marks(folder).get(setting, ""), setting, names)


@rank_zero_only
def make_mark(setting: str, names: Sequence[str]) -> str:
    """Make the mark of places; make the key first, if there is none.

    Args:
        setting: The setting, such as `source`.
        names: The places.

    Returns:
        64 hexadecimal digits; "" if no key can be kept, which is printed.
    """
    try:
        return _make_mark(_read_key() or _make_key(), setting, names)
    except (UsageError, WorkFailed, OSError) as error:
        text = (
            f"no key can be kept in {_key_path().parent} ({error}): later commands on what this "
            "one writes will ask you to name its images; SIMSIAM_STATE names another folder"
        )
        say_once(" ".join(text.split()))
        return ""


def is_mark_of(mark: str, setting: str, names: Sequence[str]) -> bool:
    """Tell whether places have a mark of this user, or lead nowhere.

    Args:
        mark: The mark, or any text.
        setting: The setting, such as `source`.
        names: The places.
    """
    if set(names) <= set(HARMLESS.get(setting, ())):
        return True
    key = _read_key()
    return key is not None and hmac.compare_digest(
        mark.encode(), _make_mark(key, setting, names).encode()
    )


def unnamed_places_error(folder: Path, places: str, command: Sequence[str]) -> UsageError:
    """Make the error for places that a run, or an embedding, names and the user has not named.

    Args:
        folder: The run folder, or the file.
        places: What they are, such as "images".
        command: The words of a command that names them, after `simsiam`.

    Returns:
        The error, for the caller to raise.
    """
    line, true_line = (shlex.join(words) for words in (map(printable, command), command))
    hidden = "" if line == true_line else " (what may be a key is left out)"
    return UsageError(
        f"{printable(str(folder))} has no mark of yours: it is not yours, or it is older than "
        f"these marks or than your key. Its {places} are only opened if you name them: "
        f"`simsiam {line}`{hidden}"
    )


def _key_path() -> Path:
    folder = os.environ.get("SIMSIAM_STATE") or user_state_dir("simsiam", appauthor=False)
    return Path(os.path.expanduser(folder), KEY_FILE)


def _read_key() -> bytes | None:
    """Read the key; None if there is none, or none that can be used."""
    try:
        key = bytes.fromhex(read_text(_key_path(), MAX_BYTES))
    except (OSError, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _make_key() -> bytes:
    """Make the key, in a folder that only its user can open. Another process may do the same."""
    path = _key_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock"), wait=True):
        if (key := _read_key()) is None:
            key = secrets.token_bytes(KEY_BYTES)
            write_text(path, key.hex())
            path.chmod(0o600)
    return key


def _make_mark(key: bytes, setting: str, names: Sequence[str]) -> str:
    return hmac.new(key, json.dumps([setting, *names]).encode(), "sha256").hexdigest()


def _read_marks(folder: Path) -> dict[str, str]:
    """Read the marks of a run; none if there is no file of marks, or no readable one."""
    try:
        lines = read_text(folder / MARKS_FILE, MAX_BYTES).splitlines()
    except (OSError, UsageError):
        return {}
    return {name: mark for name, _, mark in (line.partition(" ") for line in lines)}
