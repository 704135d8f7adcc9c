"""Full-vocabulary divergences: hand numbers, limits, autodiff in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from on_logits import on_logits

from opdjax.config import EstimatorConfig
from opdjax.config.validation import ConfigError
from opdjax.estimators import bind, divergence
from opdjax.estimators.divergence import full_kl
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

LN2 = np.log(2.0)
# Of logits [V] of student and teacher; of jsd and the skew forms also a number, which is static.
reverse_kl, forward_kl = map(on_logits, (divergence.reverse_kl, divergence.forward_kl))
jsd, skew_forward_kl, skew_reverse_kl = (
    on_logits(function, static_argnums=2)
    for function in (divergence.jsd, divergence.skew_forward_kl, divergence.skew_reverse_kl)
)
DIVERGENCES = {
    "reverse": divergence.reverse_kl,
    "forward": divergence.forward_kl,
    "jsd": lambda s, t: divergence.jsd(s, t, 0.5),
    "jsd, 0.3": lambda s, t: divergence.jsd(s, t, 0.3),
    "skew_forward": lambda s, t: divergence.skew_forward_kl(s, t, 0.1),
    "skew_reverse": lambda s, t: divergence.skew_reverse_kl(s, t, 0.1),
}


def tile(logits):
    return VocabTile(jnp.asarray(logits)[None])


@pytest.fixture
def pair(rng):
    return tuple(2 * rng.normal(size=7) for _ in range(2))


def test_hand_worked_numbers():
    """Student (1/2, 1/2, 0), teacher (1/4, 3/4, 0); the mixture at beta 1/4 is (7/16, 9/16, 0)."""
    student = np.array([np.log(0.5), np.log(0.5), -np.inf])
    teacher = np.array([np.log(0.25), np.log(0.75), -np.inf])
    np.testing.assert_allclose(
        reverse_kl(student, teacher), 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6
    )
    np.testing.assert_allclose(
        forward_kl(student, teacher), 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-6
    )
    to_mixture_t = 0.25 * np.log(4 / 7) + 0.75 * np.log(4 / 3)
    to_mixture_s = 0.5 * np.log(8 / 7) + 0.5 * np.log(8 / 9)
    np.testing.assert_allclose(
        jsd(student, teacher, 0.25), 0.25 * to_mixture_t + 0.75 * to_mixture_s, rtol=1e-5
    )


def test_beta_names_its_limits(pair):
    student, teacher = pair
    np.testing.assert_array_equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    np.testing.assert_array_equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))


@pytest.mark.usefixtures("x64")
def test_scaled_jsd_approaches_its_limits(pair):
    student, teacher = pair
    np.testing.assert_allclose(
        jsd(student, teacher, 1e-7) / 1e-7, forward_kl(student, teacher), rtol=1e-5
    )
    np.testing.assert_allclose(
        jsd(student, teacher, 1 - 1e-7) / 1e-7, reverse_kl(student, teacher), rtol=1e-5
    )


@pytest.mark.usefixtures("x64")
def test_jsd_at_one_half_is_symmetric_and_bounded(pair):
    student, teacher = pair
    np.testing.assert_allclose(jsd(student, teacher, 0.5), jsd(teacher, student, 0.5), rtol=1e-12)
    far = jsd(np.array([50.0, 0, 0]), np.array([0, 50.0, 0]), 0.5)
    np.testing.assert_allclose(far, LN2, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients(name, pair):
    student, teacher = (jnp.append(jnp.asarray(x), -jnp.inf) for x in pair)
    live, function = student[:-1], DIVERGENCES[name]

    @jax.jit
    def of_live(x):
        return function(VocabTile(jnp.append(x, -jnp.inf)[None]), VocabTile(teacher[None]))[0]

    check_grads(of_live, (live,), order=1, modes=["rev"])
    same = jax.jit(jax.grad(lambda x: function(VocabTile(x[None]), VocabTile(live[None]))[0]))
    np.testing.assert_allclose(same(live), 0, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_reverse_kl_gradient_in_closed_form(pair):
    """d KL(S || T) / d logit_v = p_v (log p_v - log q_v - KL)."""
    p, q = (x - np.logaddexp.reduce(x) for x in pair)
    kl = np.sum(np.exp(p) * (p - q))
    found = jax.grad(reverse_kl)(*pair)
    np.testing.assert_allclose(found, np.exp(p) * (p - q - kl), atol=1e-12)


def test_what_the_student_cannot_draw_costs_nothing_and_what_the_teacher_cannot_is_infinite():
    student, teacher = np.array([0.0, 0.0, -np.inf]), np.array([0.0, -np.inf, 0.0])
    assert np.isinf(reverse_kl(student, teacher))
    assert np.isinf(forward_kl(student, teacher))
    assert np.isfinite(jsd(student, teacher, 0.5))


# Skew divergences


def test_skewed_numbers_by_hand():
    """As above at alpha 1/4: T against (7/16, 9/16, 0), S against (5/16, 11/16, 0)."""
    student = np.array([np.log(0.5), np.log(0.5), -np.inf])
    teacher = np.array([np.log(0.25), np.log(0.75), -np.inf])
    forward = 0.25 * np.log(4 / 7) + 0.75 * np.log(4 / 3)
    reverse = 0.5 * np.log(8 / 5) + 0.5 * np.log(8 / 11)
    np.testing.assert_allclose(skew_forward_kl(student, teacher, 0.25), forward, rtol=1e-5)
    np.testing.assert_allclose(skew_reverse_kl(student, teacher, 0.25), reverse, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("skew", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)]
)
def test_a_skew_divergence_lies_between_its_limits(skew, plain, pair):
    """The plain KL at alpha 0 and nothing at 1, falling between; a teacher that shares no id costs
    log(1 / alpha).
    """
    student, teacher = pair
    np.testing.assert_allclose(skew(student, teacher, 0.0), plain(student, teacher), rtol=1e-12)
    np.testing.assert_allclose(skew(student, teacher, 1.0), 0, atol=1e-12)
    values = [skew(student, teacher, alpha) for alpha in (0.0, 0.1, 0.5, 1.0)]
    assert np.all(np.diff(values) < 0)
    apart = np.where(np.eye(3)[:2] == 1, 0.0, -np.inf)
    apart = skew(*apart, 0.1)
    np.testing.assert_allclose(apart, np.log(10), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_two_skew_divergences_are_one_with_the_sides_exchanged(pair):
    student, teacher = pair
    np.testing.assert_array_equal(
        skew_forward_kl(student, teacher, 0.3), skew_reverse_kl(teacher, student, 0.3)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("skew", [skew_forward_kl, skew_reverse_kl])
def test_ids_that_one_side_or_none_can_draw_leave_the_gradient_finite(skew, pair):
    """Padding changes nothing; an id of one side only stays finite, unlike in the plain KL."""
    gradient = lambda x, t: jax.value_and_grad(skew)(x, t, 0.1)
    padded = [np.append(x, [-np.inf] * 2) for x in pair]
    (value, plain), (padded_value, with_padding) = gradient(*pair), gradient(*padded)
    np.testing.assert_allclose(padded_value, value, rtol=1e-14)
    np.testing.assert_allclose(with_padding[:-2], plain, atol=1e-14)
    np.testing.assert_array_equal(with_padding[-2:], 0)
    for side in range(2):
        one_sided = [x.copy() for x in pair]
        one_sided[side][2] = -np.inf
        value, found = gradient(*one_sided)
        assert np.isfinite(value)
        assert np.isfinite(found).all()


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_every_divergence_over_a_batch(self):
        """Mapped over a batch: the loss of each row alone, and the recipe's monitored KL."""
        rng = np.random.default_rng(3)
        student, teacher = (rng.normal(size=(3, 4, 7)).astype(np.float32) for _ in range(2))
        names = sorted(DIVERGENCES.keys() - {"jsd, 0.3"})
        row = TokenInputs(jnp.zeros(4, int))

        def of_row(s, t):
            found = {}
            for name in names:
                estimator = bind("full_kl", {"divergence": name})
                loss, outputs = estimator.token_loss(VocabTile(s), VocabTile(t), row)
                found[name] = loss, outputs["kl"]
            return found

        found = self.variant(jax.vmap(of_row))(jnp.asarray(student), jnp.asarray(teacher))
        flat = [x.reshape(-1, 7) for x in (student, teacher)]
        kl = reverse_kl(*flat).reshape(3, 4)
        for name in names:
            alone = on_logits(DIVERGENCES[name])(*flat).reshape(3, 4)
            np.testing.assert_allclose(found[name][0], alone, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found[name][1], kl, rtol=1e-4)


@pytest.mark.parametrize("name", ["skew_forward", "skew_reverse"])
def test_the_skew_reaches_the_recipe(name, pair):
    """By its option, 0.1 unless given."""
    exact = {"skew_forward": skew_forward_kl, "skew_reverse": skew_reverse_kl}[name]
    row = TokenInputs(jnp.asarray([0]))
    for options, alpha in (({}, 0.1), ({"beta": 0.4}, 0.4)):
        of = on_logits(lambda s, t, o=options: full_kl(s, t, row, divergence=name, **o)[0])
        np.testing.assert_allclose(of(*pair), exact(*pair, alpha), rtol=1e-6)


def test_an_unknown_divergence_is_refused(pair):
    with pytest.raises(
        ValueError,
        match="full_kl has no divergence 'renyi'; expected one of \\['reverse', 'forward', 'jsd', ",
    ):
        full_kl(*map(tile, pair), TokenInputs(jnp.asarray([0])), divergence="renyi")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"beta": 0.1},
            "estimator.beta is 0.1; expected none unless divergence is jsd or skew_forward or "
            "skew_reverse",
        ),
        (
            {"beta": 0.0, "divergence": "skew_forward"},
            "estimator.beta is 0.0; expected more than 0",
        ),
        (
            {"beta": 1.0, "divergence": "skew_reverse"},
            "estimator.beta is 1.0; expected more than 0",
        ),
        (
            {"recipe": "topk_kl", "divergence": "skew_forward"},
            "estimator.divergence is 'skew_forward'; expected reverse or forward",
        ),
    ],
)
def test_the_config_holds_the_skew_to_its_divergence(options, message):
    with pytest.raises(ConfigError, match=message):
        EstimatorConfig(**{"recipe": "full_kl"} | options)
    assert (
        EstimatorConfig(recipe="full_kl", divergence="skew_forward", beta=0.2).options["beta"]
        == 0.2
    )
