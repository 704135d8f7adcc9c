"""The recipes, by name. A new paper is one brick, one recipe, one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from opdjax.estimators import coupling, divergence, grpo, importance, losses, opd


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A token loss and what it needs: `token_loss(student, teacher, row, **options) -> (loss [n],
    outputs)`.
    """

    token_loss: Callable
    # Nothing, its log-prob of the sampled token, that and its most likely ids with theirs, or its
    # whole distribution
    teacher: Literal["none", "token", "top_k", "vocabulary"]
    # an expectation over sampled tokens: they must come from the distribution that is scored
    is_policy_gradient: bool
    options: tuple[str, ...]
    top_k: int = 0  # how many of the teacher's most likely ids it reads, where `teacher` is top_k
    # What gives a completion its reward, where the recipe learns from one: a grader, or a judge's
    # plain score, rubric, rubric by stages
    reward: Literal["none", "task", "scalar", "rubric", "stages"] = "none"


_STATE_OPTIONS = (
    "importance",
    "importance_cap",
)  # of an exact divergence: how stale its contexts are
RECIPES = {
    "opd": Recipe(opd.opd, "token", True, opd.OPTIONS),
    "vopd": Recipe(opd.vopd, "vocabulary", True, ("baseline", "baseline_top_k", *opd.OPTIONS)),
    "full_kl": Recipe(
        divergence.full_kl, "vocabulary", False, (*divergence.FULL_OPTIONS, *_STATE_OPTIONS)
    ),
    "topk_kl": Recipe(
        divergence.topk_kl,
        "vocabulary",
        False,
        ("divergence", *divergence.TOP_K_OPTIONS, *_STATE_OPTIONS),
    ),
    "npd": Recipe(
        divergence.npd,
        "top_k",
        False,
        (*divergence.NPD_OPTIONS, *_STATE_OPTIONS),
        divergence.NPD_TOP_K,
    ),
    "sft": Recipe(losses.sft, "none", False, ()),
    "grpo": Recipe(grpo.grpo, "none", True, ("advantage", *grpo.LOSS_OPTIONS), reward="task"),
    "ropd": Recipe(grpo.ropd, "none", True, ("advantage", *grpo.LOSS_OPTIONS), reward="rubric"),
    "tjudge": Recipe(grpo.tjudge, "none", True, ("advantage", *grpo.LOSS_OPTIONS), reward="scalar"),
    "ropd_stages": Recipe(
        grpo.ropd_stages, "none", True, (*grpo.CREDIT_OPTIONS, *grpo.LOSS_OPTIONS), reward="stages"
    ),
}


def bind(name: str, options: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of that name as these options make it, and the options.

    Its token loss reads the columns of `coupling.prepare`, and `teacher` and `top_k` are what it
    needs under these options. ValueError where the recipe, one of its options or its importance
    correction does not exist.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; expected one of {sorted(RECIPES)}")
    recipe = RECIPES[name]
    for option in options:
        if option not in recipe.options:
            raise ValueError(
                f"recipe {name!r} has no option {option!r}; it has {list(recipe.options)}"
            )
    corrections = ("none", *importance.TOKEN_CORRECTIONS, *importance.SEQUENCE_CORRECTIONS)
    corrections = (
        corrections if recipe.is_policy_gradient else ("none", "prefix_truncate")
    )  # no action that could be stale
    if options.get("importance", "none") not in corrections:
        raise ValueError(
            f"recipe {name!r} has no importance correction {options['importance']!r}; it has {list(corrections)}"
        )
    is_teacher_read = recipe.is_policy_gradient and recipe.reward == "none"
    teacher = opd.teacher_needs(recipe.teacher, options) if is_teacher_read else recipe.teacher
    teacher = "none" if options.get("kd_weight") == 0 else teacher
    top_k = options.get("support_top_k", recipe.top_k) if teacher == "top_k" else 0
    return dataclasses.replace(
        recipe, token_loss=coupling.weighted(recipe.token_loss), teacher=teacher, top_k=top_k
    ), options
