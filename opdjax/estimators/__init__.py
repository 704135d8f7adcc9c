"""The estimators: `bind(name, options)` gives an `Estimator`, a recipe with its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from opdjax.config import EstimatorConfig
from opdjax.config.recipes import RECIPES, Recipe, TeacherNeed, recipe_named
from opdjax.estimators import coupling, divergence, grpo, losses, opd
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TILE, TokenInputs

# `token_loss(student, teacher, row, **options) -> (loss [n], outputs)` of each recipe.
TOKEN_LOSSES: Mapping[str, Callable] = {
    "opd": opd.opd,
    "vopd": opd.vopd,
    "full_kl": divergence.full_kl,
    "topk_kl": divergence.topk_kl,
    "npd": divergence.npd,
    "sft": losses.sft,
    "grpo": grpo.grpo,
    "ropd": grpo.ropd,
    "tjudge": grpo.tjudge,
    "ropd_stages": grpo.ropd_stages,
}


@dataclasses.dataclass(frozen=True)
class Estimator:
    """A recipe with its options; hashable, so that it is static under jit. Made by `bind`."""

    name: str
    given: tuple[tuple[str, Any], ...] = ()  # the options that are not left at their defaults
    aggregation: str = "token_mean"
    tile: int = TILE

    @property
    def recipe(self) -> Recipe:
        """The recipe's row."""
        return RECIPES[self.name]

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options that were given."""
        return dict(self.given)

    @property
    def teacher(self) -> TeacherNeed:
        """What is read of the teacher under these options."""
        return self.recipe.teacher_need(self.options)

    @property
    def top_k(self) -> int:
        """How many of the teacher's most likely ids are read; 0 where none are."""
        return self.recipe.teacher_top_k(self.options)

    @property
    def is_coupled(self) -> bool:
        """Whether a token's loss depends on other tokens, through columns that `prepare` makes."""
        return coupling.is_coupled(self.options)

    @property
    def needs_totals(self) -> bool:
        """Whether a row's columns depend on the other rows of the batch."""
        return coupling.needs_totals(self.options)

    @property
    def ratio_options(self) -> dict[str, Any]:
        """The options that `diagnostics.applied_importance` reads.

        A rewarded recipe's clip is its importance correction.
        """
        return grpo.clipping(self.options) if self.recipe.is_rewarded else self.options

    def token_loss(self, student: VocabTile, teacher: VocabTile | None, row: TokenInputs):
        """(loss [n], outputs) of n tokens, nats; weighted by `row.loss_weights` if given."""
        loss, outputs = TOKEN_LOSSES[self.name](
            student, teacher, row, **coupling.pointwise(self.options)
        )
        if teacher is not None and "kl" not in outputs:
            # Exact KL: added once, here, whenever the teacher's distribution is available.
            kl = divergence.reverse_kl(*jax.lax.stop_gradient((student, teacher)))
            outputs = outputs | {"kl": kl}
        if row.loss_weights is None:
            return loss, outputs
        return jax.lax.stop_gradient(row.loss_weights) * loss, outputs

    def token_stats(
        self, student: VocabTile, teacher: VocabTile | None, row: TokenInputs
    ) -> dict[str, Float[Array, " n"]]:
        """What `prepare` reads of each token; a pass of its own, without gradient."""
        return coupling.token_stats(student, teacher, row, self.options)

    def prepare(
        self,
        row: TokenInputs,
        stats: dict[str, Float[Array, "B T"]],
        mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        totals: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
    ) -> TokenInputs:
        """The columns with those that couple tokens; see `coupling.prepare`."""
        return coupling.prepare(
            row,
            stats,
            mask,
            segment_ids,
            self.options,
            is_policy_gradient=self.recipe.is_policy_gradient,
            totals=totals,
        )


def bind(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    aggregation: str = "token_mean",
    tile: int = TILE,
) -> Estimator:
    """The recipe of that name under these options.

    ValueError where the recipe or an option does not exist, or options contradict each other.
    """
    given = dict(options or {})
    recipe_named(name).check(given, aggregation)
    # The advantages of stages are already balanced then, see `advantage.stage_balance`.
    weighting = "token_mean" if aggregation == "stage_token_mean" else aggregation
    return Estimator(name, tuple(given.items()), weighting, tile)


@cache
def estimator_of(config: EstimatorConfig) -> Estimator:
    """The estimator that a config asks for. Cached, because every step asks for it."""
    return bind(config.recipe, config.options, aggregation=config.aggregation)
