"""Every setting of a run: frozen dataclasses, one a section, composed into `Config`. Standard
library only.

An experiment file returns a `Config`; the command line overrides single fields; the resolved result
is `config.json` in the work directory. `None` for an option of a recipe means that recipe's own
default.
"""

from __future__ import annotations

import dataclasses

from opdjax.config.api import RULE_JUDGE, ApiConfig, EndpointConfig
from opdjax.config.checkpoint import CheckpointConfig

# all of a config in one place
from opdjax.config.data import JUDGED_FIELDS, TEACHER_FIELDS, DataConfig, TeachConfig  # noqa: F401
from opdjax.config.estimator import ROPD_CODE, ROPD_PAPER, EstimatorConfig  # noqa: F401
from opdjax.config.evaluation import EvaluationConfig, require_seed
from opdjax.config.log import LogConfig
from opdjax.config.lora import LoraConfig
from opdjax.config.mesh import MeshConfig
from opdjax.config.model import MINI_STUDENT, MINI_TEACHER, STUDENT, ModelConfig
from opdjax.config.near_policy import NearPolicyConfig
from opdjax.config.optimizer import OptimizerConfig
from opdjax.config.rubrics import RubricsConfig
from opdjax.config.sampling import SamplingConfig
from opdjax.config.train import TrainConfig
from opdjax.config.validation import ConfigError, require, require_types

JUDGED_RECIPES = (
    "ropd",
    "tjudge",
    "ropd_stages",
)  # that learn from what judges say of whole answers


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    student: ModelConfig = ModelConfig(MINI_STUDENT)
    teacher: ModelConfig = ModelConfig(MINI_TEACHER)
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    near_policy: NearPolicyConfig = NearPolicyConfig()
    estimator: EstimatorConfig = EstimatorConfig()
    rubrics: RubricsConfig = RubricsConfig()
    # writes rubrics and reflections
    rubricator: EndpointConfig = EndpointConfig()
    # holds answers to a rubric, or scores them where there is none
    verifier: EndpointConfig = EndpointConfig()
    teach: TeachConfig = TeachConfig()
    # writes the references of opdjax teach; none: the teacher's checkpoint
    # does
    teacher_api: EndpointConfig = EndpointConfig()
    api: ApiConfig = ApiConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of prompts, rollouts and everything else that is drawn

    def __post_init__(self):
        require_types(self)
        require_seed("seed", self.seed)
        rows, parts = self.rows_per_step, self.train.gradient_accumulation_steps
        require(
            rows % parts == 0,
            "train.gradient_accumulation_steps",
            parts,
            f"a divisor of the {rows} rows a step",
        )
        packed, longest = self.train.pack_length, self.sampling.max_completion_length
        expected = (
            f"more than sampling.max_completion_length, {longest}: a row holds whole rollouts"
        )
        require(packed is None or packed > longest, "train.pack_length", packed, expected)
        self._check_source()
        self._check_near_policy()
        self._check_reward()
        require(
            self.student.path != STUDENT,
            "student.path",
            STUDENT,
            "the checkpoint that the student starts from",
        )
        if self.teacher_is_student:
            for name, default in (
                ("revision", None),
                ("dtype", "auto"),
                ("attention", "auto"),
                ("split_over", ModelConfig().split_over),
            ):
                found = getattr(self.teacher, name)
                require(
                    found == default,
                    f"teacher.{name}",
                    found,
                    f"{default}: the teacher is the student ({STUDENT})",
                )

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
        recipe, source = self.estimator.recipe, self.sampling.completions_from
        is_policy_gradient = recipe in ("opd", "vopd")
        require(
            not is_policy_gradient or source == "student",
            "sampling.completions_from",
            source,
            f"student: {recipe} averages over the student's draws",
        )
        is_signal = recipe != "sft" or source != "student"
        require(
            is_signal,
            "sampling.completions_from",
            source,
            "teacher or references: cross-entropy on its own draws teaches a student nothing",
        )
        is_signal = (
            recipe != "npd"
            or self.estimator.kd_weight != 0
            or source != "student"
            or self.near_policy.filter != "none"
        )
        expected = "more than 0, or rollouts that near_policy.filter chose: cross-entropy on all of its own draws teaches a student nothing"
        require(is_signal, "estimator.kd_weight", self.estimator.kd_weight, expected)
        if source == "references":
            is_plain = self.sampling.temperature == 1 and not self.sampling.has_filter
            require(
                is_plain,
                "sampling.temperature, top_p, top_k, min_p",
                "set",
                "none of them where nothing is sampled (references)",
            )
            is_free = self.sampling.slots is None and self.sampling.kv_dtype == "auto"
            require(
                is_free,
                "sampling.slots, kv_dtype",
                "set",
                "neither where nothing is sampled (references)",
            )
        has_no_teacher = recipe == "sft" and source == "references"
        for name in (
            ("teacher_format", "teacher_enable_thinking", "teacher_prompt_format")
            if has_no_teacher
            else ()
        ):
            require(
                getattr(self.data, name) is None,
                f"data.{name}",
                getattr(self.data, name),
                "none where no teacher reads the data",
            )
        corrected = self.estimator.importance or "none"
        expected = "none where the completions are not the student's: nothing tells how likely they were drawn"
        require(
            corrected == "none" or source == "student", "estimator.importance", corrected, expected
        )
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

    def _check_near_policy(self):
        """What rollouts that are drawn ahead of their update can be used for."""
        near = self.near_policy
        if near.schedule == "none":
            return
        source, steps = self.sampling.completions_from, self.train.num_steps
        require(
            source == "student",
            "sampling.completions_from",
            source,
            "student where near_policy.schedule is given: it is drawn ahead, not given",
        )
        expected = f"a checkpoint where near_policy.schedule is {near.schedule}: what it says of a rollout is stored"
        require(not self.teacher_is_student, "teacher.path", self.teacher.path, expected)
        expected = f"a divisor of train.num_steps, {steps}: every epoch has as many steps"
        require(steps % near.num_epochs == 0, "near_policy.num_epochs", near.num_epochs, expected)
        is_whole = near.schedule == "continuous" and near.filter == "none"
        coef, expected = (
            self.estimator.task_reward_coef,
            "none where rollouts of one prompt may be trained on apart (refresh, or a filter)",
        )
        require(not coef or is_whole, "estimator.task_reward_coef", coef, expected)
        is_alone = near.generator != "thread" or self.mesh.processes == 1
        expected = "inline or process where mesh.processes is not 1: a thread draws on devices of its own process alone"
        require(is_alone, "near_policy.generator", near.generator, expected)

    @property
    def is_judged(self) -> bool:
        """Whether judges are asked about rollouts: for their rewards, or for what the teacher is
        shown.
        """
        return self.estimator.recipe in JUDGED_RECIPES or bool(self.judged_fields)

    @property
    def judged_fields(self) -> tuple[str, ...]:
        """What of the judges' words the teacher is shown."""
        return tuple(
            name
            for name in JUDGED_FIELDS
            if f"{{{name}}}" in (self.data.teacher_prompt_format or "")
        )

    def _check_reward(self):
        """What a recipe that learns from rewards of whole answers needs, what judges need, and what
        nobody else reads.
        """
        require(
            self.teacher_api.base_url != RULE_JUDGE,
            "teacher_api.base_url",
            RULE_JUDGE,
            "the address of a model: a judge teaches nothing",
        )
        recipe, rubrics, is_judged, format = (
            self.estimator.recipe,
            self.rubrics,
            self.is_judged,
            self.data.teacher_prompt_format,
        )
        require(
            is_judged or rubrics == RubricsConfig(),
            "rubrics",
            "set",
            f"its defaults where the recipe is {recipe}: it asks no judge",
        )
        if recipe != "grpo" and not is_judged:
            return
        source, generations, near = (
            self.sampling.completions_from,
            self.sampling.num_generations,
            self.near_policy,
        )
        require(
            source == "student",
            "sampling.completions_from",
            source,
            f"student: {recipe} averages over the student's draws",
        )
        if recipe == "grpo" or recipe in JUDGED_RECIPES:
            expected = f"at least 2: {recipe} compares the completions of a prompt with each other"
            require(generations > 1, "sampling.num_generations", generations, expected)
            require(
                format is None,
                "data.teacher_prompt_format",
                format,
                f"none where the recipe is {recipe}: it reads no teacher's scores",
            )
        is_whole = near.schedule == "none" or (
            recipe == "grpo" and near.schedule == "continuous" and near.filter == "none"
        )
        expected = f"none where the recipe is {recipe}: a prompt's rollouts are judged together, for the update that they are drawn for"
        require(is_whole, "near_policy.schedule", near.schedule, expected)
        for role in ("verifier", "rubricator") if is_judged else ():
            is_needed = role == "verifier" or (recipe != "tjudge" and rubrics.refresh != "given")
            require(
                getattr(self, role).is_given or not is_needed,
                f"{role}.base_url",
                "",
                f"the address of a judge: {recipe} asks one",
            )
        column = self.data.rubric_column
        require(
            rubrics.refresh != "given" or bool(column),
            "data.rubric_column",
            column,
            "a column of criteria where rubrics.refresh is given",
        )
        is_staged = recipe == "ropd_stages"
        expected = "two or more names where the recipe is ropd_stages, and none elsewhere"
        require(
            bool(rubrics.stage_names) == is_staged,
            "rubrics.stage_names",
            rubrics.stage_names,
            expected,
        )
        of_rubrics = (
            "min_criteria",
            "max_criteria",
            "grades",
            "polarity",
            "rubric_of",
            "refresh",
            "blind",
        )
        for name in of_rubrics if recipe == "tjudge" else ():
            default = RubricsConfig.__dataclass_fields__[name].default
            require(
                getattr(rubrics, name) == default,
                f"rubrics.{name}",
                getattr(rubrics, name),
                f"{default} where the recipe is tjudge",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Updates of one pass over the prompts of a refresh."""
        return self.train.num_steps // self.near_policy.num_epochs

    @property
    def refresh_steps(self) -> tuple[int, ...]:
        """The numbers of updates after which all prompts of an epoch are answered anew, the first
        of them 0; none in other schedules.
        """
        near = self.near_policy
        return (
            tuple(epoch * self.steps_per_epoch for epoch in (0, *near.refresh_epochs))
            if near.schedule == "refresh"
            else ()
        )

    @property
    def rows_per_step(self) -> int:
        """Rollouts of one optimizer update."""
        return self.train.prompts_per_step * self.sampling.num_generations
