"""How an arm's learning rate was chosen: from a grid of points in the same directory. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from opdjax.config.grid import SCORED_ON
from opdjax.config.saved import upgrade
from opdjax.runs.results import Run, SeedGroup, mean, read_group


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The grid of an arm's learning rates, and the choice. A rate is chosen with equal care if the
    grid differs from the comparison in rate, seed and evaluation alone, and its best rate is used.
    """

    rates: tuple[float, ...]  # of the grid, ascending
    used: float  # by the comparison
    best: float | None = None  # None: the grid is not complete
    is_edge: bool = False  # the best rate is the lowest or the highest of the grid
    problem: str = ""  # why the rate is not that of a fair grid; empty: it is

    def __str__(self) -> str:
        if not self.rates:
            return f"{self.used:g}, {self.problem}"
        grid = f"{self.used:g} of {len(self.rates)}, {self.rates[0]:g} to {self.rates[-1]:g}"
        return "; ".join([grid, *["best at an edge"] * self.is_edge, *filter(None, [self.problem])])


def tuning_of(group: SeedGroup, groups: Sequence[SeedGroup], reading: Callable[..., Run]) -> Tuning:
    """The grid of the arm `group` among all groups of its directory."""
    config, wanted = upgrade(group.points[0].config), _untuned(group)
    used = config["optimizer"]["learning_rate"]
    grid = [each for each in groups if SCORED_ON in each.overrides and _untuned(each) == wanted]
    if not grid:
        return Tuning((), used, problem="no grid")
    scores = {_rate(each): mean(map(_score, read_group(each, reading))) for each in grid}
    rates = tuple(sorted(scores))
    if any(each.missing for each in grid) or None in scores.values():
        return Tuning(rates, used, problem="its grid is not complete")
    best = max(rates, key=lambda rate: (scores[rate], rate == used))
    seeds = {point.config["seed"] for point in group.points}
    own = lambda each: {point.config["seed"] for point in each.points}
    source = lambda each: upgrade(each.points[0].config)["evaluation"]["source"]
    problem = f"the best rate is {best:g}" if best != used else ""
    if any(source(each) == config["evaluation"]["source"] for each in grid):
        problem = "its grid has the prompts of the comparison"
    elif any(own(each) & seeds for each in grid):
        problem = "its grid has seeds of the comparison"
    return Tuning(rates, used, best, best in (rates[0], rates[-1]), problem)


def unequal(arms: dict[str, Tuning | None]) -> str:
    """Why these arms, by label, were not tuned with equal care; empty if they were. None is an
    arm that needs no rate, such as an untrained student.
    """
    tuned = {label: each for label, each in arms.items() if each}
    problems = [f"{label}: {each.problem}" for label, each in tuned.items() if each.problem]
    sizes = {label: len(each.rates) for label, each in tuned.items()}
    if not problems and len(set(sizes.values())) > 1:
        problems = [f"{label}: {size} rates" for label, size in sizes.items()]
    return "; ".join(problems)


def _rate(group: SeedGroup) -> float:
    return upgrade(group.points[0].config)["optimizer"]["learning_rate"]


def _untuned(group: SeedGroup) -> dict[str, Any]:
    """All settings but those in which a grid differs from the comparison."""
    config = dict(upgrade(group.points[0].config))
    optimizer = {k: v for k, v in config["optimizer"].items() if k != "learning_rate"}
    rest = {k: v for k, v in config.items() if k not in ("seed", "evaluation")}
    return rest | {"optimizer": optimizer}


def _score(run: Run) -> float | None:
    """avg@k, or without graded answers -KL(student || teacher)."""
    if (score := run.score("avg@k")) is not None:
        return score
    kl = run.divergence("reverse_kl")
    return None if kl is None else -kl
