"""The built-in task: chains of sums and differences, answered step by step.

`34-17+25=` has three operands below 50; `34-17=17;17+25=42#42` states each step, then the value.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

OPERAND_LIMIT = 50
NUM_OPERANDS = 3
# Percentages of the problems, by a hash of the problem's text: no problem is in two splits.
_SPLIT_BUCKETS = {"train": range(0, 90), "validation": range(90, 95), "test": range(95, 100)}
SPLITS = {"train": 16384, "validation": 1024, "test": 2048}


@dataclasses.dataclass(frozen=True)
class Problem:
    """`operands[0] signs[0] operands[1] signs[1] operands[2] =`; a sign is +1 or -1."""

    operands: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """Such as `34-17+25=`."""
        terms = zip(self.signs, self.operands[1:])
        rest = "".join(f"{_symbol(sign)}{operand}" for sign, operand in terms)
        return f"{self.operands[0]}{rest}="

    @property
    def steps(self) -> tuple[tuple[int, int, int, int], ...]:
        """(left, sign, right, result) of each step."""
        steps, left = [], self.operands[0]
        for sign, right in zip(self.signs, self.operands[1:]):
            steps.append((left, sign, right, left + sign * right))
            left = steps[-1][-1]
        return tuple(steps)

    @property
    def answer(self) -> str:
        """The final value, such as `42`."""
        return str(self.steps[-1][-1])

    @property
    def reference(self) -> str:
        """The worked answer, such as `34-17=17;17+25=42#42`."""
        chain = (f"{left}{_symbol(sign)}{right}={total}" for left, sign, right, total in self.steps)
        return f"{';'.join(chain)}#{self.answer}"


def _symbol(sign: int) -> str:
    return "+" if sign > 0 else "-"


def draw(rng: np.random.Generator) -> Problem:
    """A problem, drawn uniformly."""
    operands = rng.integers(0, OPERAND_LIMIT, NUM_OPERANDS)
    signs = 2 * rng.integers(0, 2, NUM_OPERANDS - 1) - 1
    return Problem(tuple(int(x) for x in operands), tuple(int(x) for x in signs))


def split_of(problem: Problem) -> str:
    """The split this problem belongs to."""
    bucket = zlib.crc32(problem.prompt.encode()) % 100
    return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)


def problems(split: str) -> list[Problem]:
    """The distinct problems of a split, always the same ones: `train` 16384, `validation` 1024,
    `test` 2048. ValueError on another name.
    """
    if split not in SPLITS:
        raise ValueError(f"arithmetic has no split {split!r}; expected one of {sorted(SPLITS)}")
    rng = np.random.Generator(np.random.Philox(key=zlib.crc32(split.encode())))
    found: dict[Problem, None] = {}
    while len(found) < SPLITS[split]:
        problem = draw(rng)
        if split_of(problem) == split:
            found.setdefault(problem)
    return list(found)
