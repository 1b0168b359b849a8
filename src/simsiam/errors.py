"""Errors of users and of work, as one line: what was given, what is allowed, what to do."""

import re
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import lru_cache
from math import inf

# Control characters, separators of lines and paragraphs, characters that change the direction of
# writing, and surrogates, which stand for bytes that are not UTF-8.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# In the URLs of a text: user names and passwords; queries; fragments. Each may be a key.
URL_KEYS = (
    (re.compile(r"://[^/\s]*@"), "://"),
    (re.compile(r"(://[^?]*)\?[^\s'\"`]+"), r"\1"),
    (re.compile(r"(://[^\s#]*)#[^\s'\"`]+"), r"\1"),
)
MAX_VALUE_CHARS = 150  # characters of a wrong value that an error repeats


class UsageError(ValueError):
    """The request is wrong: an unknown name, a contradiction, a folder that exists. Exit code 2."""


class WorkFailed(RuntimeError):
    """The request was correct, and the work failed: a diverged loss, a full disk. Exit code 1."""


class Stopped(RuntimeError):
    """A signal stopped the work, and everything is saved. Exit code 128 + `signum`.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, message: str, signum: int):
        """Make the error.

        Args:
            message: One line that says how to go on.
            signum: Number of the signal.
        """
        super().__init__(message)
        self.signum = signum


def none_readable(count: int, name: str, reason: str, kind: str = "images") -> WorkFailed:
    """Make the error for images of which none can be read.

    Args:
        count: The number of images.
        name: The name of the first.
        reason: Why it cannot be read.
        kind: What the images are.

    Returns:
        The error, for the caller to raise.
    """
    return WorkFailed(
        f"none of the {count:,} {kind} can be read; the first, {printable(name)}: {reason}"
    )


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> UsageError:
    """Make the error for a name that is not in a list; it suggests the nearest name.

    Args:
        kind: What the name names, such as "method".
        value: The wrong name.
        allowed: The list.

    Returns:
        The error, for the caller to raise.
    """
    names, text = sorted(allowed), truncate(value)
    nearest = nearest_name(text, names)
    hint = f"choose from {', '.join(names)}" if nearest is None else f"did you mean {nearest!r}?"
    return UsageError(f"unknown {kind} {text!r}: {hint}")


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """Find the name that a wrong one may have been meant to be.

    Args:
        name: The wrong name.
        names: The names that exist.

    Returns:
        The most similar name in upper or lower case; None if none is similar.
    """
    lower = {known.lower(): known for known in names}
    nearest = get_close_matches(name.lower(), lower, n=1)
    return lower[nearest[0]] if nearest else None


def truncate(value: object, formatter: Callable[[object], str] = str) -> str:
    """Format a wrong value for an error, and cut it to MAX_VALUE_CHARS characters.

    Args:
        value: The value.
        formatter: `str` or `repr`.

    Returns:
        The text.
    """
    try:
        text = formatter(value)
    except ValueError:  # Python limits the digits of a number
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def printable(name: str) -> str:
    """Escape what could control a terminal or a page: line breaks, escape codes, wrong UTF-8.

    Only what a person reads is escaped, never what a program reads: files hold the true names.

    Args:
        name: The name of a file, or any text.

    Returns:
        One line. Letters, spaces of any width and marks of any language stay as they are. URLs are
        without what may be a key; see `simsiam.utils.names.hide_keys`.
    """
    if "://" in name:
        for pattern, replacement in URL_KEYS:
            name = pattern.sub(replacement, name)
    return CONTROL_CHARACTERS.sub(lambda c: c[0].encode("unicode_escape").decode(), name)


def check_ranges(instance: object, **ranges: tuple[float, float]) -> None:
    """Check that attributes are in their ranges. None is allowed; tuples are checked by value.

    Args:
        instance: The object whose attributes are checked.
        **ranges: Lowest and highest allowed value of each attribute, by its name.

    Raises:
        UsageError: A value is outside its range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(instance, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:  # true of nan as well
                bounds = (
                    f"it is at least {low:g}"
                    if high == inf
                    else f"it lies between {low:g} and {high:g}"
                )
                raise UsageError(f"{name} is {number}; {bounds}")


@lru_cache(maxsize=1000)
def say_once(text: str) -> None:
    """Print a line on stderr, the first time that it is said in this process.

    Args:
        text: The line.
    """
    print(printable(text), file=sys.stderr, flush=True)
