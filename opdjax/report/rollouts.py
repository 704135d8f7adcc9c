"""The rollouts section of a run's page: sampled completions with the numbers of each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from opdjax.report.markup import (
    Html,
    count,
    details,
    fixed,
    join,
    percent,
    prompt_text,
    quiet,
    section,
    spread,
    table,
    tabs,
    tag,
    text_cell,
)
from opdjax.report.measures import completions_from
from opdjax.runs.results import Run, is_number

# Limits that keep a page small: steps, rollouts per step, tokens per rollout.
_STEPS, _ROLLOUTS, _TOKENS = 5, 4, 256
_WRITERS = {
    "student": "Student's completion",
    "teacher": "Teacher's completion",
    "references": "Reference answer",
}
_POINT_AT = (
    " Point at a token, tap it, or use Tab and the arrow keys to see its numbers; the table below"
    " each rollout lists them all."
)
_EXPLANATIONS = {
    "advantages": "The colour is the advantage, the factor of the gradient of the token's"
    " log-probability: blue tokens become more likely, orange ones (dotted underline) less likely."
    + _POINT_AT,
    "kl": "The shade is KL(student || teacher) at the token: the darker, the more the two models"
    " disagree there." + _POINT_AT,
}


@dataclasses.dataclass(frozen=True)
class Shading:
    """The field that colours the tokens, and the size at which the colour is full."""

    field: str
    limit: float

    @property
    def is_signed(self) -> bool:
        """Whether the field has a sign that the colour shows."""
        return self.field == "advantages"

    def look(self, value: float | None) -> dict[str, str]:
        """Class and style of a token. The underline shows the sign without colour."""
        if not is_number(value) or value == 0:
            return {"class_": "t"}
        share = min(1.0, abs(value) / self.limit)
        side = "for" if value > 0 and self.is_signed else "against"
        strong = " strong" if share >= 0.35 else ""
        return {"class_": f"t {side}{strong}", "style": f"--a:{share:.2f}"}


def rollouts_section(run: Run) -> Html | None:
    """Rollouts of a few steps, spread over training; None where none were written."""
    if not run.samples:
        return None
    every = sorted({row["step"] for row in run.samples})
    shown = {
        step: [row for row in run.samples if row["step"] == step][:_ROLLOUTS]
        for step in spread(every, _STEPS)
    }
    heading = _WRITERS.get(completions_from(run), "Completion")
    shading = _shading([row for rows in shown.values() for row in rows])
    views = {
        f"{step}": tag("div", *(_rollout(row, shading, heading) for row in rows), class_="rollouts")
        for step, rows in shown.items()
    }
    left_out = len(every) - len(shown)
    about = (
        "Completions of a few steps that the student was trained on. ",
        _EXPLANATIONS[shading.field] if shading else "This run recorded no numbers per token.",
        f" {count(left_out, 'more step')} in samples.jsonl." if left_out else None,
    )
    scale = None if shading is None else _scale(shading)
    choice = tabs("rollouts", views, "Training step")
    return section("rollouts", "Rollouts", quiet(*about), scale, choice)


def _shading(rows: list[dict[str, Any]]) -> Shading | None:
    """By advantage where the recipe has one, else by KL.

    The colour is full at the 95th percentile, so that outliers do not pale the rest.
    """
    for field in ("advantages", "kl"):
        values = (value for row in rows if row.get("tokens") for value in row.get(field) or ())
        sizes = sorted(abs(value) for value in values if is_number(value))
        if sizes and sizes[-1] > 0:
            at = min(len(sizes) - 1, int(0.95 * len(sizes)))
            return Shading(field, sizes[at] or sizes[-1])
    return None


def _scale(shading: Shading) -> Html:
    parts = (-1, -0.5, 0, 0.5, 1) if shading.is_signed else (0, 0.25, 0.5, 0.75, 1)
    values = [shading.limit * part for part in parts]
    boxes = [tag("span", fixed(value, 2), **shading.look(value)) for value in values]
    name = tag("span", "Advantage" if shading.is_signed else "KL, nats")
    beyond = tag("span", "and beyond", class_="quiet")
    return tag("div", name, tag("span", *boxes, class_="bar"), beyond, class_="scale")


def _rollout(row: dict[str, Any], shading: Shading | None, heading: str) -> Html:
    length, tokens = row.get("length"), row.get("tokens")
    facts = [f"{count(length, 'token')}"] if is_number(length) else []
    facts.append("cut off at the length limit" if row.get("is_truncated") else "ended by itself")
    completion, numbers = row.get("completion", ""), None
    if tokens is not None:
        kept = tokens[:_TOKENS]
        columns = {name: row.get(name) or [] for name in _FIELDS}
        completion = join(_token(at, piece, columns, shading) for at, piece in enumerate(kept))
        if any(columns.values()):
            numbers = details("Numbers of each token", _numbers(kept, columns))
        if len(tokens) > _TOKENS:
            facts.append(f"the first {_TOKENS} of {len(tokens):,} tokens are shown")
    return tag(
        "div",
        tag("h4", "Prompt"),
        tag("div", prompt_text(row.get("prompt", "")), class_="prompt"),
        tag("h4", heading),
        tag("div", completion, class_="completion"),
        tag("p", "; ".join(facts), class_="facts"),
        numbers,
        class_="rollout",
    )


def _at(values: Sequence[Any], place: int) -> Any:
    """The value of a token; None where the recipe does not record the field."""
    return values[place] if place < len(values) else None


def _token(at: int, piece: str, columns: dict[str, list], shading: Shading | None) -> Html:
    """The token in the text, coloured."""
    text = piece.replace("\n", "⏎\n") or "∅"
    if shading is None:
        return tag("span", text, class_="t")
    value = _at(columns[shading.field], at)
    name = "advantage" if shading.is_signed else "KL"
    title = f"{visible(piece)}: {name} {fixed(value)}"
    # One stop of the Tab key per rollout; the arrow keys go on from there.
    return tag("span", text, **shading.look(value), tabindex=0 if at == 0 else -1, title=title)


def _probability(value: float | None) -> str:
    return percent(value, is_log=True)


def _top(pieces: Sequence[Any] | None) -> Any:
    """The teacher's most likely tokens with their probabilities."""
    found = (f"‘{visible(piece)}’\u00a0{percent(share)}" for piece, share in pieces or ())
    return ", ".join(found)


# Fields of a row of samples.jsonl, with the column's heading and the way to write a value.
_FIELDS = {
    "advantages": ("advantage", fixed),
    "student_logprobs": ("student p", _probability),
    "teacher_logprobs": ("teacher p", _probability),
    "teacher_top": ("teacher's top 5", _top),
    "kl": ("KL, nats", fixed),
    "rewards": ("reward", fixed),
}


def _numbers(pieces: list[str], columns: dict[str, list]) -> Html:
    """The numbers of each token; a field without any value has no column."""
    head, cells = ["token"], [[visible(piece)] for piece in pieces]
    for field, (name, write) in _FIELDS.items():
        values = [write(_at(columns[field], at)) for at in range(len(pieces))]
        if any(value not in ("–", "") for value in values):
            head.append(name)
            for row, value in zip(cells, values):
                row.append(text_cell(value) if field == "teacher_top" else value)
    for at, row in enumerate(cells):
        row.append(at)
    caption = (
        "p: probability of the token given all tokens before it, at the temperature of the loss."
        " Positions count from 0."
    )
    return table([*head, "position"], cells, caption=caption)


def visible(piece: str) -> str:
    """A piece of text with its white space made visible."""
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
