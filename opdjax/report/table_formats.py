"""Rows of text as a table in Markdown, LaTeX or CSV. Standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Format = Literal["markdown", "latex", "csv"]

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "≥": r"$\geq$",
    }
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's dialect; what a cell holds is text, its bars included."""
    line = lambda cells: (
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"
    )
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def latex(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A tabular of booktabs; what a cell holds is text, whatever TeX would make of its characters."""
    line = lambda cells: " & ".join(map(latex_text, cells)) + r" \\"
    begin = rf"\begin{{tabular}}{{{'l' * len(header)}}}"
    return "\n".join(
        [
            begin,
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return text.translate(_LATEX).replace("\n", " ")


def comma_separated(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV, numbers with all their figures."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().rstrip("\n")
