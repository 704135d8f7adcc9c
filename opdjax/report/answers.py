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


@dataclasses.dataclass(frozen=True)
class ComparedPrompt:
    """A prompt with its answers; seed and step are those of arms (step None: after training)."""

    prompt: str
    answers: tuple[Answer, ...]
    seed: int | None = None
    step: int | None = None

    @property
    def reference(self) -> str | None:
        """The data's answer."""
        return next((a.reference for a in self.answers if a.reference is not None), None)


@dataclasses.dataclass(frozen=True)
class ComparedAnswers:
    """The prompts with the most different answers."""

    is_held_out: bool  # greedy answers to held-out prompts; else training rollouts
    prompts: tuple[ComparedPrompt, ...]
    # Of one run whose answers are all graded: all compared prompts, and those that went from wrong
    # to right and from right to wrong.
    changes: tuple[int, int, int] | None = None


def first_and_last(run: Run, mark: Marker = unmarked) -> ComparedAnswers | None:
    """A run's first and last answers; None if no prompt was answered at two steps."""
    by_step, is_held_out = _evaluated(run), True
    if len(by_step) < 2:
        by_step, is_held_out = _trained(run, mark), False
    found: dict[str, list[Answer]] = collections.defaultdict(list)
    for step, answers in sorted(by_step.items()):
        for prompt, answer in answers.items():
            found[prompt].append(dataclasses.replace(answer, givers=(f"step {step:,}",)))
    pairs = {prompt: (each[0], each[-1]) for prompt, each in found.items() if len(each) > 1}
    if not pairs:
        return None
    grades = [(first.is_right, last.is_right) for first, last in pairs.values()]
    is_graded = all(None not in pair for pair in grades)
    changes = len(grades), grades.count((False, True)), grades.count((True, False))
    prompts = _most_varied(ComparedPrompt(*each) for each in pairs.items())
    return ComparedAnswers(is_held_out, prompts, changes if is_graded else None)


def of_arms(arms: Sequence[tuple[str, Sequence[Run]]], mark: Marker) -> ComparedAnswers | None:
    """The prompts on which arms (name, runs) differ most; None if no two arms answered one."""
    is_held_out = any(_evaluated(run) for _, runs in arms for run in runs)
    found: dict[tuple[str, int, int | None], list[Answer]] = collections.defaultdict(list)
    for name, runs in arms:
        for run in runs:
            for step, answers in (_last(run) if is_held_out else _own(run, mark)).items():
                for prompt, answer in answers.items():
                    key = prompt, run.config["seed"], step
                    found[key].append(dataclasses.replace(answer, givers=(name,)))
    prompts = [
        ComparedPrompt(prompt, _merged(answers), seed, step)
        for (prompt, seed, step), answers in found.items()
        if len(answers) > 1
    ]
    return ComparedAnswers(is_held_out, _most_varied(prompts)) if prompts else None


def _last(run: Run) -> dict[None, dict[str, Answer]]:
    by_step = _evaluated(run)
    return {None: by_step[max(by_step)]} if by_step else {}


def _own(run: Run, mark: Marker) -> dict[int, dict[str, Answer]]:
    """The rollouts of the student; those of step 1 are by the untrained one, equal in all arms."""
    is_own = measures.completions_from(run) == "student"
    return {step: each for step, each in _trained(run, mark).items() if is_own and step > 1}


def _evaluated(run: Run) -> dict[int, dict[str, Answer]]:
    """The greedy answers to the first held-out prompts, by step and prompt; empty for runs of
    earlier versions, which did not record them.
    """
    graded = lambda each: Answer(each["completion"], bool(each["is_right"]), each["answer"])
    rows = (row for row in measures.evaluated(run) if row.get("answers"))
    return {
        row["step"]: {prompt_text(each["prompt"]): graded(each) for each in row["answers"]}
        for row in rows
    }


def _trained(run: Run, mark: Marker) -> dict[int, dict[str, Answer]]:
    """The first recorded rollout of each training prompt, by step and prompt."""
    found: dict[int, dict[str, Answer]] = collections.defaultdict(dict)
    for row in sorted(run.samples, key=lambda row: (row["step"], row.get("sample_id", 0))):
        at_step, prompt = found[row["step"]], prompt_text(row.get("prompt", ""))
        if prompt not in at_step:
            at_step[prompt] = Answer(str(row.get("completion", "")), *mark(run, row))
    return found


def _merged(answers: Iterable[Answer]) -> tuple[Answer, ...]:
    """Equal answers as one by several givers; the right answers first, then the frequent."""
    found: dict[tuple[str, bool | None], list[Answer]] = collections.defaultdict(list)
    for each in answers:
        found[each.text, each.is_right].append(each)
    merged = [
        dataclasses.replace(same[0], givers=tuple(giver for each in same for giver in each.givers))
        for same in found.values()
    ]
    merged.sort(key=lambda each: (each.is_right is not True, -len(each.givers)))
    return tuple(merged)


def _most_varied(prompts: Iterable[ComparedPrompt]) -> tuple[ComparedPrompt, ...]:
    """The prompts with the most different answers, each once: first those with mixed grades, then
    by the number of different answers and of all.
    """

    def variety(prompt: ComparedPrompt) -> tuple[bool, int, int]:
        grades = {answer.is_right for answer in prompt.answers} - {None}
        texts = {answer.text for answer in prompt.answers}
        return len(grades) > 1, len(texts), sum(len(answer.givers) for answer in prompt.answers)

    chosen: dict[str, ComparedPrompt] = {}
    for each in sorted(prompts, key=variety, reverse=True):
        chosen.setdefault(each.prompt, each)
    return tuple(chosen.values())[:_PROMPTS]
