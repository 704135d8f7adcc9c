"""What the audit measures: recipes with their options, and pitfalls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.config.recipes import RECIPES
from opdjax.config.validation import ConfigError
from opdjax.estimators import bind, coupling
from opdjax.estimators.opd import REWARD_OPTIONS, sampled_reward
from opdjax.estimators.opd import advantages as advantages_of
from opdjax.estimators.pitfalls import PITFALLS, Pitfall
from opdjax.ops.tile import VocabTile


@dataclasses.dataclass(frozen=True)
class Subject:
    """A recipe with its options, or a pitfall by name."""

    name: str
    recipe: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pitfall(self) -> Pitfall | None:
        """The pitfall; None for a recipe."""
        return PITFALLS[self.name] if self.recipe is None else None

    @property
    def is_sampled(self) -> bool:
        """Whether its gradient depends on the sampled token."""
        has_cross_entropy = self.recipe == "sft" or (self.recipe == "npd" and self._kd_weight < 1)
        return self.recipe is None or RECIPES[self.recipe].is_policy_gradient or has_cross_entropy

    @property
    def _kd_weight(self) -> float:
        return RECIPES[self.recipe].with_defaults(self.options).get("kd_weight", 1.0)

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
        if self.recipe in (None, "opd", "vopd"):
            altered = any(
                self.options.get(name) for name in (*REWARD_OPTIONS, "prefix_weight", "discount")
            )
            return "own" if altered else "reverse"
        if self.recipe == "sft":
            return "forward"
        direction = self.options.get("divergence", "reverse")
        return (
            direction if self.recipe == "full_kl" and direction in ("reverse", "forward") else "own"
        )

    def token_loss(self) -> Callable:
        """Return `token_loss(student, teacher, row) -> (loss, outputs)`."""
        if self.recipe is None:
            return self.pitfall.token_loss
        return bind(self.recipe, self.options).token_loss

    def unsampled_loss(self) -> Callable | None:
        """Return the part of the loss that does not depend on the sampled token; None if empty."""
        if not self.is_sampled:
            return self.token_loss()
        if self.recipe != "npd" or not self._kd_weight:
            return None
        divergence = subject("npd", **(self.options | {"kd_weight": 1.0})).token_loss()
        weight = self._kd_weight
        return lambda student, teacher, row: (weight * divergence(student, teacher, row)[0], {})

    def advantages(
        self, student: VocabTile, teacher: VocabTile, mean_reward: Float[Array, ""]
    ) -> Float[Array, "n V"]:
        """Return the factor `A_v` in the gradient `-A_v grad log student(v)` of every token v.

        `mean_reward`: the baseline of `batch_mean`.
        """
        if self.recipe is None:
            return self.pitfall.advantages(student, teacher)
        if self.recipe in ("sft", "npd"):
            weight = 1.0 if self.recipe == "sft" else 1 - self._kd_weight
            return jnp.full_like(student.logits, weight)
        reward = {name: self.options.get(name) for name in REWARD_OPTIONS}
        baseline = self.options.get("baseline", "full") if self.recipe == "vopd" else None
        if baseline == "batch_mean":
            return sampled_reward(teacher.logprobs, student.logprobs, **reward) - mean_reward
        top_k = {name: v for name, v in self.options.items() if name == "baseline_top_k"}
        return advantages_of(student, teacher, baseline=baseline, **top_k, **reward)

    def drawn_from(self, student: VocabTile, teacher: VocabTile) -> VocabTile:
        """Return the distribution that its tokens are sampled from."""
        if self.recipe is None and self.pitfall.drawn_from is not None:
            return self.pitfall.drawn_from(student)
        return teacher if self.recipe == "sft" else student


def subject(recipe: str, **options: Any) -> Subject:
    """Return the recipe with these options, named after both."""
    bind(recipe, options)
    text = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
    values = (f"{name}={text(value)}" for name, value in options.items())
    return Subject(" ".join([recipe, *values]), recipe, options)


DEFAULT = (
    subject("opd"),
    subject("vopd", baseline="full"),
    *(subject("vopd", baseline="student_topk", baseline_top_k=k) for k in (5, 20, 100)),
    subject("vopd", baseline="optimal"),
    subject("vopd", baseline="batch_mean"),
    subject("opd", extra_draws=3),
    subject("opd", reward_floor=-2.0),
    subject("opd", power_alpha=0.5),
    *(
        subject("full_kl", divergence=name)
        for name in ("reverse", "forward", "jsd", "skew_forward", "skew_reverse")
    ),
    subject("topk_kl", support="student", support_top_k=8),
    subject("topk_kl", support="student", support_top_k=8, renormalize="none"),
    subject("topk_kl", support="student", support_top_k=8, renormalize="none", outside="tail"),
    subject("topk_kl", support="union", support_top_k=8, renormalize="none", outside="tail"),
    subject("topk_kl", convention="verl", support_top_k=8),
    subject("topk_kl", convention="tunix", support_top_k=8),
    subject("topk_kl", convention="trl", support_top_k=8, divergence="forward"),
    subject("topk_kl", convention="thunlp", support_top_k=8),
    subject("npd"),
    subject("npd", kd_weight=1.0),
    subject("sft"),
    *(Subject(name) for name, pitfall in PITFALLS.items() if pitfall.token_loss is not None),
)
# Options that couple the tokens of a sequence: a single context does not define their gradient.
COUPLED = (
    subject("opd", discount=1.0),
    subject("opd", discount=1.0, return_to_go="expected"),
    subject("vopd", baseline="full", discount=1.0, return_to_go="expected"),
    subject("opd", prefix_weight=0.5),
)


# Options that need what the audit of a pair lacks: task rewards, data of another policy.
_REFUSED_OPTIONS = ("task_reward_coef", "importance")
_OFF = (0, "none", None)


def _with_defaults(each: Subject) -> tuple[str | None, dict[str, Any]]:
    """Return recipe and options with the defaults filled in, so that equal estimators are equal."""
    if each.recipe is None:
        return each.name, each.options
    options = RECIPES[each.recipe].with_defaults(each.options).items()
    return each.recipe, {name: value for name, value in options if value not in _OFF}


def choose(
    names: Sequence[str] | None, options: dict[str, Any] | None = None, recipe: str | None = None
) -> list[Subject]:
    """Return the subjects to measure.

    These are the default subjects of the recipes and pitfalls `names` (None: all), preceded by the
    config's own `recipe` with its `options`, and in any case `opd`. ConfigError on an unknown name
    and on options that need rewards or stale data.
    """
    subjects = (*DEFAULT, *COUPLED)
    known = {each.recipe or each.name for each in subjects}
    if unknown := sorted(set(names or ()) - known):
        raise ConfigError(f"cannot audit {unknown}; expected some of {sorted(known)}")
    chosen = [each for each in subjects if names is None or (each.recipe or each.name) in names]
    if recipe is not None:
        own = _own_subject(recipe, options or {})
        chosen = [own, *(x for x in chosen if _with_defaults(x) != _with_defaults(own))]
    plain = subject("opd")
    has_plain = any(_with_defaults(each) == _with_defaults(plain) for each in chosen)
    return chosen if has_plain else [*chosen, plain]


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
