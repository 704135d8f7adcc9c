"""Full-vocabulary divergences: hand numbers, limits, autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.estimators.divergence import forward_kl, jsd, reverse_kl
from opdjax.ops.vocab import VocabTile

LN2 = np.log(2.0)


def tile(logits):
    return VocabTile(jnp.asarray(logits)[None])


@pytest.fixture
def pair(rng):
    return tuple(2 * rng.normal(size=7) for _ in range(2))


def test_hand_worked_numbers():
    """Student (1/2, 1/2, 0), teacher (1/4, 3/4, 0); the mixture at beta 1/4 is (7/16, 9/16, 0)."""
    student, teacher = tile([np.log(0.5), np.log(0.5), -np.inf]), tile([np.log(0.25), np.log(0.75), -np.inf])
    np.testing.assert_allclose(reverse_kl(student, teacher)[0], 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6)
    np.testing.assert_allclose(forward_kl(student, teacher)[0], 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-6)
    to_mixture_t = 0.25 * np.log(4 / 7) + 0.75 * np.log(4 / 3)
    to_mixture_s = 0.5 * np.log(8 / 7) + 0.5 * np.log(8 / 9)
    np.testing.assert_allclose(jsd(student, teacher, 0.25)[0], 0.25 * to_mixture_t + 0.75 * to_mixture_s, rtol=1e-5)


def test_beta_names_its_limits(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_array_equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    np.testing.assert_array_equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))


@pytest.mark.usefixtures("x64")
def test_scaled_jsd_approaches_its_limits(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_allclose(jsd(student, teacher, 1e-7) / 1e-7, forward_kl(student, teacher), rtol=1e-5)
    np.testing.assert_allclose(jsd(student, teacher, 1 - 1e-7) / 1e-7, reverse_kl(student, teacher), rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_jsd_at_one_half_is_symmetric_and_bounded(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_allclose(jsd(student, teacher, 0.5), jsd(teacher, student, 0.5), rtol=1e-12)
    far = jsd(tile([50.0, 0, 0]), tile([0, 50.0, 0]), 0.5)
    np.testing.assert_allclose(far, LN2, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, lambda s, t: jsd(s, t, 0.3), lambda s, t: jsd(s, t, 0.5)])
def test_gradients(divergence, pair):
    student, teacher = (np.append(x, -np.inf) for x in pair)
    live = jnp.asarray(student[:-1])

    def of_live(x):
        return divergence(VocabTile(jnp.append(x, -jnp.inf)[None]), tile(teacher))[0]

    check_grads(of_live, (live,), order=1, modes=["rev"])
    assert np.isfinite(jax.grad(of_live)(live)).all()
    same = jax.grad(lambda x: divergence(VocabTile(x[None]), tile(student[:-1]))[0])(live)
    np.testing.assert_allclose(same, 0, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_reverse_kl_gradient_in_closed_form(pair):
    """d KL(S || T) / d logit_v = p_v (log p_v - log q_v - KL)."""
    student, teacher = pair
    p, q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    kl = jnp.sum(jnp.exp(p) * (p - q))
    found = jax.grad(lambda x: reverse_kl(VocabTile(x[None]), tile(teacher))[0])(jnp.asarray(student))
    np.testing.assert_allclose(found, jnp.exp(p) * (p - q - kl), atol=1e-12)


def test_what_the_student_cannot_draw_costs_nothing_and_what_the_teacher_cannot_is_infinite():
    student, teacher = tile([0.0, 0.0, -np.inf]), tile([0.0, -np.inf, 0.0])
    assert np.isinf(reverse_kl(student, teacher)[0])
    assert np.isinf(forward_kl(student, teacher)[0])
    assert np.isfinite(jsd(student, teacher, 0.5)[0])
