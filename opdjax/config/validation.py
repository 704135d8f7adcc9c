"""How settings are read, checked and dumped: whatever the sections are, a wrong name or type is
refused by name. Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from typing import Any, Literal

_MAX_INT = 2**31 - 1  # what jax indexes and counts with


class ConfigError(ValueError):
    """A field that does not exist, or a value that the field does not take."""


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


hints_of = functools.cache(
    typing.get_type_hints
)  # evaluates every annotation anew: most of the time that a sweep's configs take to read


def require(is_met: bool, field: str, value: Any, expected: str) -> None:
    """Raise a ConfigError that names the field, what it is and what was expected."""
    if not is_met:
        raise ConfigError(f"{field} is {value!r}; expected {expected}")


def convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the type that is asked for, or a ConfigError: nothing is guessed but an int for
    a float.
    """
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, path + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return convert(next(a for a in arguments if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} is {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} is {value!r}; expected a list")
        return tuple(convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if (
        hint is float
        and isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) < 1e300
    ):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} is {value!r}; expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} is {value!r}; expected a finite number")
    if hint is int and abs(value) > _MAX_INT:
        raise ConfigError(f"{path} is {value!r}; expected at most {_MAX_INT}")
    return value


def require_types(section: Any, path: str = "") -> None:
    """What is made in Python is held to the types that a file is held to: a wrong one would surface
    only when it is read back.
    """
    for name, hint in hints_of(type(section)).items():
        value = getattr(section, name)
        if not dataclasses.is_dataclass(hint):
            convert(hint, value, path + name)
        elif isinstance(value, hint):
            require_types(value, f"{name}.")
        else:
            raise ConfigError(
                f"{name} is {value!r}; expected a section with named fields: {hint.__name__}(...)"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, as `config.json` holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """The strict inverse of `to_dict`: an unknown field is refused with the nearest valid name, a
    wrong type by name.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path.rstrip('.') or 'the config'} is {values!r}; expected a section with named fields"
        )
    hints = hints_of(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown field {path + name!r}; {nearest(name, hints)}")
    return cls(**{name: convert(hints[name], value, path + name) for name, value in values.items()})


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of valid names where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {valid}"


def differences(left: dict[str, Any], right: dict[str, Any], path: str = "") -> list[str]:
    """`field: left -> right` for every leaf in which two dumped configs differ."""
    found = []
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{name}.")
        elif a != b:
            found.append(f"{path}{name}: {a!r} -> {b!r}")
    return found
