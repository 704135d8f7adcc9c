"""Checks that a run's data, models and devices satisfy its config, before anything is computed."""

from __future__ import annotations

import importlib.util

import jax

from opdjax.config.recipes import RECIPES
from opdjax.config.run import Config
from opdjax.config.validation import ConfigError, MissingExtraError, require
from opdjax.data.grading import require_grader
from opdjax.data.prompt_rows import Prompt, require_field
from opdjax.data.prompts import PromptSet
from opdjax.estimators.advantage import credit_matrix


def _require_reward_data(config: Config, rows: list[Prompt]) -> None:
    """What the rewards are made of is there."""
    data = config.data
    if config.is_judged and all(row.answer is not None for row in rows):
        require_grader(
            config.evaluation.grader
        )  # scores are recorded beside right answers where these are known
    if config.estimator.task_reward_coef or RECIPES[config.estimator.recipe].reward == "task":
        require_grader(config.evaluation.grader)
        require_field(
            rows, "answer", data.answer_column or "answer", data.source, "a task reward needs them"
        )
    if config.rubrics.stage_names:  # before a judge is paid
        estimator, count = config.estimator, len(config.rubrics.stage_names)
        try:
            credit_matrix(estimator.stage_credit, count, estimator.stage_credit_matrix or ())
        except ValueError as error:
            raise ConfigError(f"estimator.{error}") from error
    _require_own_criteria(config, rows)
    missing = [
        name
        for name in ("openai", "pydantic")
        if config.is_judged and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise MissingExtraError(
            f"judges are asked through {' and '.join(missing)}: pip install 'opdjax[judge]'"
        )
    if config.is_judged and config.rubrics.num_references and data.references is None:
        reason = "judges are shown a teacher's answers: write them with opdjax references (data.references), or set rubrics.num_references to 0"
        require_field(
            rows, "references", data.reference_column or "references", data.source, reason
        )


def _require_own_criteria(config: Config, rows: list[Prompt]) -> None:
    """Criteria that come with the prompts are such as the config's rubrics may have."""
    stages, place = config.rubrics.stage_names, f"of {config.data.source} (data.rubric_column)"
    for number, row in enumerate(rows):
        if config.rubrics.refresh == "given" and not row.criteria:
            raise ConfigError(
                f"prompt {number} {place} has no criteria; rubrics.refresh is given, so that nobody writes any"
            )
        for criterion in row.criteria:
            if criterion.is_flaw and config.rubrics.polarity == "positive":
                raise ConfigError(
                    f"prompt {number} {place} has a criterion of negative weight; set rubrics.polarity to signed"
                )
            if criterion.stage not in (stages or (None,)):
                expected = (
                    f"one of {list(stages)}" if stages else "none, for rubrics.stage_names is empty"
                )
                raise ConfigError(
                    f"prompt {number} {place} has a criterion of stage {criterion.stage!r}; expected {expected}"
                )


def _require_room(config: Config, prompts: PromptSet) -> None:
    """Every rollout fits a packed row, in both views."""
    room, answer = config.train.pack_length, config.sampling.max_completion_length
    longest = max(map(len, prompts.student_ids + (prompts.teacher_ids or ())))
    told = config.data.max_teacher_prompt_length if config.judged_fields else 0
    if room is not None and told + answer > room:
        raise ConfigError(
            f"train.pack_length is {room}; expected at least {told + answer}: what a teacher is shown with judges' words, up to "
            f"data.max_teacher_prompt_length, {told}, and an answer of sampling.max_completion_length, {answer}"
        )
    if room is not None and longest + answer > room:
        raise ConfigError(
            f"train.pack_length is {room}; expected at least {longest + answer}: the longest prompt of {config.data.source}, of {longest} "
            f"tokens, and an answer of sampling.max_completion_length, {answer}"
        )


def require_rows_divide(config: Config, shards: int) -> None:
    """ConfigError where the rows of a step cannot be split over the micro-batches and the devices."""
    parts, rows = config.train.gradient_accumulation_steps, config.rows_per_step
    if rows % (shards * parts):
        raise ConfigError(
            f"{rows} rows a step (train.prompts_per_step x sampling.num_generations) do not divide into {parts} micro-batches "
            f"(train.gradient_accumulation_steps) on {shards} devices (mesh.data x mesh.fsdp); change one of them"
        )
    if config.sampling.slots is not None and config.sampling.slots % shards:
        raise ConfigError(
            f"sampling.slots is {config.sampling.slots}; expected a multiple of {shards}, the devices that rows are split over "
            "(mesh.data x mesh.fsdp)"
        )


def _learner_devices(config: Config) -> list[jax.Device] | None:
    """Those that a generator in this process leaves; None: all."""
    near, tensor = config.near_policy, config.mesh.tensor
    if near.generator != "thread":
        return None
    available = len(jax.devices())
    is_shared_out = near.generator_devices < available and near.generator_devices % tensor == 0
    expected = f"a multiple of mesh.tensor, {tensor}, and fewer than the {available} devices that there are: the others update the student"
    require(is_shared_out, "near_policy.generator_devices", near.generator_devices, expected)
    slots, shards = config.sampling.slots, near.generator_devices // tensor
    expected = f"a multiple of {shards}, the devices that rows are split over where they are drawn (near_policy.generator_devices)"
    require(slots is None or slots % shards == 0, "sampling.slots", slots, expected)
    return jax.devices()[: -near.generator_devices]
