"""What a run adds to its rollouts for the options that want it: uniforms for extra draws, the
advantage of a task reward.
"""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.config import MINI_PAIR, Config, EstimatorConfig, EvaluationConfig, SamplingConfig
from opdjax.data.tokenizer import load_tokenizer
from opdjax.engine.evaluate import completions
from opdjax.engine.sampler import extra_uniforms
from opdjax.rollouts.rows import right_answers, with_option_columns
from opdjax.types import Rollouts, TrainBatch

ANSWERS = ["42", "17"]
TEXTS = [
    "34-17=17;17+25=42#42",
    "17",
    "42",
    "1+16=17#17",
]  # two completions of each prompt, side by side; the second of the first is wrong


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_PAIR / "student")


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    width, rows = 2 + max(len(tokenizer.encode(text)) for text in TEXTS), len(TEXTS)
    tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        tokens[row, 2 : 2 + len(ids)], mask[row, 2 : 2 + len(ids)] = ids, True
    segments = (mask | (np.arange(width) < 2)).astype(np.int32)
    counts = np.zeros(rows, np.int32)
    blank = np.zeros(mask.shape, np.float32)
    return Rollouts(
        tokens,
        mask,
        segments,
        blank,
        blank,
        np.array([0, 0, 1, 1]),
        np.array([0, 1, 0, 1]),
        counts,
        mask[:, -1],
    )


def setup_of(tokenizer, **options):
    config = Config(
        estimator=EstimatorConfig("opd", **options),
        sampling=SamplingConfig(num_generations=2),
        evaluation=EvaluationConfig(grader="gsm8k"),
        seed=5,
    )
    prompts = types.SimpleNamespace(
        prompts=[types.SimpleNamespace(answer=answer) for answer in ANSWERS]
    )
    return types.SimpleNamespace(config=config, prompts=prompts, tokenizer=tokenizer)


def batch_of(rollouts):
    return TrainBatch(
        *(
            jnp.asarray(x)
            for x in (
                rollouts.tokens,
                rollouts.mask,
                rollouts.segment_ids,
                rollouts.behavior_logprobs,
            )
        )
    )


def with_columns(setup, rollouts, batch=None):
    batch = batch or batch_of(rollouts)
    return with_option_columns(batch, rollouts, setup.config, setup.prompts, setup.tokenizer)


def test_a_task_reward_compares_the_completions_of_one_prompt(tokenizer, rollouts):
    setup = setup_of(tokenizer, task_reward_coef=0.5)
    texts = completions(rollouts, tokenizer)
    reward = right_answers(setup.prompts, rollouts.prompt_id, texts, "gsm8k")
    np.testing.assert_array_equal(reward, [1, 0, 0, 1])
    batch, metrics = with_columns(setup, rollouts)
    assert metrics == {"rollout/task_reward": 0.5}
    # The coefficient is the recipe's to apply; every sampled token of a completion holds its whole
    # advantage.
    np.testing.assert_array_equal(
        batch.advantages, np.array([[0.5], [-0.5], [-0.5], [0.5]]) * rollouts.mask
    )
    assert batch.uniforms is None


def test_extra_draws_get_their_uniforms(tokenizer, rollouts):
    batch, _ = with_columns(setup_of(tokenizer, extra_draws=3), rollouts)
    assert batch.uniforms.shape == (*rollouts.mask.shape, 3)
    np.testing.assert_array_equal(batch.uniforms, extra_uniforms(rollouts, 5, 3))
    assert batch.advantages is None


@pytest.mark.parametrize("options", [{}, {"task_reward_coef": 0.0, "extra_draws": 0}], ids=str)
def test_what_is_off_costs_nothing(options, tokenizer, rollouts):
    batch = batch_of(rollouts)
    assert with_columns(setup_of(tokenizer, **options), rollouts, batch) == (batch, {})
