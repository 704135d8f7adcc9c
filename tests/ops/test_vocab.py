"""The tiled pass against plain dense logits: value, outputs and gradients, for any tile, mesh and
garbage.
"""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from opdjax.ops import vocab as vocab_ops
from opdjax.ops.sharding import ROW_AXES, make_mesh
from opdjax.ops.tile import Head, VocabTile, head_logits
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats

ROWS, WIDTH, VOCAB, TEACHER_WIDTH = 8, 4, 11, 6
# 40 tokens, 5 on each of 8 devices: a tile of 3 divides neither, a tile of 64 is larger than both
LENGTH = 5


def cross_entropy(student, teacher, row):
    logprob = student.logprob(row.tokens)
    return -logprob, {"logprob": logprob, "ratio": jnp.exp(logprob - row.teacher_logprobs)}


def reverse_kl(student, teacher, row):
    kl = student.expect(student.logprobs - teacher.logprobs)
    return kl, {"kl": kl, "entropy": -student.expect(student.logprobs)}


def topk_forward_kl(student, teacher, row):
    """Forward KL on the teacher's top 3, plus a renormalised term on the student's top 2, scaled by
    a column.
    """
    ids, own = teacher.top_k(3), student.top_k(2)
    theirs, ours = teacher.logprob(ids), student.logprob(ids)
    loss = jnp.sum(jnp.exp(theirs) * (theirs - ours), -1) + row.teacher_logprobs * jax.nn.logsumexp(
        student.logprob(own), -1
    )
    return loss, {"ids": own, "mass": jnp.sum(jnp.exp(ours), -1), "kept": ours}


LOSSES = [cross_entropy, reverse_kl, topk_forward_kl]
over_losses = pytest.mark.parametrize("token_loss", LOSSES, ids=lambda f: f.__name__)


def problem(dtype=jnp.float64, seed=0, **head_options):
    """(hidden, head, weights, columns, teacher): weights of both signs, some 0, and one row of
    zeros.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    head = Head(normal(VOCAB, WIDTH), normal(VOCAB), **head_options)
    teacher_head = Head(normal(VOCAB, TEACHER_WIDTH), valid_vocab=head_options.get("valid_vocab"))
    weights = rng.normal(size=(ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 0.8)
    weights[:, 0] = weights[2] = 0
    tokens = rng.integers(0, head_options.get("valid_vocab", VOCAB), (ROWS, LENGTH))
    columns = TokenInputs(
        jnp.asarray(tokens, jnp.int32),
        teacher_logprobs=jnp.asarray(-rng.exponential(size=tokens.shape), dtype),
    )
    teacher = normal(ROWS, LENGTH, TEACHER_WIDTH), teacher_head
    return normal(ROWS, LENGTH, WIDTH), head, jnp.asarray(weights, dtype), columns, teacher


def dense_logits(hidden, head):
    logits = hidden @ head.kernel.T + (0 if head.bias is None else head.bias)
    logits = logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)
    valid = head.kernel.shape[0] if head.valid_vocab is None else head.valid_vocab
    return jnp.pad(
        logits[..., :valid] / head.temperature,
        ((0, 0), (0, head.kernel.shape[0] - valid)),
        constant_values=-jnp.inf,
    )


def dense_loss(token_loss, hidden, head, weights, columns, teacher=None):
    """The reference: logits of all tokens at once and plain autodiff. Hidden column t - 1 predicts
    column t >= 1.
    """
    tile_of = lambda states, head: VocabTile(
        dense_logits(states[:, :-1].reshape(-1, states.shape[-1]), head)
    )
    flat = lambda x: x[:, 1:].reshape(-1)
    student, taught = tile_of(hidden, head), None if teacher is None else tile_of(*teacher)
    losses, outputs = token_loss(student, taught, jax.tree.map(flat, columns))
    is_live = weights[:, 1:] != 0

    def place(x):
        x = x.reshape(*is_live.shape, *x.shape[1:])
        x = jnp.where(is_live.reshape(*is_live.shape, *[1] * (x.ndim - 2)), x, 0)
        return jnp.concatenate([jnp.zeros_like(x[:, :1]), x], axis=1)

    return jnp.sum(flat(weights) * losses), jax.tree.map(place, outputs)


def value_outputs_gradients(loss, *args):
    """(value, outputs, (d hidden, d head)), compiled."""
    (value, outputs), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)
    return value, outputs, gradients


@cache
def _program(token_loss, tile, is_sharded):
    loss = partial(tiled_loss, token_loss, tile=tile, mesh=mesh_of_eight() if is_sharded else None)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def tiled(token_loss, tile, *args, is_sharded=False):
    """(value, outputs, (d hidden, d head)) of the tiled pass; one program for all tests."""
    (value, outputs), gradients = _program(token_loss, tile, is_sharded)(*args)
    return value, outputs, gradients


@cache
def dense_reference(token_loss):
    """The reference of every test of `problem()`, in float64; compiled once."""
    with jax.enable_x64(True):
        return jax.tree.map(
            np.asarray, value_outputs_gradients(partial(dense_loss, token_loss), *problem())
        )


def assert_close(actual, expected, tolerance):
    """Leaves agree to `tolerance`, relative to the largest expected entry (at least 1)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1.0, np.abs(e).max()))


def mesh_of_eight():
    return make_mesh(8)


# ---- VocabTile and head_logits, by hand


def test_vocab_tile_by_hand():
    tile = VocabTile(jnp.log(jnp.array([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])))
    np.testing.assert_allclose(tile.logsumexp, np.log([8.0, 8.0]), rtol=1e-6)
    np.testing.assert_allclose(
        tile.logprobs, np.log([[1 / 8, 2 / 8, 5 / 8], [3 / 8, 3 / 8, 2 / 8]]), rtol=1e-6
    )
    np.testing.assert_allclose(tile.logprob(jnp.array([2, 0])), np.log([5 / 8, 3 / 8]), rtol=1e-6)
    np.testing.assert_allclose(
        tile.logprob(jnp.array([[2, 0], [2, 2]])),
        np.log([[5 / 8, 1 / 8], [2 / 8, 2 / 8]]),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        tile.expect(jnp.array([[8.0, 4.0, -1.6], [0.0, 8.0, 4.0]])), [1 + 1 - 1, 3 + 1], rtol=1e-6
    )
    np.testing.assert_array_equal(tile.top_k(2), [[2, 1], [0, 1]])
    np.testing.assert_array_equal(tile.top_k(9), [[2, 1, 0], [0, 1, 2]])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_ids_of_probability_zero_contribute_nothing(garbage):
    logits = jnp.log(jnp.array([[1.0, 3.0, 0.0]]))  # probabilities 1/4, 3/4, 0
    f = jnp.array([[1.0, 2.0, garbage]])
    value, (dlogits, df) = jax.value_and_grad(
        lambda logits, f: VocabTile(logits).expect(f)[0], (0, 1)
    )(logits, f)
    np.testing.assert_allclose(value, 1.75, rtol=1e-6)
    np.testing.assert_allclose(dlogits, [[0.25 * (1 - 1.75), 0.75 * (2 - 1.75), 0]], rtol=1e-6)
    np.testing.assert_allclose(df, [[0.25, 0.75, 0]], rtol=1e-6)
    assert VocabTile(logits).logprobs[0, 2] == -jnp.inf


def test_divergence_of_two_padded_tiles_is_finite():
    student = jnp.log(jnp.array([[1.0, 3.0, 0.0, 0.0]]))
    teacher = VocabTile(jnp.log(jnp.array([[1.0, 1.0, 0.0, 0.0]])))
    kl = lambda logits: VocabTile(logits).expect(VocabTile(logits).logprobs - teacher.logprobs)[0]
    value, gradient = jax.value_and_grad(kl)(student)
    expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(
        gradient,
        [[0.25 * (np.log(0.5) - expected), 0.75 * (np.log(1.5) - expected), 0, 0]],
        rtol=1e-5,
    )


def test_head_logits_by_hand():
    head = Head(
        jnp.array([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]),
        jnp.array([0.5, -0.5, 9.0]),
        softcap=4.0,
        valid_vocab=2,
        temperature=2.0,
    )
    logits = head_logits(head, jnp.array([[1.5, 2.25]]))  # raw: 2, 4
    np.testing.assert_allclose(logits, [[2 * np.tanh(0.5), 2 * np.tanh(1.0), -np.inf]], rtol=1e-6)


# ---- the one shift by one, by hand


def test_hidden_of_the_column_before_predicts_the_token():
    tokens = jnp.array([[2, 0, 1, 2]])
    # Column t holds log 2 at the id of token t + 1, whose probability is then 2 / (2 + 1 + 1); any
    # other column gives it 1 / 4.
    hidden = jnp.log(2.0) * jax.nn.one_hot(jnp.array([[0, 1, 2, 0]]), 3)
    hidden = hidden.at[:, -1].set(jnp.nan)  # predicts a token after the end
    teacher = (jnp.zeros((1, 4, 1)).at[:, -1].set(jnp.nan), Head(jnp.zeros((3, 1))))  # uniform
    weights = jnp.array([[0.0, 1.0, 10.0, 100.0]])

    def loss(student, teacher, row):
        logprob = student.logprob(row.tokens)
        return -logprob, {
            "logprob": logprob,
            "kl": student.expect(student.logprobs - teacher.logprobs),
        }

    def total(hidden):
        return tiled_loss(
            loss, hidden, Head(jnp.eye(3)), weights, TokenInputs(tokens), teacher, tile=2
        )

    (value, outputs), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(hidden)
    np.testing.assert_allclose(value, 111 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(outputs["logprob"], [[0, *[np.log(0.5)] * 3]], rtol=1e-6)
    np.testing.assert_allclose(
        outputs["kl"], [[0, *[0.5 * np.log(1.5) + 0.5 * np.log(0.75)] * 3]], rtol=1e-5
    )
    expected = [[-0.5, 0.25, 0.25], [2.5, -5, 2.5], [25, 25, -50], [0, 0, 0]]  # w * (p - one-hot)
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-6)


# ---- against the dense reference


@pytest.mark.parametrize(
    ("token_loss", "tile"),
    [
        (cross_entropy, 3),
        (cross_entropy, 40),
        (reverse_kl, 3),
        *((topk_forward_kl, n) for n in (1, 3, 64)),
        pytest.param(reverse_kl, 1, marks=pytest.mark.long),
        pytest.param(topk_forward_kl, 40, marks=pytest.mark.long),
    ],
)
def test_equals_dense_in_float64(x64, token_loss, tile):
    assert_close(tiled(token_loss, tile, *problem()), dense_reference(token_loss), 1e-10)


@pytest.mark.parametrize("block", [4, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 10))])
def test_equals_dense_for_any_block_of_the_head(x64, monkeypatch, block):
    monkeypatch.setattr(vocab_ops, "CPU_BLOCK", block)  # 4 has a remainder of 3 ids, 10 of 1
    actual = value_outputs_gradients(partial(tiled_loss, reverse_kl, tile=7), *problem())
    assert_close(actual, dense_reference(reverse_kl), 1e-10)


@over_losses
def test_equals_dense_in_float32(token_loss):
    actual = tiled(token_loss, 3, *problem(jnp.float32))
    assert_close(actual, dense_reference(token_loss), 1e-5)


@pytest.mark.long
def test_equals_dense_without_jit():
    args = problem(jnp.float32)
    (value, outputs), gradients = jax.value_and_grad(
        partial(tiled_loss, reverse_kl, tile=3), (0, 1), has_aux=True
    )(*args)
    assert_close((value, outputs, gradients), dense_reference(reverse_kl), 1e-5)


@pytest.mark.parametrize(
    ("token_loss", "tile"), [*((loss, 3) for loss in LOSSES), (topk_forward_kl, 64)]
)
def test_sharded_equals_unsharded(x64, token_loss, tile):
    actual = tiled(token_loss, tile, *problem(), is_sharded=True)
    assert_close(actual, dense_reference(token_loss), 1e-10)
    if tile == 3:
        assert_close(actual, tiled(token_loss, tile, *problem()), 1e-12)


def test_sharded_takes_distributed_rows(x64):
    hidden, head, weights, columns, (teacher_hidden, teacher_head) = problem()
    mesh = mesh_of_eight()
    rows = lambda x: jax.device_put(x, NamedSharding(mesh, P(ROW_AXES)))
    everywhere = lambda x: jax.device_put(x, NamedSharding(mesh, P()))
    placed = (
        rows(hidden),
        everywhere(head),
        rows(weights),
        rows(columns),
        (rows(teacher_hidden), everywhere(teacher_head)),
    )
    actual = tiled(reverse_kl, 3, *placed, is_sharded=True)
    assert_close(actual, dense_reference(reverse_kl), 1e-10)
    assert actual[2][0].sharding.is_equivalent_to(NamedSharding(mesh, P(ROW_AXES)), 3)
    assert actual[2][1].kernel.sharding.is_fully_replicated


PADDED = {"valid_vocab": 9, "softcap": 2.0, "temperature": 1.7}


@pytest.mark.parametrize(
    ("token_loss", "options"),
    [
        # One at a time; padded heads have both.
        pytest.param(reverse_kl, {"softcap": 1.5}, marks=pytest.mark.long),
        pytest.param(reverse_kl, {"temperature": 0.6}, marks=pytest.mark.long),
        *((loss, PADDED) for loss in LOSSES),
    ],
    ids=["softcap", "temperature", *(f"padded-{loss.__name__}" for loss in LOSSES)],
)
def test_head_options(x64, token_loss, options):
    args = problem(seed=1, **options)
    actual = tiled(token_loss, 7, *args)
    assert_close(actual, value_outputs_gradients(partial(dense_loss, token_loss), *args), 1e-10)
    n_valid = options.get("valid_vocab", VOCAB)
    assert np.all(np.isfinite(actual[2][0]))
    np.testing.assert_array_equal(actual[2][1].kernel[n_valid:], 0)
    np.testing.assert_array_equal(actual[2][1].bias[n_valid:], 0)
    assert np.all(np.abs(actual[2][1].kernel[:n_valid]).max(1) > 0)


def test_padded_ids_stand_for_no_token(x64):
    """The head cut at `valid_vocab` gives the same numbers, for any values in the padding rows."""
    hidden, head, weights, columns, (teacher_hidden, teacher_head) = problem(valid_vocab=9)
    head = Head(head.kernel.at[9:].set(1e6), head.bias, valid_vocab=9)
    padded = tiled(reverse_kl, 7, hidden, head, weights, columns, (teacher_hidden, teacher_head))
    cut_teacher = teacher_hidden, Head(teacher_head.kernel[:9])
    cut_head = Head(head.kernel[:9], head.bias[:9])
    cut = tiled(reverse_kl, 7, hidden, cut_head, weights, columns, cut_teacher)
    assert_close(padded[:2], cut[:2], 1e-12)
    assert_close(
        (padded[2][0], padded[2][1].kernel[:9], padded[2][1].bias[:9]),
        (cut[2][0], cut[2][1].kernel, cut[2][1].bias),
        1e-12,
    )


@pytest.mark.parametrize("width", [9, 14], ids=["narrower", "wider"])
def test_teacher_table_of_another_width(x64, width):
    """A vocabulary of 9 tokens, padded to 11 rows in the student: teachers padded to 9 or 14 rows
    give the same scores.
    """
    hidden, head, weights, columns, (teacher_hidden, teacher_head) = problem(**PADDED)
    resize = lambda x: jnp.resize(x[:9], (width, *x.shape[1:]))
    other = Head(resize(teacher_head.kernel), valid_vocab=9)
    run = lambda head_: tiled(
        reverse_kl, 7, hidden, head, weights, columns, (teacher_hidden, head_)
    )
    assert_close(run(other), run(teacher_head), 1e-12)


def test_tied_embedding_gets_both_parts(x64):
    _, head, weights, columns, teacher = problem()

    def through(loss, embedding):
        states = jnp.tanh(embedding[columns.tokens] @ jnp.arange(16.0).reshape(4, 4) / 8)
        return loss(states, Head(embedding), weights, columns, teacher)[0]

    gradient = lambda loss: jax.jit(jax.grad(partial(through, loss)))(head.kernel)
    actual = gradient(partial(tiled_loss, reverse_kl, tile=3))
    assert_close(actual, gradient(partial(dense_loss, reverse_kl)), 1e-10)
    assert (
        np.abs(actual - gradient(partial(tiled_loss, reverse_kl, tile=3, head_grad=False))).max()
        > 1e-3
    )


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one_device", "sharded"])
def test_without_head_gradient(x64, is_sharded):
    args, mesh = problem(), mesh_of_eight() if is_sharded else None
    full = dense_reference(reverse_kl)
    value, outputs, (dhidden, dhead) = value_outputs_gradients(
        partial(tiled_loss, reverse_kl, tile=3, head_grad=False, mesh=mesh), *args
    )
    assert_close((value, outputs, dhidden), (*full[:2], full[2][0]), 1e-10)
    np.testing.assert_array_equal(dhead.kernel, 0)
    np.testing.assert_array_equal(dhead.bias, 0)


def test_nothing_but_hidden_and_head_gets_a_gradient():
    args = problem(jnp.float32)
    loss = lambda weights, columns, teacher: tiled_loss(
        reverse_kl, *args[:2], weights, columns, teacher, tile=3
    )[0]
    gradients = jax.jit(jax.grad(loss, (0, 1, 2), allow_int=True))(*args[2:])
    for gradient in (
        gradients[0],
        gradients[1].teacher_logprobs,
        gradients[2][0],
        gradients[2][1].kernel,
    ):
        np.testing.assert_array_equal(gradient, 0)


def test_outputs_are_detached(x64):
    hidden, head, weights, columns, teacher = problem()

    @jax.jit
    @jax.grad
    def with_outputs(hidden, share):
        value, outputs = tiled_loss(reverse_kl, hidden, head, weights, columns, teacher, tile=3)
        return value + share * jnp.sum(outputs["kl"])

    np.testing.assert_array_equal(with_outputs(hidden, 5.0), with_outputs(hidden, 0.0))


def test_upstream_cotangent_scales_the_gradient(x64):
    hidden, head, *rest = problem()
    value, _, plain = dense_reference(reverse_kl)
    for outer, slope in ((lambda x: 3 * x, 3.0), (jnp.sin, np.cos(value))):
        loss = lambda hidden, head, f=outer: f(
            tiled_loss(reverse_kl, hidden, head, *rest, tile=3)[0]
        )
        scaled = jax.tree.map(lambda g, slope=slope: slope * g, plain)
        assert_close(jax.jit(jax.grad(loss, (0, 1)))(hidden, head), scaled, 1e-10)


# Of the other losses, autodiff of the dense reference is what the gradient is compared with.
@pytest.mark.parametrize(
    "token_loss",
    [topk_forward_kl, *(pytest.param(f, marks=pytest.mark.long) for f in LOSSES[:2])],
    ids=lambda f: f.__name__,
)
def test_numerical_gradient(x64, token_loss):
    hidden, head, *rest = problem(softcap=3.0)
    loss = lambda hidden, kernel, bias: tiled_loss(
        token_loss, hidden, Head(kernel, bias, softcap=3.0), *rest, tile=3
    )[0]
    check_grads(jax.jit(loss), (hidden, head.kernel, head.bias), order=1, modes=["rev"])


# ---- tokens of weight 0


def with_garbage(hidden, weights, columns, teacher):
    """NaN, and ids out of range, in every slot that is not read for a token of non-zero weight."""
    is_dead = np.asarray(weights) == 0
    is_unread = np.concatenate([is_dead[:, 1:], np.ones((ROWS, 1), bool)], axis=1)[
        ..., None
    ]  # the shift
    spoil = lambda x, where, garbage: jnp.asarray(np.where(where, garbage, x), x.dtype)
    columns = TokenInputs(
        spoil(columns.tokens, is_dead, 10**6),
        teacher_logprobs=spoil(columns.teacher_logprobs, is_dead, np.nan),
    )
    return (
        spoil(hidden, is_unread, np.nan),
        weights,
        columns,
        (spoil(teacher[0], is_unread, np.nan), teacher[1]),
    )


@over_losses
@pytest.mark.parametrize("is_sharded", [False, True], ids=["one_device", "sharded"])
def test_garbage_where_the_weight_is_zero_changes_nothing(x64, token_loss, is_sharded):
    hidden, head, *rest = problem()
    dirty, *dirty_rest = with_garbage(hidden, *rest)
    # The last visited tile holds live tokens and garbage, on one device and on every shard.
    assert int(jnp.sum(rest[0] != 0)) % 3 != 0
    run = partial(tiled, token_loss, 3, is_sharded=is_sharded)
    for a, b in zip(
        jax.tree.leaves(run(dirty, head, *dirty_rest)), jax.tree.leaves(run(hidden, head, *rest))
    ):
        np.testing.assert_array_equal(a, b)


def test_recipe_undefined_where_the_weight_is_zero(x64):
    """Inputs of a dead slot are zeros; the infinity of a division by one must not leak."""
    hidden, head, weights, columns, _ = problem()
    ratio = lambda s, t, row: (s.logprob(row.tokens) / row.teacher_logprobs, None)
    columns = TokenInputs(
        columns.tokens, teacher_logprobs=jnp.where(weights == 0, 0, columns.teacher_logprobs)
    )
    actual = value_outputs_gradients(
        partial(tiled_loss, ratio, tile=5), hidden, head, weights, columns
    )
    safe = TokenInputs(
        columns.tokens, teacher_logprobs=jnp.where(weights == 0, -1, columns.teacher_logprobs)
    )
    assert_close(
        actual,
        value_outputs_gradients(partial(dense_loss, ratio), hidden, head, weights, safe),
        1e-10,
    )


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one_device", "sharded"])
def test_no_weight_no_loss(is_sharded):
    hidden, head, weights, *rest = problem(jnp.float32)
    nothing = jnp.full_like(hidden, jnp.nan)
    empty = (nothing, head, jnp.zeros_like(weights), *rest)
    for leaf in jax.tree.leaves(tiled(reverse_kl, 3, *empty, is_sharded=is_sharded)):
        np.testing.assert_array_equal(leaf, 0)


# ---- tiled_stats


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one_device", "sharded"])
def test_stats_equal_dense(x64, is_sharded):
    hidden, head, weights, columns, teacher = problem(valid_vocab=9)
    hidden, weights, columns, teacher = with_garbage(hidden, weights, columns, teacher)
    clean_hidden, _, _, clean_columns, clean_teacher = problem(valid_vocab=9)
    stat = lambda *tiles: (
        topk_forward_kl(*tiles)[1] | reverse_kl(*tiles)[1] | cross_entropy(*tiles)[1]
    )
    dense = jax.jit(partial(dense_loss, lambda *tiles: (0.0, stat(*tiles))))
    _, expected = dense(clean_hidden, head, weights, clean_columns, clean_teacher)
    tiled = jax.jit(
        partial(tiled_stats, stat, tile=3, mesh=mesh_of_eight() if is_sharded else None)
    )
    actual = tiled(hidden, head, weights != 0, columns, teacher)
    assert_close(actual, expected, 1e-10)
    assert actual["ids"].dtype == jnp.int32


def test_stats_inside_a_differentiated_function(x64):
    """`prepare` runs inside value_and_grad, where statistics are constants."""
    hidden, head, weights, columns, _ = problem()

    def loss(hidden):
        stats = tiled_stats(
            lambda s, t, row: s.logprob(row.tokens), hidden, head, weights != 0, columns, tile=3
        )
        return jnp.sum(stats * hidden[..., 0])

    _, outputs, _ = dense_reference(cross_entropy)
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(hidden)[..., 0], outputs["logprob"], rtol=1e-10
    )


# ---- long sums


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 1e-5), pytest.param(jnp.bfloat16, 1e-2, marks=pytest.mark.long)],
    ids=["float32", "bfloat16"],
)
def test_sums_over_32768_tokens(dtype, tolerance):
    """Against numpy in float64 on the same inputs: sums are in float32 for any dtype of hidden
    states and head.
    """
    rng = np.random.default_rng(0)
    rows, length, width, vocab = 8, 4096, 4, 13
    hidden = jnp.asarray(rng.normal(size=(rows, length, width)), dtype)
    kernel = jnp.asarray(rng.normal(size=(vocab, width)), dtype)
    tokens = rng.integers(0, vocab, (rows, length))
    weights = np.full((rows, length), 1 / (rows * length), np.float32)
    weights[:, 0] = 0

    loss = lambda h, k: tiled_loss(
        lambda s, t, row: (-s.logprob(row.tokens), None),
        h,
        Head(k),
        weights,
        TokenInputs(tokens),
        tile=1024,
    )[0]
    value, (dhidden, dkernel) = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel)

    states = np.asarray(hidden, np.float64)[:, :-1].reshape(-1, width)
    w = weights[:, 1:].reshape(-1)
    k = np.asarray(kernel, np.float64)
    logits = states @ k.T
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    at_token = np.arange(len(w)), tokens[:, 1:].reshape(-1)
    dlogits = np.exp(logprobs)
    dlogits[at_token] -= 1
    dlogits *= w[:, None]
    relative = lambda a, e: np.linalg.norm(np.asarray(a, np.float64) - e) / np.linalg.norm(e)
    assert relative(value, -(w * logprobs[at_token]).sum()) < 1e-5
    assert relative(dkernel, dlogits.T @ states) < tolerance
    assert relative(dhidden[:, :-1].reshape(-1, width), dlogits @ k) < tolerance
    assert (value.dtype, dhidden.dtype, dkernel.dtype) == (jnp.float32, dtype, dtype)


# ---- the compiled program


def computations(hlo):
    """Computation -> its lines, of an HLO module in text form."""
    found, name = {}, None
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            name, found[header[1]] = header[1], []
        elif name is not None:
            found[name].append(line)
    return found


def inside_while_loops(hlo):
    """The lines of all computations inside a while body, including those it calls."""
    found = computations(hlo)
    waiting = [
        name
        for lines in found.values()
        for line in lines
        for name in re.findall(r"body=%?([\w.\-]+)", line)
    ]
    assert waiting
    visited = set()
    while waiting:
        name = waiting.pop()
        if name not in visited:
            visited.add(name)
            waiting += [
                word
                for line in found[name]
                for word in re.findall(r"%?([\w.\-]+)", line.split("=", 1)[-1])
                if word in found
            ]
    return [line for name in visited for line in found[name]]


def largest_array(hlo):
    return max(
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[([\d,]+)\]", hlo)
    )


COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def test_compiled_program_holds_no_logits_and_reduces_once():
    mesh, rows, length, vocab, width = mesh_of_eight(), 8, 512, 1000, 16
    shape = lambda spec, *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(
        dims, dtype, sharding=NamedSharding(mesh, spec)
    )
    hidden = shape(P(ROW_AXES), rows, length, width)
    kernel = Head(shape(P(), vocab, width), shape(P(), vocab))
    weights = shape(P(ROW_AXES), rows, length)
    columns = TokenInputs(shape(P(ROW_AXES), rows, length, dtype=jnp.int32))
    args = hidden, kernel, weights, columns, (hidden, kernel)

    def compiled_text(loss):
        return (
            jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).lower(*args).compile().as_text()
        )

    dense = compiled_text(partial(dense_loss, reverse_kl))
    tiled = compiled_text(partial(tiled_loss, reverse_kl, tile=64, mesh=mesh))
    assert largest_array(dense) >= (length - 1) * vocab  # the check can fail
    assert (
        largest_array(tiled) <= rows * length * width
    )  # the hidden states; a tile of logits is 64 * 1000
    assert not re.search(r"\[(\d+,)*(512|4096),1000\]", tiled)
    assert f"[64,{vocab}]" in tiled
    assert COLLECTIVE.search(tiled)
    assert [line for line in inside_while_loops(tiled) if "[64,1000]" in line]
    assert not [line for line in inside_while_loops(tiled) if COLLECTIVE.search(line)]


def test_without_head_gradient_no_accumulator():
    """head_grad=False: two matmuls per tile instead of three, and no sum or collective of the
    head's size.
    """
    mesh, vocab, width = mesh_of_eight(), 600, 64
    hidden = jnp.zeros((8, 16, width))
    head = Head(jnp.zeros((vocab, width)))
    columns = TokenInputs(jnp.zeros((8, 16), jnp.int32))
    loss = lambda s, t, row: (-s.logprob(row.tokens), None)

    def compiled(head_grad):
        pass_ = lambda h, k: tiled_loss(
            loss, h, k, jnp.ones((8, 16)), columns, tile=8, head_grad=head_grad, mesh=mesh
        )[0]
        return jax.jit(jax.value_and_grad(pass_, (0, 1))).lower(hidden, head).compile()

    with_head, without = compiled(True), compiled(False)
    reduced = re.compile(rf"= .*\[{vocab},{width}\].* all-reduce(-start)?\(")
    assert reduced.search(with_head.as_text())
    assert not reduced.search(without.as_text())
    one_matmul = 2 * 8 * vocab * width
    assert with_head.cost_analysis()["flops"] - without.cost_analysis()["flops"] >= one_matmul


def test_head_gradient_is_added_in_place(monkeypatch):
    """On a CPU in blocks of rows, so that there is no second [V, D]; on accelerators in one product
    with a fused sum.
    """
    monkeypatch.setattr(vocab_ops, "CPU_BLOCK", 512)
    vocab, width = 9000, 64
    hidden = jnp.zeros((8, 16, width))
    head = Head(jnp.zeros((vocab, width)))
    columns = TokenInputs(jnp.zeros((8, 16), jnp.int32))
    loss = lambda h, k: tiled_loss(
        lambda s, t, row: (-s.logprob(row.tokens), None), h, k, jnp.ones((8, 16)), columns, tile=8
    )[0]
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(hidden, head)
    assert traced.lower().compile().memory_analysis().temp_size_in_bytes < vocab * width * 4
    assert f"512x{width}x" in traced.lower().as_text()
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert f"512x{width}x" not in text
        assert text.count("stablehlo.while") == 1


def test_shards_add_up_in_float32():
    """The gradient of a bfloat16 head is rounded once, after the sum over shards."""
    hidden = jnp.zeros((8, 4, 16), jnp.bfloat16)
    head = Head(jnp.zeros((50, 16), jnp.bfloat16), jnp.zeros(50, jnp.bfloat16))
    columns, weights = TokenInputs(jnp.zeros((8, 4), jnp.int32)), jnp.ones((8, 4))
    loss = lambda h, k: tiled_loss(
        lambda s, t, row: (-s.logprob(row.tokens), None),
        h,
        k,
        weights,
        columns,
        tile=2,
        mesh=mesh_of_eight(),
    )[0]
    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).as_text()
    assert re.search(r"\(tensor<50x16xf32>\) -> tensor<50x16xf32>", text)
    summed = re.findall(r'"stablehlo.all_reduce".*?\}\) : \((.*?)\) ->', text, flags=re.S)
    assert "tensor<50x16xf32>" in summed
    assert not [kind for kind in summed if "bf16" in kind]


@over_losses
def test_logits_of_ones_own(x64, token_loss, monkeypatch):
    """Dense logits against plain autodiff, in blocks of two rows; a row of weight 0 may hold
    anything.
    """
    monkeypatch.setattr(vocab_ops, "CPU_LOGITS", 2 * VOCAB)
    rng = np.random.default_rng(5)
    student = jnp.asarray(rng.normal(size=(6, VOCAB)))
    teacher = jnp.asarray(rng.normal(size=(6, VOCAB)))
    columns = TokenInputs(
        jnp.asarray(rng.integers(0, VOCAB, 6)),
        teacher_logprobs=jnp.asarray(-rng.exponential(size=6)),
    )
    weights = jnp.asarray(rng.normal(size=6)).at[3].set(0)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def plain(student):
        losses, outputs = token_loss(VocabTile(student), VocabTile(teacher), columns)
        return jnp.sum(weights * losses), jax.tree.map(lambda x: x.at[3].set(0), outputs)

    expected = plain(student)
    ours = lambda logits: vocab_ops.dense_loss(token_loss, logits, weights, columns, teacher)
    assert_close(
        jax.jit(jax.value_and_grad(ours, has_aux=True))(student.at[3].set(jnp.nan)), expected, 1e-12
    )
    assert_close(jax.jit(ours)(student)[0], expected[0][0], 1e-12)


# Draws from a tile

draw = jax.jit(lambda logits, uniforms: VocabTile(logits).draw(uniforms))


@pytest.mark.parametrize("vocab", [3, 7, 200])
def test_a_tile_draws_the_id_whose_share_contains_the_uniform_number(vocab, rng):
    """Against searchsorted in float64, with some ids of probability 0; the midpoint of each id's
    share draws that id.
    """
    logits = np.where(
        rng.random((20, vocab)) < 0.2, -np.inf, 3 * rng.normal(size=(20, vocab))
    ).astype(np.float32)
    logits[:, vocab // 2] = 0
    p = np.exp(logits.astype(np.float64))
    cdf = np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)
    uniform = rng.random((20, 50)).astype(np.float32)
    found = np.asarray(draw(logits, uniform))
    expected = np.stack([np.searchsorted(row, u, side="right") for row, u in zip(cdf, uniform)])
    is_clear = np.min(np.abs(cdf[:, None] - uniform[:, :, None]), axis=2) > 1e-6
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(found[is_clear], expected[is_clear])
    assert np.all(np.take_along_axis(logits, found, axis=1) > -np.inf)
    assert found.dtype == np.int32
    if vocab < 10:
        middle = cdf - np.diff(cdf, axis=1, prepend=0) / 2
        every = np.asarray(draw(logits, middle.astype(np.float32)))
        likely = np.diff(cdf, axis=1, prepend=0) > 1e-5
        np.testing.assert_array_equal(
            every[likely], np.broadcast_to(np.arange(vocab), logits.shape)[likely]
        )


def test_draws_of_a_tile_follow_its_distribution(rng):
    """Chi-square with 6 degrees of freedom: its 99.9 % quantile is 22.5. Shifted logits give the
    same distribution.
    """
    logits = rng.normal(size=7).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum()
    for shift in (0, 500, -500):
        uniform = rng.random((1, 20_000)).astype(np.float32)
        found = np.asarray(draw(logits[None] + np.float32(shift), uniform))[0]
        counts = np.bincount(found, minlength=7)
        assert np.sum(np.square(counts - 20_000 * p) / (20_000 * p)) < 22.5


def test_nothing_is_differentiated_through_a_draw(rng):
    uniform = rng.random((2, 3)).astype(np.float32)
    logits = rng.normal(size=(2, 7)).astype(np.float32)
    drawn = lambda x: jnp.sum(VocabTile(x).logprob(VocabTile(x).draw(uniform)))
    ids = draw(logits, uniform)
    held = lambda x: jnp.sum(VocabTile(x).logprob(ids))
    found, expected = jax.jit(lambda x: (jax.grad(drawn)(x), jax.grad(held)(x)))(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
