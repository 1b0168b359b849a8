"""Settings: fields with a help text, and values converted to the type that a field declares."""

import operator
import types
from collections.abc import Mapping
from dataclasses import field, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from simsiam.errors import UsageError, truncate, unknown_name

MAX_INT = 2**63  # largest size of a whole number; YAML has no limit

T = TypeVar("T")


def setting(default: T, help_text: str) -> T:
    """Declare a field of a dataclass that is a setting: a flag of a verb and a keyword argument.

    Args:
        default: The default value.
        help_text: What the setting means, in one line; the flag's help.

    Returns:
        The dataclass field. Its type is declared as that of the value, which is how type checkers
        understand a default.
    """
    declared = field(default=default, metadata={"help": help_text})  # type: ignore[call-overload]
    return declared  # type: ignore[no-any-return]


def parse_value(value: object, expected_type: object, name: str) -> object:
    """Convert a value from a flag (text), from YAML or from Python to the type of a setting.

    Args:
        value: The value.
        expected_type: A type: bool, int, float, str, Literal, a tuple or dataclass of these, or
            one of these or None.
        name: Name of the setting, for messages.

    Returns:
        The converted value.

    Raises:
        UsageError: The value does not have the type.
    """
    origin, options = get_origin(expected_type), get_args(expected_type)
    if origin in (Union, types.UnionType):  # always "X | None"
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
            count = f"{len(kinds)} values, not {len(values)}"
            raise UsageError(f"{name} takes {count}: {truncate(value, repr)}")
        return tuple(parse_value(v, k, name) for v, k in zip(values, kinds, strict=True))
    if is_dataclass(expected_type):
        return _parse_dataclass(value, expected_type, name)
    return _parse_scalar(value, expected_type, name)


def _parse_dataclass(value: object, expected_type: Any, name: str) -> object:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {truncate(value, repr)}; it takes a mapping")
    hints = get_type_hints(expected_type)
    for key in value:
        if key not in hints:
            raise unknown_name(f"key in {name}", key, hints)
    try:
        return expected_type(**{k: parse_value(v, hints[k], k) for k, v in value.items()})
    except TypeError as error:
        raise UsageError(f"{name} is incomplete: {error}") from None


def _parse_scalar(value: Any, expected_type: Any, name: str) -> object:
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
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        allowed = kinds[expected_type]
        raise UsageError(f"{name} is {truncate(value, repr)}; it takes {allowed}") from None


def replace_settings(settings_class: type[T], overrides: Mapping[str, object]) -> T:
    """Make settings from defaults and changes.

    Args:
        settings_class: A dataclass of settings.
        overrides: New values, by the names of fields.

    Returns:
        An instance of the dataclass.

    Raises:
        UsageError: A name is unknown or a value is wrong.
    """
    kinds = get_type_hints(settings_class)
    for name in overrides:
        if name not in kinds:
            raise unknown_name("setting", name, kinds)
    values = {name: parse_value(value, kinds[name], name) for name, value in overrides.items()}
    return settings_class(**values)


def to_builtin_types(value: object) -> object:
    """Convert tuples to lists, also inside of dictionaries and lists, as YAML and JSON need it.

    Args:
        value: Dictionaries, lists, tuples and scalars.

    Returns:
        The same without tuples.
    """
    if isinstance(value, dict):
        return {k: to_builtin_types(v) for k, v in value.items()}
    return [to_builtin_types(v) for v in value] if isinstance(value, list | tuple) else value


def flatten(value: object, name: str = "") -> dict[str, object]:
    """Flatten nested mappings into one mapping with dotted names.

    Args:
        value: A mapping, a list of mappings, or a leaf.
        name: The dotted name of `value` itself; empty at the top.

    Returns:
        The leaves by name, such as "method.dim" or "method.views.0.blur".
    """
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: value}
    return {
        leaf_name: leaf
        for key, item in value.items()
        for leaf_name, leaf in flatten(item, f"{name}.{key}".lstrip(".")).items()
    }
