"""A sweep is a list of points, built by pure algebra on lists of overrides. Standard library only.

    def get_sweep() -> list[SweepPoint]:
        rates = vary("optimizer.learning_rate", (1e-4, 3e-4))
        recipes = vary("estimator", {"opd": EstimatorConfig(recipe="opd"), "vopd":
        EstimatorConfig(recipe="vopd")}) return points(Config(), product(recipes, rates, seeds(5)))

A point's id is made of its own overrides alone, so it does not change when the sweep around it
grows.
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

_MAX_ID = 180  # file systems allow 255 bytes a name


@dataclasses.dataclass(frozen=True)
class Choice:
    """A value of a field and how it is called."""

    label: str | None  # None: the name of an arm tells of it
    value: Any


Overrides = dict[
    str, Choice
]  # dotted field -> what it becomes; a name without a field stands for the fields beside it that have no label


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One run to be made."""

    id: str  # such as estimator=vopd,learning_rate=0.0003,seed=1
    overrides: dict[str, str]  # short field name -> label
    config: Config


def vary(field: str, values: Iterable[Any] | Mapping[str, Any]) -> list[Overrides]:
    """One entry a value of a dotted field or of a whole section; a mapping gives the values names
    of their own.
    """
    _check_field(field)
    named = (
        values.items()
        if isinstance(values, Mapping)
        else ((_label(value), value) for value in values)
    )
    return [{field: Choice(label, value)} for label, value in named]


def arms(fields: Mapping[str, Mapping[str, Any]], name: str = "arm") -> list[Overrides]:
    """One entry an arm of the study: the fields that it sets, under one name, by which tables of
    papers find its runs.

    `arms({"opd": {"estimator": OPD}, "npd": {"estimator": NPD, "train.pack_length": 256}})` has
    points `arm=opd` and `arm=npd`.
    """
    if (
        name in _short_names() or name in _short_names().values()
    ):  # by either it would stand in ids and tables
        raise ConfigError(
            f"{name!r} is a field of the config; expected a name of its own for arms that set several"
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
    """Runs that differ in nothing but what is drawn."""
    return vary("seed", range(first, first + count))


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Every combination; the last sweep varies fastest."""
    return [_merge(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """Entry by entry; all must be of one length."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped sweeps have {lengths} entries; expected as many in each")
    return [_merge(parts) for parts in zip(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """One after the other; an entry that stands in several is kept once."""
    kept: list[Overrides] = []
    for entry in itertools.chain(*sweeps):
        if entry not in kept:
            kept.append(entry)
    return kept


def points(base: Config, overrides: Sequence[Overrides]) -> list[SweepPoint]:
    """The overrides applied to a base config, equal configs once; ConfigError where one does not
    fit, or where two share an id.
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
            continue  # asked for in other words: a second run would count its seed twice
        if made.setdefault(point.id, point).config != point.config:
            raise ConfigError(
                f"two points of the sweep are called {point.id!r} and differ; give their values labels of their own"
            )
    return list(made.values())


def select(points: Sequence[SweepPoint], patterns: Sequence[str]) -> list[SweepPoint]:
    """The points that one of the patterns names: a whole id, or `name=label` parts that are all of
    its parts; `*` and `?` stand for text.

    ConfigError where a pattern names none.
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
                f"--only {pattern!r} names no point of the sweep; expected an id or parts of one, such as {', '.join(close)}"
            )
        chosen |= {p.id: p for p in found}
    return [p for p in points if p.id in chosen]


def _merge(parts: Sequence[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ConfigError(
                f"the sweep sets {sorted(twice)} twice; expected each field in one factor"
            )
        merged |= part
    return merged


def _apply(base: Config, overrides: Overrides) -> Config:
    # A section before its fields, and all fields of a section at once: they are checked together.
    fields = {field: choice.value for field, choice in overrides.items() if field in _short_names()}
    sections = {field: value for field, value in fields.items() if "." not in field}
    leaves: dict[str, dict[str, Any]] = {}
    for field, value in fields.items():
        section, _, leaf = field.partition(".")
        if leaf:
            leaves.setdefault(section, {})[leaf] = value
    try:
        for section, values in leaves.items():
            sections[section] = dataclasses.replace(
                sections.get(section, getattr(base, section)), **values
            )
        return dataclasses.replace(base, **sections)
    except (ConfigError, TypeError) as error:
        described = ", ".join(
            f"{field}={choice.label}"
            for field, choice in overrides.items()
            if choice.label is not None
        )
        raise ConfigError(f"the point {described} of the sweep: {error}") from error


@functools.cache
def _short_names() -> dict[str, str]:
    """Each dotted field by the shortest ending that no other field has."""
    sections = typing.get_type_hints(Config)
    fields = [
        *sections,
        *(
            f"{s}.{f.name}"
            for s, hint in sections.items()
            if dataclasses.is_dataclass(hint)
            for f in dataclasses.fields(hint)
        ),
    ]
    endings = [field.rpartition(".")[2] for field in fields]
    return {
        field: ending if endings.count(ending) == 1 else field
        for field, ending in zip(fields, endings)
    }


def _check_field(field: str) -> None:
    if field not in _short_names():
        raise ConfigError(
            f"a sweep varies {field!r}, which is no field; {nearest(field, _short_names())}"
        )


def _label(value: Any) -> str:
    """A value as it stands in an id; what does not fit there is told apart by a digest."""
    if dataclasses.is_dataclass(value):
        text, plain = type(value).__name__, json.dumps(to_dict(value), sort_keys=True)
    else:
        text = plain = f"{value:g}" if isinstance(value, float) else str(value)
    safe = re.sub(r"[^A-Za-z0-9._+-]", "-", text)
    return safe if safe == plain else f"{safe}-{_digest(plain)}"


def _id_of(labels: Mapping[str, str]) -> str:
    text = (
        ",".join(
            f"{name}={re.sub(r'[^A-Za-z0-9._+-]', '-', label)}" for name, label in labels.items()
        )
        or "base"
    )
    return text if len(text) <= _MAX_ID else f"{text[:_MAX_ID]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
