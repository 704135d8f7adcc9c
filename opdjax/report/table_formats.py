"""Formats rows of text as a Markdown, LaTeX or CSV table. Standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Format = Literal["markdown", "latex", "csv"]

_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "{}$&#_%"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"±": r"$\pm$", "≥": r"$\geq$"}
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub Markdown table; bars and line breaks inside cells are escaped."""
    text = lambda cell: cell.replace("|", r"\|").replace("\n", " ")
    line = lambda cells: f"| {' | '.join(map(text, cells))} |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def latex(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A booktabs tabular; characters that are special to TeX are escaped inside cells."""
    line = lambda cells: " & ".join(map(latex_text, cells)) + r" \\"
    begin = rf"\begin{{tabular}}{{{'l' * len(header)}}}"
    head = [begin, r"\toprule", line(header), r"\midrule"]
    return "\n".join([*head, *map(line, rows), r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    """The text with the characters that are special to TeX escaped, on one line."""
    return text.translate(_LATEX).replace("\n", " ")


def comma_separated(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV with numbers in full precision."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().rstrip("\n")
