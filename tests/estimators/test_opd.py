"""The sampled-token recipes: what they advertise is proven by enumerating every action in float64."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.estimators import RECIPES, bind, divergence, sequence
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.ops.vocab import Columns, Head, VocabTile, tiled_loss, tiled_stats

V = 7
EVERY_SAMPLED = [
    ("opd", {}),
    ("vopd", {"baseline": "full"}),
    ("vopd", {"baseline": "optimal"}),
    *[("vopd", {"baseline": "student_topk", "baseline_top_k": k}) for k in (1, 2, 3, 6, 7, 100)],
]


@pytest.fixture
def logits(rng):
    """Student and teacher at one context."""
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


def token_loss(name, options, student, teacher, token):
    """The recipe's loss of one token under one-context tiles."""
    tiles = (VocabTile(jnp.asarray(student)[None]), VocabTile(jnp.asarray(teacher)[None]))
    loss, outputs = RECIPES[name].token_loss(*tiles, Columns(jnp.asarray([token])), **options)
    return loss[0], outputs


def expected_gradient(name, options, student, teacher):
    """E_{y ~ student}[grad loss(y)], every y enumerated."""
    grad = jax.grad(lambda x, y: token_loss(name, options, x, teacher, y)[0])
    probs = jax.nn.softmax(student)
    return sum(probs[y] * grad(jnp.asarray(student), y) for y in range(len(student)) if probs[y] > 0)


def reverse_kl(student, teacher):
    p, q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(p) * (p - q))


@pytest.mark.usefixtures("x64")
class TestOneContext:
    @pytest.mark.parametrize(("name", "options"), EVERY_SAMPLED)
    def test_expected_gradient_is_that_of_the_reverse_kl(self, name, options, logits):
        student, teacher = logits
        exact = jax.grad(reverse_kl)(student, teacher)
        assert np.linalg.norm(exact) > 0.1
        np.testing.assert_allclose(expected_gradient(name, options, student, teacher), exact, atol=1e-10)

    def test_the_full_baseline_makes_advantages_average_to_zero(self, logits):
        student, teacher = logits
        advantages = np.array([token_loss("vopd", {}, student, teacher, y)[1]["advantage"][0] for y in range(V)])
        assert np.abs(advantages).max() > 0.1
        assert abs(jax.nn.softmax(student) @ advantages) < 1e-12

    def test_k_of_one_is_opd(self, logits):
        for y in range(V):
            one, _ = token_loss("vopd", {"baseline": "student_topk", "baseline_top_k": 1}, *logits, y)
            np.testing.assert_allclose(one, token_loss("opd", {}, *logits, y)[0], rtol=1e-14)

    @pytest.mark.parametrize("k", [V, V + 1, 100])
    def test_k_of_at_least_v_is_the_full_baseline(self, k, logits):
        for y in range(V):
            topk, _ = token_loss("vopd", {"baseline": "student_topk", "baseline_top_k": k}, *logits, y)
            np.testing.assert_allclose(topk, token_loss("vopd", {}, *logits, y)[0], rtol=1e-13)

    @pytest.mark.parametrize(("name", "options"), EVERY_SAMPLED)
    def test_a_student_that_is_the_teacher_gets_no_gradient(self, name, options, logits):
        student, _ = logits
        for y in range(V):
            gradient = jax.grad(lambda x, y=y: token_loss(name, options, x, student, y)[0])(jnp.asarray(student))
            np.testing.assert_allclose(gradient, 0, atol=1e-14)

    @pytest.mark.parametrize(("name", "options"), EVERY_SAMPLED)
    def test_no_gradient_reaches_the_teacher(self, name, options, logits):
        student, teacher = logits
        gradient = jax.grad(lambda t: token_loss(name, options, student, t, 2)[0])(jnp.asarray(teacher))
        np.testing.assert_array_equal(gradient, 0)

    def test_padded_ids_change_nothing(self, logits):
        student, teacher = (np.append(x, [-np.inf, -np.inf]) for x in logits)
        for name, options in EVERY_SAMPLED:
            padded = expected_gradient(name, options, student, teacher)
            np.testing.assert_allclose(padded[:V], expected_gradient(name, options, *logits), atol=1e-12)
            np.testing.assert_array_equal(padded[V:], 0)


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/2, 1/4), token 0: r = ln(1/2), KL = (1/2) ln 2 - (1/4) ln 2 = (1/4) ln 2."""
    student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    ln2 = np.log(2.0)
    loss, outputs = token_loss("opd", {}, student, teacher, 0)
    np.testing.assert_allclose(outputs["reward"][0], -ln2, rtol=1e-6)
    np.testing.assert_allclose(loss, ln2 * np.log(0.5), rtol=1e-6)
    loss, outputs = token_loss("vopd", {}, student, teacher, 0)
    np.testing.assert_allclose(outputs["kl"][0], ln2 / 4, rtol=1e-6)
    np.testing.assert_allclose(outputs["advantage"][0], -0.75 * ln2, rtol=1e-6)
    np.testing.assert_allclose(loss, 0.75 * ln2 * np.log(0.5), rtol=1e-6)
    # On the student's top two (renormalised to 2/3, 1/3 and 1/3, 2/3) the KL is (1/3) ln 2.
    _, outputs = token_loss("vopd", {"baseline": "student_topk", "baseline_top_k": 2}, student, teacher, 0)
    np.testing.assert_allclose(outputs["advantage"][0], -ln2 + ln2 / 3, rtol=1e-6)
    assert "kl" not in outputs  # a truncated KL is not reported as the KL


# --- A tree: V = 3, T = 3, token 0 ends the sequence. Parameters are one row of logits per context. ---

LENGTH, EOS = 3, 0
CONTEXTS = [prefix for n in range(LENGTH) for prefix in itertools.product((1, 2), repeat=n)]
SEQUENCES = [(*prefix, EOS) for prefix in CONTEXTS] + [(*prefix, y) for prefix in CONTEXTS if len(prefix) == 2 for y in (1, 2)]


def encode(sequence):
    """(tokens [T+1], mask, one-hot contexts [T+1, C]): column 0 is the prompt, column t + 1 the sequence's token t."""
    tokens, mask, hidden = np.zeros(LENGTH + 1, int), np.zeros(LENGTH + 1, bool), np.zeros((LENGTH + 1, len(CONTEXTS)))
    for t, token in enumerate(sequence):
        tokens[t + 1], mask[t + 1] = token, True
        hidden[t, CONTEXTS.index(sequence[:t])] = 1
    return tokens, mask, hidden


ENCODED = [np.stack(parts) for parts in zip(*map(encode, SEQUENCES))]


def sequence_logprobs(theta):
    """Log-probability of every sequence under the table theta [C, V]."""
    logprobs = jax.nn.log_softmax(theta, axis=-1)
    return jnp.stack([sum(logprobs[CONTEXTS.index(s[:t]), y] for t, y in enumerate(s)) for s in SEQUENCES])


@partial(jax.jit, static_argnames=("name", "discount", "aggregation", "baseline"))
def row_gradient(theta, teacher_theta, rows, name, discount, aggregation, baseline=None):
    """Gradient of the recipe's loss on a batch of sequences (by number), through the tiled pass and the real aggregation."""
    tokens, mask, hidden = (jnp.asarray(x)[rows] for x in ENCODED)
    segments = jnp.ones_like(tokens)
    weights = aggregation_weights(mask, segments, aggregation, count_denominators(mask, segments, LENGTH))
    recipe, options = bind(name, {"discount": discount} | ({} if baseline is None else {"baseline": baseline}))
    columns = Columns(tokens)
    teacher = (hidden, Head(teacher_theta.T))
    if sequence.is_coupled(options):
        stat = partial(sequence.token_stats, options=options)
        stats = tiled_stats(stat, hidden, Head(theta.T), mask, columns, teacher, tile=4)
        columns = sequence.prepare(columns, stats, mask, segments, options, is_policy_gradient=True)

    def loss(kernel):
        return tiled_loss(partial(recipe.token_loss, **options), hidden, Head(kernel), weights, columns, teacher, tile=4)[0]

    return jax.grad(loss)(theta.T).T


@pytest.mark.usefixtures("x64")
class TestTree:
    @pytest.fixture
    def tables(self, rng):
        return tuple(jnp.asarray(rng.normal(size=(len(CONTEXTS), 3))) for _ in range(2))

    def expected(self, tables, **how):
        probs = jnp.exp(sequence_logprobs(tables[0]))
        np.testing.assert_allclose(probs.sum(), 1, rtol=1e-12)
        return sum(p * row_gradient(*tables, jnp.array([i]), **how) for i, p in enumerate(probs))

    def frozen_state_gradient(self, tables):
        """Sum over contexts of P(reach it) * grad KL there, divided by the fixed denominator."""
        theta, teacher = tables
        probs = np.exp(sequence_logprobs(theta))
        reach = [sum(p for p, s in zip(probs, SEQUENCES) if s[: len(c)] == c and len(s) > len(c)) for c in CONTEXTS]
        kl = lambda x: sum(p * reverse_kl(x[i], teacher[i]) for i, p in enumerate(reach))  # noqa: E731
        return jax.grad(kl)(theta) / LENGTH

    def sequence_gradient(self, tables):
        theta, teacher = tables
        kl = lambda x: jnp.sum(jnp.exp(sequence_logprobs(x)) * (sequence_logprobs(x) - sequence_logprobs(teacher)))  # noqa: E731
        return jax.grad(kl)(theta) / LENGTH

    @pytest.mark.parametrize(("name", "baseline"), [("opd", None), ("vopd", "full"), ("vopd", "student_topk")])
    def test_no_discount_is_the_gradient_with_the_states_held_fixed(self, name, baseline, tables):
        found = self.expected(tables, name=name, discount=0.0, aggregation="fixed_denominator", baseline=baseline)
        np.testing.assert_allclose(found, self.frozen_state_gradient(tables), atol=1e-10)

    @pytest.mark.parametrize(("name", "baseline"), [("opd", None), ("vopd", "full")])
    def test_discount_one_is_the_gradient_of_the_sequence_kl(self, name, baseline, tables):
        found = self.expected(tables, name=name, discount=1.0, aggregation="fixed_denominator", baseline=baseline)
        np.testing.assert_allclose(found, self.sequence_gradient(tables), atol=1e-10)

    def test_no_discount_is_not_the_gradient_of_the_sequence_kl(self, tables):
        frozen, whole = self.frozen_state_gradient(tables), self.sequence_gradient(tables)
        assert np.linalg.norm(frozen - whole) > 0.05 * np.linalg.norm(whole)

    @pytest.mark.parametrize(
        ("aggregation", "is_free"),
        [("fixed_denominator", True), ("sequence_mean_token_sum", True), ("token_mean", False), ("sequence_mean_token_mean", False)],
    )
    def test_a_baseline_is_free_only_where_no_divisor_depends_on_the_sample(self, aggregation, is_free, tables):
        """Two rows, all 225 pairs: the baseline's part of the expected gradient, relative to the gradient."""
        probs = np.exp(sequence_logprobs(tables[0]))
        pairs = jnp.array(list(itertools.product(range(len(SEQUENCES)), repeat=2)))
        weights = jnp.asarray([probs[i] * probs[j] for i, j in pairs])

        def expectation(name, baseline):
            gradient = jax.vmap(lambda rows: row_gradient(*tables, rows, name, 0.0, aggregation, baseline))(pairs)
            return jnp.einsum("p,pcv->cv", weights, gradient)

        without = expectation("opd", None)
        bias = np.linalg.norm(expectation("vopd", "full") - without) / np.linalg.norm(without)
        print(f"{aggregation}: relative bias of the baseline {bias:.3e}")
        assert (bias < 1e-12) if is_free else (0.01 < bias < 0.5)


# --- Under jit and vmap, finite differences, garbage, refusals. ---


class TestTransforms(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_recipes_agree_with_and_without_transforms(self):
        rng = np.random.default_rng(1)
        student, teacher = (jnp.asarray(rng.normal(size=(8, 4, V)), jnp.float32) for _ in range(2))
        tokens = jnp.asarray(rng.integers(0, V, (8, 4)))
        for name, options in [*EVERY_SAMPLED, ("full_kl", {"divergence": "jsd", "beta": 0.3})]:

            def loss(s, t, y, name=name, options=options):
                return RECIPES[name].token_loss(VocabTile(s), VocabTile(t), Columns(y), **options)[0]

            plain = np.stack([loss(*row) for row in zip(student, teacher, tokens)])
            np.testing.assert_allclose(jax.vmap(loss)(student, teacher, tokens), plain, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(self.variant(jax.vmap(loss))(student, teacher, tokens), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("baseline", ["full", "student_topk"])
def test_gradient_agrees_with_finite_differences_when_the_advantage_is_held(baseline, logits):
    student, teacher = logits
    advantage = token_loss("vopd", {"baseline": baseline}, student, teacher, 3)[1]["advantage"]
    surrogate = lambda x: -advantage[0] * jax.nn.log_softmax(x)[3]  # noqa: E731
    check_grads(surrogate, (jnp.asarray(student),), order=1, modes=["rev"])
    found = jax.grad(lambda x: token_loss("vopd", {"baseline": baseline}, x, teacher, 3)[0])(jnp.asarray(student))
    np.testing.assert_allclose(found, jax.grad(surrogate)(jnp.asarray(student)), rtol=1e-10)


@pytest.mark.parametrize(("name", "options"), [*EVERY_SAMPLED, ("full_kl", {}), ("full_kl", {"divergence": "jsd"})])
def test_nan_in_masked_slots_changes_neither_value_nor_gradient(name, options, rng):
    hidden, teacher_hidden = (rng.normal(size=(2, 5, 4)).astype(np.float32) for _ in range(2))
    head, teacher_head = (Head(jnp.asarray(rng.normal(size=(V, 4)), jnp.float32)) for _ in range(2))
    tokens = jnp.asarray(rng.integers(0, V, (2, 5)))
    weights = jnp.asarray([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], jnp.float32)
    # Hidden column t predicts token t + 1: these are the columns from which no counted token is predicted.
    unread = np.array([[1, 0, 0, 1, 1], [0, 0, 1, 1, 1]], bool)

    def run(hidden, teacher_hidden):
        def loss(hidden, head):
            token = partial(RECIPES[name].token_loss, **options)
            return tiled_loss(token, hidden, head, weights, Columns(tokens), (teacher_hidden, teacher_head), tile=3)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(hidden), head)

    clean = run(hidden, teacher_hidden)
    garbage = [np.where(unread[:, :, None], np.nan, x) for x in (hidden, teacher_hidden)]
    chex.assert_trees_all_equal(run(*garbage), clean)


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
