"""Checks that a run's data, models and devices satisfy its config, before anything is computed.

All raise ConfigError, or MissingExtraError if a package is not installed.
"""

from __future__ import annotations

import importlib.util

import jax

from opdjax.config.run import Config
from opdjax.config.validation import ConfigError, MissingExtraError, require
from opdjax.data.grading import require_grader, require_readable
from opdjax.data.prompt_rows import Prompt, require_field
from opdjax.data.prompts import PromptSet
from opdjax.estimators.advantage import credit_matrix


def require_given_answers(config: Config, rows: list[Prompt]) -> None:
    """Training on references needs one in every row."""
    data = config.data
    if config.sampling.completions_from == "references" and data.references is None:
        reason = "training on the data's own answers needs them"
        require_field(rows, "references", data.column_names, data.source, reason)


def require_reward_data(config: Config, rows: list[Prompt]) -> None:
    """The data, packages and settings that the rewards need must be there."""
    data, rubrics, estimator = config.data, config.rubrics, config.estimator
    if config.is_judged and all(row.answer is not None for row in rows):
        require_grader(config.grader)  # the record of scores contains right answers
    if estimator.task_reward_coef or config.recipe.reward == "task":
        require_grader(config.grader)
        reason = "a task reward needs them"
        require_field(rows, "answer", data.column_names, data.source, reason)
        require_readable(config.grader, [row.answer for row in rows], data.source)
    if rubrics.stage_names:  # checked before anyone pays for scores that no stage can use
        try:
            credit_matrix(estimator.stage_credit, len(rubrics.stage_names))
        except ValueError as error:
            raise ConfigError(f"estimator.{error}") from error
    _require_own_criteria(config, rows)
    if not config.is_judged:
        return
    missing = [name for name in ("openai", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"judge requests need {' and '.join(missing)}: pip install 'opdjax[judge]'"
        )
    if rubrics.num_references and data.references is None:
        reason = "judges are shown a teacher's answers: write them with opdjax references "
        reason += "(data.references), or set rubrics.num_references to 0"
        require_field(rows, "references", data.column_names, data.source, reason)


def _require_own_criteria(config: Config, rows: list[Prompt]) -> None:
    """The criteria that come with the prompts must fit the config's rubrics."""
    rubrics, stages = config.rubrics, config.rubrics.stage_names
    for number, row in enumerate(rows):
        where = f"prompt {number} of {config.data.source} (rubric in data.columns)"
        if rubrics.refresh == "given" and not row.criteria:
            raise ConfigError(
                f"{where} has no criteria, and with rubrics.refresh given no judge writes any"
            )
        for criterion in row.criteria:
            if criterion.is_flaw and rubrics.polarity == "positive":
                raise ConfigError(
                    f"{where} has a criterion of negative weight; set rubrics.polarity to signed"
                )
            if criterion.stage not in (stages or (None,)):
                expected = f"one of {list(stages)}" if stages else "none: rubrics.stage_names is ()"
                raise ConfigError(
                    f"{where} has a criterion of stage {criterion.stage!r}; expected {expected}"
                )


def require_room(config: Config, prompts: PromptSet) -> None:
    """Every rollout must fit into a packed row, for the student and for the teacher."""
    length, answer = config.train.pack_length, config.sampling.max_completion_length
    if length is None:
        return
    longest = max(map(len, prompts.student_ids + (prompts.teacher_ids or ())))
    prompt = f"the longest prompt of {config.data.source}, of {longest} tokens"
    teacher = config.data.max_teacher_prompt_length if config.judged_fields else 0
    text = f"a teacher prompt with judges' texts, of up to {teacher} tokens"
    for needed, name in ((teacher, text), (longest, prompt)):
        expected = f"at least {needed + answer}: {name}, and an answer of "
        expected += f"sampling.max_completion_length, {answer}"
        require(needed + answer <= length, "train.pack_length", length, expected)


def require_rows_divide(config: Config, shards: int) -> None:
    """The rows of a step must divide into the micro-batches and the row shards of the mesh."""
    parts, rows = config.train.gradient_accumulation_steps, config.rows_per_step
    if rows % (shards * parts):
        raise ConfigError(
            f"{rows} rows a step (train.prompts_per_step x sampling.num_generations) do not divide "
            f"into {parts} micro-batches (train.gradient_accumulation_steps) on {shards} devices "
            "(mesh.data x mesh.fsdp); change one of them"
        )
    slots = config.sampling.slots
    expected = f"a multiple of {shards}, the devices that rows are sharded over "
    expected += "(mesh.data x mesh.fsdp)"
    require(slots is None or slots % shards == 0, "sampling.slots", slots, expected)


def learner_devices(config: Config) -> list[jax.Device] | None:
    """The devices that a generator thread leaves to the learner; None: all devices."""
    if config.near_policy.generator != "thread":
        return None
    tensor, available = config.mesh.tensor, len(jax.devices())
    count = config.mesh.generator_devices(available)
    expected = f"a mesh that leaves some of the {available} devices to the generator thread, "
    expected += f"a multiple of mesh.tensor, {tensor}, and has one or more"
    is_possible = 0 < count < available and count % tensor == 0
    require(is_possible, "mesh.data", config.mesh.data, expected)
    slots, shards = config.sampling.slots, count // tensor
    expected = f"a multiple of {shards}, the devices that the thread shards rows over"
    require(slots is None or slots % shards == 0, "sampling.slots", slots, expected)
    return jax.devices()[:-count]
