"""What the audit measures: recipes with their options, and pitfalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.config.recipes import PLAIN, RECIPES, Recipe
from opdjax.config.validation import ConfigError, require
from opdjax.estimators import bind, coupling
from opdjax.estimators.opd import REWARD_OPTIONS, sampled_reward
from opdjax.estimators.opd import advantages as advantages_of
from opdjax.estimators.pitfalls import PITFALLS, Pitfall
from opdjax.ops.tile import VocabTile

_OFF = (0, "none", None)  # values of an option without an effect

Progress = Callable[[Sequence[Any]], Iterable[Any]]  # yields the items and shows how many are left
Part = dict[str, Any]  # of the audit's JSON document


@dataclasses.dataclass(frozen=True)
class Subject:
    """A recipe with its options, or a pitfall by name."""

    name: str
    recipe: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_own: bool = dataclasses.field(default=False, compare=False)  # the config's own recipe

    @property
    def pitfall(self) -> Pitfall | None:
        """The pitfall; None for a recipe."""
        return PITFALLS[self.name] if self.recipe is None else None

    @property
    def row(self) -> Recipe | None:
        """The recipe's row; None for a pitfall."""
        return None if self.recipe is None else RECIPES[self.recipe]

    @property
    def _cross_entropy(self) -> float:
        return self.row.cross_entropy_weight(self.options)

    @property
    def is_sampled(self) -> bool:
        """Whether its gradient depends on the sampled token."""
        return self.row is None or self.row.is_policy_gradient or self._cross_entropy > 0

    @property
    def is_coupled(self) -> bool:
        """Whether a token's loss depends on other contexts, apart from a batch's mean reward."""
        return coupling.is_coupled(self.options | {"baseline": None})

    @property
    def is_on_policy(self) -> bool:
        """Whether the student may sample its tokens; else the teacher does."""
        return self.row is None or "student" in self.row.completions

    @property
    def num_draws(self) -> int:
        """Tokens sampled at each context."""
        return 1 + self.options.get("extra_draws", 0)

    @property
    def advertises(self) -> str:
        """The KL whose gradient it should have: `reverse`, `forward`, or `own` for neither."""
        return "reverse" if self.row is None else self.row.advertised(self.options)

    @property
    def definition(self) -> tuple[str, dict[str, Any]]:
        """Recipe and options with the defaults filled in: equal estimators have equal ones."""
        options = self.options if self.row is None else self.row.with_defaults(self.options)
        return self.recipe or self.name, {k: v for k, v in options.items() if v not in _OFF}

    def with_one_draw(self) -> Subject:
        """Return the subject without extra draws."""
        kept = {name: v for name, v in self.options.items() if name != "extra_draws"}
        return dataclasses.replace(self, options=kept)

    def token_loss(self) -> Callable:
        """Return `token_loss(student, teacher, row) -> (loss, outputs)`."""
        return (self.pitfall or bind(self.recipe, self.options)).token_loss

    def unsampled_loss(self) -> Callable:
        """Return the part of the loss that does not depend on the sampled token."""
        if not self.is_sampled:
            return self.token_loss()
        if self.row is None or self.row.cross_entropy is not None or self._cross_entropy == 1:
            return lambda student, teacher, row: (jnp.zeros_like(student.logsumexp), {})
        divergence = bind(self.recipe, self.options | {"kd_weight": 1.0}).token_loss
        weight = 1 - self._cross_entropy
        return lambda *tiles: (weight * divergence(*tiles)[0], {})

    def advantages(
        self, student: VocabTile, teacher: VocabTile, mean_reward: Float[Array, ""]
    ) -> Float[Array, "n V"]:
        """Return the factor `A_v` in the gradient `-A_v grad log student(v)` of every token v; the
        baseline of `batch_mean` is `mean_reward`.
        """
        if self.recipe is None:
            return self.pitfall.advantages(student, teacher)
        if not self.row.is_policy_gradient:
            return jnp.full_like(student.logits, self._cross_entropy)
        reward = {name: self.options.get(name) for name in REWARD_OPTIONS}
        baseline = self.row.with_defaults(self.options).get("baseline")
        if baseline == "batch_mean":
            return sampled_reward(teacher.logprobs, student.logprobs, **reward) - mean_reward
        top_k = {name: v for name, v in self.options.items() if name == "support_top_k"}
        return advantages_of(student, teacher, baseline=baseline, **top_k, **reward)

    def drawn_from(self, student: VocabTile, teacher: VocabTile) -> VocabTile:
        """Return the distribution that its tokens are sampled from."""
        if self.recipe is None and self.pitfall.drawn_from is not None:
            return self.pitfall.drawn_from(student)
        return student if self.is_on_policy else teacher


def subject(recipe: str, **options: Any) -> Subject:
    """Return the recipe with these options, named after both."""
    bind(recipe, options)
    text = lambda value: f"{value:g}" if isinstance(value, float) else value
    values = (f"{name}={text(value)}" for name, value in options.items())
    return Subject(" ".join([recipe, *values]), recipe, options)


_AUDITED = [subject(name, **options) for name, row in RECIPES.items() for options in row.audited]
_AUDITED += [Subject(name) for name, pitfall in PITFALLS.items() if pitfall.token_loss is not None]
# Those that a single context defines.
DEFAULT = tuple(each for each in _AUDITED if not each.is_coupled)


def choose(
    names: Sequence[str] | None, options: dict[str, Any] | None = None, recipe: str | None = None
) -> list[Subject]:
    """Return the default subjects of the recipes and pitfalls `names` (None: all), preceded by the
    config's own `recipe` with its `options`, and in any case the plain recipe. ConfigError on an
    unknown name and on options that need rewards or stale data.
    """
    known, plain = {each.recipe or each.name for each in _AUDITED}, subject(PLAIN)
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"cannot audit {unknown}; expected some of {sorted(known)}")
    subjects = [*DEFAULT, *(each for each in _AUDITED if each.is_coupled)]
    chosen = [each for each in subjects if names is None or (each.recipe or each.name) in names]
    if recipe is not None:
        expected = "one that a teacher supervises: the audit of a pair has no rewards."
        expected += f" opdjax audit --explain {recipe} describes it"
        require(not RECIPES[recipe].is_rewarded, "estimator.recipe", recipe, expected)
        expected = "none: the audit of a pair has neither task rewards nor stale data"
        expected += " (its tree measures importance corrections)"
        for name in ("task_reward_coef", "importance"):
            value = (options or {}).get(name)
            require(value in _OFF, f"estimator.{name}", value, expected)
        own = subject(recipe, **(options or {}))
        own = plain if own.definition == plain.definition else own
        others = (each for each in chosen if each.definition != own.definition)
        chosen = [dataclasses.replace(own, is_own=True), *others]
    return chosen if plain in chosen else [*chosen, plain]
