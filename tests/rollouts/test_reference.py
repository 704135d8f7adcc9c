"""The penalty on leaving the student's start: a frozen copy, at whose log-probs every batch is
looked at once.
"""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_runs import column, interrupted_at

from opdjax.config import (
    ApiConfig,
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    JudgeConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    RubricsConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.data.packing import pack, to_train_batch, unpack
from opdjax.ops.sharding import to_host
from opdjax.rollouts.checks import check_settings
from opdjax.rollouts.on_policy import draw, prompts_of
from opdjax.rollouts.rows import scored
from opdjax.rollouts.setup import prepare
from opdjax.rollouts.weights import initial_weights, load_student
from opdjax.runs.workdir import read_lines
from opdjax.train import train
from opdjax.types import TrainBatch

COEF = 0.05


def config_of(**sections):
    usual = {
        "data": DataConfig(source="arithmetic:train[:64]", max_prompt_length=32),
        "sampling": SamplingConfig(num_generations=4, max_completion_length=20),
        "estimator": EstimatorConfig("grpo", reference_kl_coef=COEF, reference_kl="k2"),
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "train": TrainConfig(num_steps=3, prompts_per_step=2, gradient_accumulation_steps=2),
        "evaluation": EvaluationConfig(source=None),
        "log": LogConfig(samples_every=1),
        "mesh": MeshConfig(1),
    }
    return Config(**(usual | sections))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Three steps of grpo with a penalty, in two micro-batches."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    train(config_of(), workdir)
    return workdir


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.long), 0.7])
def test_the_reference_policy_scores_the_first_rollouts_as_the_student_did(temperature):
    """At the sampling temperature; packed rows and a separate teacher view change nothing."""
    sampling = SamplingConfig(num_generations=4, max_completion_length=20, temperature=temperature)
    setup = prepare(config_of(sampling=sampling))
    prompts = prompts_of(setup.prompts, setup.config, 0)
    rollouts = to_host(draw(setup, initial_weights(setup), prompts, 0))
    batch = to_train_batch(rollouts, prompts)
    found, head = scored(setup, batch, "none")
    assert head is None
    mask = np.asarray(rollouts.mask)
    np.testing.assert_allclose(
        np.asarray(found.reference_logprobs)[mask], rollouts.behavior_logprobs[mask], atol=2e-5
    )
    rows, source = pack(batch, 96, parts=2)
    of_rows, _ = scored(setup, rows, "none")
    again = unpack(np.asarray(of_rows.reference_logprobs), source, mask.shape)
    np.testing.assert_allclose(again[mask], rollouts.behavior_logprobs[mask], atol=2e-5)
    shown = dataclasses.replace(
        prompts, teacher_tokens=prompts.tokens[:, :5], teacher_mask=np.ones((2, 5), bool)
    )
    with_view, _ = scored(setup, to_train_batch(rollouts, shown), "none")
    assert with_view.teacher_view is not None
    np.testing.assert_array_equal(
        np.asarray(with_view.reference_logprobs), np.asarray(found.reference_logprobs)
    )


def test_without_a_coefficient_there_is_none():
    for coef in (None, 0.0):
        setup = prepare(config_of(estimator=EstimatorConfig("grpo", reference_kl_coef=coef)))
        assert setup.reference_policy is None
        batch = TrainBatch(*np.zeros((3, 2, 4), np.int32), None)
        assert scored(setup, batch, "none")[0].reference_logprobs is None


@pytest.mark.long
def test_the_penalty_starts_at_nothing_and_grows(straight):
    rows = read_lines(straight / "metrics.jsonl")
    assert abs(rows[0]["kl/reference"]) < 1e-9
    assert all(row["kl/reference"] > 1e-4 for row in rows[1:])
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows)
    assert all(row["importance/clip_fraction"] == 0 for row in rows)
    assert "kl/student_teacher" not in rows[0]
    assert all(0 <= row["rollout/task_reward"] <= 1 for row in rows)
    assert not (straight / "rubrics.jsonl").exists()
    seen = read_lines(straight / "samples.jsonl")[0]
    assert seen["student_logprobs"] is not None
    assert seen["advantages"] is not None


@pytest.mark.long
def test_an_interrupted_run_has_the_same_reference_policy(straight, tmp_path):
    """Continued at step 2, the reference is still the start, not the restored weights."""
    config = config_of(checkpoint=dataclasses.replace(config_of().checkpoint, every=1))
    with interrupted_at(2):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert column(straight, "kl/reference") == column(tmp_path / "run", "kl/reference")


@pytest.mark.long
def test_beside_adapters_the_frozen_student_is_the_reference(tmp_path):
    """One copy of the weights serves both, and adapters start at its log-probs."""
    config = config_of(lora=LoraConfig(rank=2))
    setup = prepare(config)
    _, frozen = load_student(setup)
    for left, right in zip(jax.tree.leaves(frozen), jax.tree.leaves(setup.reference_policy.params)):
        assert left is right
    train(config, tmp_path / "run")
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert abs(rows[0]["kl/reference"]) < 1e-9
    assert rows[-1]["kl/reference"] > 1e-6


def test_a_run_with_a_reference_is_found_in_order():
    setup = prepare(config_of())
    assert {finding.status for finding in check_settings(setup)} <= {"ok", "warning"}


def test_stages_that_cannot_be_credited_are_refused_before_anything_is_asked():
    stages = RubricsConfig(stages=("derive", "answer=#"), num_references=0)
    judge = JudgeConfig("rules")
    for options, told in (
        ({"stage_credit": "paper"}, "there are 2"),
        ({"stage_credit": (1.0,) * 9}, "has 9 numbers; expected 4"),
    ):
        config = config_of(
            estimator=EstimatorConfig("ropd_stages", **options),
            rubrics=stages,
            rubricator=judge,
            verifier=judge,
            api=ApiConfig("http://127.0.0.1:9/v1"),
        )
        with pytest.raises(ValueError, match=told):
            prepare(config)
