"""The recipes, one row each: what a recipe needs, which options it has, and how to describe it.

This is all that the rest of the package knows of a recipe; `opdjax.estimators` has the functions.
A new recipe is one row here and one function there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from opdjax.config.validation import ConfigError, in_range, require

RecipeName = Literal[
    "opd", "vopd", "full_kl", "topk_kl", "npd", "sft", "grpo", "ropd", "tjudge", "ropd_stages"
]
DEFAULT_RECIPE: RecipeName = "vopd"
# Recipes by their part in a comparison.
PLAIN: RecipeName = "opd"
WITH_BASELINE: RecipeName = "vopd"
EXACT: RecipeName = "full_kl"
Baseline = Literal["full", "student_topk", "optimal", "batch_mean"]  # of vopd
Divergence = Literal["reverse", "forward", "jsd", "skew_forward", "skew_reverse"]
Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_mask", "prefix_truncate", "ppo_clip"
]
Convention = Literal[
    "tunix", "verl", "nemo_rl", "nemo_rl_floor", "easydel", "trl", "thunlp", "distillkit"
]
TeacherNeed = Literal["none", "token", "top_k", "vocabulary"]
RewardKind = Literal["none", "task", "scalar", "rubric", "stages"]
CompletionsFrom = Literal["student", "teacher", "references"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition that an option sets on another one (`other`) when it is given.

    `accepted`: values, or a range in words (`in_range`). With `is_needed` the other option, its
    default included, must have an accepted value; without, it may be left out, and if it is given
    it must have an accepted value. `values`: the rule holds for these values alone; empty: for all.
    """

    other: str
    accepted: tuple[Any, ...] | str = ()
    is_needed: bool = False
    values: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether the other option may have this value."""
        if isinstance(self.accepted, str):
            return value is not None and in_range(value, self.accepted)
        return value in self.accepted

    @property
    def expected(self) -> str:
        """The accepted values in words."""
        if isinstance(self.accepted, str):
            return self.accepted
        return " or ".join(map(str, self.accepted)) or "none"


def needs(other: str, *accepted: Any, values: tuple[Any, ...] = ()) -> Rule:
    """The option is read only where `other` has one of the accepted values."""
    return Rule(other, accepted, True, values)


def fixes(other: str, *accepted: Any, values: tuple[Any, ...] = ()) -> Rule:
    """Where the option is given, `other` is left out or has one of the accepted values."""
    return Rule(other, accepted, False, values)


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a recipe: its default, the values it accepts, and what it asks of others."""

    default: Any = None
    choices: tuple[str, ...] = ()  # empty: all values of the field's type
    range: str | None = None  # in words, see `in_range`
    rules: tuple[Rule, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What everybody may know of a recipe; its options are the fields of `EstimatorConfig`."""

    name: str
    description: str  # one paragraph for a report
    # Read of the teacher without any option: nothing, the sampled token's log-prob, its most likely
    # ids with their log-probs, or its whole distribution.
    teacher: TeacherNeed = "none"
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    # An expectation over sampled tokens: they must come from the distribution that is scored.
    is_policy_gradient: bool = False
    # Gives a completion its reward: a grader (task), or a judge's score, rubric, rubric by stages.
    reward: RewardKind = "none"
    completions: tuple[CompletionsFrom, ...] = ("student", "teacher", "references")
    # The options, defaults included, under which loss and gradient are 0 at student = teacher: one
    # of these sets of accepted values; none: never.
    zero_at_teacher: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    # The KL whose gradient the recipe advertises; reverse is KL(student || teacher). option: that
    # of the option `divergence`; own: another objective.
    target: Literal["reverse", "forward", "option", "own"] = "own"
    # Weight of the cross-entropy of the given token; None: 1 - kd_weight.
    cross_entropy: float | None = 0.0
    audited: tuple[Mapping[str, Any], ...] = ()  # options under which `opdjax audit` measures it

    @property
    def is_rewarded(self) -> bool:
        """Whether the recipe learns from a reward of whole completions."""
        return self.reward != "none"

    @property
    def is_judged(self) -> bool:
        """Whether that reward comes from a judge."""
        return self.reward in ("scalar", "rubric", "stages")

    @property
    def has_stages(self) -> bool:
        """Whether the reward is given to the stages of a completion."""
        return self.reward == "stages"

    def with_defaults(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the recipe's defaults, and with what a convention sets."""
        found = {name: option.default for name, option in self.options.items()} | dict(options)
        return found | TOP_K_CONVENTIONS.get(found.get("convention"), {})

    def is_zero_at_teacher(self, options: Mapping[str, Any]) -> bool:
        """Whether loss and gradient are 0 at student = teacher under these options."""
        found = self.with_defaults(options)
        return any(
            all(found[name] in accepted for name, accepted in case.items())
            for case in self.zero_at_teacher
        )

    def advertised(self, options: Mapping[str, Any]) -> str:
        """`reverse` or `forward`, the KL whose gradient is advertised; `own` for neither."""
        if self.target == "option":
            divergence = self.with_defaults(options)["divergence"]
            return divergence if divergence in _DIRECTIONS else "own"
        return "own" if any(options.get(name) for name in _ALTERING) else self.target

    def cross_entropy_weight(self, options: Mapping[str, Any]) -> float:
        """Weight of -log student(y) of the given token y in the loss."""
        if self.cross_entropy is None:
            return 1 - self.with_defaults(options)["kd_weight"]
        return self.cross_entropy

    def teacher_need(self, options: Mapping[str, Any]) -> TeacherNeed:
        """What is read of the teacher under these options."""
        if options.get("kd_weight") == 0:
            return "none"
        if options.get("extra_draws") or options.get("return_to_go") == "expected":
            return "vocabulary"
        return "token" if options.get("baseline") == "batch_mean" else self.teacher

    def teacher_top_k(self, options: Mapping[str, Any]) -> int:
        """How many of the teacher's most likely ids are read; 0 where none are."""
        if self.teacher_need(options) != "top_k":
            return 0
        return self.with_defaults(options)["support_top_k"]

    def check(self, options: Mapping[str, Any], aggregation: str = "token_mean") -> None:
        """ConfigError where an option does not exist, is out of range or contradicts another."""
        for name, value in options.items():
            if name not in self.options:
                has = ", ".join(self.options) or "none"
                raise ConfigError(f"recipe {self.name!r} has no option {name!r}; it has {has}")
            option, field = self.options[name], f"estimator.{name}"
            expected = f"{' or '.join(option.choices)} where the recipe is {self.name}"
            require(not option.choices or value in option.choices, field, value, expected)
            is_free = option.range is None or isinstance(value, str)
            require(is_free or in_range(value, option.range), field, value, option.range)
            for rule in option.rules:
                self._check_rule(name, value, rule, options)
        is_possible = aggregation != "stage_token_mean" or self.has_stages
        expected = f"another one where the recipe is {self.name}: it has no stages"
        require(is_possible, "estimator.aggregation", aggregation, expected)

    def _check_rule(self, name: str, value: Any, rule: Rule, options: Mapping[str, Any]) -> None:
        if rule.values and value not in rule.values:
            return
        if rule.is_needed:
            other = options.get(rule.other, self.options[rule.other].default)
            instead = "another value" if rule.values else "none"
            expected = f"{instead} unless {rule.other} is {rule.expected}"
            require(rule.accepts(other), f"estimator.{name}", value, expected)
        elif rule.other in options:
            expected = f"{rule.expected} where {name} is {value}"
            other = options[rule.other]
            require(rule.accepts(other), f"estimator.{rule.other}", other, expected)


# Default of importance_cap, by correction.
DEFAULT_CAPS = dict.fromkeys(get_args(Correction)[1:5], 2.0) | {"sequence_mask": 3.0}
_ALTERING = ("reward_floor", "power_alpha", "prefix_weight", "discount")  # change the objective
_DIVERGENCES = get_args(Divergence)
_DIRECTIONS, _SKEWS = _DIVERGENCES[:2], _DIVERGENCES[3:]
# What other libraries compute under the name top-k distillation. A library with one direction sets
# the divergence too. verl also takes 0 for a token's negative value (clamp_at_zero), and clamps
# log-probs at -10 and the loss at 10, which is left out here. DistillKit spreads the missing mass
# of each side over the same ids, which equals `tail`. EasyDeL's value is larger by the teacher's
# entropy.
_OF_TEACHER = {"support": "teacher"}
_UNSCALED = _OF_TEACHER | {"renormalize": "none"}
TOP_K_CONVENTIONS: Mapping[Convention, Mapping[str, Any]] = {
    "tunix": _OF_TEACHER | {"renormalize": "both", "divergence": "forward"},
    "verl": _UNSCALED | {"clamp_at_zero": True, "divergence": "forward"},
    "nemo_rl": _OF_TEACHER | {"renormalize": "both"},
    "nemo_rl_floor": _OF_TEACHER | {"renormalize": "teacher", "outside": "floor"},
    "easydel": _OF_TEACHER | {"renormalize": "teacher", "divergence": "forward"},
    "trl": _UNSCALED | {"outside": "tail"},
    "thunlp": _UNSCALED | {"support": "student", "weight": "p_student", "divergence": "reverse"},
    "distillkit": _UNSCALED | {"outside": "tail"},
}
_ONE_DIRECTION = tuple(name for name, sets in TOP_K_CONVENTIONS.items() if "divergence" in sets)

# Options that recipes share.
_COUNT = "at least 1"
_DISCOUNTED = Rule("discount", "more than 0", is_needed=True)
_PENALISED = Rule("reference_kl_coef", "more than 0", is_needed=True)
_CLIP_LOW = Option(0.2, range="more than 0 and less than 1")
_CLIP_HIGH = Option(0.28, range="more than 0")
_CORRECTED = (
    fixes("extra_draws", 0, values=get_args(Correction)[1:]),
    Rule("importance_cap", "more than 1", values=("token_mask",)),  # the bounds are 1 / cap and cap
)
_IF_CLIPPED = (needs("importance", "ppo_clip"),)
_SAMPLED = {  # of recipes that sample tokens and score them
    "discount": Option(0.0, range="from 0 to 1"),
    "return_to_go": Option("sampled", ("sampled", "expected"), rules=(_DISCOUNTED,)),
    "reward_floor": Option(range="less than 0 (nats)"),
    "power_alpha": Option(range="more than 0", rules=(fixes("reward_floor"),)),
    "prefix_weight": Option(0.0, range="0 (off) or more"),
    "extra_draws": Option(0, range="0 (off) or more"),
    "task_reward_coef": Option(0.0),
    "importance": Option("none", get_args(Correction), rules=_CORRECTED),
    "importance_cap": Option(range="more than 0", rules=(needs("importance", *DEFAULT_CAPS),)),
    "clip_low": dataclasses.replace(_CLIP_LOW, rules=_IF_CLIPPED),
    "clip_high": dataclasses.replace(_CLIP_HIGH, rules=_IF_CLIPPED),
}
_STATE = {  # of an exact divergence: how stale its contexts are
    "importance": Option("none", ("none", "prefix_truncate")),
    "importance_cap": Option(range="more than 0", rules=(needs("importance", "prefix_truncate"),)),
}
_CLIPPED = {  # of a clipped policy gradient on rewards
    "advantage": Option("mean"),
    "clip_low": _CLIP_LOW,
    "clip_high": _CLIP_HIGH,
    "dual_clip": Option(3.0, range="0 (off), or more than 1"),
    "reference_kl_coef": Option(0.0, range="0 (off) or more"),
    "reference_kl": Option("k3_direct", rules=(_PENALISED,)),
}
_OUTSIDE = (
    needs("renormalize", "none", values=("tail",)),
    needs("renormalize", "none", "teacher", values=("floor",)),
)
# A share of 0 or 1 of a mixture leaves nothing to learn.
_MIXED = Rule("beta", "more than 0 and less than 1", values=_SKEWS)
_WEIGHTED = (fixes("outside", "drop"), fixes("renormalize", "none"), fixes("divergence", "reverse"))
_SET_BY_CONVENTION = (
    *map(fixes, ("support", "renormalize", "outside", "weight")),
    fixes("divergence", values=_ONE_DIRECTION),
)
_WITHOUT_TEACHER = tuple(
    fixes(name, values=(0,)) for name in ("support_top_k", "renormalize", "divergence")
)
# Fields that rows share, and options under which they are audited.
_ON_POLICY = {"is_policy_gradient": True, "completions": ("student",)}
_REWARDED = {"options": _CLIPPED, **_ON_POLICY}
_ON_LOG_RATIO = {
    "zero_at_teacher": ({"task_reward_coef": (None, 0.0)},),
    "target": "reverse",
    **_ON_POLICY,
}
_EXPECTED = {"discount": 1.0, "return_to_go": "expected"}
_COARSE = {"renormalize": "none", "outside": "tail"}
_EIGHT = {"support_top_k": 8}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "opd",
            "Each sampled token is rewarded with log p_teacher - log p_student, and a policy "
            "gradient moves its probability.",
            "token",
            _SAMPLED,
            **_ON_LOG_RATIO,
            audited=(
                {},
                {"extra_draws": 3},
                {"reward_floor": -2.0},
                {"power_alpha": 0.5},
                {"discount": 1.0},
                _EXPECTED,
                {"prefix_weight": 0.5},
            ),
        ),
        Recipe(
            "vopd",
            "Each sampled token is rewarded with log p_teacher - log p_student, less a baseline: "
            "the expected reward at that position. The baseline lowers the variance of the policy "
            "gradient and keeps its mean.",
            "vocabulary",
            {
                "baseline": Option("full", get_args(Baseline)),
                "support_top_k": Option(
                    100, range=_COUNT, rules=(needs("baseline", "student_topk"),)
                ),
                **_SAMPLED,
            },
            **_ON_LOG_RATIO,
            audited=(
                {"baseline": "full"},
                *({"baseline": "student_topk", "support_top_k": k} for k in (5, 20, 100)),
                {"baseline": "optimal"},
                {"baseline": "batch_mean"},
                {"baseline": "full", **_EXPECTED},
            ),
        ),
        Recipe(
            "full_kl",
            "The divergence between the two next-token distributions is minimised at every "
            "position of the completion, over the whole vocabulary.",
            "vocabulary",
            {
                "divergence": Option("reverse", _DIVERGENCES, rules=(_MIXED,)),
                # Default 0.5 of jsd, 0.1 of a skew divergence.
                "beta": Option(range="from 0 to 1", rules=(needs("divergence", "jsd", *_SKEWS),)),
                **_STATE,
            },
            zero_at_teacher=({},),
            target="option",
            audited=tuple({"divergence": name} for name in _DIVERGENCES),
        ),
        Recipe(
            "topk_kl",
            "The divergence is minimised at every position on a few of the most likely tokens "
            "instead of the whole vocabulary.",
            "vocabulary",
            {
                "divergence": Option("reverse", _DIRECTIONS),
                "support": Option("student"),
                "support_top_k": Option(100, range=_COUNT),
                "renormalize": Option("both"),
                "outside": Option("drop", rules=_OUTSIDE),
                "weight": Option(rules=_WEIGHTED),
                "convention": Option(rules=_SET_BY_CONVENTION),
                **_STATE,
            },
            zero_at_teacher=(
                {"weight": ("p_student", "p_teacher", "none")},
                {"renormalize": ("both",)},
                {"outside": ("tail",)},
            ),
            audited=(
                {"support": "student", **_EIGHT},
                {"support": "student", **_EIGHT, "renormalize": "none"},
                {"support": "student", **_EIGHT, **_COARSE},
                {"support": "union", **_EIGHT, **_COARSE},
                {"convention": "verl", **_EIGHT},
                {"convention": "tunix", **_EIGHT},
                {"convention": "trl", **_EIGHT, "divergence": "forward"},
                {"convention": "thunlp", **_EIGHT},
            ),
        ),
        Recipe(
            "npd",
            "Cross-entropy on the student's own kept tokens, mixed with the divergence from the "
            "teacher on its most likely tokens.",
            "top_k",
            {
                "kd_weight": Option(0.9, range="from 0 to 1", rules=_WITHOUT_TEACHER),
                "support_top_k": Option(10, range=_COUNT),
                "renormalize": Option("none"),
                "divergence": Option("forward", _DIRECTIONS),
                **_STATE,
            },
            zero_at_teacher=({"kd_weight": (1.0,), "renormalize": ("both",)},),
            cross_entropy=None,
            audited=({}, {"kd_weight": 1.0}),
        ),
        Recipe(
            "sft",
            "Cross-entropy on the given tokens.",
            completions=("teacher", "references"),
            target="forward",
            cross_entropy=1.0,
            audited=({},),
        ),
        Recipe(
            "grpo",
            "The reward of an answer is 1 where a grader finds it right; its advantage over the "
            "other answers to the prompt multiplies a clipped policy gradient.",
            reward="task",
            **_REWARDED,
        ),
        Recipe(
            "ropd",
            "The reward of an answer is the weighted share of its rubric's criteria that it meets "
            "(ROPD, arXiv 2605.07396); its advantage over the other answers to the prompt "
            "multiplies a clipped policy gradient.",
            reward="rubric",
            **_REWARDED,
        ),
        Recipe(
            "tjudge",
            "The reward of an answer is one number from a judge, without a rubric: the control "
            "that shows what rubrics add.",
            reward="scalar",
            **_REWARDED,
        ),
        Recipe(
            "ropd_stages",
            "Each stage of an answer is scored by its own criteria and credited with the scores of "
            "later stages too (RubricEM, arXiv 2605.10899); advantages over the other answers to "
            "the prompt multiply a clipped policy gradient.",
            options={
                "stage_credit": Option(range="K * K numbers, row by row, for K stages"),
                **_CLIPPED,
            },
            reward="stages",
            **_ON_POLICY,
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """The row of that name; ConfigError where there is none."""
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; expected one of {sorted(RECIPES)}")
    return RECIPES[name]


# ROPD as released, and as its paper prints it (arXiv 2605.07396, section 2.2 and algorithm 1):
# fields of `EstimatorConfig`.
ROPD_RELEASE = {
    "recipe": "ropd",
    "aggregation": "token_mean",
    "advantage": "mean",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
}
ROPD_PRINTED = ROPD_RELEASE | {
    "aggregation": "sequence_mean_token_mean",
    "advantage": "mean_std",
    "dual_clip": 0.0,
}
