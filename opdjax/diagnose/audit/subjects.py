"""What is audited: recipes under their options, and the pitfalls beside them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from opdjax.config.recipes import RECIPES
from opdjax.estimators import TOKEN_LOSSES, bind, coupling
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
        """What is known of it, where it is one."""
        return PITFALLS[self.name] if self.recipe is None else None

    @property
    def is_sampled(self) -> bool:
        """Whether its gradient depends on the token that was drawn."""
        is_crossed = self.recipe == "sft" or (self.recipe == "npd" and self._kd_weight < 1)
        return self.recipe is None or RECIPES[self.recipe].is_policy_gradient or is_crossed

    @property
    def _kd_weight(self) -> float:
        return RECIPES[self.recipe].with_defaults(self.options).get("kd_weight", 1.0)

    @property
    def is_coupled(self) -> bool:
        """Whether one context alone does not determine it; the mean reward of a batch counts as
        given.
        """
        rest = {name: value for name, value in self.options.items() if name != "baseline"}
        return coupling.is_coupled(rest)

    @property
    def num_draws(self) -> int:
        """Tokens drawn at each context."""
        return 1 + self.options.get("extra_draws", 0)

    @property
    def advertises(self) -> str:
        """Whose gradient it is meant to have: `reverse`, `forward`, or `own`: neither, by intent."""
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
        """`token_loss(student, teacher, row) -> (loss, outputs)`."""
        if self.recipe is None:
            return self.pitfall.token_loss
        return bind(self.recipe, self.options).token_loss

    def undrawn_loss(self) -> Callable | None:
        """The part of the loss that the same context has whatever was drawn there; None where there
        is none.
        """
        if not self.is_sampled:
            return self.token_loss()
        if self.recipe != "npd" or not self._kd_weight:
            return None
        alone, weight = (
            subject("npd", **(self.options | {"kd_weight": 1.0})).token_loss(),
            self._kd_weight,
        )
        return lambda student, teacher, row: (weight * alone(student, teacher, row)[0], {})

    def advantages(
        self, student: VocabTile, teacher: VocabTile, mean_reward: Float[Array, ""]
    ) -> Float[Array, "n V"]:
        """The factor `A_v` in the gradient `-A_v grad log student(v)` of each token drawn;
        `mean_reward` is that of `batch_mean`.
        """
        if self.recipe is None:
            return self.pitfall.advantages(student, teacher)
        if self.recipe in ("sft", "npd"):
            return jnp.full_like(
                student.logits, 1.0 if self.recipe == "sft" else 1 - self._kd_weight
            )
        how = {name: self.options.get(name) for name in REWARD_OPTIONS}
        baseline = self.options.get("baseline", "full") if self.recipe == "vopd" else None
        if baseline == "batch_mean":
            return sampled_reward(teacher.logprobs, student.logprobs, **how) - mean_reward
        k = (
            {"baseline_top_k": self.options["baseline_top_k"]}
            if "baseline_top_k" in self.options
            else {}
        )
        return advantages_of(student, teacher, baseline=baseline, **k, **how)

    def drawn_from(self, student: VocabTile, teacher: VocabTile) -> VocabTile:
        """The distribution that its tokens come from."""
        if self.recipe is None and self.pitfall.drawn_from is not None:
            return self.pitfall.drawn_from(student)
        return teacher if self.recipe == "sft" else student


def subject(recipe: str, **options: Any) -> Subject:
    """The recipe under these options, named after them."""
    bind(recipe, options)
    values = (
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.items()
    )
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
# Options that couple the tokens of a sequence; one context says nothing of them.
COUPLED = (
    subject("opd", discount=1.0),
    subject("opd", discount=1.0, return_to_go="expected"),
    subject("vopd", baseline="full", discount=1.0, return_to_go="expected"),
    subject("opd", prefix_weight=0.5),
)


# What an option reads that the audit does not have: rewards of a task, data that another policy
# drew.
_BEYOND = ("task_reward_coef", "importance")


def _filled(each: Subject) -> tuple[str | None, dict[str, Any]]:
    """Recipe and options with its defaults in place of nothing, so that one estimator is not
    measured twice.
    """
    known = {} if each.recipe is None else inspect.signature(TOKEN_LOSSES[each.recipe]).parameters
    usual = {
        name: known[name].default
        for name in known
        if known[name].kind is inspect.Parameter.KEYWORD_ONLY
    }
    return each.recipe or each.name, {
        name: value
        for name, value in (usual | each.options).items()
        if value not in (0, "none", None)
    }


def choose(
    names: Sequence[str] | None, options: dict[str, Any] | None = None, recipe: str | None = None
) -> list[Subject]:
    """The default subjects of these recipes or pitfalls (all: None), the one that a config asks for
    first, and `opd`, always.

    ValueError on a name that is not known, and on options whose input the audit does not have.
    """
    known = (*DEFAULT, *COUPLED)
    wanted = [s for s in known if names is None or (s.recipe or s.name) in names]
    unknown = sorted(set(names or ()) - {s.recipe or s.name for s in known})
    if unknown:
        raise ValueError(
            f"there is nothing called {unknown} to audit; expected some of {sorted({s.recipe or s.name for s in known})}"
        )
    if recipe is not None:
        beyond = [name for name in _BEYOND if (options or {}).get(name) not in (None, 0, "none")]
        if RECIPES[recipe].is_rewarded:
            raise ValueError(
                f"estimator.recipe is {recipe!r}; expected one that a teacher supervises: the audit of a pair has no rewards of answers. "
                f"opdjax audit --explain {recipe} tells of it"
            )
        if beyond:
            raise ValueError(
                f"estimator.{beyond[0]} is {options[beyond[0]]!r}; expected none: the audit of a pair has neither rewards of a task nor "
                "stale data (importance corrections are measured on its tree)"
            )
        asked = subject(recipe, **(options or {}))
        wanted = [each for each in wanted if _filled(each) != _filled(asked)]
        wanted.insert(0, asked)
    plain = subject("opd")
    return wanted if any(_filled(each) == _filled(plain) for each in wanted) else [*wanted, plain]
