"""The recipes, by name. A new paper is one brick, one recipe, one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from opdjax.estimators import divergence, losses, opd


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A token loss and what it needs: `token_loss(student, teacher, row, **options) -> (loss [n], outputs)`."""

    token_loss: Callable
    teacher: Literal["none", "token", "vocabulary"]  # nothing, its log-prob of the sampled token, or its whole distribution
    is_policy_gradient: bool  # an expectation over sampled tokens: they must come from the distribution that is scored
    options: tuple[str, ...]


RECIPES = {
    "opd": Recipe(opd.opd, "token", True, ("discount",)),
    "vopd": Recipe(opd.vopd, "vocabulary", True, ("discount", "baseline", "baseline_top_k")),
    "full_kl": Recipe(divergence.full_kl, "vocabulary", False, divergence.FULL_OPTIONS),
    "topk_kl": Recipe(divergence.topk_kl, "vocabulary", False, ("divergence", *divergence.TOP_K_OPTIONS)),
    "sft": Recipe(losses.sft, "none", False, ()),
}


def bind(name: str, options: dict) -> tuple[Recipe, dict]:
    """The recipe of that name and its options, or a ValueError that names an option the recipe does not have."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; expected one of {sorted(RECIPES)}")
    recipe = RECIPES[name]
    for option in options:
        if option not in recipe.options:
            raise ValueError(f"recipe {name!r} has no option {option!r}; it has {list(recipe.options)}")
    return recipe, options
