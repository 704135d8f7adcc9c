"""Sweeps: lists of points, built by pure functions of lists of overrides. Standard library only.

    def get_sweep() -> list[SweepPoint]:
        rates = vary("optimizer.learning_rate", (1e-4, 3e-4))
        recipes = vary("estimator.recipe", ("opd", "vopd"))
        return points(Config(), product(recipes, rates, seeds(5)))

The id of a point is made of its own overrides, so it does not change when the sweep grows.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import itertools
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opdjax.config import Config
from opdjax.config.validation import ConfigError, nearest, to_dict

_MAX_ID = 180  # characters; file systems allow names of 255 bytes
_UNSAFE = r"[^A-Za-z0-9._+-]"  # characters that an id does not keep


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of a field and its name in ids and tables."""

    label: str | None  # None: the field belongs to an arm, which has the label
    value: Any


# Dotted field -> its value. The name of an arm is an entry too, with a label and no value.
Overrides = dict[str, Choice]


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep."""

    id: str  # such as estimator=vopd,learning_rate=0.0003,seed=1
    overrides: dict[str, str]  # short field name -> label
    config: Config


def vary(field: str, values: Iterable[Any] | Mapping[str, Any]) -> list[Overrides]:
    """One entry per value of a dotted field or a whole section; the keys of a mapping label its
    values. ConfigError if there is no such field.
    """
    _check_field(field)
    if not isinstance(values, Mapping):
        return [{field: Choice(_label(value), value)} for value in values]
    return [{field: Choice(label, value)} for label, value in values.items()]


def arms(fields: Mapping[str, Mapping[str, Any]], name: str = "arm") -> list[Overrides]:
    """One entry per arm of a study: the values of several fields under one label, by which the
    tables of papers find its runs. ConfigError if `name` is a field, or a field does not exist.

    `arms({"opd": {"estimator": OPD}, "npd": {"estimator": NPD, "train.pack_length": 256}})` gives
    the points `arm=opd` and `arm=npd`.
    """
    if name in _short_names() or name in _short_names().values():  # ids and tables use both
        raise ConfigError(
            f"{name!r} is a field of the config; expected another name for arms that set several"
        )
    for field in {field for values in fields.values() for field in values}:
        _check_field(field)
    return [
        {
            name: Choice(label, None),
            **{field: Choice(None, value) for field, value in values.items()},
        }
        for label, values in fields.items()
    ]


def seeds(count: int, first: int = 0) -> list[Overrides]:
    """Runs that differ only in their random draws."""
    return vary("seed", range(first, first + count))


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """All combinations; the last sweep varies fastest."""
    return [_merge(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The entries of several sweeps joined one by one; ConfigError unless all have one length."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped sweeps have {lengths} entries; expected the same number in each")
    return [_merge(parts) for parts in zip(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The entries of several sweeps, in order; equal entries are kept once."""
    kept: list[Overrides] = []
    for entry in itertools.chain(*sweeps):
        if entry not in kept:
            kept.append(entry)
    return kept


def points(base: Config, overrides: Sequence[Overrides]) -> list[SweepPoint]:
    """The points that the overrides make of a base config, equal configs once; ConfigError if an
    override does not fit, or if two different points have one id.
    """
    made: dict[str, SweepPoint] = {}
    for entry in overrides:
        labels = {
            _short_names().get(field, field): choice.label
            for field, choice in entry.items()
            if choice.label is not None
        }
        point = SweepPoint(_id_of(labels), labels, _apply(base, entry))
        if point.id not in made and point.config in [other.config for other in made.values()]:
            continue  # the same run under another id, whose seed would count twice
        if made.setdefault(point.id, point).config != point.config:
            raise ConfigError(
                f"two different points of the sweep have the id {point.id!r}; give their values "
                "different labels"
            )
    return list(made.values())


def select(points: Sequence[SweepPoint], patterns: Sequence[str]) -> list[SweepPoint]:
    """The points that match at least one pattern: an id, or some of its `name=label` parts joined
    by commas, with the wildcards `*` and `?`. ConfigError if a pattern matches no point.
    """
    chosen: dict[str, SweepPoint] = {}
    for pattern in patterns:
        whole = [p for p in points if fnmatch.fnmatchcase(p.id, pattern)]
        found = whole or [
            p
            for p in points
            if all(fnmatch.filter(p.id.split(","), part) for part in pattern.split(","))
        ]
        if not found:
            ids = [p.id for p in points]
            close = difflib.get_close_matches(pattern, ids, n=5, cutoff=0.3) or ids[:5]
            raise ConfigError(
                f"--only {pattern!r} matches no point of the sweep; expected an id or parts of "
                f"one, such as {', '.join(close)}"
            )
        chosen |= {p.id: p for p in found}
    return [p for p in points if p.id in chosen]


def _merge(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ConfigError(
                f"the sweep sets {sorted(twice)} twice; expected each field in one factor only"
            )
        merged |= part
    return merged


def _apply(base: Config, overrides: Overrides) -> Config:
    # Sections first, then all fields of a section at once, because they are checked together.
    fields = {field: choice.value for field, choice in overrides.items() if field in _short_names()}
    sections = {field: value for field, value in fields.items() if "." not in field}
    leaves: dict[str, dict[str, Any]] = {}
    for field, value in fields.items():
        section, _, leaf = field.partition(".")
        if leaf:
            leaves.setdefault(section, {})[leaf] = value
    try:
        for section, values in leaves.items():
            before = sections.get(section, getattr(base, section))
            sections[section] = dataclasses.replace(before, **values)
        return dataclasses.replace(base, **sections)
    except (ConfigError, TypeError) as error:
        labelled = {name: c.label for name, c in overrides.items() if c.label is not None}
        point = ", ".join(f"{name}={label}" for name, label in labelled.items())
        raise ConfigError(f"the point {point} of the sweep: {error}") from error


@functools.cache
def _short_names() -> dict[str, str]:
    """Dotted field -> its last name, or the whole if another field ends in the same name."""
    sections = typing.get_type_hints(Config)
    fields = list(sections)
    for section, hint in sections.items():
        if dataclasses.is_dataclass(hint):
            fields += [f"{section}.{field.name}" for field in dataclasses.fields(hint)]
    names = [field.rpartition(".")[2] for field in fields]
    return {f: name if names.count(name) == 1 else f for f, name in zip(fields, names)}


def _check_field(field: str) -> None:
    if field not in _short_names():
        raise ConfigError(
            f"a sweep varies {field!r}, which is no field; {nearest(field, _short_names())}"
        )


def _label(value: Any) -> str:
    """The text of a value in an id; characters that an id cannot hold are replaced, and a digest
    keeps such labels different.
    """
    if dataclasses.is_dataclass(value):
        text, plain = type(value).__name__, json.dumps(to_dict(value), sort_keys=True)
    else:
        text = plain = f"{value:g}" if isinstance(value, float) else str(value)
    safe = re.sub(_UNSAFE, "-", text)
    return safe if safe == plain else f"{safe}-{_digest(plain)}"


def _id_of(labels: Mapping[str, str]) -> str:
    parts = [f"{name}={re.sub(_UNSAFE, '-', label)}" for name, label in labels.items()]
    text = ",".join(parts) or "base"
    return text if len(text) <= _MAX_ID else f"{text[:_MAX_ID]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
