"""The columns that `prepare` makes of a first pass: which reward each option reads, and what stays
as it was.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.estimators import coupling
from opdjax.estimators.opd import advantages
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

# Two sequences of two tokens: student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4), so that the tokens'
# r are (-ln 2, ln 2, 0).
LN2 = np.log(2)
TILES = tuple(
    VocabTile(jnp.log(jnp.array([row] * 4))) for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
)
TOKENS = jnp.array([[0, 1], [2, 0]])
SHAPE, MASK, SEGMENTS = (2, 2), jnp.ones((2, 2), bool), jnp.ones((2, 2), int)
BEHAVIOR = jnp.log(jnp.array([[0.25, 0.5], [0.125, 0.5]]))  # ratios 2, 1/2; 2, 1


def prepared(options, is_policy_gradient=True, teacher=TILES[1]):
    row = TokenInputs(
        TOKENS,
        teacher_logprobs=TILES[1].logprob(TOKENS.reshape(-1)).reshape(SHAPE),
        behavior_logprobs=BEHAVIOR,
    )
    flat = TokenInputs(TOKENS.reshape(-1), teacher_logprobs=row.teacher_logprobs.reshape(-1))
    stats = coupling.token_stats(TILES[0], teacher, flat, options)
    stats = {name: x.reshape(SHAPE) for name, x in stats.items()}
    found = coupling.prepare(
        row, stats, MASK, SEGMENTS, options, is_policy_gradient=is_policy_gradient
    )
    return {
        name: getattr(found, name) for name in ("future_rewards", "mean_rewards", "loss_weights")
    }


def check(found, **expected):
    assert {name for name, x in found.items() if x is not None} == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=1e-6)


@pytest.mark.parametrize("teacher", [TILES[1], None], ids=["vocabulary", "token"])
def test_rewards_are_those_of_the_recipe_and_weights_those_of_the_plain_disagreement(teacher):
    check(
        prepared({"discount": 0.5}, teacher=teacher), future_rewards=[[LN2 / 2, 0], [-LN2 / 2, 0]]
    )
    check(
        prepared({"discount": 0.5, "reward_floor": -0.5}, teacher=teacher),
        future_rewards=[[LN2 / 2, 0], [-0.25, 0]],
    )
    check(
        prepared({"baseline": "batch_mean"}, teacher=teacher),
        mean_rewards=[[-LN2 / 2] * 2, [0] * 2],
    )
    check(
        prepared({"baseline": "batch_mean", "power_alpha": 1.0}, teacher=teacher),
        mean_rewards=[[-0.125] * 2, [0] * 2],
    )
    for transform in ({}, {"reward_floor": -0.5}, {"power_alpha": 1.0}):
        check(
            prepared({"prefix_weight": 0.5} | transform, teacher=teacher),
            loss_weights=[[1.5, 1.25], [1.5, 1.5]],
        )


def test_expected_returns_take_the_mean_of_the_recipe_s_own_reward():
    how = {"discount": 0.5, "return_to_go": "expected"}
    check(prepared(how), future_rewards=[[-LN2 / 8, 0]] * 2)
    check(prepared(how | {"reward_floor": -0.5}), future_rewards=[[(LN2 / 4 - 0.25) / 2, 0]] * 2)
    # What stands beside it stays a mean of the rewards drawn.
    both = prepared(how | {"baseline": "batch_mean"})
    check(both, future_rewards=[[-LN2 / 8, 0]] * 2, mean_rewards=[[-LN2 / 2] * 2, [0] * 2])


def test_weights_multiply():
    check(prepared({"importance": "prefix_truncate"}), loss_weights=[[2, 1], [2, 2]])
    check(
        prepared({"importance": "prefix_truncate", "importance_cap": 1.5}),
        loss_weights=[[1.5, 1], [1.5, 1.5]],
    )
    check(
        prepared({"importance": "prefix_truncate"}, is_policy_gradient=False),
        loss_weights=[[1, 2], [1, 2]],
    )
    check(prepared({"importance": "sequence_mask"}), loss_weights=[[1, 1], [2, 2]])
    check(
        prepared({"importance": "sequence_mask", "importance_cap": 1.5}),
        loss_weights=[[1, 1], [0, 0]],
    )
    check(
        prepared({"importance": "prefix_truncate", "prefix_weight": 0.5}),
        loss_weights=[[3, 1.25], [3, 3]],
    )


def test_what_needs_no_pass_of_its_own_gets_none():
    for options in (
        {},
        {"discount": 0.0},
        {"prefix_weight": 0.0},
        {"importance": "none"},
        {"importance": "token_mask"},
        {"extra_draws": 3},
    ):
        assert not coupling.is_coupled(options)
        check(prepared(options))
    for options in (
        {"discount": 0.1},
        {"prefix_weight": 0.1},
        {"importance": "sequence_mask"},
        {"baseline": "batch_mean"},
    ):
        assert coupling.is_coupled(options)


def test_a_context_alone_has_no_batch_to_average_over():
    with pytest.raises(ValueError, match="baseline batch_mean reads 'mean_rewards'"):
        advantages(*TILES, baseline="batch_mean")
