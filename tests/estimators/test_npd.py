"""The near-policy recipe: hand numbers, its expected gradient by brute force, and the stored top k
against the teacher itself.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from on_logits import on_logits

from opdjax.config.recipes import RECIPES
from opdjax.estimators import bind
from opdjax.estimators.divergence import npd, topk_kl
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TokenInputs, dense_loss, tiled_loss

V, K = 7, 3
SUMS = [
    (renormalize, divergence)
    for renormalize in ("none", "teacher", "both")
    for divergence in ("forward", "reverse")
]


def stored(teacher, k, token=0, dtype=None):
    """A token's columns as annotation stores them: the teacher's k most likely ids and their
    log-probs.
    """
    teacher = np.asarray(teacher)
    logprobs = teacher - np.logaddexp.reduce(teacher)
    ids = np.argsort(-teacher)[:k]
    return TokenInputs(
        jnp.asarray([token]),
        teacher_top_ids=jnp.asarray(ids)[None],
        teacher_top_logprobs=jnp.asarray(logprobs[ids], dtype)[None],
    )


def value(student, row, **options):
    return npd(VocabTile(jnp.asarray(student)[None]), None, row, **options)[0][0]


def evaluate(cases, student, rows):
    """For each case (options): values and gradients of the student, one per row. One program."""
    cases = tuple(tuple(options.items()) for options in cases)
    return jax.tree.map(np.asarray, _evaluate(cases, jnp.asarray(student), rows))


@partial(jax.jit, static_argnums=0)
def _evaluate(cases, student, rows):
    of = lambda options: jax.value_and_grad(lambda x, row: value(x, row, **dict(options)))
    return [jax.vmap(of(options), in_axes=(None, 0))(student, rows) for options in cases]


def stacked(*rows):
    """Columns of several tokens, for `evaluate`."""
    return jax.tree.map(lambda *x: np.stack(x), *rows)


def options_of(*sums, **options):
    return [
        {"renormalize": renormalize, "divergence": divergence} | options
        for renormalize, divergence in sums
    ]


@pytest.fixture
def pair(rng):
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), its top 1, the token 0."""
    student, row = np.log([0.5, 0.25, 0.25]), stored(np.log([0.25, 0.25, 0.5]), 1)
    two = np.log(2)
    alone = {
        ("none", "forward"): 0.5 * two,
        ("teacher", "forward"): 2 * two,
        ("both", "forward"): 0.0,
        ("none", "reverse"): -0.25 * two,
        ("teacher", "reverse"): 0.25 * -2 * two,
        ("both", "reverse"): 0.0,
    }
    cases = [{}, {"kd_weight": 0.0}, *options_of(*alone, kd_weight=1.0)]
    cases = [{"support_top_k": 1} | options for options in cases]
    found = [values[0] for values, _ in evaluate(cases, student, stacked(row))]
    expected = [0.1 * two + 0.9 * 0.5 * two, two, *alone.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def stated_gradient(p, q, ids, renormalize, divergence):
    """Of the divergence by the student's logits, as the recipe's page states it."""
    a, b = np.zeros(V), np.zeros(V)
    a[ids], b[ids] = p[ids], q[ids]
    a = a / a.sum() if renormalize == "both" else a
    b = b if renormalize == "none" else b / b.sum()
    if divergence == "forward":
        pushed = -b
    else:
        gain = np.log(np.where(a > 0, a, 1) / np.where(b > 0, b, 1)) + (renormalize != "both")
        pushed = a * gain
    score = np.eye(V) - (a if renormalize == "both" else p)
    return pushed @ score


@pytest.mark.usefixtures("x64")
def test_expected_gradient_by_brute_force(pair, rng):
    """Every token of the vocabulary in turn, weighed by another policy than the student: (1 - l) (p
    - b) + l (what is stated).
    """
    student, teacher = pair
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in pair)
    behavior = rng.dirichlet(np.ones(V))
    rows = stacked(*(stored(teacher, K + 1, y) for y in range(V)))
    cases = options_of(*SUMS, kd_weight=0.7, support_top_k=K)
    for options, (_, gradients) in zip(cases, evaluate(cases, student, rows)):
        renormalize, divergence = options["renormalize"], options["divergence"]
        stated = stated_gradient(p, q, np.argsort(-q)[:K], renormalize, divergence)
        np.testing.assert_allclose(
            behavior @ gradients,
            0.3 * (p - behavior) + 0.7 * stated,
            atol=1e-12,
            err_msg=str(options),
        )
    row = stored(teacher, K)
    every = jax.jit(lambda x: jnp.stack([value(x, row, **options) for options in cases]))
    check_grads(every, (jnp.asarray(student),), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_where_student_and_teacher_are_one(pair):
    """The page's table, and where the default rests: at the teacher cut to its top k, not at the
    teacher.
    """
    logits = pair[1]
    p, inside = np.exp(logits - np.logaddexp.reduce(logits)), np.zeros(V)
    inside[np.argsort(-logits)[:K]] = 1
    kept = p @ inside
    of_mass = p * (inside - kept)
    stated = {
        ("none", "forward"): -of_mass,
        ("teacher", "forward"): -of_mass / kept,
        ("both", "forward"): 0 * of_mass,
        ("none", "reverse"): of_mass,
        ("teacher", "reverse"): (1 + np.log(kept)) * of_mass,
        ("both", "reverse"): 0 * of_mass,
    }
    row, alone = stacked(stored(logits, K)), {"kd_weight": 1.0, "support_top_k": K}
    cases = options_of(*stated, **alone)
    for options, expected, (_, gradients) in zip(
        cases, stated.values(), evaluate(cases, logits, row)
    ):
        np.testing.assert_allclose(gradients[0], expected, atol=1e-12, err_msg=str(options))
    ((_, gradients),) = evaluate([alone], np.where(inside, logits, -1e3), row)
    np.testing.assert_allclose(gradients, 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("renormalize", "divergence"),
    [
        pytest.param(*each, marks=[] if each in (SUMS[0], SUMS[5]) else pytest.mark.long)
        for each in SUMS
    ],
)
def test_what_was_stored_does_what_the_teacher_itself_would(renormalize, divergence, pair):
    """Also with more stored than are read, and the divergence alone is `topk_kl` on the teacher's
    ids.
    """
    options = {"support_top_k": K, "renormalize": renormalize, "divergence": divergence}
    token, rows = jnp.asarray([4]), [stored(pair[1], count, 4) for count in (K, V)]

    @jax.jit
    def run(student, teacher):
        student, teacher = VocabTile(student[None]), VocabTile(teacher[None])
        row = TokenInputs(token, teacher_logprobs=teacher.logprob(token))
        return (
            npd(student, teacher, row, **options),
            [npd(student, None, columns, **options) for columns in rows],
            npd(student, None, row, kd_weight=0.0)[1],
            npd(student, teacher, row, kd_weight=1.0, **options)[0],
            topk_kl(student, teacher, row, support="teacher", **options)[0],
        )

    (loss, outputs), from_stored, outputs_alone, alone, expected = run(*map(jnp.asarray, pair))
    for other, metrics in from_stored:
        np.testing.assert_allclose(other, loss, rtol=1e-12)
        assert metrics.keys() == {"student_logprobs"}
    assert outputs.keys() == outputs_alone.keys() == {"student_logprobs", "rewards"}
    student, teacher = (x - np.logaddexp.reduce(x) for x in pair)
    np.testing.assert_allclose(outputs["rewards"], [teacher[4] - student[4]], rtol=1e-12)
    np.testing.assert_allclose(alone, expected, rtol=1e-12)


def test_ids_beyond_the_vocabulary_and_of_no_mass_are_in_no_support(pair):
    """A teacher's padding among its top k: ids that the student's logits do not have, log-probs of
    -inf.
    """
    row = jax.tree.map(np.asarray, stored(pair[1], V))
    padded = TokenInputs(
        row.tokens,
        teacher_top_ids=np.append(row.teacher_top_ids, [[V, V + 5]], axis=1),
        teacher_top_logprobs=np.append(row.teacher_top_logprobs, [[-np.inf] * 2], axis=1).astype(
            np.float32
        ),
    )
    cases = options_of(*SUMS, support_top_k=V + 2)
    expected = evaluate(cases, pair[0], stacked(row))
    found = evaluate(cases, np.append(pair[0], -np.inf), stacked(padded))
    for (value, gradient), (padded_value, with_padding) in zip(expected, found):
        np.testing.assert_allclose(padded_value, value, rtol=1e-5)
        np.testing.assert_allclose(with_padding[:, :V], gradient, atol=1e-6)
        assert with_padding[0, V] == 0


def test_half_precision_is_read_in_the_type_of_the_logits(pair):
    student = jnp.asarray(pair[0], jnp.float32)
    exact, half = (
        jax.jit(partial(value, support_top_k=K))(student, stored(pair[1], K, dtype=dtype))
        for dtype in (jnp.float32, jnp.float16)
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=2e-3)
    assert half != exact


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_over_a_batch(self):
        rng = np.random.default_rng(1)
        student = jnp.asarray(rng.normal(size=(3, 4, V)), jnp.float32)
        teacher = VocabTile(jnp.asarray(rng.normal(size=(12, V)), jnp.float32))
        ids = teacher.top_k(K)
        shaped = lambda x: x.reshape(3, 4, *x.shape[1:])
        row = TokenInputs(
            jnp.zeros((3, 4), int),
            teacher_top_ids=shaped(ids),
            teacher_top_logprobs=shaped(teacher.logprob(ids)),
        )
        batched = lambda s, row: npd(VocabTile(s), None, row, support_top_k=K)[0]
        losses = self.variant(jax.vmap(batched))(student, row)
        row = TokenInputs(jnp.zeros(12, int))
        whole = on_logits(lambda s, t: npd(s, t, row, support_top_k=K)[0])(
            student.reshape(12, V), teacher.logits
        )
        np.testing.assert_allclose(losses.reshape(-1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_tiles_and_garbage_where_nothing_counts(rng):
    """Any tile gives the dense loss and gradient, and NaN or absurd ids in a slot that does not
    count change neither.
    """
    hidden, kernel = jnp.asarray(rng.normal(size=(2, 5, 6))), jnp.asarray(rng.normal(size=(V, 6)))
    weights = jnp.asarray(rng.random((2, 5))).at[:, jnp.array([0, 2])].set(0)
    teacher = VocabTile(jnp.asarray(rng.normal(size=(10, V))))
    ids = teacher.top_k(K)
    columns = TokenInputs(
        jnp.asarray(rng.integers(0, V, (2, 5))),
        teacher_top_ids=ids.reshape(2, 5, K),
        teacher_top_logprobs=teacher.logprob(ids).reshape(2, 5, K),
    )
    token_loss = lambda s, t, row: npd(s, t, row, support_top_k=K)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def dense(hidden, kernel):
        logits = jnp.concatenate([jnp.zeros((2, 1, 6)), hidden[:, :-1]], axis=1) @ kernel.T
        flat = jax.tree.map(lambda x: x.reshape(10, *x.shape[2:]), (logits, weights, columns))
        return dense_loss(token_loss, *flat)[0]

    @partial(jax.jit, static_argnums=3)
    @partial(jax.value_and_grad, argnums=(0, 1))
    def tiled(hidden, kernel, columns, tile):
        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, tile=tile)[0]

    expected = dense(hidden, kernel)
    clean, other = (tiled(hidden, kernel, columns, tile) for tile in (3, 10))
    chex.assert_trees_all_close(expected, clean, rtol=1e-12)
    chex.assert_trees_all_close(expected, other, rtol=1e-12)
    is_dead = (weights == 0)[:, :, None]
    garbage = TokenInputs(
        jnp.where(weights == 0, 10**6, columns.tokens),
        teacher_top_ids=jnp.where(is_dead, -(10**6), columns.teacher_top_ids),
        teacher_top_logprobs=jnp.where(is_dead, jnp.nan, columns.teacher_top_logprobs),
    )
    # The state of column 1 speaks of column 2, and the last one of no column.
    dirty = tiled(hidden.at[:, jnp.array([1, 4])].set(jnp.nan), kernel, garbage, 3)
    chex.assert_trees_all_equal(clean, dirty)


@pytest.mark.parametrize(
    ("options", "needs", "top_k"),
    [
        ({}, "top_k", 10),
        ({"support_top_k": 3, "importance": "prefix_truncate"}, "top_k", 3),
        ({"kd_weight": 1.0}, "top_k", 10),
        ({"kd_weight": 0.0}, "none", 0),
    ],
    ids=str,
)
def test_what_it_asks_of_a_teacher(options, needs, top_k):
    estimator = bind("npd", options)
    assert (estimator.teacher, estimator.top_k) == (needs, top_k)
    assert not estimator.recipe.is_policy_gradient
    assert bind("topk_kl", {"support_top_k": 4}).top_k == 0


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {}, "npd reads 'teacher_top_ids', which this batch does not carry"),
        ({"teacher_top_ids": jnp.zeros((1, 5), int)}, {}, "npd reads 'teacher_top_logprobs'"),
        (
            "stored",
            {},
            "npd has support_top_k 10, but 3 ids of the teacher are stored; expected at least 7",
        ),
        (
            "stored",
            {"support_top_k": 4},
            "npd has support_top_k 4, but 3 ids of the teacher are stored; expected at least 4",
        ),
        (
            "stored",
            {"support_top_k": 3, "renormalize": "student"},
            "npd has no renormalize 'student'",
        ),
        ("stored", {"support_top_k": 3, "divergence": "jsd"}, "npd has no divergence 'jsd'"),
    ],
    ids=str,
)
def test_what_is_missing_is_named(columns, options, message):
    row = (
        stored(np.arange(V), K)
        if columns == "stored"
        else TokenInputs(jnp.zeros(1, int), **columns)
    )
    with pytest.raises(ValueError, match=message):
        value(np.zeros(V), row, **options)


def test_options_of_its_siblings_are_refused():
    for option in ("outside", "support", "clamp_at_zero", "discount", "baseline"):
        with pytest.raises(ValueError, match=f"recipe 'npd' has no option '{option}'"):
            bind("npd", {option: "x"})
    with pytest.raises(
        ValueError, match="estimator.importance is 'token_mask'; expected none or prefix"
    ):
        bind("npd", {"importance": "token_mask"})
    assert "kd_weight" not in RECIPES["topk_kl"].options
