"""Full-vocabulary divergences: hand numbers, limits, autodiff in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.config import EstimatorConfig
from opdjax.config.validation import ConfigError
from opdjax.estimators import bind
from opdjax.estimators.divergence import (
    forward_kl,
    full_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from opdjax.ops.tile import VocabTile
from opdjax.ops.vocab import TokenInputs

LN2 = np.log(2.0)
DIVERGENCES = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": lambda s, t: jsd(s, t, 0.5),
    "jsd, 0.3": lambda s, t: jsd(s, t, 0.3),
    "skew_forward": lambda s, t: skew_forward_kl(s, t, 0.1),
    "skew_reverse": lambda s, t: skew_reverse_kl(s, t, 0.1),
}


def tile(logits):
    return VocabTile(jnp.asarray(logits)[None])


@pytest.fixture
def pair(rng):
    return tuple(2 * rng.normal(size=7) for _ in range(2))


def test_hand_worked_numbers():
    """Student (1/2, 1/2, 0), teacher (1/4, 3/4, 0); the mixture at beta 1/4 is (7/16, 9/16, 0)."""
    student, teacher = (
        tile([np.log(0.5), np.log(0.5), -np.inf]),
        tile([np.log(0.25), np.log(0.75), -np.inf]),
    )
    np.testing.assert_allclose(
        reverse_kl(student, teacher)[0], 0.5 * np.log(2) + 0.5 * np.log(2 / 3), rtol=1e-6
    )
    np.testing.assert_allclose(
        forward_kl(student, teacher)[0], 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-6
    )
    to_mixture_t = 0.25 * np.log(4 / 7) + 0.75 * np.log(4 / 3)
    to_mixture_s = 0.5 * np.log(8 / 7) + 0.5 * np.log(8 / 9)
    np.testing.assert_allclose(
        jsd(student, teacher, 0.25)[0], 0.25 * to_mixture_t + 0.75 * to_mixture_s, rtol=1e-5
    )


def test_beta_names_its_limits(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_array_equal(jsd(student, teacher, 0.0), forward_kl(student, teacher))
    np.testing.assert_array_equal(jsd(student, teacher, 1.0), reverse_kl(student, teacher))


@pytest.mark.usefixtures("x64")
def test_scaled_jsd_approaches_its_limits(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_allclose(
        jsd(student, teacher, 1e-7) / 1e-7, forward_kl(student, teacher), rtol=1e-5
    )
    np.testing.assert_allclose(
        jsd(student, teacher, 1 - 1e-7) / 1e-7, reverse_kl(student, teacher), rtol=1e-5
    )


@pytest.mark.usefixtures("x64")
def test_jsd_at_one_half_is_symmetric_and_bounded(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_allclose(jsd(student, teacher, 0.5), jsd(teacher, student, 0.5), rtol=1e-12)
    far = jsd(tile([50.0, 0, 0]), tile([0, 50.0, 0]), 0.5)
    np.testing.assert_allclose(far, LN2, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
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
    found = jax.grad(lambda x: reverse_kl(VocabTile(x[None]), tile(teacher))[0])(
        jnp.asarray(student)
    )
    np.testing.assert_allclose(found, jnp.exp(p) * (p - q - kl), atol=1e-12)


def test_what_the_student_cannot_draw_costs_nothing_and_what_the_teacher_cannot_is_infinite():
    student, teacher = tile([0.0, 0.0, -np.inf]), tile([0.0, -np.inf, 0.0])
    assert np.isinf(reverse_kl(student, teacher)[0])
    assert np.isinf(forward_kl(student, teacher)[0])
    assert np.isfinite(jsd(student, teacher, 0.5)[0])


# Skew divergences


def test_skewed_numbers_by_hand():
    """As above at alpha 1/4: T against (7/16, 9/16, 0), S against (5/16, 11/16, 0)."""
    student, teacher = (
        tile([np.log(0.5), np.log(0.5), -np.inf]),
        tile([np.log(0.25), np.log(0.75), -np.inf]),
    )
    forward = 0.25 * np.log(4 / 7) + 0.75 * np.log(4 / 3)
    reverse = 0.5 * np.log(8 / 5) + 0.5 * np.log(8 / 11)
    np.testing.assert_allclose(skew_forward_kl(student, teacher, 0.25)[0], forward, rtol=1e-5)
    np.testing.assert_allclose(skew_reverse_kl(student, teacher, 0.25)[0], reverse, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("skew", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)]
)
def test_a_skew_divergence_lies_between_its_limits(skew, plain, pair):
    """The plain KL at alpha 0 and nothing at 1, falling between; a teacher that shares no id costs
    log(1 / alpha).
    """
    student, teacher = map(tile, pair)
    np.testing.assert_allclose(skew(student, teacher, 0.0), plain(student, teacher), rtol=1e-12)
    np.testing.assert_allclose(skew(student, teacher, 1.0), 0, atol=1e-12)
    values = [skew(student, teacher, alpha)[0] for alpha in (0.0, 0.1, 0.3, 0.6, 0.9, 1.0)]
    assert np.all(np.diff(values) < 0)
    apart = skew(tile([0.0, -np.inf, -np.inf]), tile([-np.inf, 0.0, -np.inf]), 0.1)
    np.testing.assert_allclose(apart, np.log(10), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_two_skew_divergences_are_one_with_the_sides_exchanged(pair):
    student, teacher = map(tile, pair)
    np.testing.assert_array_equal(
        skew_forward_kl(student, teacher, 0.3), skew_reverse_kl(teacher, student, 0.3)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("skew", [skew_forward_kl, skew_reverse_kl])
def test_ids_that_one_side_or_none_can_draw_leave_the_gradient_finite(skew, pair):
    """Padding changes nothing at all; an id of one side only is finite, where the plain KL is not."""
    student, teacher = (jnp.asarray(x) for x in pair)

    def gradient(x, t):
        return jax.value_and_grad(lambda x: skew(VocabTile(x[None]), VocabTile(t[None]), 0.1)[0])(x)

    padded = [jnp.concatenate([x, jnp.full(2, -jnp.inf)]) for x in (student, teacher)]
    (value, plain), (padded_value, with_padding) = gradient(student, teacher), gradient(*padded)
    np.testing.assert_allclose(padded_value, value, rtol=1e-14)
    np.testing.assert_allclose(with_padding[:-2], plain, atol=1e-14)
    np.testing.assert_array_equal(with_padding[-2:], 0)
    for s, t in ((student.at[2].set(-jnp.inf), teacher), (student, teacher.at[2].set(-jnp.inf))):
        value, found = gradient(s, t)
        assert np.isfinite(value)
        assert np.isfinite(found).all()


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_every_divergence_over_a_batch(self):
        """Mapped over a batch: what each row has alone, and the recipe's monitored KL beside it."""
        rng = np.random.default_rng(3)
        student, teacher = (jnp.asarray(rng.normal(size=(3, 4, 7)), jnp.float32) for _ in range(2))
        for name in DIVERGENCES.keys() - {"jsd, 0.3"}:

            def of_row(s, t, name=name):
                row = TokenInputs(jnp.zeros(4, int))
                estimator = bind("full_kl", {"divergence": name})
                loss, outputs = estimator.token_loss(VocabTile(s), VocabTile(t), row)
                return loss, outputs["kl"]

            losses, kl = self.variant(jax.vmap(of_row))(student, teacher)
            alone = [of_row(*rows) for rows in zip(student, teacher)]
            np.testing.assert_allclose(
                losses, np.stack([loss for loss, _ in alone]), rtol=1e-4, atol=1e-6
            )
            np.testing.assert_allclose(
                kl,
                jax.vmap(lambda s, t: reverse_kl(VocabTile(s), VocabTile(t)))(student, teacher),
                rtol=1e-4,
            )


@pytest.mark.parametrize("name", ["skew_forward", "skew_reverse"])
def test_the_skew_reaches_the_recipe(name, pair):
    """By its option, 0.1 unless given."""
    exact = {"skew_forward": skew_forward_kl, "skew_reverse": skew_reverse_kl}[name]
    student, teacher = map(tile, pair)
    for options, alpha in (({}, 0.1), ({"skew_alpha": 0.4}, 0.4)):
        found = full_kl(
            student, teacher, TokenInputs(jnp.asarray([0])), divergence=name, **options
        )[0]
        np.testing.assert_array_equal(found, exact(student, teacher, alpha))


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
            {"skew_alpha": 0.1},
            "estimator.skew_alpha is 0.1; expected none unless divergence is a skew one",
        ),
        (
            {"skew_alpha": 0.1, "divergence": "jsd"},
            "estimator.skew_alpha is 0.1; expected none unless divergence is a skew one",
        ),
        (
            {"skew_alpha": 0.0, "divergence": "skew_forward"},
            "estimator.skew_alpha is 0.0; expected more than 0",
        ),
        (
            {"skew_alpha": 1.0, "divergence": "skew_reverse"},
            "estimator.skew_alpha is 1.0; expected more than 0",
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
        EstimatorConfig(recipe="full_kl", divergence="skew_forward", skew_alpha=0.2).options[
            "skew_alpha"
        ]
        == 0.2
    )
