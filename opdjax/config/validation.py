"""Reads, checks and dumps settings. Errors name the field and what was expected."""

import dataclasses
import difflib
import functools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

_MAX_INT = 2**31 - 1  # the largest integer of jax's default type
_SHOWN_CHARS = 300  # of a wrong value
# Ranges of values, by the words of an error message.
_RANGES: Mapping[str, Callable[[Any], bool]] = {
    "less than 0": lambda x: x < 0,
    "0 or more": lambda x: x >= 0,
    "0, or more than 1": lambda x: x == 0 or x > 1,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "from 0 to 2147483647": lambda x: 0 <= x <= _MAX_INT,
    "from 2 to 200": lambda x: 2 <= x <= 200,
    "at least 0 and less than 1": lambda x: 0 <= x < 1,
    "more than 0": lambda x: x > 0,
    "more than 1": lambda x: x > 1,
    "more than 0 and at most 1": lambda x: 0 < x <= 1,
    "more than 0 and less than 1": lambda x: 0 < x < 1,
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
    "-1 or at least 1": lambda x: x == -1 or x >= 1,
    "one or more different numbers above 0": lambda x: 0 < len({*x}) == len(x) and min(x) > 0,
    "0 or more each": lambda x: min(x) >= 0,
    "K * K numbers, row by row, for K stages": lambda x: (
        len(x) > 1 and math.isqrt(len(x)) ** 2 == len(x)
    ),
}


class ConfigError(ValueError):
    """A field that does not exist, or a value that the field does not accept."""


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


# Cached: it evaluates every annotation, which takes most of the time of reading a sweep's configs.
hints_of = functools.cache(functools.partial(typing.get_type_hints, include_extras=True))


def require(is_met: bool, field: str, value: Any, expected: str) -> None:
    """Raise a ConfigError with the field, its value and what was expected, unless `is_met`."""
    if not is_met:
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]} …"
        raise ConfigError(f"{field} is {shown}; expected {expected}")


@typing.dataclass_transform(frozen_default=True)
class Section:
    """A group of settings. Its subclasses are frozen dataclasses, which check the types and ranges
    of their fields when they are made.

    A range is given in words: `every: Annotated[int, "0 (off) or more"] = 0`. Errors name a field
    of `DataConfig` as data.FIELD, and a field of `Config` as FIELD.
    """

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        require_types(self, self._path())

    def require(self, is_met: bool, name: str, expected: str) -> None:
        """Raise a ConfigError about a field, FIELD or SECTION.FIELD, unless `is_met`."""
        require(is_met, self._path() + name, operator.attrgetter(name)(self), expected)

    def require_default(self, name: str, reason: str) -> None:
        """Raise one unless a field has its default; `reason` continues "expected DEFAULT ..."."""
        default = type(self).__dataclass_fields__[name].default
        self.require(getattr(self, name) == default, name, f"{default} {reason}")

    @classmethod
    def _path(cls) -> str:
        name = re.sub(r"\B(?=[A-Z])", "_", cls.__name__.removesuffix("Config")).lower()
        return f"{name}." if name else ""


def in_range(value: Any, words: str) -> bool:
    """Whether a value is in a range that is given in words. Words in parentheses, and ", or none
    ..." at the end, are ignored.
    """
    return _RANGES[re.sub(r" \([^)]*\)|, or none.*", "", words)](value)


def pairs_of(field: str, items: tuple[str, ...], expected: str) -> dict[str, str]:
    """Name -> value, of items NAME=VALUE; ConfigError for another form or a repeated name."""
    pairs = dict(item.split("=", 1) for item in items if "=" in item)
    is_complete = len(pairs) == len(items) and all(map(all, pairs.items()))
    require(is_complete, field, items, expected)
    return pairs


def convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the annotated type and in its range, or a ConfigError; floats may be ints."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = convert(arguments[0], value, path)
        require(value is None or in_range(value, arguments[1]), path, value, arguments[1])
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        # A list belongs to the alternative that is one.
        is_list = isinstance(value, (list, tuple))
        fitting = [a for a in arguments if (typing.get_origin(a) is tuple) == is_list]
        return convert(next(a for a in (*fitting, *arguments) if a is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} is {value!r}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), path, value, "a list")
        is_long_enough = arguments[-1] is ... or len(value) == len(arguments)
        require(is_long_enough, path, value, f"{len(arguments)} values")
        return tuple(convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int) and not is_bool and abs(value) < 1e300:
        return float(value)
    is_right_type = isinstance(value, hint) and is_bool == (hint is bool)
    require(is_right_type, path, value, hint.__name__)
    require(hint is not float or math.isfinite(value), path, value, "a finite number")
    require(hint is not int or abs(value) <= _MAX_INT, path, value, f"at most {_MAX_INT}")
    return value


def require_types(section: Any, path: str = "") -> None:
    """Check a section made in Python as if it were read from a file."""
    for name, hint in hints_of(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(hint):
            expected = f"a section with named fields: {hint.__name__}(...)"
            require(isinstance(value, hint), name, value, expected)
            require_types(value, f"{name}.")
        else:
            convert(hint, value, path + name)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values, as `config.json` holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any], path: str = "") -> Any:
    """The strict inverse of `to_dict`: ConfigError for an unknown field, with the nearest valid
    name, for a wrong type and for the lack of a field without a default.
    """
    where = path.rstrip(".") or "the config"
    require(isinstance(values, dict), where, values, "a section with named fields")
    hints = hints_of(cls)
    for name in values:
        if name not in hints:
            raise ConfigError(f"unknown field {path + name!r}; {nearest(name, hints)}")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory:  # both MISSING
            raise ConfigError(f"{path + field.name} is not given; expected a value")
    return cls(**{name: convert(hints[name], value, path + name) for name, value in values.items()})


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of valid names if none is similar."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {valid}"


def differences(left: dict[str, Any], right: dict[str, Any], path: str = "") -> list[str]:
    """`field: left -> right` for every field in which two dumped configs differ."""
    found = []
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{name}.")
        elif a != b:
            found.append(f"{path}{name}: {a!r} -> {b!r}")
    return found
