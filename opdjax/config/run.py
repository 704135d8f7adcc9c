"""A whole run: its sections, and what they require of each other.

An experiment file returns a `Config`; the command line overrides single fields; the resolved result
is `config.json` in the work directory. `None` for an option of a recipe means that recipe's own
default.
"""

import dataclasses
from typing import Annotated, Literal

from opdjax.config.api import ApiConfig, Endpoint, JudgeConfig, require_model
from opdjax.config.data import JUDGED_FIELDS, DataConfig, TeachConfig
from opdjax.config.estimator import EstimatorConfig
from opdjax.config.model import MINI_STUDENT, MINI_TEACHER, STUDENT, ModelConfig
from opdjax.config.near_policy import NearPolicyConfig
from opdjax.config.presets import grader_of
from opdjax.config.recipes import RECIPES, Recipe
from opdjax.config.rubrics import RubricsConfig
from opdjax.config.sampling import EvaluationConfig, SamplingConfig
from opdjax.config.train import (
    CheckpointConfig,
    FrozenWeights,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError, Section, require


class Config(Section):
    """A whole run."""

    student: ModelConfig = ModelConfig(MINI_STUDENT)  # The model that is trained.
    teacher: ModelConfig = ModelConfig(MINI_TEACHER)  # The model that the student learns from.
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    near_policy: NearPolicyConfig = NearPolicyConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    rubrics: RubricsConfig = RubricsConfig()
    rubricator: JudgeConfig = JudgeConfig()  # Writes rubrics and reflections.
    verifier: JudgeConfig = JudgeConfig()  # Grades answers by a rubric, or with a plain score.
    teach: TeachConfig = TeachConfig()
    api: ApiConfig = ApiConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    # Seed of the order of prompts, of all sampling and of initial adapters.
    seed: Annotated[int, "from 0 to 2147483647"] = 0

    def __post_init__(self):
        super().__post_init__()
        rows, parts = self.rows_per_step, self.train.gradient_accumulation_steps
        expected = f"a divisor of the {rows} rows a step"
        self.require(rows % parts == 0, "train.gradient_accumulation_steps", expected)
        packed, longest = self.train.pack_length, self.sampling.max_completion_length
        expected = f"more than sampling.max_completion_length, {longest}: rollouts are never split"
        self.require(packed is None or packed > longest, "train.pack_length", expected)
        expected = "the checkpoint that the student starts from"
        self.require(self.student.path != STUDENT, "student.path", expected)
        expected = f"dtype where teacher.path is {STUDENT} and lora.rank 0: all weights are trained"
        is_frozen = not self.teacher_is_student or self.lora.rank
        self.require(
            is_frozen or self.train.frozen_weights == "dtype", "train.frozen_weights", expected
        )
        is_own = self.teacher_is_student or not self.optimizer.teacher_ema_decay
        expected = f"0 unless teacher.path is {STUDENT}: another teacher's weights stay as they are"
        self.require(is_own, "optimizer.teacher_ema_decay", expected)
        is_counted = self.evaluation.source is not None and self.evaluation.every > 0
        expected = "more than 0, with an evaluation.source: early stopping counts evaluations"
        is_possible = is_counted or not self.train.early_stopping_patience
        self.require(is_possible, "evaluation.every", expected)
        expected = f"answers where teacher.path is {STUDENT}: such a teacher moves with the student"
        is_frozen = not self.teacher_is_student or not self.evaluation.measures
        self.require(is_frozen, "evaluation.kind", expected)
        self._check_completions()
        if self.near_policy.schedule != "none":
            self._check_near_policy()
        self._check_judges()
        if self.recipe.is_rewarded or self.is_judged:
            self._check_rewards()

    @property
    def recipe(self) -> Recipe:
        """The row of the estimator's recipe."""
        return RECIPES[self.estimator.recipe]

    @property
    def teacher_is_student(self) -> bool:
        """Whether the student in training is its own teacher."""
        return self.teacher.path == STUDENT

    @property
    def base_weights(self) -> FrozenWeights:
        """How the weights below adapters are held: the student's tables, which the loss reads, are
        never in 8 bits.
        """
        return "int8" if self.lora.rank and self.train.frozen_weights != "dtype" else "dtype"

    @property
    def teacher_model(self) -> ModelConfig:
        """The model whose tokenizer and shape the teacher has."""
        return self.student if self.teacher_is_student else self.teacher

    def endpoint(self, role: Literal["rubricator", "verifier"]) -> Endpoint:
        """The endpoint of a judge."""
        judge: JudgeConfig = getattr(self, role)
        own = {"temperature": judge.temperature, "reasoning_effort": judge.reasoning_effort}
        return self.api.endpoint(role, judge.model, judge.base_url, **own)

    @property
    def api_keys(self) -> set[str]:
        """The environment variables whose keys the run sends."""
        judges = [self.endpoint(r) for r in ("rubricator", "verifier") if getattr(self, r).model]
        teachers = [self.teach.endpoint(self.api)] if self.teach.model else []
        return {endpoint.api_key_env for endpoint in (*judges, *teachers)} - {""}

    def _check_completions(self):
        """Whose completions a recipe may be trained on, and how they may be sampled."""
        recipe, sampling, estimator = self.recipe, self.sampling, self.estimator
        source = sampling.completions_from
        reason = (
            f"{recipe.name} averages over the student's samples"
            if recipe.is_policy_gradient
            else "cross-entropy on its own samples teaches a student nothing"
        )
        expected = f"{' or '.join(recipe.completions)}: {reason}"
        is_given, fraction = source != "student", "sampling.student_fraction"
        if recipe.is_policy_gradient or "student" not in recipe.completions:
            self.require(sampling.student_fraction == 0, fraction, f"0: {reason}")
        self.require(source in recipe.completions, "sampling.completions_from", expected)
        expected = "0 where sampling.completions_from is student: it writes all completions"
        self.require(is_given or sampling.student_fraction == 0, fraction, expected)
        is_own = sampling.student_samples and self.near_policy.filter == "none"
        expected = "more than 0, or rollouts that near_policy.filter chose: cross-entropy on all "
        expected += "of its own samples teaches a student nothing"
        self.require(not is_own or estimator.kd_weight != 0, "estimator.kd_weight", expected)
        if not sampling.student_samples and source == "references":
            is_plain = sampling.temperature == 1 and not sampling.has_filter
            expected = "their defaults where nothing is sampled (references)"
            require(is_plain, "sampling.temperature, top_p, top_k", "set", expected)
            self.require(sampling.kv_dtype == "auto", "sampling.kv_dtype", f"auto: {expected}")
        reads_teacher = source != "references" or recipe.teacher != "none"
        for name in ("teacher_format", "teacher_prompt_format"):
            is_read = reads_teacher or getattr(self.data, name) is None
            self.require(is_read, f"data.{name}", "none where no teacher reads the data")
        is_uncorrected = estimator.importance in (None, "none")
        expected = "none where the completions are not the student's: their probability under the "
        expected += "policy that wrote them is unknown"
        self.require(is_uncorrected or source == "student", "estimator.importance", expected)
        expected = "at least 2 where estimator.task_reward_coef is "
        expected += "given: a reward is compared with those of the same prompt"
        is_compared = not estimator.task_reward_coef or sampling.num_generations > 1
        self.require(is_compared, "sampling.num_generations", expected)
        is_altered = sampling.has_filter or sampling.temperature != 1
        is_exact = not recipe.is_policy_gradient or recipe.is_rewarded
        if is_altered and not is_exact and is_uncorrected:
            raise ConfigError(
                f"recipe {recipe.name!r} with sampling.temperature {sampling.temperature}, top_p "
                f"{sampling.top_p}, top_k {sampling.top_k} does not have the expected gradient "
                "that it advertises; sample with temperature 1 and no filter, use an exact "
                "divergence (full_kl), or set estimator.importance to accept the KL at that "
                "temperature, without the tokens that a filter removes"
            )

    def _check_near_policy(self):
        """What rollouts that are sampled ahead of their update can be used for."""
        near, recipe, steps = self.near_policy, self.recipe, self.train.num_steps
        is_sampled = self.sampling.completions_from == "student"
        expected = "student where near_policy.schedule is set: given answers are not sampled ahead"
        self.require(is_sampled, "sampling.completions_from", expected)
        expected = f"a checkpoint where the schedule is {near.schedule}: its scores are stored"
        self.require(not self.teacher_is_student, "teacher.path", expected)
        expected = "student where near_policy.schedule is set, by --train.start-with student: "
        expected += "rollouts of other steps are stored with the other run"
        is_fresh = self.train.start_from is None or self.train.start_with == "student"
        self.require(is_fresh, "train.start_with", expected)
        is_counted = near.schedule != "refresh" or self.train.num_epochs is None
        expected = "none where near_policy.schedule is refresh: it has near_policy.num_epochs"
        self.require(is_counted, "train.num_epochs", expected)
        expected = f"a divisor of train.num_steps, {steps}: every epoch has as many steps"
        self.require(steps % near.num_epochs == 0, "near_policy.num_epochs", expected)
        keeps_groups = near.schedule == "continuous" and near.filter == "none"
        expected = "none where near_policy may separate a prompt's rollouts (refresh, a filter)"
        is_kept = keeps_groups or not self.estimator.task_reward_coef
        self.require(is_kept, "estimator.task_reward_coef", expected)
        may_lead = not self.is_judged and (recipe.reward != "task" or keeps_groups)
        expected = f"none where the recipe is {recipe.name}: the rollouts of a prompt are graded "
        expected += "together, for the update that samples them"
        self.require(may_lead, "near_policy.schedule", expected)
        is_alone = near.generator != "thread" or self.mesh.processes == 1
        expected = "inline or process where mesh.processes is not 1: a thread samples on the "
        expected += "devices of its own process"
        self.require(is_alone, "near_policy.generator", expected)

    @property
    def grader(self) -> str:
        """The grader of answers; `auto` is resolved by where the prompts come from."""
        if self.evaluation.grader != "auto":
            return self.evaluation.grader
        source = self.evaluation.source or self.data.source
        graders = {"arithmetic": "gsm8k", "stories": "gsm8k", "tasks": "tasks"}
        chosen = graders.get(source.partition(":")[0])
        return chosen or grader_of(source) or "last_number"

    @property
    def grades_rollouts(self) -> bool:
        """Whether the grader of answers also reads rollouts, for rewards or records of them."""
        is_rewarded = self.recipe.reward == "task" or self.estimator.task_reward_coef
        return bool(is_rewarded or self.is_judged or self.near_policy.schedule != "none")

    @property
    def is_judged(self) -> bool:
        """Whether judges read rollouts: for rewards, or for texts that the teacher is shown."""
        return self.recipe.is_judged or bool(self.judged_fields)

    @property
    def judged_fields(self) -> tuple[str, ...]:
        """The judges' texts that the teacher is shown."""
        shown = self.data.teacher_prompt_format or ""
        return tuple(name for name in JUDGED_FIELDS if f"{{{name}}}" in shown)

    def _check_judges(self):
        for role in ("rubricator", "verifier", "teach"):
            section = getattr(self, role)
            require_model(role, section.model, section.base_url, self.api)
        expected = f"its defaults where the recipe is {self.recipe.name}: it asks no judge"
        is_default = self.is_judged or self.rubrics == RubricsConfig()
        require(is_default, "rubrics", "set", expected)

    def _check_rewards(self):
        """What a recipe that learns from rewards of whole answers, and judges, need."""
        recipe, rubrics = self.recipe, self.rubrics
        is_sampled = self.sampling.completions_from == "student"
        expected = f"student: {recipe.name} averages over the student's samples"
        self.require(is_sampled, "sampling.completions_from", expected)
        is_compared = not recipe.is_rewarded or self.sampling.num_generations > 1
        expected = f"at least 2: {recipe.name} compares the completions of a prompt with each other"
        self.require(is_compared, "sampling.num_generations", expected)
        is_unread = not recipe.is_rewarded or self.data.teacher_prompt_format is None
        expected = f"none where the recipe is {recipe.name}: it reads no teacher's scores"
        self.require(is_unread, "data.teacher_prompt_format", expected)
        writes_rubrics = recipe.reward != "scalar" and rubrics.refresh != "given"
        is_asked = writes_rubrics or "reflection" in self.judged_fields
        roles = ("verifier", "rubricator") if is_asked else ("verifier",)
        for role in roles if self.is_judged else ():
            expected = f"the name of a model: {recipe.name} asks this judge"
            self.require(getattr(self, role).model, f"{role}.model", expected)
        is_written = rubrics.refresh != "given" or "rubric" in self.data.column_names
        expected = "a column of criteria, rubric=COLUMN, where rubrics.refresh is given"
        self.require(is_written, "data.columns", expected)
        expected = f"none where the recipe is {recipe.name}: it has no stages"
        if recipe.has_stages:
            expected = f"two or more names where the recipe is {recipe.name}"
        is_staged = bool(rubrics.stage_names) == recipe.has_stages
        self.require(is_staged, "rubrics.stages", expected)
        of_rubrics = "num_criteria", "grades", "polarity", "rubric_of", "refresh", "blind"
        for name in of_rubrics if recipe.reward == "scalar" else ():
            reason = f"where the recipe is {recipe.name}: it has no rubric"
            rubrics.require_default(name, reason)

    def with_steps_over(self, num_prompts: int) -> "Config":
        """The config of a run over this many prompts: train.num_steps instead of num_epochs."""
        steps = {"num_steps": self.train.steps_over(num_prompts), "num_epochs": None}
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **steps))

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one pass over the prompts of a refresh."""
        return self.train.num_steps // self.near_policy.num_epochs

    @property
    def refresh_steps(self) -> tuple[int, ...]:
        """The numbers of updates, 0 first, after which prompts are answered anew; () if never."""
        if self.near_policy.schedule != "refresh":
            return ()
        epochs = (0, *self.near_policy.refresh_epochs)
        return tuple(epoch * self.steps_per_epoch for epoch in epochs)

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer update."""
        return self.train.prompts_per_step * self.sampling.num_generations
