"""Who divides by what."""

import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.estimators.losses import AGGREGATIONS, aggregation_weights, count_denominators

# Two rows; the second packs two sequences. Sequences have 2, 1 and 3 trained tokens; 3 sequences of
# at most 4.
MASK = jnp.array([[0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]], bool)
SEGMENTS = jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 2]])
EXPECTED = {
    "token_mean": [[0, 1 / 6, 1 / 6, 0, 0, 0], [0, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6]],
    "sequence_mean_token_mean": [[0, 1 / 6, 1 / 6, 0, 0, 0], [0, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9]],
    "sequence_mean_token_sum": [[0, 1 / 3, 1 / 3, 0, 0, 0], [0, 1 / 3, 0, 1 / 3, 1 / 3, 1 / 3]],
    "fixed_denominator": [[0, 1 / 12, 1 / 12, 0, 0, 0], [0, 1 / 12, 0, 1 / 12, 1 / 12, 1 / 12]],
}


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_weights_by_hand(kind):
    denominators = count_denominators(MASK, SEGMENTS, max_length=4)
    np.testing.assert_allclose(
        aggregation_weights(MASK, SEGMENTS, kind, denominators), EXPECTED[kind], rtol=1e-6
    )


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_batch_without_trained_tokens_weighs_nothing(kind):
    empty = jnp.zeros_like(MASK)
    weights = aggregation_weights(empty, SEGMENTS, kind, count_denominators(empty, SEGMENTS, 4))
    np.testing.assert_array_equal(weights, 0)


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="no aggregation 'mean'.*token_mean"):
        aggregation_weights(MASK, SEGMENTS, "mean", count_denominators(MASK, SEGMENTS, 4))
