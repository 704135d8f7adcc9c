"""The same prompt answered twice: by several arms of a sweep, or by one run before and after
training.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.markup import Html, count, section, table, table_row, tabs, tag
from opdjax.report.ranking import Ranked, label
from opdjax.report.rollouts import prompt_text
from opdjax.runs.results import Run

_PROMPTS = 6  # shown
_TEXT = 1200  # letters of an answer
# (whether a row of samples.jsonl is right, the answer that its data gives); None where that is not
# known.
Marker = Callable[[Run, Mapping[str, Any]], tuple[bool | None, str | None]]


def unmarked(run: Run, row: Mapping[str, Any]) -> tuple[None, None]:
    """Where nobody says what is right."""
    return None, None


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """What was answered to a prompt, and whether it is right."""

    prompt: str
    text: str
    is_right: bool | None
    reference: str | None


@dataclasses.dataclass(frozen=True)
class ComparedPrompt:
    """A prompt and who answered what to it."""

    where: str  # in words
    prompt: str
    answers: tuple[tuple[str, ShownAnswer], ...]  # (who, what)

    @property
    def reference(self) -> str | None:
        """The answer of the data."""
        return next(
            (answer.reference for _, answer in self.answers if answer.reference is not None), None
        )

    @property
    def telling(self) -> tuple[bool, int, int]:
        """The greater the more there is to see: some right and some wrong, many different answers,
        many who answered.
        """
        marks = {answer.is_right for _, answer in self.answers} - {None}
        return len(marks) > 1, len({answer.text for _, answer in self.answers}), len(self.answers)


def evaluated_answers(run: Run) -> dict[int, list[ShownAnswer]]:
    """By step, the most likely answers to the first held-out prompts; empty for runs of before
    these were kept.
    """
    return {
        row["step"]: [
            ShownAnswer(
                prompt_text(each["prompt"]),
                each["completion"],
                bool(each["is_right"]),
                each["answer"],
            )
            for each in row["answers"]
        ]
        for row in measures.evaluated(run)
        if row.get("answers")
    }


def trained_answers(run: Run, mark: Marker) -> dict[int, list[ShownAnswer]]:
    """By step, the first recorded rollout of each prompt that was trained on."""
    found: dict[int, dict[str, ShownAnswer]] = {}
    for row in sorted(run.samples, key=lambda row: (row["step"], row.get("sample_id", 0))):
        prompt = prompt_text(row.get("prompt", ""))
        if prompt not in found.setdefault(row["step"], {}):
            found[row["step"]][prompt] = ShownAnswer(
                prompt, str(row.get("completion", "")), *mark(run, row)
            )
    return {step: list(answers.values()) for step, answers in found.items()}


# Of a sweep


def arms_section(entries: Sequence[Ranked], mark: Marker) -> Html | None:
    """Prompts on which arms disagree most; None where no two arms answered the same one."""
    held_out, trained = _held_out(entries), []
    if not held_out:
        trained = _trained(entries, mark)
    chosen = _chosen(held_out or trained)
    if not chosen:
        return None
    kind = (
        "The most likely answers (T = 0) to held-out prompts, after training."
        if held_out
        else "Rollouts that were trained on: runs of one seed draw the same prompts at the same step, so their answers stand side by side. "
        "One sampled answer each, with luck in it: for scores see above."
    )
    note = f"{kind} Chosen are the prompts where arms differ most; equal answers share a row. The better arm of a table is not better on each."
    return section(
        "answers",
        "Answers side by side",
        tag("p", note, class_="quiet"),
        _panels(chosen, "arms", "answers"),
    )


def _held_out(entries: Sequence[Ranked]) -> list[ComparedPrompt]:
    found: dict[tuple[int, str], list[tuple[str, ShownAnswer]]] = {}
    for entry in entries:
        for run in entry.runs:
            by_step = evaluated_answers(run)
            for answer in by_step[max(by_step)] if by_step else ():
                found.setdefault((run.config["seed"], answer.prompt), []).append(
                    (label(entry), answer)
                )
    return [
        ComparedPrompt(f"seed {seed}, after training", prompt, tuple(who))
        for (seed, prompt), who in found.items()
    ]


def _trained(entries: Sequence[Ranked], mark: Marker) -> list[ComparedPrompt]:
    found: dict[tuple[int, int, str], list[tuple[str, ShownAnswer]]] = {}
    for entry in entries:
        for run in entry.runs:
            if run.config["sampling"].get("source", "student") != "student":
                continue  # what it was trained on was written by another
            for step, answers in trained_answers(run, mark).items():
                for answer in (
                    answers if step > 1 else ()
                ):  # the first is answered by the untrained student, the same in all arms
                    found.setdefault((run.config["seed"], step, answer.prompt), []).append(
                        (label(entry), answer)
                    )
    return [
        ComparedPrompt(f"seed {seed}, step {step:,}", prompt, tuple(who))
        for (seed, step, prompt), who in found.items()
    ]


def _chosen(questions: Iterable[ComparedPrompt]) -> list[ComparedPrompt]:
    """The most telling ones, each prompt once; nothing to compare where one alone answered."""
    chosen: dict[str, ComparedPrompt] = {}
    for question in sorted(
        (q for q in questions if len(q.answers) > 1), key=lambda q: q.telling, reverse=True
    ):
        chosen.setdefault(question.prompt, question)
    return list(chosen.values())[:_PROMPTS]


# Of one run


def progress_section(run: Run, mark: Marker) -> Html | None:
    """The first answers beside the last ones to the same prompts; None where no prompt was answered
    at two steps.
    """
    kept = evaluated_answers(run)
    about = "The most likely answers (T = 0) to held-out prompts"
    if len(kept) < 2:
        kept, about = (
            trained_answers(run, mark),
            "Rollouts that were trained on, of prompts that came up again",
        )
    found: dict[str, list[tuple[str, ShownAnswer]]] = {}
    for step in sorted(kept):
        for answer in kept[step]:
            found.setdefault(answer.prompt, []).append((f"step {step:,}", answer))
    again = [
        ComparedPrompt("", prompt, (who[0], who[-1]))
        for prompt, who in found.items()
        if len(who) > 1
    ]
    chosen = _chosen(again)
    if not chosen:
        return None
    told = ""
    if all(answer.is_right is not None for question in again for _, answer in question.answers):
        turned = [
            (question.answers[0][1].is_right, question.answers[1][1].is_right) for question in again
        ]
        better, worse = turned.count((False, True)), turned.count((True, False))
        told = f" Of {count(len(again), 'prompt')} {better} went from wrong to right, {worse} from right to wrong."
    note = f"{about}: the first answer beside the last one.{told}"
    return section(
        "answers",
        "First and last answers",
        tag("p", note, class_="quiet"),
        _panels(chosen, "step", "progress"),
    )


# Both


def _panels(questions: Sequence[ComparedPrompt], who: str, name: str) -> Html:
    views = {
        f"{number}: {_cut(question.prompt, 32)}": _panel(question, who)
        for number, question in enumerate(questions, 1)
    }
    return tabs(name, views, "Prompt")


def _panel(question: ComparedPrompt, who: str) -> Html:
    reference = question.reference
    facts = (
        tag("p", f"{question.where[:1].upper()}{question.where[1:]}.", class_="facts")
        if question.where
        else None
    )
    told = (
        None
        if reference is None
        else (tag("h4", "Right answer"), tag("div", _cut(reference, _TEXT), class_="prompt"))
    )
    head = [tag("th", name, class_="text", scope="col") for name in ("answer", "", who)]
    rows = [_row(text, mark, names) for (text, mark), names in _together(question)]
    return tag(
        "div",
        facts,
        tag("h4", "Prompt"),
        tag("div", _cut(question.prompt, _TEXT), class_="prompt"),
        *(told or ()),
        table(head, rows, class_="samples"),
        class_="rollout",
    )


def _together(question: ComparedPrompt) -> list[tuple[tuple[str, bool | None], list[str]]]:
    """Who gave each answer, the right ones first."""
    if len(question.answers) == 2:
        return [((answer.text, answer.is_right), [who]) for who, answer in question.answers]
    found: dict[tuple[str, bool | None], list[str]] = collections.defaultdict(list)
    for who, answer in question.answers:
        found[answer.text, answer.is_right].append(who)
    return sorted(found.items(), key=lambda each: (each[0][1] is not True, -len(each[1])))


def _row(text: str, is_right: bool | None, names: Sequence[str]) -> Html:
    shown = {
        True: ("✓ right", "right"),
        False: ("✗ wrong", "wrong"),
        None: ("not graded", "not-run"),
    }[is_right]
    return table_row(
        [
            tag("th", _cut(text, _TEXT) or "∅", class_="sample", scope="row"),
            tag("td", tag("span", shown[0], class_=f"chip {shown[1]}"), class_="text"),
            tag("td", ", ".join(names), class_="wrap text"),
        ]
    )


def _cut(text: str, limit: int) -> str:
    """Its start and its end, which are what tells: a problem and its answer."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} […] {text[-half:]}"
