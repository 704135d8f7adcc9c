"""Examples of judged groups: question, rubric, verdicts and answers, as the judge saw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opdjax.report.judgements import JudgedGroup, JudgedRow, Steps
from opdjax.report.markup import (
    Html,
    details,
    fixed,
    join,
    notice,
    number,
    prompt_text,
    quiet,
    section,
    shortened,
    spread,
    table,
    table_row,
    tabs,
    tag,
    text_head,
)
from opdjax.runs.results import is_number

_STEPS = 3
_LIMIT = 4000  # characters shown of a text
_MARKS = {1.0: ("✓", "met"), 0.0: ("✗", "unmet")}


def examples_section(steps: Steps) -> Html | None:
    """A judged group from a few steps; None where no texts were recorded."""
    logged = [step for step, groups in steps.items() if any(map(_has_texts, groups))]
    if not logged:
        return None
    chosen = spread(logged, _STEPS)
    views = {f"step {step:,}": _example(_chosen_group(steps[step])) for step in chosen}
    which = "the one step" if len(logged) == 1 else f"{len(views)} of {len(logged)} steps"
    about = (
        f"From {which} with recorded texts: the first prompt whose rollouts have different scores."
        " Texts are as the judge saw them, without hidden reasoning."
    )
    return section("judged", "Judged answers", tabs("judged-step", views, "From"), about=about)


def _has_texts(group: JudgedGroup) -> bool:
    return "answers" in group.rows[0].texts or "question" in group.rows[0].texts


def _chosen_group(groups: Sequence[JudgedGroup]) -> JudgedGroup:
    """The first group with texts whose scores differ; else the first with scores, or texts."""
    order = {False: 0, True: 1, None: 2}
    return min(filter(_has_texts, groups), key=lambda group: order[group.is_tied])


def _example(group: JudgedGroup) -> Html:
    known = group.scores[np.isfinite(group.scores)]
    group_mean = float(known.mean()) if known.size > 1 else None
    rows = group.rows[:2]  # two are enough where each rollout has its own rubric
    parts: list[Any] = [quiet(f"Prompt {rows[0].prompt_id}")]
    if "question" in rows[0].texts:
        parts.append(_block(("Question", prompt_text(rows[0].texts["question"]), "prompt")))
    for row in rows:
        parts += [verdict_table(row, group_mean), _failure_note(row), answer_texts(row, group_mean)]
    more = len(group.rows) - len(rows)
    if more:
        parts.append(quiet(f"Each rollout has its own rubric; {more} more are not shown."))
    return join(parts)


def _block(*texts: tuple[str, str, str]) -> Html:
    """(heading, text, class) triples below each other."""
    parts: list[Html] = []
    for heading, text, class_ in texts:
        body = tag("div", shortened(text, _LIMIT) or "(empty)", class_=class_)
        parts += [tag("h4", heading), body]
    return tag("div", *parts, class_="rollout")


def _failure_note(row: JudgedRow) -> Html | None:
    if np.isfinite(row.scores).any():
        return None
    causes = ", ".join(f"{name} {amount}" for name, amount in row.problems.items() if amount)
    return notice(f"Judging these answers failed{f' ({causes})' if causes else ''}.")


# Verdicts


def verdict_table(row: JudgedRow, group_mean: float | None) -> Html:
    """Criteria by answers, references first, with the scores below; readable without colour."""
    references = len(row.reference_scores)
    names = [f"ref {at + 1}" for at in range(references)] + [*map(str, row.samples)]
    marks = [
        tag("th", name, class_=_mark_class(at == references), scope="col")
        for at, name in enumerate(names)
    ]
    body = [_criterion_row(row, at) for at in range(len(row.criteria))]
    scores = [fixed(score, 2) for score in (*row.reference_scores, *row.scores)]
    body.append(_last_row("score", scores, references))
    blank = [""] * references
    if group_mean is not None:
        gaps = [_signed(score - group_mean) for score in row.scores]
        body.append(_last_row("score − group mean", blank + gaps, references))
    if row.correct is not None:
        answers = ["right" if is_right else "wrong" for is_right in row.correct]
        body.append(_last_row("the final answer is", blank + answers, references))
    caption = (
        f"Columns: {'the references (ref), then ' if references else ''}the rollouts, numbered from"
        " 0. ✓ earns the weight, ✗ nothing, ½ half of it; for a flaw, ✓ means that the answer does"
        " not have it. –: no usable verdict. Met by: number of rollouts that meet the criterion;"
        " one that all or none meet has no effect on training."
    )
    head = [text_head("criterion"), text_head("kind"), "weight", *marks, "met by"]
    return table(head, body, caption=caption if row.criteria else None, class_="dense verdicts")


def _mark_class(is_edge: bool, kind: str = "") -> str:
    """`edge` draws the line between references and rollouts."""
    return " ".join(part for part in ("mark", kind, "edge" if is_edge else "") if part)


def _criterion_row(row: JudgedRow, at: int) -> Html:
    criterion, met = row.criteria[at], row.met[:, at]
    known = met[np.isfinite(met)]
    flaw = (tag("span", "flaw", class_="badge"), " ") if criterion.is_flaw else ()
    stage = f" ({criterion.stage})" if criterion.stage else ""
    met_by = f"{fixed(float(known.sum()), 1).removesuffix('.0')} of {len(known)}"
    if len(known) > 1 and (known == known[0]).all():
        met_by += ", all alike"
    return table_row(
        [
            tag("th", *flaw, criterion.text, class_="long", scope="row"),
            tag("td", criterion.category + stage, class_="text"),
            number(criterion.weight),
            *(_mark(value, is_edge=False) for value in row.reference_met[:, at]),
            *(_mark(value, is_edge=place == 0) for place, value in enumerate(met)),
            met_by,
        ]
    )


def _mark(value: float, *, is_edge: bool) -> Html:
    sign, kind = _MARKS.get(float(value), ("½", "")) if is_number(value) else ("–", "")
    return tag("td", sign, class_=_mark_class(is_edge, kind))


def _last_row(name: str, values: Sequence[str], references: int) -> Html:
    cells = [
        tag("td", text, class_=_mark_class(at == references)) for at, text in enumerate(values)
    ]
    head = tag("th", name, class_="text", scope="row")
    return table_row([head, "", "", *cells, ""], class_="main")


def _signed(value: float) -> str:
    return ("+" if is_number(value) and value > 0 else "") + fixed(float(value), 2)


# Answers


def answer_texts(row: JudgedRow, group_mean: float | None) -> Html | None:
    """The answers as the judge saw them, with their scores; None where they were not recorded."""
    answers, references, cut, reflections = (
        _list(row, name) for name in ("answers", "references", "is_truncated", "reflections")
    )
    if not answers and not references:
        return None
    blocks = [
        _block((f"Reference {at + 1}: {_score(row.reference_scores, at)}", str(text), "completion"))
        for at, text in enumerate(references)
    ]
    for at, text in enumerate(answers):
        facts = [_score(row.scores, at, group_mean)]
        if row.correct is not None and at < len(row.correct):
            facts.append("right answer" if row.correct[at] else "wrong answer")
        facts += ["cut off at the length limit"] if at < len(cut) and cut[at] else []
        name = f"Rollout {row.samples[at] if at < len(row.samples) else at}"
        texts = [(f"{name}: {'; '.join(facts)}", str(text), "completion")]
        if at < len(reflections) and reflections[at]:
            texts.append(("What the teacher was shown about it", str(reflections[at]), "prompt"))
        blocks.append(_block(*texts))
    is_short = sum(len(str(text)) for text in [*answers, *references]) < _LIMIT
    return details("Full answers", tag("div", *blocks, class_="rollouts"), open=is_short)


def _list(row: JudgedRow, name: str) -> list[Any]:
    value = row.texts.get(name)
    return value if isinstance(value, list) else []


def _score(scores: np.ndarray, at: int, group_mean: float | None = None) -> str:
    if at >= len(scores) or not is_number(float(scores[at])):
        return "no score"
    value = float(scores[at])
    gap = "" if group_mean is None else f", {_signed(value - group_mean)} against the group mean"
    return f"score {fixed(value, 2)}{gap}"
