"""What a user can get wrong, said in one line: what was given, what is allowed, what to do."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import inf

MAX_VALUE_CHARS = 200  # characters of what was given that an error repeats


class UsageError(ValueError):
    """The request itself is wrong: an unknown name, a contradiction, a folder that exists. Exit code 2."""


class WorkFailed(RuntimeError):
    """The request was fine and the work failed: no readable image, a diverged loss, a full disk. Exit code 1."""


def unknown_name(kind: str, value: object, allowed: Iterable[str]) -> UsageError:
    """The error for a name that is not in a list, with the nearest one that is."""
    names, text = sorted(allowed), truncate(value)
    near = get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(names)}"
    return UsageError(f"unknown {kind} {text!r}: {hint}")


def truncate(value: object, formatter: Callable[[object], str] = str) -> str:
    """What was given, at most a line of it."""
    try:
        text = formatter(value)
    except ValueError:  # Python's limit for the digits of a number
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def printable(name: str) -> str:
    """A file's name as one printable line: line breaks, terminal escapes and what is not UTF-8 as backslashes."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def check_ranges(instance: object, **ranges: tuple[float, float]) -> None:
    """Raises UsageError for a field of `owner` (or a value of a tuple there) that is set and outside its range."""
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


class Stopped(RuntimeError):
    """A signal asked the work to stop, and it stopped in good order. Exit code 128 + `signum`."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
