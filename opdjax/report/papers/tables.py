"""A paper's table or figure as data: what it compares, its numbers and its claims.

A row is an arm of a sweep (`opdjax.config.grid.arms`). A column is a score or metric of its runs,
possibly for one pair of models. A cell is the mean over the seeds of the points that carry the
labels of both. Sweeps at the paper's size and their small twins use the same labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

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


@dataclasses.dataclass(frozen=True)
class Value:
    """A number of the paper, in its own unit."""

    number: float
    mark: str  # a key of MARKS


@dataclasses.dataclass(frozen=True)
class PaperColumn:
    """A quantity, how it is read from a run, and the points that it applies to."""

    label: str
    # See `reading.reader`. Empty: only the paper has this number, no run here can have it.
    read: str = "avg@k"
    # Labels that the column's points carry in addition to the row's, such as pair.
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: float = 1.0  # from a run's number to the paper's unit, such as 100 for percent
    unit: str = ""
    # Label of a row. If set, the number is not the score `read` but the cost (`spent`) until a run
    # first scores as much as the best evaluation of that row's run with the same seed.
    until: str = ""
    spent: Literal["prompts", "seconds"] = "prompts"


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: an arm of the sweep, or, without labels, a method that is not implemented here."""

    label: str
    labels: Mapping[str, str] | None  # such as {"arm": "vopd"}
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)  # by column label
    note: str = ""
    # The score after or before training; `before` is the untrained student of these runs.
    when: Literal["after", "before"] = "after"


@dataclasses.dataclass(frozen=True)
class PaperClaim:
    """A statement of the paper about two rows in a column, which runs can reproduce or contradict.

    `more`, `less`: left minus right is above `margin`, or below -margin. `equal`: it is within ±
    margin. `ratio`: left is at least `margin` times right. `gap`: left closes at least the share
    `margin` of the gap from `base` to right. Margins are in a run's own unit, not the paper's.
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

    def column(self, label: str) -> PaperColumn:
        """The column with this label."""
        return next(column for column in self.columns if column.label == label)


def numbers(
    columns: Sequence[PaperColumn], values: Sequence[float | None], mark: str = "P"
) -> dict[str, Value]:
    """The paper's values of a row by column label; a value of None is left out."""
    pairs = zip(columns, values)
    return {column.label: Value(value, mark) for column, value in pairs if value is not None}
