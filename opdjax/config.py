"""Every setting of a run: frozen dataclasses, one a section, composed into `Config`. Standard library only.

An experiment file returns a `Config`; the command line overrides single fields; the resolved result is `config.json` in
the work directory. `None` for an option of a recipe means that recipe's own default.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from typing import Any, Literal

from opdjax.fields import ConfigError, require, require_types

PACKAGE = pathlib.Path(__file__).parent
# Models by name: such a name is no directory's and no hub id's, and means the same on every machine that reads a config.
MINI_TEACHER, MINI_STUDENT = "@mini_teacher", "@mini_student"  # the built-in pair
STUDENT = "@student"  # as teacher.path: the student that is trained, with the weights it has at each step
MINI_PAIR = PACKAGE / "assets" / "mini_pair"  # where it lies: `teacher` and `student`
TEACHER_FIELDS = ("prompt", "answer", "reference")  # of a row, in data.teacher_prompt_format


def _require_sampling(section: str, sampling: Any) -> None:
    """The fields that drawing rollouts and drawing answers share."""
    require(sampling.max_completion_length > 0, f"{section}.max_completion_length", sampling.max_completion_length, "at least 1")
    require(sampling.temperature > 0, f"{section}.temperature", sampling.temperature, "more than 0")
    require(0 < sampling.top_p <= 1, f"{section}.top_p", sampling.top_p, "more than 0 and at most 1")
    require(sampling.top_k >= 0, f"{section}.top_k", sampling.top_k, "0 (off) or more")


def _require_seed(field: str, seed: int) -> None:
    """Random bit generators take no negative seed, jitted functions no more than 31 bits."""
    require(0 <= seed < 2**31, field, seed, "from 0 to 2147483647")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the run."""

    # Local directory in Hugging Face layout, a hub id such as Qwen/Qwen3-1.7B-Base, or @mini_teacher or @mini_student, the built-in pair.
    # Of the teacher also @student: the student in training is its own teacher, with the weights of each step, through which no
    # gradient flows; data.teacher_prompt_format shows the teacher more. The student's own path is its frozen start instead.
    path: str = ""
    revision: str | None = None  # branch, tag or commit of a hub id
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward pass; auto: bfloat16 on TPU and GPU, float32 on CPU


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The prompts and how each model sees them."""

    # arithmetic:SPLIT for the built-in task, a .jsonl file, parquet:PATH (file, directory or pattern), hf:NAME[@CONFIG]#SPLIT,
    # or tfds:NAME[/CONFIG][:VERSION]#SPLIT. NAME may be a directory (./DIR, /DIR), SPLIT a slice such as train[:10%].
    source: str = "arithmetic:train"
    prompt_format: str = "{prompt}"  # wrapped around a prompt that is a string; must contain {prompt}
    system_prompt: str | None = None  # put before the messages; needs a chat format
    format: Literal["chat", "raw"] = "chat"  # the tokenizer's chat template, or the bare text
    enable_thinking: bool | None = None  # handed to the chat template; None: the template's own default
    teacher_format: Literal["chat", "raw"] | None = None  # None: the teacher sees what the student sees
    teacher_enable_thinking: bool | None = None  # None: as enable_thinking
    max_prompt_length: int = 512  # tokens, template included
    overlong: Literal["skip", "error"] = "skip"  # what to do with longer prompts: leave them out, counted, or refuse the data
    # Of any source: a string, or a list of messages, of which the assistant's turn that it may end in becomes a reference.
    # `a.b` is field b of column a (reward_model.ground_truth), `a.0` the first item of a list (prompt.0.content).
    prompt_column: str = "prompt"
    answer_column: str | None = None  # the value to grade by, a string or a number; None: `answer`, where there is one
    reference_column: str | None = None  # worked answers: text, texts or messages; None: `references` or `reference`, where there is one
    # What the teacher reads in the place of prompt_format: {prompt} (in messages the last turn of the user), and what only it is
    # shown, {answer} and {reference}, the row's first. Other braces stay as they are. None: as prompt_format.
    teacher_prompt_format: str | None = None

    def __post_init__(self):
        require_types(self, "data.")
        require("{prompt}" in self.prompt_format, "data.prompt_format", self.prompt_format, "a text that contains {prompt}")
        self._check_teacher_prompt_format()
        require(self.max_prompt_length > 0, "data.max_prompt_length", self.max_prompt_length, "at least 1")
        for name in ("prompt_column", "answer_column", "reference_column"):
            require(getattr(self, name) != "", f"data.{name}", "", "the name of a column")
        is_teacher_chat = (self.teacher_format or self.format) == "chat"
        is_chat, thinking = self.format == "chat" or is_teacher_chat, self.teacher_enable_thinking
        require(is_chat or self.system_prompt is None, "data.system_prompt", self.system_prompt, "none where no format is chat")
        require(is_chat or self.enable_thinking is None, "data.enable_thinking", self.enable_thinking, "none where no format is chat")
        require(is_teacher_chat or thinking is None, "data.teacher_enable_thinking", thinking, "none where the teacher's format is raw")

    def _check_teacher_prompt_format(self):
        text = "{prompt}" if self.teacher_prompt_format is None else self.teacher_prompt_format
        require("{prompt}" in text, "data.teacher_prompt_format", text, "a text that contains {prompt}")
        # A misspelt field would be shown to the teacher as it stands, and no error would tell.
        for name in set(re.findall(r"\{(\w+)\}", text)) - set(TEACHER_FIELDS):
            close = difflib.get_close_matches(name, TEACHER_FIELDS, n=1)
            require(not close, "data.teacher_prompt_format", text, f"{{{''.join(close)}}} in place of {{{name}}}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Who writes the completions that are trained on, and how they are drawn."""

    num_generations: int = 1  # completions per prompt
    max_completion_length: int = 512  # tokens, stop token included
    temperature: float = 1.0  # the student is scored at this temperature too where it is the student that is sampled
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # beside the end-of-sequence ids of the checkpoint
    source: Literal["student", "teacher", "references"] = "student"  # student: on-policy; references: the data's own answers

    def __post_init__(self):
        require_types(self, "sampling.")
        require(self.num_generations > 0, "sampling.num_generations", self.num_generations, "at least 1")
        _require_sampling("sampling", self)
        require(0 <= self.min_p < 1, "sampling.min_p", self.min_p, "at least 0 (off) and less than 1")

    @property
    def has_filter(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclasses.dataclass(frozen=True)
class EstimatorConfig:
    """The recipe and its options; an option that the recipe does not have is refused."""

    recipe: Literal["opd", "vopd", "full_kl", "topk_kl", "sft"] = "vopd"
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "fixed_denominator"] = "token_mean"
    tile: int = 512  # tokens whose logits exist at a time, per device
    discount: float | None = None  # opd, vopd: 0 credits a token with its own reward only, 1 with all that follow
    return_to_go: Literal["sampled", "expected"] | None = None  # opd, vopd with a discount: later rewards as drawn, or -KL in their place
    reward_floor: float | None = None  # opd, vopd: no token's reward is below it, nats (REOPOLD: log(lambda / (1 - lambda)))
    power_alpha: float | None = None  # opd, vopd: the reward is teacher(y)^a - student(y)^a (PowerOPD)
    prefix_weight: float | None = None  # opd, vopd: IW-OPD's gain, 0.5 in its release; early tokens count up to 1 + gain times
    extra_draws: int | None = None  # opd, vopd: so many more tokens drawn at each context and averaged with the first
    task_reward_coef: float | None = None  # opd, vopd: adds coef * (right answer - mean of the prompt's completions)
    # opd, vopd: ratio of the student to the policy that drew the tokens. full_kl, topk_kl: prefix_truncate, of the tokens before
    importance: Literal["none", "token_truncate", "token_mask", "sequence_mask", "prefix_truncate", "ppo_clip"] | None = None
    importance_cap: float | None = None  # largest ratio; None: 3 for sequence_mask, 2 for the others
    importance_floor: float | None = None  # token_mask: smallest ratio; None: 0.5
    clip_low: float | None = None  # ppo_clip: ratios below 1 - clip_low gain nothing; None: 0.2
    clip_high: float | None = None  # ppo_clip: nor ratios above 1 + clip_high; None: 0.28
    baseline: Literal["full", "student_topk", "optimal", "batch_mean"] | None = None  # vopd
    baseline_top_k: int | None = None  # vopd with baseline student_topk
    divergence: Literal["reverse", "forward", "jsd", "skew_forward", "skew_reverse"] | None = None  # full_kl; topk_kl (the first two)
    beta: float | None = None  # full_kl with divergence jsd: 0 forward KL, 1 reverse KL
    skew_alpha: float | None = None  # full_kl with a skew divergence: the share of its first argument in the second
    # topk_kl: the most likely ids of whom; of both: in one set or the other, in both, in exactly one
    support: Literal["student", "teacher", "union", "intersection", "symmetric_difference"] | None = None
    support_top_k: int | None = None  # topk_kl: how many ids of each side
    renormalize: Literal["both", "teacher", "none"] | None = None  # topk_kl: which side is renormalised on those ids
    outside: Literal["drop", "tail", "floor"] | None = None  # topk_kl: the ids outside; tail needs renormalize none, floor teacher or none
    clamp_at_zero: bool | None = None  # topk_kl: a token's negative value counts as 0
    weight: Literal["p_student", "p_teacher", "none"] | None = None  # topk_kl as a policy gradient over the kept ids, weighted so
    # topk_kl: all five options above as that system ships them; estimators/divergence.py has the table
    convention: Literal["tunix", "verl", "nemo_rl", "nemo_rl_floor", "easydel", "trl", "thunlp", "distillkit"] | None = None

    def __post_init__(self):
        require_types(self, "estimator.")
        require(self.tile > 0, "estimator.tile", self.tile, "at least 1")
        require(self.discount is None or 0 <= self.discount <= 1, "estimator.discount", self.discount, "from 0 to 1")
        require(self.beta is None or 0 <= self.beta <= 1, "estimator.beta", self.beta, "from 0 to 1")
        require(self.baseline_top_k is None or self.baseline_top_k > 0, "estimator.baseline_top_k", self.baseline_top_k, "at least 1")
        has_topk, has_jsd = self.baseline == "student_topk", self.divergence == "jsd"
        require(
            has_topk or self.baseline_top_k is None, "estimator.baseline_top_k", self.baseline_top_k, "none unless baseline is student_topk"
        )
        require(has_jsd or self.beta is None, "estimator.beta", self.beta, "none unless divergence is jsd")
        has_skew = self.divergence in ("skew_forward", "skew_reverse")
        require(has_skew or self.skew_alpha is None, "estimator.skew_alpha", self.skew_alpha, "none unless divergence is a skew one")
        is_share = self.skew_alpha is None or 0 < self.skew_alpha < 1
        require(is_share, "estimator.skew_alpha", self.skew_alpha, "more than 0 (the plain KL) and less than 1 (nothing left)")
        self._check_topk()
        self._check_reward()
        self._check_importance()

    def _check_reward(self):
        floor, alpha, draws = self.reward_floor, self.power_alpha, self.extra_draws
        require(floor is None or floor < 0, "estimator.reward_floor", floor, "less than 0 (nats)")
        require(alpha is None or alpha > 0, "estimator.power_alpha", alpha, "more than 0")
        require(
            floor is None or alpha is None, "estimator.reward_floor", floor, "none where power_alpha is given: one transform of the reward"
        )
        require(self.prefix_weight is None or self.prefix_weight >= 0, "estimator.prefix_weight", self.prefix_weight, "0 (off) or more")
        require(draws is None or draws >= 0, "estimator.extra_draws", draws, "0 (off) or more")
        is_discounted = bool(self.discount)
        require(
            is_discounted or self.return_to_go is None, "estimator.return_to_go", self.return_to_go, "none unless discount is more than 0"
        )

    def _check_importance(self):
        kind, recipe = self.importance or "none", self.recipe
        owners = {
            "importance_cap": ("token_truncate", "token_mask", "sequence_mask", "prefix_truncate"),
            "importance_floor": ("token_mask",), "clip_low": ("ppo_clip",), "clip_high": ("ppo_clip",),
        }  # fmt: skip
        for name, kinds in owners.items():
            value = getattr(self, name)
            require(value is None or kind in kinds, f"estimator.{name}", value, f"none unless importance is {' or '.join(kinds)}")
            require(value is None or value > 0, f"estimator.{name}", value, "more than 0")
        floor, cap = self.importance_floor or 0.5, self.importance_cap or 2.0
        require(kind != "token_mask" or floor < cap, "estimator.importance_floor", floor, f"less than importance_cap, which is {cap}")
        require((self.clip_low or 0) < 1, "estimator.clip_low", self.clip_low, "less than 1")
        if recipe in ("full_kl", "topk_kl"):
            expected = f"none or prefix_truncate: {recipe} draws no token, so that only how its contexts were reached can be stale"
            require(kind in ("none", "prefix_truncate"), "estimator.importance", kind, expected)
        expected = "0 where importance is given: extra tokens are drawn from the student as it is"
        require(kind == "none" or not self.extra_draws, "estimator.extra_draws", self.extra_draws, expected)

    def _check_topk(self):
        k, fixed = self.support_top_k, ("support", "renormalize", "outside", "clamp_at_zero", "weight")
        require(k is None or k > 0, "estimator.support_top_k", k, "at least 1")
        has_divergence = self.recipe != "topk_kl" or self.divergence in (None, "reverse", "forward")
        require(has_divergence, "estimator.divergence", self.divergence, "reverse or forward where the recipe is topk_kl")
        if self.convention in ("tunix", "verl", "easydel", "thunlp"):
            fixed += ("divergence",)
        for name in fixed if self.convention is not None else ():
            require(getattr(self, name) is None, f"estimator.{name}", getattr(self, name), f"none: convention {self.convention} sets it")
        has_outside = {"none": ("tail", "floor"), "teacher": ("floor",)}.get(self.renormalize, ())
        expected = f"drop where renormalize is {self.renormalize or 'both'}"
        require(self.outside in (None, "drop", *has_outside), "estimator.outside", self.outside, expected)
        if self.weight is not None:
            require(self.outside in (None, "drop"), "estimator.outside", self.outside, "drop where weight is given")
            require(self.renormalize in (None, "none"), "estimator.renormalize", self.renormalize, "none where weight is given")
            require(not self.clamp_at_zero, "estimator.clamp_at_zero", self.clamp_at_zero, "false where weight is given")
            require(self.divergence in (None, "reverse"), "estimator.divergence", self.divergence, "reverse where weight is given")

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's options that were given."""
        shared = ("recipe", "aggregation", "tile")
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in shared}
        return {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 1e-5  # the peak
    schedule: Literal["constant", "linear", "cosine"] = "cosine"  # after the warm-up, down to 0 at the last step
    warmup_steps: int = 0  # rising linearly from 0
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # global norm that gradients are clipped to; 0: no clipping

    def __post_init__(self):
        require_types(self, "optimizer.")
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "more than 0")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optimizer.b1, b2", (self.b1, self.b2), "each at least 0 and less than 1")
        require(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "more than 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 (off) or more")
        require(self.max_grad_norm >= 0, "optimizer.max_grad_norm", self.max_grad_norm, "0 (off) or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = 100  # optimizer updates
    prompts_per_step: int = 64
    gradient_accumulation_steps: int = 1  # micro-batches a step; changes memory, never the gradient
    remat: bool = False  # recompute each layer in the backward pass: less memory, one more forward
    max_nonfinite_steps: int = 5  # so many skipped steps in a row stop the run

    def __post_init__(self):
        require_types(self, "train.")
        for name in ("num_steps", "prompts_per_step", "gradient_accumulation_steps", "max_nonfinite_steps"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "at least 1")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sampled and greedy answers to held-out prompts, before, during and after training."""

    source: str | None = "arithmetic:test"  # as data.source; rows need an answer. None: no evaluation
    grader: Literal["final_number", "boxed", "exact"] = "final_number"  # what of a completion is compared with the answer
    num_prompts: int = 512  # the first so many
    num_samples: int = 8  # answers a prompt: the k of avg@k and pass@k
    temperature: float = 1.0
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    max_completion_length: int = 512
    batch_size: int = 512  # rows sampled at a time
    extra_temperatures: tuple[float, ...] = ()  # the untrained student is also measured at these
    every: int = 0  # steps between evaluations; 0: only before and after
    seed: int = 0  # common to all runs that are compared: they then answer the same prompts with the same draws
    prompt_column: str | None = None  # None: data.prompt_column
    answer_column: str | None = None  # None: data.answer_column

    def __post_init__(self):
        require_types(self, "evaluation.")
        for name in ("num_prompts", "num_samples", "batch_size"):
            require(getattr(self, name) > 0, f"evaluation.{name}", getattr(self, name), "at least 1")
        _require_sampling("evaluation", self)
        require(all(t > 0 for t in self.extra_temperatures), "evaluation.extra_temperatures", self.extra_temperatures, "more than 0 each")
        require(self.every >= 0, "evaluation.every", self.every, "0 (off) or more")
        _require_seed("evaluation.seed", self.seed)
        for name in ("prompt_column", "answer_column"):
            require(getattr(self, name) != "", f"evaluation.{name}", "", "the name of a column")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to continue from, and which step is the best."""

    every: int = 50  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept
    best_metric: str = "avg@k"  # of the evaluation; the best checkpoint by it is kept as well

    def __post_init__(self):
        require_types(self, "checkpoint.")
        require(self.every > 0, "checkpoint.every", self.every, "at least 1")
        require(self.keep > 0, "checkpoint.keep", self.keep, "at least 1")
        require(self.best_metric in ("avg@k", "pass@k", "greedy"), "checkpoint.best_metric", self.best_metric, "avg@k, pass@k or greedy")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written beside metrics.jsonl."""

    samples_every: int = 50  # steps between rollouts written to samples.jsonl; 0: never
    num_samples: int = 4  # rollouts written each time
    tensorboard: bool = False  # event files too; needs the tensorboard extra
    # Steps between those that also measure entropies, overlap of student and teacher, quantiles of the reward; 0: never
    diagnostics_every: int = 10

    def __post_init__(self):
        require_types(self, "log.")
        require(self.samples_every >= 0, "log.samples_every", self.samples_every, "0 (off) or more")
        require(self.diagnostics_every >= 0, "log.diagnostics_every", self.diagnostics_every, "0 (off) or more")
        require(self.num_samples > 0, "log.num_samples", self.num_samples, "at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are used."""

    data: int = -1  # devices that rows are split over; -1: all there are

    def __post_init__(self):
        require_types(self, "mesh.")
        require(self.data == -1 or self.data > 0, "mesh.data", self.data, "-1 (all devices) or at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    student: ModelConfig = ModelConfig(MINI_STUDENT)
    teacher: ModelConfig = ModelConfig(MINI_TEACHER)
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of prompts, rollouts and everything else that is drawn

    def __post_init__(self):
        require_types(self)
        _require_seed("seed", self.seed)
        rows, parts = self.rows_per_step, self.train.gradient_accumulation_steps
        require(rows % parts == 0, "train.gradient_accumulation_steps", parts, f"a divisor of the {rows} rows a step")
        self._check_source()
        require(self.student.path != STUDENT, "student.path", STUDENT, "the checkpoint that the student starts from")
        if self.teacher_is_student:
            for name, default in (("revision", None), ("dtype", "auto")):
                found = getattr(self.teacher, name)
                require(found == default, f"teacher.{name}", found, f"{default}: the teacher is the student ({STUDENT})")

    @property
    def teacher_is_student(self) -> bool:
        """Whether the student in training is its own teacher."""
        return self.teacher.path == STUDENT

    @property
    def teacher_model(self) -> ModelConfig:
        """Where the teacher's tokenizer, shape and type are read."""
        return self.student if self.teacher_is_student else self.teacher

    def _check_source(self):
        """Whose completions a recipe may be trained on."""
        recipe, source = self.estimator.recipe, self.sampling.source
        is_policy_gradient = recipe in ("opd", "vopd")
        require(
            not is_policy_gradient or source == "student", "sampling.source", source, f"student: {recipe} averages over the student's draws"
        )
        is_signal = recipe != "sft" or source != "student"
        require(is_signal, "sampling.source", source, "teacher or references: cross-entropy on its own draws teaches a student nothing")
        if source == "references":
            is_plain = self.sampling.temperature == 1 and not self.sampling.has_filter
            require(is_plain, "sampling.temperature, top_p, top_k, min_p", "set", "none of them where nothing is sampled (references)")
        has_no_teacher = recipe == "sft" and source == "references"
        for name in ("teacher_format", "teacher_enable_thinking", "teacher_prompt_format") if has_no_teacher else ():
            require(getattr(self.data, name) is None, f"data.{name}", getattr(self.data, name), "none where no teacher reads the data")
        corrected = self.estimator.importance or "none"
        expected = "none where the completions are not the student's: nothing tells how likely they were drawn"
        require(corrected == "none" or source == "student", "estimator.importance", corrected, expected)
        coef, generations = self.estimator.task_reward_coef, self.sampling.num_generations
        expected = "at least 2 where estimator.task_reward_coef is given: a reward is compared with those of the same prompt"
        require(not coef or generations > 1, "sampling.num_generations", generations, expected)
        is_altered = self.sampling.has_filter or self.sampling.temperature != 1
        if is_altered and is_policy_gradient and corrected == "none":
            raise ConfigError(
                f"recipe {self.estimator.recipe!r} with sampling.temperature {self.sampling.temperature}, top_p {self.sampling.top_p}, "
                f"top_k {self.sampling.top_k}, min_p {self.sampling.min_p}: its expected gradient is then no longer the one it "
                "advertises; sample with temperature 1 and no filter, use the recipe full_kl, or set estimator.importance to accept the "
                "KL at that temperature, without the tokens that a filter takes away"
            )

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer update."""
        return self.train.prompts_per_step * self.sampling.num_generations


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """How much `opdjax audit` measures."""

    num_contexts: int = 1000  # random ones, every draw of which is enumerated
    vocab: int = 50  # of the random contexts, at most 200
    num_prompts: int = 128  # that the student answers
    num_generations: int = 2  # answers a prompt: what differs between them is the noise of trajectories
    # The gradients of all parameters too, one rollout at a time, some sixty passes over all rollouts; memory for five float32
    # copies of the student.
    parameter_space: bool = True

    def __post_init__(self):
        require_types(self, "how.")
        for name, least in (("num_contexts", 1), ("vocab", 2), ("num_prompts", 2), ("num_generations", 2)):
            require(getattr(self, name) >= least, f"how.{name}", getattr(self, name), f"at least {least}")
        require(self.vocab <= 200, "how.vocab", self.vocab, "at most 200: V x V numbers are enumerated at each context")
