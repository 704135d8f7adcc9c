"""Sampled-token recipes: their advertised gradients, enumerated over every action in float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    CONTEXT_OF,
    CONTEXTS,
    LENGTH,
    MASK,
    PAIRS,
    SEQUENCES,
    TOKENS,
    batch_probabilities,
    exact_gradient,
    expected_gradient,
    log_softmax,
    relative_bias,
    reverse_kl_gradient,
    sample_gradients,
    softmax,
    token_logprobs,
)
from jax.test_util import check_grads

from opdjax.config.recipes import RECIPES
from opdjax.estimators import TOKEN_LOSSES, bind, coupling, divergence
from opdjax.estimators.losses import (
    aggregation_weights,
    clipped_policy_gradient_loss,
    count_denominators,
)
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats

V = 7
EVERY_SAMPLED = [
    ("opd", {}),
    ("vopd", {"baseline": "full"}),
    ("vopd", {"baseline": "optimal"}),
    *[("vopd", {"baseline": "student_topk", "support_top_k": k}) for k in (1, 2, 3, 6, 7, 100)],
]


@pytest.fixture
def logits(rng):
    """Student and teacher at one context."""
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


def token_loss(name, options, student, teacher, token):
    """The recipe's loss of one token under one-context tiles."""
    tiles = (VocabTile(jnp.asarray(student)[None]), VocabTile(jnp.asarray(teacher)[None]))
    loss, outputs = TOKEN_LOSSES[name](*tiles, TokenInputs(jnp.asarray([token])), **options)
    return loss[0], outputs


@pytest.mark.usefixtures("x64")
class TestOneContext:
    @pytest.mark.parametrize(("name", "options"), EVERY_SAMPLED)
    def test_expected_gradient_is_that_of_the_reverse_kl(self, name, options, logits):
        """And nothing is learnt from a teacher that equals the student."""
        student, teacher = logits
        exact = reverse_kl_gradient(student, teacher)
        assert np.linalg.norm(exact) > 0.1
        np.testing.assert_allclose(
            expected_gradient(name, options, student, teacher), exact, atol=1e-10
        )
        of_itself, _ = sample_gradients(name, options, student, student)
        np.testing.assert_allclose(of_itself, 0, atol=1e-14)

    def test_the_full_baseline_makes_advantages_average_to_zero(self, logits):
        advantages = sample_gradients("vopd", {}, *logits)[1]["advantages"]
        assert np.abs(advantages).max() > 0.1
        assert abs(softmax(logits[0]) @ advantages) < 1e-12

    @pytest.mark.parametrize(
        ("k", "expected"),
        [(1, ("opd", {})), *((k, ("vopd", {})) for k in (V, V + 1, 100))],
        ids=["1 is opd", "V", "V + 1", "100"],
    )
    def test_k_of_one_is_opd_and_of_at_least_v_the_full_baseline(self, k, expected, logits):
        options = {"baseline": "student_topk", "support_top_k": k}
        found, outputs = sample_gradients("vopd", options, *logits)
        others, other_outputs = sample_gradients(*expected, *logits)
        np.testing.assert_allclose(found, others, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(
            outputs["advantages"], other_outputs["advantages"], rtol=1e-12, atol=1e-14
        )

    @pytest.mark.parametrize(("name", "options"), EVERY_SAMPLED[:4])
    def test_no_gradient_reaches_the_teacher(self, name, options, logits):
        student, teacher = logits
        of_teacher = jax.jit(jax.grad(lambda t: token_loss(name, options, student, t, 2)[0]))
        np.testing.assert_array_equal(of_teacher(teacher), 0)


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4), token 0: r = ln(1/2), KL = (1/2) ln 2 -
    (1/4) ln 2 = (1/4) ln 2.
    """
    student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    ln2 = np.log(2.0)
    loss, outputs = token_loss("opd", {}, student, teacher, 0)
    np.testing.assert_allclose(outputs["rewards"][0], -ln2, rtol=1e-6)
    np.testing.assert_allclose(loss, ln2 * np.log(0.5), rtol=1e-6)
    loss, outputs = token_loss("vopd", {}, student, teacher, 0)
    np.testing.assert_allclose(outputs["kl"][0], ln2 / 4, rtol=1e-6)
    np.testing.assert_allclose(outputs["advantages"][0], -0.75 * ln2, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.75 * ln2 * np.log(0.5), rtol=1e-6)
    # On the student's top two (renormalised to 2/3, 1/3 and 1/3, 2/3) the KL is (1/3) ln 2.
    _, outputs = token_loss(
        "vopd", {"baseline": "student_topk", "support_top_k": 2}, student, teacher, 0
    )
    np.testing.assert_allclose(outputs["advantages"][0], -ln2 + ln2 / 3, rtol=1e-6)
    assert "kl" not in outputs  # a truncated KL is not reported as the KL


# The tree, through the tiled pass and the real aggregation

ENCODED = (
    np.pad(TOKENS, ((0, 0), (1, 0))),
    np.pad(MASK, ((0, 0), (1, 0))),
)  # column 0 is the prompt


@partial(jax.jit, static_argnames=("name", "options", "aggregation"))
def batch_gradient(
    theta, teacher_theta, rows, name, options=(), aggregation="fixed_denominator", **columns
):
    """Gradient [C, V] of the recipe's loss on a batch of sequences (by number), as an update forms
    it.
    """
    options = dict(options)
    tokens, mask = (jnp.asarray(x)[rows] for x in ENCODED)
    # The hidden state is the one-hot context, one column before the token that it predicts.
    hidden = jnp.pad(jnp.eye(len(CONTEXTS))[CONTEXT_OF], ((0, 0), (0, 1), (0, 0)))[rows]
    segments = jnp.ones_like(tokens)
    weights = aggregation_weights(
        mask, segments, aggregation, count_denominators(mask, segments, LENGTH)
    )
    estimator = bind(name, options)
    columns = TokenInputs(
        tokens, **{key: jnp.pad(x, ((0, 0), (1, 0)))[rows] for key, x in columns.items()}
    )
    teacher = (hidden, Head(teacher_theta.T))
    if estimator.is_coupled:
        stat = estimator.token_stats
        stats = tiled_stats(stat, hidden, Head(theta.T), mask, columns, teacher, tile=4)
        columns = estimator.prepare(columns, stats, mask, segments)

    def loss(kernel):
        return tiled_loss(
            estimator.token_loss,
            hidden,
            Head(kernel),
            weights,
            columns,
            teacher,
            tile=4,
        )[0]

    return jax.grad(loss)(theta.T).T


@pytest.mark.usefixtures("x64")
class TestTree:
    @pytest.fixture
    def tables(self, rng):
        return tuple(rng.normal(size=(len(CONTEXTS), 3)) for _ in range(2))

    def expectation(
        self, tables, name, options=(), aggregation="fixed_denominator", batches=None, **columns
    ):
        batches = np.arange(len(SEQUENCES))[:, None] if batches is None else batches
        one = lambda rows: batch_gradient(*tables, rows, name, options, aggregation, **columns)
        gradients = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(batches)))
        return np.tensordot(batch_probabilities(tables[0], batches), gradients, 1)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            pytest.param("opd", {"discount": 0.0}, marks=pytest.mark.long),
            pytest.param("vopd", {"discount": 1.0}, marks=pytest.mark.long),
            ("vopd", {"discount": 0.5, "return_to_go": "expected", "baseline": "optimal"}),
            ("opd", {"importance": "prefix_truncate", "discount": 0.0}),
        ],
        ids=str,
    )
    def test_the_tiled_pass_gives_the_exact_gradient(self, name, options, tables):
        columns = (
            {"behavior_logprobs": token_logprobs(tables[0])} if "importance" in options else {}
        )
        found = self.expectation(tables, name, tuple(options.items()), **columns)
        np.testing.assert_allclose(found, exact_gradient(tables, options["discount"]), atol=1e-10)

    def test_no_discount_is_not_the_gradient_of_the_sequence_kl(self, tables):
        assert relative_bias(exact_gradient(tables, 0.0), exact_gradient(tables, 1.0)) > 0.05

    @pytest.mark.parametrize(
        ("aggregation", "is_free"),
        [
            ("fixed_denominator", True),
            pytest.param("sequence_mean_token_sum", True, marks=pytest.mark.long),
            ("token_mean", False),
            pytest.param("sequence_mean_token_mean", False, marks=pytest.mark.long),
        ],
    )
    def test_a_baseline_is_free_only_where_no_divisor_depends_on_the_sample(
        self, aggregation, is_free, tables
    ):
        """Two rows, all 225 pairs: the baseline's part of the expected gradient, relative to the
        gradient.
        """
        found, without = (
            self.expectation(tables, name, (), aggregation, PAIRS) for name in ("vopd", "opd")
        )
        print(f"{aggregation}: relative bias of the baseline {relative_bias(found, without):.3e}")
        assert (
            (relative_bias(found, without) < 1e-12)
            if is_free
            else (0.01 < relative_bias(found, without) < 0.5)
        )


# Under jit and vmap, finite differences, garbage, refusals

OPTIONED = [  # every option, in few recipes
    (
        "opd",
        {"reward_floor": -0.5, "discount": 0.5, "task_reward_coef": 0.7, "importance": "ppo_clip"},
    ),
    ("opd", {"power_alpha": 0.5, "extra_draws": 2}),
    ("opd", {"importance": "token_truncate", "importance_cap": 1.1}),
    ("vopd", {"baseline": "batch_mean", "importance": "token_mask", "importance_cap": 2.5}),
    ("vopd", {"baseline": "optimal", "reward_floor": -0.5, "extra_draws": 2}),
]


def random_columns(rng, shape):
    """Every column that a recipe may read."""
    normal = {
        key: rng.normal(size=shape) for key in ("advantages", "future_rewards", "mean_rewards")
    }
    positive = {
        "behavior_logprobs": -rng.exponential(2, size=shape),
        "loss_weights": rng.exponential(size=shape),
    }
    return normal | positive | {"uniforms": rng.random((*shape, 2))}


class TestTransforms(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_recipes_agree_with_and_without_transforms(self):
        rng = np.random.default_rng(1)
        student, teacher = (jnp.asarray(rng.normal(size=(8, 4, V)), jnp.float32) for _ in range(2))
        rows = TokenInputs(
            jnp.asarray(rng.integers(0, V, (8, 4))),
            **{key: np.float32(x) for key, x in random_columns(rng, (8, 4)).items()},
        )
        recipes = [*EVERY_SAMPLED[:4], *OPTIONED, ("full_kl", {"divergence": "jsd", "beta": 0.3})]

        def losses(s, t, row):
            return [
                bind(name, options).token_loss(VocabTile(s), VocabTile(t), row)[0]
                for name, options in recipes
            ]

        # Tokens do not see one another: all rows at once are the reference.
        flat = lambda tree: jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), tree)
        plain = [x.reshape(8, 4) for x in jax.jit(losses)(*map(flat, (student, teacher, rows)))]
        chex.assert_trees_all_close(
            self.variant(jax.vmap(losses))(student, teacher, rows), plain, rtol=1e-5, atol=1e-6
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vopd", {}),
        ("vopd", {"baseline": "student_topk"}),
        ("vopd", {"baseline": "optimal"}),
        ("opd", {"power_alpha": 0.5, "discount": 1.0}),
    ],
    ids=str,
)
def test_gradient_agrees_with_finite_differences_when_the_advantage_is_held(name, options, logits):
    student, teacher = logits
    columns = {"future_rewards": 0.3} if "discount" in options else {}
    gradients, outputs = sample_gradients(name, options, student, teacher, [3], **columns)
    held = float(outputs["advantages"][0])
    surrogate = lambda x: -held * log_softmax(x)[3]
    numeric = [
        (surrogate(student + step) - surrogate(student - step)) / 2e-6 for step in 1e-6 * np.eye(V)
    ]
    np.testing.assert_allclose(gradients[0], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_the_clipped_surrogate_agrees_with_finite_differences_when_the_advantage_is_held(logits):
    student, teacher = logits
    behavior = log_softmax(student) + np.array([-0.1, 0.1, 0.6, -0.6, 0.0, 0.9, -0.9])
    gradients, outputs = sample_gradients(
        "opd", {"importance": "ppo_clip"}, student, teacher, behavior_logprobs=behavior
    )
    surrogate = jax.jit(
        lambda x: clipped_policy_gradient_loss(
            outputs["advantages"], jax.nn.log_softmax(x), behavior, 0.2, 0.28
        )
    )
    check_grads(surrogate, (jnp.asarray(student),), order=1, modes=["rev"])
    np.testing.assert_allclose(gradients, jax.jacrev(surrogate)(jnp.asarray(student)), atol=1e-12)
    assert 0 < np.sum(~np.any(gradients, axis=1)) < V


GIVEN = (
    "advantages",
    "behavior_logprobs",
    "uniforms",
)  # by the batch; the other columns are prepared
COUPLED = [
    (
        "opd",
        {
            "discount": 0.5,
            "prefix_weight": 0.5,
            "importance": "prefix_truncate",
            "task_reward_coef": 0.5,
        },
    ),
    (
        "vopd",
        {
            "baseline": "batch_mean",
            "discount": 0.5,
            "return_to_go": "expected",
            "extra_draws": 2,
            "reward_floor": -0.5,
        },
    ),
    ("opd", {"importance": "sequence_mask", "power_alpha": 0.5}),
    ("full_kl", {"importance": "prefix_truncate"}),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *COUPLED[:2],
        OPTIONED[3],
        ("full_kl", {"divergence": "jsd"}),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in (*EVERY_SAMPLED[:2], OPTIONED[2], *COUPLED[2:])
        ),
    ],
)
def test_nan_in_masked_slots_changes_neither_value_nor_gradient(name, options, rng):
    hidden, teacher_hidden = (rng.normal(size=(2, 5, 4)).astype(np.float32) for _ in range(2))
    head, teacher_head = (Head(jnp.asarray(rng.normal(size=(V, 4)), jnp.float32)) for _ in range(2))
    tokens = jnp.asarray(rng.integers(0, V, (2, 5)))
    weights = jnp.asarray([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], jnp.float32)
    segments = jnp.asarray([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    columns = {
        key: x.astype(np.float32) for key, x in random_columns(rng, (2, 5)).items() if key in GIVEN
    }
    # Hidden column t predicts token t + 1: these are the columns from which no counted token is
    # predicted.
    unread = np.array([[1, 0, 0, 1, 1], [0, 0, 1, 1, 1]], bool)
    estimator = bind(name, options)

    @jax.jit
    def run(hidden, teacher_hidden, columns):
        row = TokenInputs(tokens, **columns)
        teacher = (teacher_hidden, teacher_head)
        mask = weights > 0
        if estimator.is_coupled:
            stats = tiled_stats(
                estimator.token_stats,
                hidden,
                head,
                mask,
                row,
                teacher,
                tile=3,
            )
            row = estimator.prepare(row, stats, mask, segments)

        def loss(hidden, head):
            return tiled_loss(estimator.token_loss, hidden, head, weights, row, teacher, tile=3)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    clean = run(hidden, teacher_hidden, columns)
    assert np.isfinite(clean[0])
    assert np.any(clean[1][0])
    garbage = [np.where(unread[:, :, None], np.nan, x) for x in (hidden, teacher_hidden)]
    spoilt = {
        key: np.where((weights > 0).reshape(2, 5, *[1] * (x.ndim - 2)), x, np.nan)
        for key, x in columns.items()
    }
    chex.assert_trees_all_equal(run(*garbage, spoilt), clean)


def test_options_that_a_recipe_does_not_have_are_refused():
    with pytest.raises(ValueError, match="recipe 'opd' has no option 'baseline'"):
        bind("opd", {"baseline": "full"})
    with pytest.raises(ValueError, match="there is no recipe 'vodp'"):
        bind("vodp", {})
    with pytest.raises(ValueError, match="no baseline 'nope'"):
        token_loss("vopd", {"baseline": "nope"}, np.zeros(3), np.zeros(3), 0)
    with pytest.raises(ValueError, match="no divergence 'nope'"):
        token_loss("full_kl", {"divergence": "nope"}, np.zeros(3), np.zeros(3), 0)
    assert set(divergence.full_kl.__kwdefaults__) <= set(RECIPES["full_kl"].options)
    for name, kinds in {
        "opd": ["token_trunkate"],
        "full_kl": ["token_truncate", "ppo_clip", "sequence_mask"],
        "topk_kl": ["ppo_clip"],
    }.items():
        for kind in kinds:
            with pytest.raises(
                ValueError, match=f"estimator.importance is '{kind}'; expected none"
            ):
                bind(name, {"importance": kind})
    # Unbound, a recipe knows neither the options that `prepare` turns into columns nor what is
    # misspelt.
    for option in ({"prefix_weight": 0.5}, {"return_to_go": "expected"}, {"importance_capp": 2.0}):
        with pytest.raises(TypeError, match=next(iter(option))):
            token_loss("opd", option, np.zeros(3), np.zeros(3), 0)
    with pytest.raises(ValueError, match="a token has no importance correction 'prefix_truncate'"):
        token_loss("opd", {"importance": "prefix_truncate"}, np.zeros(3), np.zeros(3), 0)


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("opd", {}, "token"),
        ("opd", {"discount": 1.0, "return_to_go": "sampled", "extra_draws": 0}, "token"),
        (
            "opd",
            {
                "reward_floor": -1.0,
                "prefix_weight": 0.5,
                "importance": "sequence_mask",
                "task_reward_coef": 1.0,
            },
            "token",
        ),
        ("opd", {"discount": 1.0, "return_to_go": "expected"}, "vocabulary"),
        ("opd", {"extra_draws": 1}, "vocabulary"),
        ("vopd", {}, "vocabulary"),
        ("vopd", {"baseline": "optimal"}, "vocabulary"),
        ("vopd", {"baseline": "batch_mean"}, "token"),
        ("vopd", {"baseline": "batch_mean", "extra_draws": 2}, "vocabulary"),
        (
            "vopd",
            {"baseline": "batch_mean", "discount": 0.5, "return_to_go": "expected"},
            "vocabulary",
        ),
        ("full_kl", {"importance": "prefix_truncate"}, "vocabulary"),
        ("topk_kl", {}, "vocabulary"),
        ("sft", {}, "none"),
    ],
    ids=str,
)
def test_what_a_recipe_reads_of_the_teacher(name, options, needs, rng):
    estimator = bind(name, options)
    assert estimator.teacher == needs
    if needs == "vocabulary":
        return
    # The columns alone are enough, where no more is asked for.
    shape, mask = (2, 3), np.array([[0, 1, 1], [0, 1, 0]], bool)
    tile = VocabTile(jnp.asarray(rng.normal(size=(6, V)), jnp.float32))
    row = TokenInputs(
        jnp.zeros(shape, int),
        teacher_logprobs=-jnp.ones(shape),
        behavior_logprobs=-jnp.ones(shape),
        advantages=jnp.ones(shape),
    )
    flat = lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
    if estimator.is_coupled:
        stats = jax.tree.map(
            lambda x: x.reshape(shape), estimator.token_stats(tile, None, flat(row))
        )
        row = estimator.prepare(row, stats, mask, jnp.ones(shape, int))
    assert np.isfinite(estimator.token_loss(tile, None, flat(row))[0]).all()


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("opd", {}, "a recipe reads 'teacher_logprobs'"),
        ("vopd", {}, "baseline full reads 'teacher'"),
        ("vopd", {"baseline": "optimal"}, "baseline optimal reads 'teacher'"),
        ("vopd", {"baseline": "batch_mean"}, "baseline batch_mean reads 'mean_rewards'"),
        ("opd", {"discount": 0.5}, "discount reads 'future_rewards'"),
        ("opd", {"task_reward_coef": 0.5}, "task_reward_coef reads 'advantages'"),
        ("opd", {"importance": "token_mask"}, "importance token_mask reads 'behavior_logprobs'"),
        ("opd", {"importance": "ppo_clip"}, "importance ppo_clip reads 'behavior_logprobs'"),
        ("opd", {"extra_draws": 2}, "extra_draws reads 'uniforms'"),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x),
)
def test_a_column_that_is_missing_is_named(name, options, missing):
    tile = VocabTile(jnp.zeros((1, 3)))
    known = {} if missing.startswith("a recipe") else {"teacher_logprobs": jnp.zeros(1)}
    with pytest.raises(ValueError, match=f"{missing}, which this batch does not carry"):
        TOKEN_LOSSES[name](tile, None, TokenInputs(jnp.zeros(1, int), **known), **options)


def test_a_missing_behaviour_is_named_before_the_pass():
    estimator = bind("opd", {"importance": "sequence_mask"})
    row, tile = TokenInputs(jnp.zeros((1, 1), int)), VocabTile(jnp.zeros((1, 3)))
    stats = {"student_logprobs": tile.logprob(row.tokens[0])[None]}
    with pytest.raises(ValueError, match="importance sequence_mask reads 'behavior_logprobs'"):
        estimator.prepare(row, stats, np.ones((1, 1), bool), jnp.ones((1, 1), int))
    with pytest.raises(ValueError, match="return_to_go expected reads 'teacher'"):
        coupling.token_stats(
            tile,
            None,
            TokenInputs(row.tokens[0], teacher_logprobs=jnp.zeros(1)),
            {"return_to_go": "expected"},
        )
