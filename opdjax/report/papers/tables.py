"""A table or a figure of a paper as data: what it compares, its numbers and how sure they are, and
what the paper claims of them.

A row is an arm of a sweep (`opdjax.config.grid.arms`), a column a score of its runs, perhaps of one
pair of models; a cell is the mean over the seeds of the points that have the labels of both. Sweeps
at the paper's size and their small twins use the same labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

# How sure a number is, strongest first: what stands behind it.
MARKS = {
    "C": "the released code",
    "P": "the paper's or its author's own words",
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
    """What is compared: how it is read from a run, and on which points."""

    label: str
    read: str = (
        "avg@k"  # see compare.reader; empty: a number of the paper that no run here can have
    )
    labels: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # that its points have beside the row's, such as pair
    scale: float = 1.0  # of a run's number to the paper's unit, such as 100 for percent
    unit: str = ""
    # Label of a row: the number is then not the score `read` itself, but what a run had spent when
    # it first scored as much as the run of that row and seed ever did.
    until: str = ""
    spent: Literal["prompts", "seconds"] = "prompts"  # until then


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: an arm of the sweep, or, without labels, one that is not implemented here."""

    label: str
    labels: Mapping[str, str] | None  # such as {"arm": "vopd"}
    values: Mapping[str, Value] = dataclasses.field(
        default_factory=dict
    )  # by the label of the column
    note: str = ""
    when: Literal["after", "before"] = (
        "after"  # training; before: the start of these runs, such as an untrained student
    )


@dataclasses.dataclass(frozen=True)
class PaperClaim:
    """What the paper says of two rows in a column, as a statement that runs can bear out or
    contradict.

    `more`, `less`: left less right is above `margin`, or below -margin. `equal`: it lies within ±
    margin. `ratio`: left is at least `margin` times right. `gap`: left has closed at least the
    share `margin` of what lies between `base` and right. Differences are of a run's own numbers,
    not in the paper's unit.
    """

    text: str
    kind: Literal["more", "less", "equal", "ratio", "gap"]
    left: str  # labels of rows
    right: str
    column: str  # label of the column; its labels' `pair` is left open where the study has another
    margin: float = 0.0
    mark: str = "P"
    base: str = ""  # label of a row; of a gap


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """A table or figure, with what it was measured on."""

    name: str  # as `opdjax table --paper` calls it
    paper: str
    title: str
    settings: str  # models, data, hardware
    columns: tuple[PaperColumn, ...]
    rows: tuple[Row, ...]
    claims: tuple[PaperClaim, ...]
    notes: tuple[str, ...] = ()

    def row(self, label: str) -> Row:
        """By its label."""
        return next(row for row in self.rows if row.label == label)

    def column(self, label: str) -> PaperColumn:
        """By its label."""
        return next(column for column in self.columns if column.label == label)


def numbers(
    columns: Sequence[PaperColumn], values: Sequence[float | None], mark: str = "P"
) -> dict[str, Value]:
    """A row of the paper, one number a column from the first on; None where it has none."""
    return {
        column.label: Value(value, mark)
        for column, value in zip(columns, values)
        if value is not None
    }
