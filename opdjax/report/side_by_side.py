"""The same prompt answered by several arms of a sweep, or by one run before and after training."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.markup import (
    Html,
    count,
    prompt_text,
    section,
    table,
    table_row,
    tabs,
    tag,
    text_head,
)
from opdjax.report.ranking import Ranked, label
from opdjax.runs.results import Run

_PROMPTS = 6  # shown
_TEXT = 1200  # characters of an answer
# Grades a row of samples.jsonl: (whether it is right, the data's answer), None where unknown.
Marker = Callable[[Run, Mapping[str, Any]], tuple[bool | None, str | None]]


def unmarked(run: Run, row: Mapping[str, Any]) -> tuple[None, None]:
    """The Marker that grades nothing."""
    return None, None


@dataclasses.dataclass(frozen=True)
class ShownAnswer:
    """An answer to a prompt, with its grade."""

    prompt: str
    text: str
    is_right: bool | None  # None: not graded
    reference: str | None


@dataclasses.dataclass(frozen=True)
class ComparedPrompt:
    """A prompt with the answers of several arms, or of one run at several steps."""

    place: str  # seed and step, in words
    prompt: str
    answers: tuple[tuple[str, ShownAnswer], ...]  # (arm or step, answer)

    @property
    def reference(self) -> str | None:
        """The data's answer."""
        known = (a.reference for _, a in self.answers if a.reference is not None)
        return next(known, None)

    @property
    def variety(self) -> tuple[bool, int, int]:
        """Sorts prompts by how different their answers are: mixed grades, distinct answers, number
        of answers.
        """
        grades = {answer.is_right for _, answer in self.answers} - {None}
        return len(grades) > 1, len({answer.text for _, answer in self.answers}), len(self.answers)


def evaluated_answers(run: Run) -> dict[int, list[ShownAnswer]]:
    """The greedy answers to the first held-out prompts, by step; empty for runs of earlier
    versions, which did not record them.
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
    """The first recorded rollout of each training prompt, by step."""
    found: dict[int, dict[str, ShownAnswer]] = {}
    for row in sorted(run.samples, key=lambda row: (row["step"], row.get("sample_id", 0))):
        prompt = prompt_text(row.get("prompt", ""))
        at_step = found.setdefault(row["step"], {})
        if prompt not in at_step:
            text = str(row.get("completion", ""))
            at_step[prompt] = ShownAnswer(prompt, text, *mark(run, row))
    return {step: list(answers.values()) for step, answers in found.items()}


# A sweep


def arms_section(entries: Sequence[Ranked], mark: Marker) -> Html | None:
    """The prompts on which arms differ most; None if no prompt was answered by two arms."""
    held_out = _held_out(entries)
    chosen = _most_varied(held_out or _trained(entries, mark))
    if not chosen:
        return None
    kind = "Greedy answers (T = 0) to held-out prompts, after training."
    if not held_out:
        kind = (
            "Training rollouts: runs with one seed have the same prompts at the same step. Each is "
            "one sampled answer, so chance plays a part; for scores see above."
        )
    note = (
        f"{kind} These are the prompts on which arms differ most; equal answers share a row. The "
        "arm with the better score is not better on every prompt."
    )
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
                key = run.config["seed"], answer.prompt
                found.setdefault(key, []).append((label(entry), answer))
    return [
        ComparedPrompt(f"seed {seed}, after training", prompt, tuple(answers))
        for (seed, prompt), answers in found.items()
    ]


def _trained(entries: Sequence[Ranked], mark: Marker) -> list[ComparedPrompt]:
    found: dict[tuple[int, int, str], list[tuple[str, ShownAnswer]]] = {}
    for entry in entries:
        for run in entry.runs:
            if measures.completions_from(run) != "student":
                continue  # the student wrote none of its training answers
            for step, answers in trained_answers(run, mark).items():
                if step == 1:
                    continue  # by the untrained student, equal in all arms
                for answer in answers:
                    key = run.config["seed"], step, answer.prompt
                    found.setdefault(key, []).append((label(entry), answer))
    return [
        ComparedPrompt(f"seed {seed}, step {step:,}", prompt, tuple(answers))
        for (seed, step, prompt), answers in found.items()
    ]


def _most_varied(prompts: Iterable[ComparedPrompt]) -> list[ComparedPrompt]:
    """The prompts with the most different answers, each once, if it has two answers or more."""
    comparable = (each for each in prompts if len(each.answers) > 1)
    chosen: dict[str, ComparedPrompt] = {}
    for each in sorted(comparable, key=lambda each: each.variety, reverse=True):
        chosen.setdefault(each.prompt, each)
    return list(chosen.values())[:_PROMPTS]


# One run


def progress_section(run: Run, mark: Marker) -> Html | None:
    """The first and last answers to the same prompts; None if no prompt was answered at two
    steps.
    """
    by_step = evaluated_answers(run)
    about = "Greedy answers (T = 0) to held-out prompts"
    if len(by_step) < 2:
        by_step = trained_answers(run, mark)
        about = "Training rollouts for prompts that came up again"
    found: dict[str, list[tuple[str, ShownAnswer]]] = {}
    for step in sorted(by_step):
        for answer in by_step[step]:
            found.setdefault(answer.prompt, []).append((f"step {step:,}", answer))
    repeated = [
        ComparedPrompt("", prompt, (answers[0], answers[-1]))
        for prompt, answers in found.items()
        if len(answers) > 1
    ]
    chosen = _most_varied(repeated)
    if not chosen:
        return None
    note = f"{about}: the first and the last answer.{_changes(repeated)}"
    return section(
        "answers",
        "First and last answers",
        tag("p", note, class_="quiet"),
        _panels(chosen, "step", "progress"),
    )


def _changes(repeated: Sequence[ComparedPrompt]) -> str:
    """How many prompts changed their grade; empty if an answer is not graded."""
    grades = [tuple(answer.is_right for _, answer in each.answers) for each in repeated]
    if any(None in pair for pair in grades):
        return ""
    better, worse = grades.count((False, True)), grades.count((True, False))
    return (
        f" Of {count(len(grades), 'prompt')} {better} went from wrong to right, {worse} from right "
        "to wrong."
    )


# Both


def _panels(prompts: Sequence[ComparedPrompt], who: str, name: str) -> Html:
    views = {
        f"{number}: {_cut(each.prompt, 32)}": _panel(each, who)
        for number, each in enumerate(prompts, 1)
    }
    return tabs(name, views, "Prompt")


def _panel(compared: ComparedPrompt, who: str) -> Html:
    place, reference = compared.place, compared.reference
    parts = [tag("p", f"{place[:1].upper()}{place[1:]}.", class_="facts")] if place else []
    texts = {"Prompt": compared.prompt, "Right answer": reference}
    for title, text in texts.items():
        if text is not None:
            parts += [tag("h4", title), tag("div", _cut(text, _TEXT), class_="prompt")]
    head = [text_head(name) for name in ("answer", "", who)]
    rows = [_row(text, is_right, names) for (text, is_right), names in _by_answer(compared)]
    return tag("div", *parts, table(head, rows, class_="samples"), class_="rollout")


def _by_answer(compared: ComparedPrompt) -> list[tuple[tuple[str, bool | None], list[str]]]:
    """Arms by their answer, right answers first; two steps of a run stay in order."""
    if len(compared.answers) == 2:
        return [((answer.text, answer.is_right), [who]) for who, answer in compared.answers]
    found: dict[tuple[str, bool | None], list[str]] = collections.defaultdict(list)
    for who, answer in compared.answers:
        found[answer.text, answer.is_right].append(who)
    return sorted(found.items(), key=lambda each: (each[0][1] is not True, -len(each[1])))


_GRADES = {
    True: ("✓ right", "right"),
    False: ("✗ wrong", "wrong"),
    None: ("not graded", "not-run"),
}


def _row(text: str, is_right: bool | None, names: Sequence[str]) -> Html:
    grade, class_ = _GRADES[is_right]
    return table_row(
        [
            tag("th", _cut(text, _TEXT) or "∅", class_="sample", scope="row"),
            tag("td", tag("span", grade, class_=f"chip {class_}"), class_="text"),
            tag("td", ", ".join(names), class_="wrap text"),
        ]
    )


def _cut(text: str, limit: int) -> str:
    """The text's start and end: a problem and its answer."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} […] {text[-half:]}"
