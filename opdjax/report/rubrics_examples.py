"""Groups as the judge saw them: question, rubric, which answer meets which criterion, and the
answers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.report.judgements import JudgedAnswer, JudgedGroup, Steps
from opdjax.report.markup import (
    Html,
    details,
    fixed,
    join,
    notice,
    number,
    section,
    table,
    table_row,
    tabs,
    tag,
)
from opdjax.report.rollouts import prompt_text
from opdjax.runs.results import is_number

_STEPS = 3
_QUESTION, _TEXT = 3000, 4000  # letters that are shown of a question, and of an answer
_MARKS = {1.0: ("✓", "met"), 0.0: ("✗", "unmet")}


# Examples


def examples_section(steps: Steps) -> Html | None:
    """A few groups as the judge saw them; None where no texts were written down."""
    logged = [step for step, groups in steps.items() if any(_has_texts(group) for group in groups)]
    if not logged:
        return None
    chosen = sorted({logged[round(at * (len(logged) - 1) / (_STEPS - 1))] for at in range(_STEPS)})
    views = {f"step {step:,}": _example(_telling(steps[step])) for step in chosen}
    about = (
        f"From {'the one step' if len(logged) == 1 else f'{len(views)} of {len(logged)} steps'} whose texts were written down: the first "
        "prompt whose rollouts do not all score alike. Texts are as the judge saw them, without what was thought aloud."
    )
    return section(
        "judged",
        "Judged answers",
        tag("p", about, class_="quiet"),
        tabs("judged-step", views, "From"),
    )


def _has_texts(group: JudgedGroup) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _telling(groups: Sequence[JudgedGroup]) -> JudgedGroup:
    """The first group with texts whose scores differ; else the first that has scores, or texts."""
    known = [group for group in groups if _has_texts(group)]
    return min(known, key=lambda group: {False: 0, True: 1, None: 2}[group.is_tied])


def _example(group: JudgedGroup) -> Html:
    known = group.scores[np.isfinite(group.scores)]
    group_mean = float(known.mean()) if known.size > 1 else None
    # Where each rollout has a rubric of its own, a few tell what such rubrics are like.
    rows = group.rows[:2]
    parts = [
        tag("h4", "Question"),
        tag(
            "div",
            shortened(prompt_text(rows[0].texts.get("question", "")), _QUESTION),
            class_="prompt",
        ),
    ]
    question = tag("div", *parts, class_="rollout") if "question" in rows[0].texts else None
    shown = [
        join((pass_matrix(row, group_mean), _failure_note(row), answer_texts(row, group_mean)))
        for row in rows
    ]
    more = tag(
        "p",
        f"Each rollout has a rubric of its own; {len(group.rows) - 2} more are not shown.",
        class_="quiet",
    )
    return join(
        (
            tag("p", f"Prompt {group.rows[0].prompt_id}", class_="quiet"),
            question,
            *shown,
            more if len(group.rows) > 2 else None,
        )
    )


def _failure_note(row: JudgedAnswer) -> Html | None:
    if np.isfinite(row.scores).any():
        return None
    causes = ", ".join(f"{name} {amount}" for name, amount in row.problems.items() if amount)
    return notice(
        f"Nobody could say what these answers are worth{f' ({causes})' if causes else ''}."
    )


# Who meets what


def pass_matrix(row: JudgedAnswer, group_mean: float | None) -> Html:
    """Criteria by answers, references first, and below what the answers earned; a table that needs
    no colour to be read.
    """
    references = len(row.reference_scores)
    names = [f"ref {place + 1}" for place in range(references)] + [
        str(sample) for sample in row.samples
    ]
    marks = [
        tag("th", name, class_=_place_class(at == references), scope="col")
        for at, name in enumerate(names)
    ]
    words = [tag("th", name, class_="text", scope="col") for name in ("criterion", "kind")]
    body = [_criterion_row(row, place) for place in range(len(row.criteria))]
    unrewarded = [""] * references
    body.append(
        _foot(
            "score", [fixed(score, 2) for score in (*row.reference_scores, *row.scores)], references
        )
    )
    if group_mean is not None:
        body.append(
            _foot(
                "score less the group's mean",
                [*unrewarded, *(_signed(score - group_mean) for score in row.scores)],
                references,
            )
        )
    if row.correct is not None:
        body.append(
            _foot(
                "the final answer is",
                [*unrewarded, *("right" if good else "wrong" for good in row.correct)],
                references,
            )
        )
    caption = (
        f"Columns: {'the references (ref), then ' if references else ''}the rollouts by number, from 0. ✓ earns the weight, ✗ does not, "
        "½ earns half; for a flaw ✓ means that it is not there. – : the judge gave no usable verdict. Met by: how many rollouts meet it; a "
        "criterion that all or none meet cannot move the training."
    )
    return table(
        [*words, "weight", *marks, "met by"],
        body,
        caption=caption if row.criteria else None,
        class_="dense verdicts",
    )


def _place_class(is_edge: bool, kind: str = "") -> str:
    return " ".join(part for part in ("mark", kind, "edge" if is_edge else "") if part)


def _criterion_row(row: JudgedAnswer, place: int) -> Html:
    criterion, met = row.criteria[place], row.met[:, place]
    known = met[np.isfinite(met)]
    stage = f" ({criterion.stage})" if criterion.stage else ""
    name = (
        join((tag("span", "flaw", class_="badge"), " ", criterion.text))
        if criterion.is_flaw
        else criterion.text
    )
    total, is_alike = (
        fixed(float(known.sum()), 1).removesuffix(".0"),
        len(known) > 1 and (known == known[0]).all(),
    )
    cells = [_mark(value, is_edge=False) for value in row.reference_met[:, place]]
    cells += [_mark(value, is_edge=not at) for at, value in enumerate(met)]
    heard = f"{total} of {len(known)}" + (", all alike" if is_alike else "")
    return table_row(
        [
            tag("th", name, class_="long", scope="row"),
            tag("td", criterion.category + stage, class_="text"),
            number(criterion.weight),
            *cells,
            heard,
        ]
    )


def _mark(value: float, *, is_edge: bool) -> Html:
    sign, kind = ("–", "") if not is_number(value) else _MARKS.get(float(value), ("½", ""))
    return tag("td", sign, class_=_place_class(is_edge, kind))


def _foot(name: str, values: Sequence[str], references: int) -> Html:
    cells = [
        tag("td", text, class_=_place_class(at == references)) for at, text in enumerate(values)
    ]
    return table_row(
        [tag("th", name, class_="text", scope="row"), "", "", *cells, ""], class_="main"
    )


def _signed(value: float) -> str:
    return ("+" if is_number(value) and value > 0 else "") + fixed(float(value), 2)


def answer_texts(row: JudgedAnswer, group_mean: float | None) -> Html | None:
    """The answers as the judge saw them, each with what it earned; None where they were not written
    down.
    """
    answers, references, cut, told = (
        _list(row, name) for name in ("answers", "references", "is_truncated", "reflections")
    )
    if not answers and not references:
        return None
    blocks = [
        _answer(f"Reference {at + 1}", text, [_score_words(row.reference_scores, at, None)])
        for at, text in enumerate(references)
    ]
    for at, text in enumerate(answers):
        facts = [_score_words(row.scores, at, group_mean)]
        if row.correct is not None and at < len(row.correct):
            facts.append("right answer" if row.correct[at] else "wrong answer")
        facts += ["cut off at the length limit"] if at < len(cut) and cut[at] else []
        name = f"Rollout {row.samples[at] if at < len(row.samples) else at}"
        blocks.append(_answer(name, text, facts, told[at] if at < len(told) else None))
    is_short = sum(len(str(text)) for text in [*answers, *references]) < _TEXT
    return details(
        "The answers, word for word", tag("div", *blocks, class_="rollouts"), open=is_short
    )


def _list(row: JudgedAnswer, name: str) -> list[Any]:
    value = row.texts.get(name)
    return value if isinstance(value, list) else []


def _score_words(scores: np.ndarray, place: int, group_mean: float | None) -> str:
    if place >= len(scores) or not is_number(float(scores[place])):
        return "no score"
    against = (
        ""
        if group_mean is None
        else f", {_signed(scores[place] - group_mean)} against the group's mean"
    )
    return f"score {fixed(float(scores[place]), 2)}{against}"


def _answer(name: str, text: Any, facts: Sequence[str], reflection: Any = None) -> Html:
    """`reflection`: what a judge wrote about it, where a teacher is shown that."""
    parts = [
        tag("h4", f"{name}: {'; '.join(facts)}"),
        tag("div", shortened(str(text)) or "(empty)", class_="completion"),
    ]
    if reflection:
        parts += [
            tag("h4", "What the teacher was told of it"),
            tag("div", shortened(str(reflection)), class_="prompt"),
        ]
    return tag("div", *parts, class_="rollout")


def shortened(text: str, limit: int = _TEXT) -> str:
    """The text, or its start and its end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} […{len(text) - limit:,} letters…] {text[-(limit // 2) :]}"
