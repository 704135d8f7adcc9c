"""Experts: the dense sum of a token's experts, with its gradient; ties; the experts of a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.models.experts import mix_experts, route
from opdjax.ops.sharding import make_mesh

NUM_EXPERTS, WIDTH, INNER = 6, 7, 5
CONFIG = types.SimpleNamespace(experts_per_token=3, normalizes_experts=True)


@pytest.fixture
def problem(rng):
    """Weights, states `[3, 4, WIDTH]`, and a cotangent of the mixed states."""
    shapes = {
        "router_kernel": (NUM_EXPERTS, WIDTH),
        "expert_gate_kernel": (NUM_EXPERTS, INNER, WIDTH),
        "expert_up_kernel": (NUM_EXPERTS, INNER, WIDTH),
        "expert_down_kernel": (NUM_EXPERTS, WIDTH, INNER),
    }
    weights = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return weights, *jnp.asarray(rng.normal(size=(2, 3, 4, WIDTH)))


def dense(x, weights):
    """Every expert of every token, of which those that are not chosen have weight 0."""
    probs = jax.nn.softmax(x @ weights["router_kernel"].T)
    chosen = jnp.argsort(-probs)[..., : CONFIG.experts_per_token]
    probs = jnp.where((jnp.arange(NUM_EXPERTS)[:, None] == chosen[..., None, :]).any(-1), probs, 0)
    gate, up = (
        jnp.einsum("btd,efd->btef", x, weights[f"expert_{n}_kernel"]) for n in ("gate", "up")
    )
    y = jnp.einsum("btef,edf->bted", jax.nn.silu(gate) * up, weights["expert_down_kernel"])
    return jnp.einsum("bted,bte->btd", y, probs / probs.sum(-1, keepdims=True))


def value_and_grads(run, weights, x, cotangent):
    loss = lambda x, weights: (run(x, weights) * cotangent).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "mesh",
    [None, pytest.param((1, 4, 2), marks=pytest.mark.long), (3, 1, 2)],
    ids=["one", "rows-undivided", "rows-divided"],
)
def test_the_grouped_product_is_the_dense_sum(problem, mesh):
    """On a mesh, each device of `tensor` has the half of the experts."""
    mesh = mesh and make_mesh(*mesh)
    run = lambda x, weights: mix_experts(x, weights, jax.nn.silu, CONFIG, mesh)
    expected, found = (value_and_grads(each, *problem) for each in (dense, run))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), expected, found)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[1]))


def test_of_equal_experts_those_of_lower_index_are_chosen():
    router = jnp.array([[1.0], [2.0], [2.0], [0.0], [2.0], [2.0]])
    for states, expected in (([[1.0]], [1, 2, 4]), ([[0.0]], [0, 1, 2]), ([[-1.0]], [3, 0, 1])):
        chosen, experts = route(jnp.array(states), router, CONFIG)
        assert experts.tolist() == [expected]
        np.testing.assert_allclose(chosen.sum(), 1, rtol=1e-6)


def test_weights_that_are_not_normalized_are_probabilities_of_all_experts():
    config = types.SimpleNamespace(experts_per_token=2, normalizes_experts=False)
    chosen, _ = route(jnp.ones((1, 1)), jnp.log(jnp.array([[1.0], [4.0], [3.0]])), config)
    np.testing.assert_allclose(chosen, [[0.5, 0.375]], rtol=1e-6)
