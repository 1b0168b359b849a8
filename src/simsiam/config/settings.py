"""Values of settings: text, YAML and Python values converted to the type that a field declares."""

import operator
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simsiam.errors import UsageError, truncate, unknown_name

MAX_INT = 2**63  # of a whole number: YAML knows no bounds


T = TypeVar("T")


def parse_value(value: Any, expected_type: Any, name: str) -> Any:
    """`value` as `kind`: from a flag's text, from YAML, or from Python alike. Raises UsageError."""
    origin, options = get_origin(expected_type), get_args(expected_type)
    if origin in (Union, types.UnionType):  # here always "X | None"
        if value is None or (value in ("none", ["none"]) and "none" not in get_args(options[0])):
            return None
        return parse_value(value, options[0], name)
    if origin is Literal:
        if value not in options:
            raise unknown_name(name, value, options)
        return value
    if origin is tuple:
        values = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [options[0]] * len(values) if options[-1] is Ellipsis else list(options)
        if len(values) != len(kinds):
            raise UsageError(
                f"{name} takes {len(kinds)} values, not {len(values)}: {truncate(value, repr)}"
            )
        return tuple(parse_value(v, k, name) for v, k in zip(values, kinds, strict=True))
    if is_dataclass(expected_type):
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} is {truncate(value, repr)}; it takes a mapping")
        hints = get_type_hints(expected_type)
        for key in value:
            if key not in hints:
                raise unknown_name(f"key in {name}", key, hints)
        try:
            return expected_type(**{k: parse_value(v, hints[k], k) for k, v in value.items()})  # type: ignore[operator]
        except TypeError as error:
            raise UsageError(f"{name} is incomplete: {error}") from None
    if type(value) is expected_type and not (expected_type is int and abs(value) > MAX_INT):
        return value
    try:
        if expected_type is bool or expected_type is str or isinstance(value, bool):
            raise ValueError
        if expected_type is float:
            return float(value)
        number = operator.index(int(value) if isinstance(value, str) else value)
        if abs(number) > MAX_INT:
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[
            expected_type
        ]
        raise UsageError(f"{name} is {truncate(value, repr)}; it takes {word}") from None


def replace_settings(settings_class: type[T], overrides: Mapping[str, Any]) -> T:
    """Settings, a dataclass, with some words changed. Raises UsageError for a wrong name or value."""
    kinds = get_type_hints(settings_class)
    for name in overrides:
        if name not in kinds:
            raise unknown_name("setting", name, kinds)
    return settings_class(
        **{name: parse_value(value, kinds[name], name) for name, value in overrides.items()}
    )


def _to_builtin_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _to_builtin_types(v) for k, v in value.items()}
    return [_to_builtin_types(v) for v in value] if isinstance(value, list | tuple) else value
