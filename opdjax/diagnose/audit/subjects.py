"""What the audit measures: recipes with their options, and pitfalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.config.recipes import RECIPES, Recipe
from opdjax.config.validation import ConfigError
from opdjax.estimators import Estimator, bind, coupling, variants
from opdjax.estimators.opd import REWARD_OPTIONS, sampled_reward
from opdjax.estimators.opd import advantages as advantages_of
from opdjax.estimators.pitfalls import PITFALLS, Pitfall
from opdjax.ops.tile import VocabTile


@dataclasses.dataclass(frozen=True)
class Subject:
    """An estimator, or a pitfall by name."""

    name: str
    estimator: Estimator | None = None

    @property
    def recipe(self) -> Recipe | None:
        """The row of the estimator's recipe; None for a pitfall."""
        return None if self.estimator is None else self.estimator.recipe

    @property
    def options(self) -> dict[str, Any]:
        """The options of the estimator."""
        return {} if self.estimator is None else self.estimator.options

    @property
    def pitfall(self) -> Pitfall | None:
        """The pitfall; None for a recipe."""
        return PITFALLS[self.name] if self.estimator is None else None

    @property
    def is_policy_gradient(self) -> bool:
        """Whether advantages multiply the gradient of the sampled token's log-prob."""
        return self.recipe is None or self.recipe.is_policy_gradient

    @property
    def has_baseline(self) -> bool:
        """Whether a baseline reduces the variance of the advantages."""
        return self.recipe is not None and "baseline" in self.recipe.options

    @property
    def is_sampled(self) -> bool:
        """Whether its gradient depends on the sampled token."""
        return self.is_policy_gradient or self._divergence_weight < 1

    @property
    def _divergence_weight(self) -> float:
        """The weight of the divergence in the loss; the rest is cross-entropy."""
        default = 0.0 if self.recipe.teacher == "none" else 1.0
        return self.recipe.with_defaults(self.options).get("kd_weight", default)

    @property
    def reads_given_answers(self) -> bool:
        """Whether its tokens come from the teacher."""
        return self.recipe is not None and "student" not in self.recipe.completions

    @property
    def is_coupled(self) -> bool:
        """Whether a token's loss depends on other contexts, apart from a batch's mean reward."""
        options = {name: value for name, value in self.options.items() if name != "baseline"}
        return coupling.is_coupled(options)

    @property
    def num_draws(self) -> int:
        """Tokens sampled at each context."""
        return 1 + self.options.get("extra_draws", 0)

    @property
    def advertises(self) -> str:
        """The KL whose gradient it should have: `reverse`, `forward`, or `own` for neither."""
        if self.is_policy_gradient:
            changes = (*REWARD_OPTIONS, "prefix_weight", "discount")
            return "own" if any(self.options.get(name) for name in changes) else "reverse"
        if self.reads_given_answers:
            return "forward"
        is_exact = self.recipe.teacher == "vocabulary" and "support" not in self.recipe.options
        direction = self.options.get("divergence", "reverse")
        return direction if is_exact and direction in ("reverse", "forward") else "own"

    def token_loss(self) -> Callable:
        """Return `token_loss(student, teacher, row) -> (loss, outputs)`."""
        return self.pitfall.token_loss if self.estimator is None else self.estimator.token_loss

    def unsampled_loss(self) -> Callable | None:
        """Return the part of the loss that does not depend on the sampled token; None if empty."""
        if not self.is_sampled:
            return self.token_loss()
        if self.is_policy_gradient or not self._divergence_weight:
            return None
        divergence = variants.varied(self.estimator, kd_weight=1.0).token_loss
        weight = self._divergence_weight
        return lambda student, teacher, row: (weight * divergence(student, teacher, row)[0], {})

    def advantages(
        self, student: VocabTile, teacher: VocabTile, mean_reward: Float[Array, ""]
    ) -> Float[Array, "n V"]:
        """Return the factor `A_v` in the gradient `-A_v grad log student(v)` of every token v.

        `mean_reward`: the baseline of `batch_mean`.
        """
        if self.estimator is None:
            return self.pitfall.advantages(student, teacher)
        if not self.is_policy_gradient:
            return jnp.full_like(student.logits, 1 - self._divergence_weight)
        reward = {name: self.options.get(name) for name in REWARD_OPTIONS}
        baseline = self.recipe.with_defaults(self.options).get("baseline")
        if baseline == "batch_mean":
            return sampled_reward(teacher.logprobs, student.logprobs, **reward) - mean_reward
        top_k = {name: v for name, v in self.options.items() if name == "baseline_top_k"}
        return advantages_of(student, teacher, baseline=baseline, **top_k, **reward)

    def drawn_from(self, student: VocabTile, teacher: VocabTile) -> VocabTile:
        """Return the distribution that its tokens are sampled from."""
        if self.estimator is None and self.pitfall.drawn_from is not None:
            return self.pitfall.drawn_from(student)
        return teacher if self.reads_given_answers else student


def subject_of(estimator: Estimator) -> Subject:
    """Return the estimator as a subject, named after its recipe and options."""
    text = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
    values = (f"{name}={text(value)}" for name, value in estimator.options.items())
    return Subject(" ".join([estimator.name, *values]), estimator)


def subject(recipe: str, **options: Any) -> Subject:
    """Return the recipe of this name with these options."""
    return subject_of(bind(recipe, options))


PLAIN = subject_of(variants.SAMPLED)  # every comparison is with this one
DEFAULT = (
    *map(subject_of, variants.UNCOUPLED),
    *(Subject(name) for name, pitfall in PITFALLS.items() if pitfall.token_loss is not None),
)
COUPLED = tuple(map(subject_of, variants.COUPLED))
# Options that need what the audit of a pair lacks: task rewards, data of another policy.
_REFUSED_OPTIONS = ("task_reward_coef", "importance")
_OFF = (0, "none", None)


def _group(each: Subject) -> str:
    """Return the name by which a subject is chosen."""
    return each.name if each.estimator is None else each.estimator.name


def _is_same(one: Subject, other: Subject) -> bool:
    """Return whether two subjects are the same estimator, defaults filled in."""

    def options(each: Subject) -> dict[str, Any]:
        found = {} if each.recipe is None else each.recipe.with_defaults(each.options)
        return {name: value for name, value in found.items() if value not in _OFF}

    return _group(one) == _group(other) and options(one) == options(other)


def choose(
    names: Sequence[str] | None, options: dict[str, Any] | None = None, recipe: str | None = None
) -> list[Subject]:
    """Return the subjects to measure.

    These are the default subjects of the recipes and pitfalls `names` (None: all), preceded by the
    config's own `recipe` with its `options`, and in any case the plain one. ConfigError on an
    unknown name and on options that need rewards or stale data.
    """
    subjects = (*DEFAULT, *COUPLED)
    known = set(map(_group, subjects))
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"cannot audit {unknown}; expected some of {sorted(known)}")
    chosen = [each for each in subjects if names is None or _group(each) in names]
    if recipe is not None:
        own = _own_subject(recipe, options or {})
        own = PLAIN if _is_same(own, PLAIN) else own
        chosen = [own, *(each for each in chosen if not _is_same(each, own))]
    return chosen if any(_is_same(each, PLAIN) for each in chosen) else [*chosen, PLAIN]


def _own_subject(recipe: str, options: dict[str, Any]) -> Subject:
    if RECIPES[recipe].is_rewarded:
        raise ConfigError(
            f"estimator.recipe is {recipe!r}; expected one that a teacher supervises: the audit of "
            f"a pair has no rewards. opdjax audit --explain {recipe} describes it"
        )
    for name in _REFUSED_OPTIONS:
        if options.get(name) not in _OFF:
            raise ConfigError(
                f"estimator.{name} is {options[name]!r}; expected none: the audit of a pair has "
                "neither task rewards nor stale data (its tree measures importance corrections)"
            )
    return subject(recipe, **options)
