"""A step of `RefreshSource` over packed rows, some rollouts left out, is the step over the same
rollouts one a row.
"""

import dataclasses

import jax
import numpy as np
import pytest
from near_runs import FILTERED, REFRESH, near

from opdjax.engine.update import loss_and_grad
from opdjax.rollouts.near_policy.refresh import RefreshSource
from opdjax.rollouts.setup import prepare, update_spec
from opdjax.rollouts.weights import initial_weights, load_student
from opdjax.runs.metrics import Timer


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The setup, and the first step of its first epoch."""
    sections = {
        "train": {"pack_length": 60, "num_steps": 2, "gradient_accumulation_steps": 2},
        "sampling": {"num_generations": 2},
    }
    config = near(REFRESH | FILTERED | {"num_epochs": 1, "refresh_epochs": ()}, **sections)
    setup = prepare(config)
    source = RefreshSource(setup, tmp_path_factory.mktemp("packed"), lambda step: False)
    source.publish(0, lambda: initial_weights(setup), Timer())
    return setup, source.next(0, Timer())


def lesson(setup, params, batch, dtype):
    """Loss and gradient of what is stored in the rows."""
    spec = dataclasses.replace(update_spec(setup), dtype=dtype)
    cast = lambda x: (
        np.asarray(x).astype(dtype)
        if np.issubdtype(np.asarray(x).dtype, np.floating)
        else np.asarray(x)
    )
    run = jax.jit(lambda p, b: loss_and_grad(p, b, None, spec, jax.numpy.bool_(False))[:2])
    loss, grads = jax.device_get(run(jax.tree.map(cast, params), jax.tree.map(cast, batch)))
    return float(loss), np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_packed_rows_of_an_epoch_teach_what_the_rollouts_do(dtype, tolerance, drawn):
    setup, step = drawn
    rows, batch = step.rows, step.batch
    assert np.asarray(rows.mask).sum() == np.asarray(batch.mask).sum() > 0
    # As many rollouts as there are, in whole micro-batches.
    rest = -len(batch.tokens) % 2
    batch = jax.tree.map(
        lambda x: np.concatenate(
            [np.asarray(x), np.zeros((rest, *np.shape(x)[1:]), np.asarray(x).dtype)]
        ),
        batch,
    )
    params = jax.device_get(load_student(setup)[0])
    with jax.enable_x64(dtype == "float64"):
        loss, grads = lesson(setup, params, batch, dtype)
        packed_loss, packed_grads = lesson(setup, params, rows, dtype)
    np.testing.assert_allclose(packed_loss, loss, rtol=tolerance)
    assert np.linalg.norm(packed_grads - grads) / np.linalg.norm(grads) < tolerance
