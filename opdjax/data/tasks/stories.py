"""The built-in word problems: two to five changes of a number of things, worded as a story.

A problem has many right solutions, which differ in words, detail and, where it is possible, in the
order of the steps. Every solution ends in `#### 42`. Numbers are whole, from 0 to 400.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import random
import zlib
from typing import Any

import yaml

SPLITS = {"train": 8192, "validation": 512, "test": 1024}
# Percentages of the chains of numbers, by their hash: no chain is in two splits.
_SPLIT_BUCKETS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}
_LARGEST = 400
Change = tuple[str, int]  # a sign, one of + - * /, and the number on its right
Parts = list[tuple[str, bool]]  # pieces of a text, and whether a model trains on each


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """A story of one number: `start`, then `changes` in this order."""

    prompt: str
    start: int
    changes: tuple[Change, ...]
    name: str
    items: str

    @property
    def answer(self) -> str:
        """The final number, such as `42`."""
        return str(functools.reduce(_changed, self.changes, self.start))


def draw(split: str, seed: int, index: int) -> WordProblem:
    """Problem `index` of a split, a function of its arguments alone. Problems of `test` with an odd
    index use people, things and sentences that occur in no other split.
    """
    rng, words = random.Random(f"{split} {seed} {index}"), _words()
    part = "test" if split == "test" and index % 2 else "train"
    start, changes = _chain(rng)
    while split_of(start, changes) != split:
        start, changes = _chain(rng)
    name, friend = rng.sample(words["names"][part], 2)
    items, other = rng.sample(words["items"][part], 2)
    people = {"name": name, "friend": friend, "items": items, "other": other}

    def filled(sentences: list[str], number: int = 0) -> str:
        filling = {key: rng.choice(words[f"{key}s"]) for key in ("place", "adjective", "day")}
        return rng.choice(sentences).format(n=number, **people, **filling)

    story = [filled(words["openings"][part], start)]
    for sign, number in changes:
        if rng.random() < 0.2:
            story.append(filled(words["remarks"]))
        story.append(filled(words["changes"][part][sign], number))
    story.append(filled(words["questions"][part]))
    return WordProblem(" ".join(story), start, changes, name, items)


def split_of(start: int, changes: tuple[Change, ...]) -> str:
    """The split to which the problems with these numbers belong."""
    bucket = zlib.crc32(repr((start, changes)).encode()) % 100
    return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)


def problems(split: str) -> list[WordProblem]:
    """The problems of a split, always the same ones: `train` 8192, `validation` 512, `test` 1024.
    ValueError on another name.
    """
    if split not in SPLITS:
        raise ValueError(f"stories has no split {split!r}; expected one of {sorted(SPLITS)}")
    return [draw(split, 0, index) for index in range(SPLITS[split])]


def solution(problem: WordProblem, seed: int, error_rate: float = 0.0) -> str:
    """A worked solution, one of many for each seed, that is wrong with probability `error_rate`."""
    rng = random.Random(f"{problem.prompt} {seed}")
    mistake = "carried" if rng.random() < error_rate else None
    return "".join(text for text, _ in parts(problem, rng, mistake))


def parts(problem: WordProblem, rng: random.Random, mistake: str | None = None) -> Parts:
    """The pieces of a worked solution. With a mistake, the result of one step is wrong, and is no
    text to train on. After a mistake that is `carried`, all that follows is right given the wrong
    number, so that the final number is wrong; `corrected`: the next sentence repairs it.
    """
    words, detail = _words(), rng.choices((0, 1, 2), (40, 35, 25))[0]
    changes, value = _ordered(problem, rng), problem.start
    wrong_place, wrong = _mistake(value, changes, rng) if mistake else (None, None)
    found: Parts = []

    def write(kind: list[str], **numbers: Any) -> None:
        text = rng.choice(kind).format(name=problem.name, items=problem.items, **numbers)
        found.append((text + " ", True))

    if detail == 2:
        write(words["begin"])
    if detail:
        write(words["start"], n=value)
    for place, (sign, number) in enumerate(changes):
        left, value = value, _changed(value, (sign, number))
        right, before = value, f"{left} {sign} {number} = "
        if place == wrong_place:
            value = wrong
        sentence = rng.choice(words["steps"][sign]) if detail else "{sum}."
        names = {"name": problem.name, "items": problem.items, "n": number}
        head, tail = sentence.format(sum="\0", **names).split("\0")
        found += [(head + before, True), (str(value), value == right), (tail, True)]
        if place == wrong_place and mistake == "corrected":
            value = right
            found.append((rng.choice(words["corrected"]).format(sum=f"{before}{right}"), True))
        found.append((" ", True))
        if detail == 2:
            write(words["after"], left=left, result=value)
    if detail:
        write(words["end"], result=value)
    return [*found, (f"#### {value}", True)]


def _mistake(value: int, changes: list[Change], rng: random.Random) -> tuple[int, int]:
    """A place and a wrong result from which the chain can go on to a wrong final number."""
    able, right = [], value
    for place, change in enumerate(changes):
        right = _changed(right, change)
        for wrong in {right + d for d in (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20)}:
            if _is_possible(wrong, changes[place + 1 :]):
                able.append((place, wrong))
    return rng.choice(sorted(able))


def _is_possible(value: int, changes: list[Change]) -> bool:
    """Whether every number of the chain is whole and from 0 to 999."""
    for sign, number in changes:
        if not 0 <= value <= 999 or (sign == "/" and value % number):
            return False
        value = _changed(value, (sign, number))
    return 0 <= value <= 999


def _ordered(problem: WordProblem, rng: random.Random) -> list[Change]:
    """The changes as in the story or, if there are only sums, sometimes in another order."""
    changes = list(problem.changes)
    if all(sign in "+-" for sign, _ in changes) and rng.random() < 0.4:
        mixed = rng.sample(changes, len(changes))
        return mixed if _is_possible(problem.start, mixed) else changes
    return changes


def _chain(rng: random.Random) -> tuple[int, tuple[Change, ...]]:
    start = value = rng.randint(4, 60)
    changes: list[Change] = []
    for _ in range(rng.choices((2, 3, 4, 5), (35, 30, 20, 15))[0]):
        able = [("+", rng.randint(2, 40))]
        able += [("-", rng.randint(1, min(value - 1, 40)))] if value > 2 else []
        able += [("*", factor) for factor in (2, 3, 4) if value * factor <= _LARGEST // 2]
        able += [("/", factor) for factor in (2, 3, 4, 5) if value % factor == 0]
        sign = rng.choices("+-*/", (4, 4, 1, 1))[0]
        change = rng.choice([each for each in able if each[0] == sign] or able[:1])
        changes.append(change)
        value = _changed(value, change)
    return start, tuple(changes)


def _changed(value: int, change: Change) -> int:
    sign, number = change
    match sign:
        case "+":
            return value + number
        case "-":
            return value - number
        case "*":
            return value * number
    return value // number


@functools.cache
def _words() -> dict[str, Any]:
    file = importlib.resources.files("opdjax") / "assets" / "stories.yaml"
    words = yaml.safe_load(file.read_text("utf-8"))
    listed = lambda each: each.split() if isinstance(each, str) else each
    for key in ("names", "items"):
        words[key] = {part: listed(text) for part, text in words[key].items()}
    return {key: listed(value) for key, value in words.items()}
