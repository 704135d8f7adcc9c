"""Greedy answers to the same held-out prompt: by the arms of a sweep, or by a run at two steps."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from opdjax.report import measures
from opdjax.report.text import count, prompt_text
from opdjax.runs.results import Run

_PROMPTS = 6  # shown
_GRADES = {True: "✓ right", False: "✗ wrong"}

Given = list[tuple[str, Mapping[str, Any]]]  # who gave it, and the recorded answer


def first_and_last(run: Run) -> dict[str, Any] | None:
    """A run's first and last answers; None if it was evaluated once only."""
    by_step = _answers(run)
    if len(by_step) < 2:
        return None
    steps = min(by_step), max(by_step)
    shared = by_step[steps[0]].keys() & by_step[steps[1]]
    found = {
        (0, prompt): [(f"step {step:,}", by_step[step][prompt]) for step in steps]
        for prompt in by_step[steps[0]]
        if prompt in shared
    }
    grades = [tuple(bool(answer["is_right"]) for _, answer in given) for given in found.values()]
    about = (
        f"The first and the last answer. Of {count(len(grades), 'prompt')}, "
        f"{grades.count((False, True))} went from wrong to right, "
        f"{grades.count((True, False))} from right to wrong."
    )
    return _shown(about, found)


def of_arms(arms: Sequence[tuple[str, Sequence[Run]]]) -> dict[str, Any] | None:
    """The prompts on which arms (name, runs) of one seed differ most after training; None if no two
    arms answered one.
    """
    found: dict[tuple[int, str], Given] = collections.defaultdict(list)
    for name, runs in arms:
        for run in runs:
            by_step = _answers(run)
            for prompt, answer in by_step[max(by_step)].items() if by_step else ():
                found[run.config["seed"], prompt].append((name, answer))
    found = {key: given for key, given in found.items() if len(given) > 1}
    about = "After training, by arms of one seed: the prompts on which they differ most."
    return _shown(about, found)


def _answers(run: Run) -> dict[int, dict[str, Mapping[str, Any]]]:
    """By step and prompt."""
    return {
        row["step"]: {prompt_text(each["prompt"]): each for each in row["answers"]}
        for row in measures.evaluated(run)
        if row.get("answers")
    }


def _shown(about: str, found: Mapping[tuple[int, str], Given]) -> dict[str, Any] | None:
    """The prompts whose answers differ most, each once: first those with mixed grades."""
    chosen = {}
    for key in sorted(found, key=lambda key: _variety(found[key]), reverse=True):
        chosen.setdefault(key[1], found[key])
    views = [
        {"prompt": prompt, "reference": given[0][1]["answer"], "answers": _merged(given)}
        for prompt, given in list(chosen.items())[:_PROMPTS]
    ]
    return {"about": about, "prompts": views} if views else None


def _variety(given: Given) -> tuple[bool, int, int]:
    """Whether grades are mixed, the number of different answers and of all."""
    texts, grades = ({answer[name] for _, answer in given} for name in ("completion", "is_right"))
    return len(grades) > 1, len(texts), len(given)


def _merged(given: Given) -> list[tuple[str, str, str]]:
    """(answer, grade, who gave it): the right answers first, then the frequent."""
    givers: dict[tuple[str, bool], list[str]] = collections.defaultdict(list)
    for who, answer in given:
        givers[answer["completion"], bool(answer["is_right"])].append(who)
    ranked = sorted(givers.items(), key=lambda each: (not each[0][1], -len(each[1])))
    return [(text, _GRADES[is_right], ", ".join(who)) for (text, is_right), who in ranked]
