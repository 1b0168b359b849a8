"""Values of settings: text, YAML and Python values converted to the type that a field declares."""

import operator
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simsiam.errors import UsageError, brief, unknown

MOST = 2**63  # of a whole number: YAML knows no bounds


T = TypeVar("T")


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`: from a flag's text, from YAML, or from Python alike. Raises UsageError."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # here always "X | None"
        if value is None or (value in ("none", ["none"]) and "none" not in get_args(options[0])):
            return None
        return convert(value, options[0], name)
    if origin is Literal:
        if value not in options:
            raise unknown(name, value, options)
        return value
    if origin is tuple:
        values = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [options[0]] * len(values) if options[-1] is Ellipsis else list(options)
        if len(values) != len(kinds):
            raise UsageError(f"{name} takes {len(kinds)} values, not {len(values)}: {brief(value, repr)}")
        return tuple(convert(v, k, name) for v, k in zip(values, kinds, strict=True))
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} is {brief(value, repr)}; it takes a mapping")
        hints = get_type_hints(kind)
        for key in value:
            if key not in hints:
                raise unknown(f"key in {name}", key, hints)
        try:
            return kind(**{k: convert(v, hints[k], k) for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise UsageError(f"{name} is incomplete: {error}") from None
    if type(value) is kind and not (kind is int and abs(value) > MOST):
        return value
    try:
        if kind is bool or kind is str or isinstance(value, bool):
            raise ValueError
        if kind is float:
            return float(value)
        number = operator.index(int(value) if isinstance(value, str) else value)
        if abs(number) > MOST:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
        raise UsageError(f"{name} is {brief(value, repr)}; it takes {word}") from None


def changed(owner: type[T], words: Mapping[str, Any]) -> T:
    """Settings, a dataclass, with some words changed. Raises UsageError for a wrong name or value."""
    kinds = get_type_hints(owner)
    for name in words:
        if name not in kinds:
            raise unknown("setting", name, kinds)
    return owner(**{name: convert(value, kinds[name], name) for name, value in words.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
