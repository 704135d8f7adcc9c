"""Sweeps: lists of points, built by pure functions of lists of overrides.

    def get_sweep() -> list[SweepPoint]:
        rates = vary("optimizer.learning_rate", (1e-4, 3e-4))
        recipes = vary("estimator.recipe", ("opd", "vopd"))
        return points(Config(), product(recipes, rates, seeds(5)))

The id of a point is made of its own overrides, so it does not change when the sweep grows.
"""

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opdjax.config import Config
from opdjax.config.validation import ConfigError, nearest, to_dict

SCORED_ON = "scored_on"  # label of the points of a grid; a table's cells leave them out
_MAX_ID = 180  # characters; file systems allow names of 255 bytes
_UNSAFE = r"[^A-Za-z0-9._+-]"  # characters that an id does not keep


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Values of fields, by their dotted names, and labels by which ids and tables know them."""

    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep."""

    id: str  # such as estimator=vopd,learning_rate=0.0003,seed=1
    overrides: dict[str, str]  # short field name -> label
    config: Config


def vary(field: str, values: Iterable[Any] | Mapping[str, Any]) -> list[Overrides]:
    """One entry per value of a field or a section; the keys of a mapping label its values."""
    name = _short_name(field)
    pairs = values.items() if isinstance(values, Mapping) else ((_label(v), v) for v in values)
    return [Overrides({name: label}, {field: value}) for label, value in pairs]


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
    for field in itertools.chain(*fields.values()):
        _short_name(field)
    return [Overrides({name: label}, dict(values)) for label, values in fields.items()]


def seeds(count: int, first: int = 0) -> list[Overrides]:
    """Runs that differ only in their random draws."""
    return vary("seed", range(first, first + count))


def rate_grid(
    methods: Sequence[Overrides], rates: Iterable[float], evaluation: Mapping[str, Any], seed: int
) -> list[Overrides]:
    """The points that choose the learning rate of each method, whose own overrides leave it open:
    each rate once, with other `evaluation.*` fields (validation prompts) and another seed than the
    comparison. Tables of papers find a method's grid by its config, equal in all other settings.
    """
    validation = arms(
        {"validation": {f"evaluation.{k}": v for k, v in evaluation.items()}}, SCORED_ON
    )
    return product(methods, vary("optimizer.learning_rate", rates), validation, seeds(1, seed))


def product(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """All combinations; the last sweep varies fastest. ConfigError if two set one field."""
    return [functools.reduce(_merge, parts, Overrides()) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The entries of several sweeps joined one by one; ConfigError unless all have one length."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped sweeps have {lengths} entries; expected the same number in each")
    return [functools.reduce(_merge, parts) for parts in zip(*sweeps)]


def chain(*sweeps: Sequence[Overrides]) -> list[Overrides]:
    """The entries of several sweeps, in order; equal entries are kept once."""
    entries = list(itertools.chain(*sweeps))
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


def points(base: Config, overrides: Sequence[Overrides]) -> list[SweepPoint]:
    """The points that the overrides make of a base config, equal configs once; ConfigError if an
    override does not fit, or if two different points have one id.
    """
    made: dict[str, SweepPoint] = {}
    for entry in overrides:
        point = SweepPoint(_id_of(entry.labels), entry.labels, _apply(base, entry))
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


def _merge(left: Overrides, right: Overrides) -> Overrides:
    twice = left.fields.keys() & right.fields.keys() or left.labels.keys() & right.labels.keys()
    if twice:
        raise ConfigError(
            f"the sweep sets {sorted(twice)} twice; expected each field in one factor only"
        )
    return Overrides(left.labels | right.labels, left.fields | right.fields)


def _apply(base: Config, overrides: Overrides) -> Config:
    # Sections first, then all fields of a section at once, because they are checked together.
    sections = {field: value for field, value in overrides.fields.items() if "." not in field}
    leaves: dict[str, dict[str, Any]] = {}
    for field, value in overrides.fields.items():
        section, _, leaf = field.partition(".")
        if leaf:
            leaves.setdefault(section, {})[leaf] = value
    try:
        for section, values in leaves.items():
            before = sections.get(section, getattr(base, section))
            sections[section] = dataclasses.replace(before, **values)
        return dataclasses.replace(base, **sections)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"the point {_id_of(overrides.labels)} of the sweep: {error}") from error


@functools.cache
def _short_names() -> dict[str, str]:
    """Dotted field -> its last name, or the whole if another field ends in the same name."""
    config = to_dict(Config())
    fields = list(config)
    for section, values in config.items():
        fields += [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
    names = [field.rpartition(".")[2] for field in fields]
    return {f: name if names.count(name) == 1 else f for f, name in zip(fields, names)}


def _short_name(field: str) -> str:
    if field not in _short_names():
        raise ConfigError(
            f"a sweep varies {field!r}, which is no field; {nearest(field, _short_names())}"
        )
    return _short_names()[field]


def _label(value: Any) -> str:
    """The text of a value in an id; a digest tells apart those that an id cannot hold."""
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
