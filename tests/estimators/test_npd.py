"""The near-policy recipe: hand numbers, its expected gradient by brute force, and the stored top k
against the teacher itself.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

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


@pytest.fixture
def pair(rng):
    return tuple(1.5 * rng.normal(size=V) for _ in range(2))


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), its top 1, the token 0."""
    student, row = np.log([0.5, 0.25, 0.25]), stored(np.log([0.25, 0.25, 0.5]), 1)
    of = lambda **options: float(value(student, row, support_top_k=1, **options))
    two = np.log(2)
    assert of() == pytest.approx(0.1 * two + 0.9 * 0.5 * two)
    assert of(kd_weight=0.0) == pytest.approx(two)
    alone = {
        ("none", "forward"): 0.5 * two,
        ("teacher", "forward"): 2 * two,
        ("both", "forward"): 0.0,
        ("none", "reverse"): -0.25 * two,
        ("teacher", "reverse"): 0.25 * -2 * two,
        ("both", "reverse"): 0.0,
    }
    for (renormalize, divergence), expected in alone.items():
        assert of(kd_weight=1.0, renormalize=renormalize, divergence=divergence) == pytest.approx(
            expected, abs=1e-7
        )


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
@pytest.mark.parametrize(("renormalize", "divergence"), SUMS)
def test_expected_gradient_by_brute_force(renormalize, divergence, pair, rng):
    """Every token of the vocabulary in turn, weighed by another policy than the student: (1 - l) (p
    - b) + l (what is stated).
    """
    student, teacher = pair
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in pair)
    behavior = rng.dirichlet(np.ones(V))
    options = {
        "kd_weight": 0.7,
        "support_top_k": K,
        "renormalize": renormalize,
        "divergence": divergence,
    }
    gradient = jax.grad(lambda x, y: value(x, stored(teacher, K + 1, y), **options))
    found = sum(behavior[y] * gradient(jnp.asarray(student), y) for y in range(V))
    expected = 0.3 * (p - behavior) + 0.7 * stated_gradient(
        p, q, np.argsort(-q)[:K], renormalize, divergence
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)
    check_grads(
        lambda x: value(x, stored(teacher, K), **options),
        (jnp.asarray(student),),
        order=1,
        modes=["rev"],
        rtol=1e-5,
    )


@pytest.mark.usefixtures("x64")
def test_where_student_and_teacher_are_one(pair):
    """The page's table, and where the default rests: at the teacher cut to its top k, not at the
    teacher.
    """
    logits = jnp.asarray(pair[1])
    ids = np.argsort(-pair[1])[:K]
    mass = lambda x: jnp.sum(jax.nn.softmax(x)[ids])
    kept, of_mass, of_log_mass = (
        mass(logits),
        jax.grad(mass)(logits),
        jax.grad(lambda x: jnp.log(mass(x)))(logits),
    )
    stated = {
        ("none", "forward"): -of_mass,
        ("teacher", "forward"): -of_log_mass,
        ("both", "forward"): 0 * of_mass,
        ("none", "reverse"): of_mass,
        ("teacher", "reverse"): (1 + jnp.log(kept)) * of_mass,
        ("both", "reverse"): 0 * of_mass,
    }
    alone = {"kd_weight": 1.0, "support_top_k": K}
    for (renormalize, divergence), expected in stated.items():
        options = alone | {"renormalize": renormalize, "divergence": divergence}
        found = jax.grad(lambda x, options=options: value(x, stored(logits, K), **options))(logits)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=str(options))
    cut = jnp.where(jnp.isin(jnp.arange(V), ids), logits, -1e3)
    np.testing.assert_allclose(
        jax.grad(lambda x: value(x, stored(logits, K), **alone))(cut), 0, atol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("renormalize", "divergence"), SUMS)
def test_what_was_stored_does_what_the_teacher_itself_would(renormalize, divergence, pair):
    """Also with more stored than are read, and the divergence alone is `topk_kl` on the teacher's
    ids.
    """
    student, teacher = (VocabTile(jnp.asarray(x)[None]) for x in pair)
    options = {"support_top_k": K, "renormalize": renormalize, "divergence": divergence}
    row = TokenInputs(jnp.asarray([4]), teacher_logprobs=teacher.logprob(jnp.asarray([4])))
    loss, outputs = npd(student, teacher, row, **options)
    for count in (K, V):
        columns = stored(pair[1], count, 4)
        other, told = npd(student, None, columns, **options)
        np.testing.assert_allclose(other, loss, rtol=1e-12)
        assert told.keys() == {"student_logprobs"}
    assert outputs.keys() == {"student_logprobs", "rewards"}
    assert npd(student, None, row, kd_weight=0.0)[1].keys() == {"student_logprobs", "rewards"}
    np.testing.assert_allclose(
        outputs["rewards"],
        pair[1][4] - pair[0][4] - teacher.logsumexp + student.logsumexp,
        rtol=1e-12,
    )
    alone = npd(student, teacher, row, kd_weight=1.0, **options)[0]
    np.testing.assert_allclose(
        alone, topk_kl(student, teacher, row, support="teacher", **options)[0], rtol=1e-12
    )


def test_ids_beyond_the_vocabulary_and_of_no_mass_are_in_no_support(pair):
    """A teacher's padding among its top k: ids that the student's logits do not have, log-probs of
    -inf.
    """
    student, row = np.append(pair[0], -np.inf), stored(pair[1], V)
    padded = TokenInputs(
        row.tokens,
        teacher_top_ids=jnp.append(row.teacher_top_ids, jnp.asarray([[V, V + 5]]), axis=1),
        teacher_top_logprobs=jnp.append(
            row.teacher_top_logprobs, jnp.full((1, 2), -jnp.inf), axis=1
        ),
    )
    for renormalize, divergence in SUMS:
        options = {"support_top_k": V + 2, "renormalize": renormalize, "divergence": divergence}
        of = lambda x, row, options=options: value(x, row, **options)
        expected, found = (
            jax.value_and_grad(of)(jnp.asarray(x), r)
            for x, r in ((pair[0], row), (student, padded))
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1][:V], expected[1], atol=1e-6)
        assert found[1][V] == 0


def test_half_precision_is_read_in_the_type_of_the_logits(pair):
    student = jnp.asarray(pair[0], jnp.float32)
    exact, half = (
        value(student, stored(pair[1], K, dtype=dtype), support_top_k=K)
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
        whole = npd(
            VocabTile(student.reshape(12, V)),
            teacher,
            TokenInputs(jnp.zeros(12, int)),
            support_top_k=K,
        )[0]
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

    def dense(hidden, kernel):
        logits = jnp.concatenate([jnp.zeros((2, 1, 6)), hidden[:, :-1]], axis=1) @ kernel.T
        flat = jax.tree.map(lambda x: x.reshape(10, *x.shape[2:]), (logits, weights, columns))
        return dense_loss(token_loss, *flat)[0]

    def tiled(hidden, kernel, columns, tile):
        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, tile=tile)[0]

    expected = jax.value_and_grad(dense, argnums=(0, 1))(hidden, kernel)
    clean, other = (
        jax.value_and_grad(tiled, argnums=(0, 1))(hidden, kernel, columns, tile) for tile in (3, 10)
    )
    chex.assert_trees_all_close(expected, clean, rtol=1e-12)
    chex.assert_trees_all_close(expected, other, rtol=1e-12)
    is_dead = (weights == 0)[:, :, None]
    garbage = TokenInputs(
        jnp.where(weights == 0, 10**6, columns.tokens),
        teacher_top_ids=jnp.where(is_dead, -(10**6), columns.teacher_top_ids),
        teacher_top_logprobs=jnp.where(is_dead, jnp.nan, columns.teacher_top_logprobs),
    )
    # The state of column 1 speaks of column 2, and the last one of no column.
    dirty = jax.value_and_grad(tiled, argnums=(0, 1))(
        hidden.at[:, jnp.array([1, 4])].set(jnp.nan), kernel, garbage, 3
    )
    chex.assert_trees_all_equal(clean, dirty)


@pytest.mark.parametrize(
    ("options", "needs", "top_k"),
    [
        ({}, "top_k", 10),
        ({"support_top_k": 3, "importance": "prefix_truncate"}, "top_k", 3),
        ({"kd_weight": 1.0}, "top_k", 10),
        ({"kd_weight": 0.0, "support_top_k": 3}, "none", 0),
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
    with pytest.raises(ValueError, match="recipe 'npd' has no importance correction 'token_mask'"):
        bind("npd", {"importance": "token_mask"})
    assert "kd_weight" not in RECIPES["topk_kl"].options
