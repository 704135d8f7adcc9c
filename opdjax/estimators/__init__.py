"""The recipes, by name. A new paper is one brick, one recipe, one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from opdjax.estimators import divergence, losses, opd, sequence


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A token loss and what it needs: `token_loss(student, teacher, row, **options) -> (loss [n], outputs)`."""

    token_loss: Callable
    teacher: Literal["none", "token", "vocabulary"]  # nothing, its log-prob of the sampled token, or its whole distribution
    is_policy_gradient: bool  # an expectation over sampled tokens: they must come from the distribution that is scored
    options: tuple[str, ...]


_STATE_OPTIONS = ("importance", "importance_cap")  # of an exact divergence: how stale its contexts are
RECIPES = {
    "opd": Recipe(opd.opd, "token", True, opd.OPTIONS),
    "vopd": Recipe(opd.vopd, "vocabulary", True, ("baseline", "baseline_top_k", *opd.OPTIONS)),
    "full_kl": Recipe(divergence.full_kl, "vocabulary", False, (*divergence.FULL_OPTIONS, *_STATE_OPTIONS)),
    "topk_kl": Recipe(divergence.topk_kl, "vocabulary", False, ("divergence", *divergence.TOP_K_OPTIONS, *_STATE_OPTIONS)),
    "sft": Recipe(losses.sft, "none", False, ()),
}


def bind(name: str, options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of that name as these options make it, and the options.

    Its token loss reads the columns of `sequence.prepare`, and its `teacher` is what it needs under these options.
    ValueError where the recipe or one of its options does not exist.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; expected one of {sorted(RECIPES)}")
    recipe = RECIPES[name]
    for option in options:
        if option not in recipe.options:
            raise ValueError(f"recipe {name!r} has no option {option!r}; it has {list(recipe.options)}")
    teacher = opd.teacher_needs(recipe.teacher, options) if recipe.is_policy_gradient else recipe.teacher
    return dataclasses.replace(recipe, token_loss=sequence.weighted(recipe.token_loss), teacher=teacher), options
