"""Sample rollouts: what the student wrote, token by token, and what the teacher would have written."""

from __future__ import annotations

import math
from typing import Any

from opdjax.report.markup import (
    Html,
    count,
    details,
    fixed,
    join,
    number,
    section,
    table,
    tabs,
    tag,
)
from opdjax.runs.results import Run, is_number

# A page must stay small enough to be sent around: steps shown, rollouts of each, tokens of each.
_STEPS, _ROLLOUTS, _TOKENS = 5, 4, 256
_WRITERS = {
    "student": "Student's completion",
    "teacher": "Teacher's completion",
    "references": "Reference answer",
}


def rollouts_section(run: Run) -> Html | None:
    """The rollouts of a few steps spread over training; None where none were written."""
    if not run.samples:
        return None
    steps = _spread(sorted({row["step"] for row in run.samples}))
    shown = {
        step: [row for row in run.samples if row["step"] == step][:_ROLLOUTS] for step in steps
    }
    heading = _WRITERS.get(run.config["sampling"].get("source", "student"), "Completion")
    measure = _measure([row for rows in shown.values() for row in rows])
    views = {
        f"{step}": tag("div", *(_rollout(row, measure, heading) for row in rows), class_="rollouts")
        for step, rows in shown.items()
    }
    left_out = len({row["step"] for row in run.samples}) - len(steps)
    kept = f" {count(left_out, 'more step')} in samples.jsonl." if left_out else ""
    return section(
        "rollouts",
        "Rollouts",
        tag(
            "p",
            "Completions that were trained on, from a few steps. ",
            _explanation(measure),
            kept,
            class_="quiet",
        ),
        _scale(measure),
        tabs("rollouts", views, "Training step"),
    )


def _spread(steps: list[int]) -> list[int]:
    """The first, the last and some between."""
    if len(steps) <= _STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (_STEPS - 1))] for i in range(_STEPS)]


class _Measure:
    """Which number colours the tokens, and the size at which the colour is full."""

    def __init__(self, field: str, limit: float):
        self.field, self.limit = field, limit

    def share(self, value: float) -> float:
        return min(1.0, abs(value) / self.limit)


def _measure(rows: list[dict[str, Any]]) -> _Measure | None:
    """The advantage where the recipe has one, else KL; the full colour is at the 95th percentile,
    so that outliers do not pale the rest.
    """
    for field in ("advantages", "kl"):
        sizes = sorted(
            abs(value)
            for row in rows
            if row.get("tokens")
            for value in row.get(field) or ()
            if is_number(value)
        )
        if sizes and sizes[-1] > 0:
            return _Measure(field, sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] or sizes[-1])
    return None


def _explanation(measure: _Measure | None) -> Html:
    if measure is None:
        return join(("This run recorded no numbers for single tokens.",))
    how = "Point at a token, tap it, or use Tab and the arrow keys to see its numbers; the tables below each rollout hold them all."
    if measure.field == "kl":
        return join(
            (
                f"Shaded by KL(student || teacher) at the token: the darker, the more the two models disagree there. {how}",
            )
        )
    return join(
        (
            "Coloured by the advantage, the number that multiplies the gradient of the token's log-probability: blue tokens are made "
            f"more likely, orange ones (dotted underline) less likely. {how}",
        )
    )


def _scale(measure: _Measure | None) -> Html | None:
    if measure is None:
        return None
    is_signed = measure.field == "advantages"
    values = [
        measure.limit * part
        for part in ((-1, -0.5, 0, 0.5, 1) if is_signed else (0, 0.25, 0.5, 0.75, 1))
    ]
    boxes = [tag("span", fixed(value, 2), **_look(value, measure)) for value in values]
    name = "Advantage" if is_signed else "KL, nats"
    return tag(
        "div",
        tag("span", name),
        tag("span", *boxes, class_="bar"),
        tag("span", "and beyond", class_="quiet"),
        class_="scale",
    )


def _look(value: float | None, measure: _Measure | None) -> dict[str, str]:
    """Class and strength of a token's colour. The underline carries the sign without colour."""
    if measure is None or not is_number(value) or value == 0:
        return {"class_": "t"}
    share = measure.share(value)
    side = "for" if value > 0 and measure.field == "advantages" else "against"
    return {"class_": f"t {side}{' strong' if share >= 0.35 else ''}", "style": f"--a:{share:.2f}"}


def _rollout(row: dict[str, Any], measure: _Measure | None, heading: str) -> Html:
    length = row.get("length")
    ended = "cut off at the length limit" if row.get("is_truncated") else "ended by itself"
    facts = [f"{count(length, 'token')}, {ended}"] if is_number(length) else [ended]
    tokens = row.get("tokens")
    if tokens is None:
        completion, numbers = join((row.get("completion", ""),)), None
    else:
        if len(tokens) > _TOKENS:
            facts.append(f"the first {_TOKENS} of {len(tokens):,} tokens are shown")
        columns = {
            name: values
            for name, values in row.items()
            if isinstance(values, list) and name not in ("tokens", "prompt")
        }
        kept = [
            _Token(row_number, piece, columns) for row_number, piece in enumerate(tokens[:_TOKENS])
        ]
        completion = join(token.mark(measure) for token in kept)
        numbers = details("Numbers of each token", _numbers(kept)) if columns else None
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


def prompt_text(prompt: Any) -> str:
    """A prompt as it is read: text, or messages with the role of each."""
    if isinstance(prompt, list):
        return "\n".join(
            f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt
        )
    return str(prompt)


class _Token:
    """One sampled token with what was recorded of it; a list that the recipe does not have gives
    None.
    """

    def __init__(self, position: int, piece: str, columns: dict[str, list]):
        self.position, self.piece = position, piece
        self._at = {
            name: values[position] if position < len(values) else None
            for name, values in columns.items()
        }

    def mark(self, measure: _Measure | None) -> Html:
        """The token in the text."""
        value = self._at.get(measure.field) if measure else None
        text = self.piece.replace("\n", "⏎\n") or "∅"
        if measure is None:
            return tag("span", text, class_="t")
        name = "advantage" if measure.field == "advantages" else "KL"
        title = f"{visible(self.piece)}: {name} {fixed(value)}"
        # One stop of the Tab key for each rollout; the arrow keys go on from there.
        return tag(
            "span",
            text,
            **_look(value, measure),
            tabindex=0 if self.position == 0 else -1,
            title=title,
        )

    def cells(self) -> list[Any]:
        """Its row of the table, as `_COLUMNS` names it."""
        advantage, reward, kl = (
            fixed(self._at.get(name)) for name in ("advantages", "rewards", "kl")
        )
        student, teacher = (
            percent(self._at.get(name), is_log=True)
            for name in ("student_logprobs", "teacher_logprobs")
        )
        top = ", ".join(
            f"‘{visible(piece)}’\u00a0{percent(p)}"
            for piece, p in self._at.get("teacher_top") or ()
        )
        return [visible(self.piece), advantage, student, teacher, top, kl, reward, self.position]


_COLUMNS = (
    "token",
    "advantage",
    "student p",
    "teacher p",
    "teacher's top 5",
    "KL",
    "reward",
    "position",
)


def _numbers(tokens: list[_Token]) -> Html:
    rows = [token.cells() for token in tokens]
    # What no token has (an advantage under an exact divergence) would be a column of dashes.
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] not in ("–", "") for row in rows)]
    caption = (
        "p: probability of this token given all before it, at the temperature at which the models are compared. Advantage, "
        "KL(student || teacher) and reward in nats. Positions count from 0."
    )
    cells = (
        [
            tag("td", row[i], class_="wrap text") if _COLUMNS[i].startswith("teacher's") else row[i]
            for i in kept
        ]
        for row in rows
    )
    return table([_COLUMNS[i] for i in kept], cells, caption=caption)


def visible(piece: str) -> str:
    """A piece of text with its white space to be seen."""
    return piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def percent(value: float | None, *, is_log: bool = False) -> str:
    """Such as 91.2 %."""
    if not is_number(value):
        return "–"
    share = math.exp(value) if is_log else value
    return "<\u00a00.1\u00a0%" if 0 <= share < 0.0005 else f"{number(round(100 * share, 1))}\u00a0%"
