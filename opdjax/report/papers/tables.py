"""The papers' tables: their numbers, rows and claims, as data. No jax.

Each paper has a YAML file in this directory with `paper` and `tables`, a list of `PaperTable`; its
entries have the fields of the dataclasses below. A row is an arm of a sweep
(`opdjax.config.grid.arms`). A column is a score or metric of its runs, possibly for one pair of
models. Sweeps at the paper's size and their small twins use the same labels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Literal

import yaml

from opdjax.config.validation import ConfigError, from_dict, nearest

PAPERS = ("vopd", "npd", "ropd", "rubricem")
# Where a number comes from, the most reliable source first.
MARKS = {
    "C": "the released code",
    "P": "the paper or its author",
    "R": "a later release of the same author",
    "A": "the abstract",
    "T": "the code base that the paper builds on",
    "N": "machine-written notes on the paper",
    "B": "an earlier note of the same kind",
    "W": "a collection of results",
    "H": "a predecessor of the same authors",
    "D": "derived by arithmetic",
    "I": "inferred",
}
_SCALES = {"%": 100.0, "h": 1 / 3600}  # from a run's number to the unit


@dataclasses.dataclass(frozen=True)
class Value:
    """A number of the paper, in its own unit."""

    number: float
    mark: str  # a key of MARKS


@dataclasses.dataclass(frozen=True)
class PaperColumn:
    """A quantity, how it is read from a run, and the pair of models that it applies to."""

    label: str
    # See `cells.reader`. Empty: only the paper has this number, no run here can have it.
    read: str = "avg@k"
    pair: str = ""  # label of the column's points in addition to the row's arm; empty: any
    unit: str = ""
    # Label of a row. If set, the number is not the score `read` but the cost (`spent`) until a run
    # first scores as much as the best evaluation of that row's run with the same seed.
    until: str = ""
    spent: Literal["prompts", "seconds"] = "prompts"

    @property
    def scale(self) -> float:
        """From a run's own number to the paper's unit."""
        return _SCALES.get(self.unit, 1.0)

    @property
    def is_timed(self) -> bool:
        """Whether the number depends on the machine."""
        parts = (self.read, self.spent if self.until else "")
        return "seconds" in parts or "time/" in self.read or "per_second" in self.read


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: an arm of the sweep or, without one, a method that is not implemented here."""

    label: str
    arm: str = ""
    # The paper's numbers in the table's first columns, each with its mark ("58.7 N"), or None.
    values: tuple[str | None, ...] = ()
    note: str = ""
    # The score after or before training; `before` is the untrained student of these runs.
    when: Literal["after", "before"] = "after"

    def value(self, index: int) -> Value | None:
        """The paper's number in a column of the table; None if it has none."""
        text = self.values[index] if index < len(self.values) else None
        if text is None:
            return None
        number, mark = text.split()
        return Value(json.loads(number), mark)


@dataclasses.dataclass(frozen=True)
class PaperClaim:
    """A statement of the paper about two rows in a column, which runs can reproduce or contradict.

    `more`, `less`: left minus right is above `margin`, or below -margin. `equal`: it is within ±
    the `equivalence` of the table. `ratio`: left is at least `margin` times right. `gap`: left
    closes at least the share `margin` of the gap from `base` to right. Margins are in a run's own
    unit, not the paper's.
    """

    kind: Literal["more", "less", "equal", "ratio", "gap"]
    text: str
    left: str  # label of a row
    right: str
    column: str  # label; the claim is also tested in columns that read the same for other pairs
    margin: float = 0.0
    mark: str = "P"
    base: str = ""  # label of a row, for a gap


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table or figure of a paper."""

    name: str  # as in `opdjax table --paper NAME`
    paper: str
    title: str
    settings: str  # models, data, hardware
    columns: tuple[PaperColumn, ...]
    rows: tuple[Row, ...]
    claims: tuple[PaperClaim, ...]
    notes: tuple[str, ...] = ()
    # Scores within this much of each other are equal, for every `equal` claim; stated before runs.
    equivalence: float = 0.01

    @property
    def labels(self) -> str:
        """The labels of the table's points."""
        labels = [f"arm={row.arm}" for row in self.rows if row.arm]
        labels += [f"pair={column.pair}" for column in self.columns if column.pair]
        return " ".join(dict.fromkeys(labels))


@functools.cache
def paper_tables() -> dict[str, PaperTable]:
    """The tables of all papers, by name. ConfigError if a file is wrong."""
    here = pathlib.Path(__file__).parent
    return {table.name: table for name in PAPERS for table in load(here / f"{name}.yaml")}


def paper_named(name: str) -> PaperTable:
    """The table with this name; ConfigError if there is none."""
    tables = paper_tables()
    if name not in tables:
        advice = f"{nearest(name, tables)}; the names are {', '.join(tables)}"
        raise ConfigError(f"there is no table {name!r}; {advice}")
    return tables[name]


def load(file: pathlib.Path) -> list[PaperTable]:
    """The tables of one paper; ConfigError with the file and the entry if a field is wrong."""
    found = yaml.safe_load(file.read_text("utf-8"))
    return [
        from_dict(PaperTable, of | {"paper": found["paper"]}, f"{file.name}: {of.get('name')}.")
        for of in found["tables"]
    ]
