"""Answers to the same prompt: by several arms of a sweep, or by one run at two steps."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.text import prompt_text
from opdjax.runs.results import Run

_PROMPTS = 6  # shown
# Grades a row of samples.jsonl: (whether it is right, the data's answer), None where unknown.
Marker = Callable[[Run, Mapping[str, Any]], tuple[bool | None, str | None]]


def unmarked(run: Run, row: Mapping[str, Any]) -> tuple[None, None]:
    """The Marker that grades nothing."""
    return None, None


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its grade (None: not graded)."""

    text: str
    is_right: bool | None
    reference: str | None  # the data's answer
    givers: tuple[str, ...] = ()  # arms, or a step of the run


# By prompt, and the seed and step of arms (step None: after training).
Compared = dict[tuple[str, int | None, int | None], list[Answer]]


def first_and_last(run: Run, mark: Marker = unmarked) -> dict[str, Any] | None:
    """A run's first and last answers, greedy ones to held-out prompts or else training rollouts;
    None if no prompt was answered at two steps.
    """
    by_step, is_held_out = _evaluated(run), True
    if len(by_step) < 2:
        by_step, is_held_out = _trained(run, mark), False
    found: Compared = collections.defaultdict(list)
    for step, answers in sorted(by_step.items()):
        for prompt, answer in answers.items():
            given = dataclasses.replace(answer, givers=(f"step {step:,}",))
            found[prompt, None, None].append(given)
    pairs = {key: [each[0], each[-1]] for key, each in found.items() if len(each) > 1}
    if not pairs:
        return None
    grades = [(first.is_right, last.is_right) for first, last in pairs.values()]
    # All prompts, and those that went from wrong to right and from right to wrong.
    changes = len(grades), grades.count((False, True)), grades.count((True, False))
    return {
        "is_held_out": is_held_out,
        "prompts": _most_varied(pairs),
        "changes": changes if all(None not in pair for pair in grades) else None,
    }


def of_arms(arms: Sequence[tuple[str, Sequence[Run]]], mark: Marker) -> dict[str, Any] | None:
    """The prompts on which arms (name, runs) differ most; None if no two arms answered one."""
    is_held_out = any(_evaluated(run) for _, runs in arms for run in runs)
    found: Compared = collections.defaultdict(list)
    for name, runs in arms:
        for run in runs:
            for step, answers in (_last(run) if is_held_out else _own(run, mark)).items():
                for prompt, answer in answers.items():
                    given = dataclasses.replace(answer, givers=(name,))
                    found[prompt, run.config["seed"], step].append(given)
    merged = {key: _merged(answers) for key, answers in found.items() if len(answers) > 1}
    return {"is_held_out": is_held_out, "prompts": _most_varied(merged)} if merged else None


def _last(run: Run) -> dict[None, dict[str, Answer]]:
    by_step = _evaluated(run)
    return {None: by_step[max(by_step)]} if by_step else {}


def _own(run: Run, mark: Marker) -> dict[int, dict[str, Answer]]:
    """The rollouts of the student; those of step 1 are by the untrained one, equal in all arms."""
    is_own = run.config["sampling"].get("completions_from", "student") == "student"
    return {step: each for step, each in _trained(run, mark).items() if is_own and step > 1}


def _evaluated(run: Run) -> dict[int, dict[str, Answer]]:
    """The greedy answers to the first held-out prompts, by step and prompt; empty for runs of
    earlier versions, which did not record them.
    """
    graded = lambda each: Answer(each["completion"], bool(each["is_right"]), each["answer"])
    return {
        row["step"]: {prompt_text(each["prompt"]): graded(each) for each in row["answers"]}
        for row in measures.evaluated(run)
        if row.get("answers")
    }


def _trained(run: Run, mark: Marker) -> dict[int, dict[str, Answer]]:
    """The first recorded rollout of each training prompt, by step and prompt."""
    found: dict[int, dict[str, Answer]] = collections.defaultdict(dict)
    for row in sorted(run.samples, key=lambda row: (row["step"], row.get("sample_id", 0))):
        at_step, prompt = found[row["step"]], prompt_text(row.get("prompt", ""))
        if prompt not in at_step:
            at_step[prompt] = Answer(str(row.get("completion", "")), *mark(run, row))
    return found


def _merged(answers: Iterable[Answer]) -> list[Answer]:
    """Equal answers as one by several givers; the right answers first, then the frequent."""
    found: dict[tuple[str, bool | None], Answer] = {}
    for each in answers:
        key = each.text, each.is_right
        same = found.get(key)
        givers = (*same.givers, *each.givers) if same else each.givers
        found[key] = dataclasses.replace(same or each, givers=givers)
    return sorted(found.values(), key=lambda each: (each.is_right is not True, -len(each.givers)))


def _most_varied(found: Compared) -> list[dict[str, Any]]:
    """The prompts with the most different answers, each once: first those with mixed grades, then
    by the number of different answers and of all.
    """

    def variety(answers: Sequence[Answer]) -> tuple[bool, int, int]:
        grades = {answer.is_right for answer in answers} - {None}
        texts = {answer.text for answer in answers}
        return len(grades) > 1, len(texts), sum(len(answer.givers) for answer in answers)

    chosen: dict[str, dict[str, Any]] = {}
    for key, answers in sorted(found.items(), key=lambda each: variety(each[1]), reverse=True):
        references = (a.reference for a in answers if a.reference is not None)
        about = dict(zip(("prompt", "seed", "step"), key), reference=next(references, None))
        chosen.setdefault(key[0], about | {"answers": answers})
    return list(chosen.values())[:_PROMPTS]
