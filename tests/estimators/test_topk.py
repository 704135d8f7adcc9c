"""Divergences on a few ids: hand numbers, what each convention is made of, gradients and fixed
points in float64.
"""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.config import EstimatorConfig
from opdjax.config.recipes import RECIPES, TOP_K_CONVENTIONS
from opdjax.config.validation import ConfigError
from opdjax.estimators import TOKEN_LOSSES
from opdjax.estimators.divergence import (
    FLOOR,
    SUPPORTS_OF_BOTH,
    forward_kl,
    reverse_kl,
    topk_kl,
)
from opdjax.estimators.losses import sft
from opdjax.ops.tile import Head, VocabTile
from opdjax.ops.vocab import TokenInputs, tiled_loss

V = 9
ROW = TokenInputs(jnp.asarray([2]))
EVERY = [
    {"support": support, "support_top_k": k, "divergence": divergence, **kind}
    for support in ("student", "teacher")
    for k in (1, 3, V - 1)
    for divergence in ("reverse", "forward")
    for kind in (
        {"renormalize": "both"},
        {"renormalize": "teacher"},
        {"renormalize": "none"},
        {"renormalize": "none", "outside": "tail"},
        {"renormalize": "none", "outside": "floor"},
        {"renormalize": "teacher", "outside": "floor"},
    )
]
NAMES = ["-".join(map(str, options.values())) for options in EVERY]


def tile(logits):
    return VocabTile(jnp.asarray(logits)[None])


def value(student, teacher, **options):
    return topk_kl(tile(student), tile(teacher), ROW, **options)[0][0]


def by_hand(student, teacher, *, support, support_top_k, divergence, renormalize, outside="drop"):
    """The same from probabilities, id by id."""
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (student, teacher))
    inside = np.argsort(-(p if support == "student" else q))[:support_top_k]
    rest = np.setdiff1d(np.arange(len(p)), inside)
    a, b = p[inside], q[inside]
    if renormalize == "both":
        a = a / a.sum()
    if renormalize != "none":
        b = b / b.sum()
    if outside == "tail":
        a, b = np.append(a, p[rest].sum()), np.append(b, q[rest].sum())
    if outside == "floor":
        a, b = np.append(a, p[rest]), np.append(b, np.full(len(rest), np.exp(FLOOR)))
    first, second = (a, b) if divergence == "reverse" else (b, a)
    return np.sum(first * np.log(first / second))


@pytest.fixture
def pair(rng):
    return tuple(2 * rng.normal(size=V) for _ in range(2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", EVERY, ids=NAMES)
def test_value_and_gradient(options, pair):
    student, teacher = pair
    np.testing.assert_allclose(
        value(student, teacher, **options),
        by_hand(student, teacher, **options),
        rtol=1e-9,
        atol=1e-12,
    )
    check_grads(
        lambda x: value(x, teacher, **options),
        (jnp.asarray(student),),
        order=1,
        modes=["rev"],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(
        jax.grad(lambda t: value(student, t, **options))(jnp.asarray(teacher)), 0
    )


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), the student's top 1: what each convention
    makes of it.
    """
    student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    at_one = {"support": "student", "support_top_k": 1}
    assert value(student, teacher, **at_one, renormalize="both") == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(
        value(student, teacher, **at_one, renormalize="none"), 0.5 * np.log(2), rtol=1e-5
    )
    tail = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(
        value(student, teacher, **at_one, renormalize="none", outside="tail"), tail, rtol=1e-5
    )
    floor = 0.5 * np.log(2) + 2 * 0.25 * (np.log(0.25) + 100)
    np.testing.assert_allclose(
        value(student, teacher, **at_one, renormalize="none", outside="floor"), floor, rtol=1e-5
    )
    np.testing.assert_allclose(
        value(student, teacher, **at_one, renormalize="teacher"), 0.5 * np.log(0.5), rtol=1e-5
    )
    assert value(student, teacher, **at_one, renormalize="teacher", clamp_at_zero=True) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("divergence", "exact"), [("reverse", reverse_kl), ("forward", forward_kl)]
)
@pytest.mark.parametrize(
    "kind",
    [{"renormalize": "both"}, {"renormalize": "none"}, {"renormalize": "none", "outside": "tail"}],
    ids=str,
)
@pytest.mark.parametrize("k", [V, V + 3])
def test_all_ids_are_the_full_divergence(divergence, exact, kind, k, pair):
    """Padding included: an id of no token changes neither value nor gradient."""
    student, teacher = (np.append(x, -np.inf) for x in pair)

    def topk(x):
        return value(x, teacher, support_top_k=k, divergence=divergence, **kind)

    np.testing.assert_allclose(
        topk(jnp.asarray(student)), exact(tile(student), tile(teacher))[0], rtol=1e-12
    )
    np.testing.assert_allclose(
        jax.grad(topk)(jnp.asarray(student)),
        jax.grad(lambda x: exact(tile(x), tile(teacher))[0])(jnp.asarray(student)),
        atol=1e-12,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_one_tail_bucket_is_a_lower_bound(divergence, pair):
    full = value(*pair, support_top_k=V, divergence=divergence)
    values = [
        value(*pair, support_top_k=k, divergence=divergence, renormalize="none", outside="tail")
        for k in range(1, V + 1)
    ]
    assert np.all(np.diff(values) >= -1e-12)
    assert 0 <= values[0] < full


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", EVERY, ids=NAMES)
def test_where_student_and_teacher_are_one(options, pair):
    """No gradient for `both` and `tail`; a stated one for `drop` (that of the kept mass) and for
    the floor.
    """
    student = jnp.asarray(pair[0])
    gradient = np.asarray(jax.grad(lambda x: value(x, student, **options))(student))
    is_fixed = options["renormalize"] == "both" or options.get("outside") == "tail"
    if is_fixed:
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
    elif options["renormalize"] == "none" and options.get("outside") is None:
        kept = topk_mass(student, options["support_top_k"])
        sign = (
            1 if options["divergence"] == "reverse" else -1
        )  # forward pulls mass onto the support, reverse pushes it off
        np.testing.assert_allclose(
            gradient,
            sign * np.asarray(jax.grad(lambda x: topk_mass(x, options["support_top_k"]))(student)),
            atol=1e-12,
        )
        assert kept < 1
        assert np.abs(gradient).max() > 1e-4


def topk_mass(logits, k):
    return jnp.sum(jax.lax.top_k(jax.nn.softmax(logits), k)[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight", ["p_student", "p_teacher", "none"])
def test_the_weighted_form_is_a_policy_gradient_over_the_kept_ids(weight, pair):
    student, teacher = pair
    ids = np.argsort(-student)[:3]
    p, q = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in pair)
    w = {
        "p_student": p[ids] / p[ids].sum(),
        "p_teacher": q[ids] / q[ids].sum(),
        "none": np.ones(3),
    }[weight]
    gradient = jax.grad(lambda x: value(x, teacher, support_top_k=3, weight=weight))(
        jnp.asarray(student)
    )
    scores = np.eye(V)[ids] - p
    np.testing.assert_allclose(gradient, -(w * np.log(q[ids] / p[ids])) @ scores, atol=1e-12)


# Each system's formula written out once more, from probabilities p (student), q (teacher) inside
# and outside the kept ids.
SHIPPED = {
    "tunix": lambda p, q, p_rest, q_rest: np.sum(q / q.sum() * np.log(q / q.sum() / (p / p.sum()))),
    "verl": lambda p, q, p_rest, q_rest: max(np.sum(q * np.log(q / p)), 0),
    "nemo_rl": lambda p, q, p_rest, q_rest: np.sum(
        p / p.sum() * np.log(p / p.sum() / (q / q.sum()))
    ),
    "nemo_rl_floor": lambda p, q, p_rest, q_rest: (
        np.sum(p * np.log(p / (q / q.sum()))) + np.sum(p_rest * (np.log(p_rest) + 100))
    ),
    "easydel": lambda p, q, p_rest, q_rest: np.sum(q / q.sum() * np.log(q / q.sum() / p)),
    "trl": lambda p, q, p_rest, q_rest: (
        np.sum(p * np.log(p / q)) + p_rest.sum() * np.log(p_rest.sum() / q_rest.sum())
    ),
    "distillkit": lambda p, q, p_rest, q_rest: (
        np.sum(p * np.log(p / q))
        + np.sum(np.full(6, p_rest.sum() / 6) * np.log(p_rest.sum() / q_rest.sum()))
    ),
    "thunlp": lambda p, q, p_rest, q_rest: -np.sum(p / p.sum() * np.log(q / p) * np.log(p)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TOP_K_CONVENTIONS)
def test_a_convention_is_what_its_system_computes(name, pair):
    student, teacher = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in pair)
    inside = np.argsort(-(student if TOP_K_CONVENTIONS[name]["support"] == "student" else teacher))[
        :3
    ]
    outside = np.setdiff1d(np.arange(V), inside)
    expected = SHIPPED[name](student[inside], teacher[inside], student[outside], teacher[outside])
    np.testing.assert_allclose(value(*pair, convention=name, support_top_k=3), expected, rtol=1e-10)


@pytest.mark.parametrize("name", TOP_K_CONVENTIONS)
def test_the_config_takes_a_convention_whole(name):
    """Spelled out it is the same; beside it no option of its row may be given."""
    assert EstimatorConfig(recipe="topk_kl", convention=name, support_top_k=3).options == {
        "convention": name,
        "support_top_k": 3,
    }
    EstimatorConfig(recipe="topk_kl", **TOP_K_CONVENTIONS[name])
    for option, setting in TOP_K_CONVENTIONS[name].items():
        with pytest.raises(
            ConfigError, match=f"estimator.{option} is .* convention {name} sets it"
        ):
            EstimatorConfig(recipe="topk_kl", convention=name, **{option: setting})
    if "divergence" not in TOP_K_CONVENTIONS[name]:
        EstimatorConfig(recipe="topk_kl", convention=name, divergence="forward")


def test_the_floor_stands_for_what_lies_outside(pair):
    with_floor, without = (
        {"support": "teacher", "support_top_k": 2, "renormalize": "teacher", "outside": o}
        for o in ("floor", "drop")
    )
    assert value(*pair, **with_floor) > value(*pair, **without) + 10
    forward = {"divergence": "forward"}
    np.testing.assert_allclose(
        value(*pair, **with_floor, **forward), value(*pair, **without, **forward), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight": "none", "clamp_at_zero": True},
            "estimator.clamp_at_zero is True; expected false where weight is given",
        ),
        (
            {"weight": "none", "divergence": "forward"},
            "estimator.divergence is 'forward'; expected reverse where weight is given",
        ),
        (
            {"weight": "none", "renormalize": "both"},
            "estimator.renormalize is 'both'; expected none where weight is given",
        ),
        (
            {"outside": "tail"},
            "estimator.outside is 'tail'; expected drop where renormalize is both",
        ),
        (
            {"outside": "tail", "renormalize": "teacher"},
            "estimator.outside is 'tail'; expected drop where renormalize is teacher",
        ),
        (
            {"divergence": "jsd"},
            "estimator.divergence is 'jsd'; expected reverse or forward where the recipe is topk_kl",
        ),
        (
            {"divergence": "skew_reverse"},
            "estimator.divergence is 'skew_reverse'; expected reverse or forward where the recipe is topk_kl",
        ),
        ({"support_top_k": 0}, "estimator.support_top_k is 0; expected at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EstimatorConfig(recipe="topk_kl", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"support": "both"},
            "no support 'both'; expected one of \\['student', 'teacher', 'union', 'intersection', 'symmetric_difference'\\]",
        ),
        ({"renormalize": "all"}, "no renormalize 'all'"),
        ({"outside": "keep", "renormalize": "none"}, "no outside 'keep'"),
        (
            {"outside": "tail"},
            "outside 'tail' with renormalize 'both'; expected renormalize 'none'",
        ),
        ({"divergence": "jsd"}, "no divergence 'jsd'"),
        (
            {"divergence": "skew_forward"},
            "no divergence 'skew_forward'; expected one of \\['reverse', 'forward'\\]",
        ),
        ({"weight": "p"}, "no weight 'p'"),
    ],
)
def test_unknown_options_are_refused(options, message, pair):
    with pytest.raises(ValueError, match=message):
        value(*pair, **options)


def test_a_tiny_tail_is_resolved_in_float32():
    """Mass 1e-9 outside: one minus the kept mass would be 0, and the bucket's logarithm infinite."""
    student, teacher = np.float32([0, -21, -22, -25]), np.float32([0, -20, -22, -24])
    found = value(student, teacher, support_top_k=1, renormalize="none", outside="tail")
    gradient = jax.grad(
        lambda x: value(x, teacher, support_top_k=1, renormalize="none", outside="tail")
    )(jnp.asarray(student))
    assert np.isfinite(found)
    assert np.all(np.isfinite(gradient))
    assert np.abs(np.asarray(gradient)).max() > 0


class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_over_a_batch(self):
        rng = np.random.default_rng(1)
        student, teacher = (jnp.asarray(rng.normal(size=(8, 4, V)), jnp.float32) for _ in range(2))

        def batched(s, t):
            return topk_kl(
                VocabTile(s),
                VocabTile(t),
                TokenInputs(jnp.zeros(4, jnp.int32)),
                support_top_k=3,
                renormalize="none",
                outside="tail",
            )[0]

        losses = self.variant(jax.vmap(batched))(student, teacher)
        expected = np.stack([batched(*rows) for rows in zip(student, teacher)])
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_through_the_tiled_pass(rng):
    """The same loss and gradient whether the logits exist at once or a tile at a time."""
    hidden, kernel = (
        jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32),
        jnp.asarray(rng.normal(size=(V, 6)), jnp.float32),
    )
    teacher = (
        jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32),
        Head(jnp.asarray(rng.normal(size=(V, 6)), jnp.float32)),
    )
    columns, weights = TokenInputs(jnp.zeros((2, 5), jnp.int32)), jnp.ones((2, 5)).at[:, 0].set(0)

    def loss(hidden, kernel, tile):
        def token_loss(s, t, row):
            return topk_kl(s, t, row, support="teacher", support_top_k=3, divergence="forward")

        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, teacher, tile=tile)[0]

    whole, tiled = (
        jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, tile) for tile in (10, 3)
    )
    chex.assert_trees_all_close(whole, tiled, rtol=1e-5, atol=1e-6)


# Supports made of both sides' top k

KINDS = [
    {"renormalize": "both"},
    {"renormalize": "teacher"},
    {"renormalize": "none"},
    {"renormalize": "none", "outside": "tail"},
    {"renormalize": "none", "outside": "floor"},
    {"renormalize": "teacher", "outside": "floor"},
]
BOTH_SIDES = [
    {"support": support, "divergence": divergence, **kind}
    for support in SUPPORTS_OF_BOTH
    for divergence in ("reverse", "forward")
    for kind in KINDS
]


def kept_by_hand(p, q, support, k):
    """The ids by set algebra, ties to the lower id."""
    ours, theirs = (set(np.argsort(-x, kind="stable")[:k].tolist()) for x in (p, q))
    joined = {
        "union": ours | theirs,
        "intersection": ours & theirs,
        "symmetric_difference": ours ^ theirs,
    }[support]
    return np.array(sorted(joined), int)


def on_sets(student, teacher, *, support, support_top_k, divergence, renormalize, outside="drop"):
    """The value from probabilities and set algebra; 0 log 0 is 0, and an empty support 0."""
    p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (student, teacher))
    inside = kept_by_hand(p, q, support, support_top_k)
    if not inside.size:
        return 0.0
    rest = np.setdiff1d(np.arange(len(p)), inside)
    a, b = p[inside], q[inside]
    a, b = (
        (a / a.sum() if renormalize == "both" else a),
        (b / b.sum() if renormalize != "none" else b),
    )
    if outside == "tail":
        a, b = np.append(a, p[rest].sum()), np.append(b, q[rest].sum())
    if outside == "floor":
        a, b = np.append(a, p[rest]), np.append(b, np.exp(FLOOR) * np.ones(len(rest)))
    first, second = (a, b) if divergence == "reverse" else (b, a)
    if divergence == "forward" and outside == "floor":  # e^-100 counts as 0
        first, second = first[: inside.size], second[: inside.size]
    live = first > 0
    return np.sum(first[live] * np.log(first[live] / second[live]))


@pytest.mark.parametrize(
    ("support", "expected"), [("union", 3), ("intersection", 1), ("symmetric_difference", 2)]
)
def test_sets_by_hand(support, expected):
    """Student (8, 4, 2, 1, 1)/16, teacher (1, 4, 8, 2, 1)/16: the top 2 are {0, 1} and {2, 1}."""
    student, teacher = np.log([8, 4, 2, 1, 1]), np.log([1, 4, 8, 2, 1])
    terms = {
        "union": 8 * np.log(8) + 2 * np.log(1 / 4),
        "intersection": 0,
        "symmetric_difference": 8 * np.log(8) + 2 * np.log(1 / 4),
    }
    found = value(student, teacher, support=support, support_top_k=2, renormalize="none")
    np.testing.assert_allclose(found, terms[support] / 16, rtol=1e-5, atol=1e-6)
    p, q = {
        "union": ([8, 4, 2], [1, 4, 8]),
        "intersection": ([4], [4]),
        "symmetric_difference": ([8, 2], [1, 8]),
    }[support]
    p, q = np.divide(p, np.sum(p)), np.divide(q, np.sum(q))
    assert len(p) == expected
    found = value(student, teacher, support=support, support_top_k=2, divergence="forward")
    np.testing.assert_allclose(found, np.sum(q * np.log(q / p)), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", BOTH_SIDES, ids=str)
def test_sets_against_brute_force(options, rng):
    """Random pairs, ties, ids that neither side can draw, any k up to beyond V."""
    sizes = [1, 2, 4, V, V + 3]
    rows = []
    for _ in range(6):
        student, teacher = (2 * rng.normal(size=V + 2) for _ in range(2))
        student[rng.permutation(V)[:3]] = 0.5
        student[V:], teacher[V:] = -np.inf, -np.inf
        rows.append((student, teacher))
    students, teachers = (VocabTile(jnp.asarray(np.stack(side))) for side in zip(*rows))
    for k in sizes:
        found = topk_kl(
            students, teachers, TokenInputs(jnp.zeros(6, int)), support_top_k=k, **options
        )[0]
        expected = [on_sets(*row, support_top_k=k, **options) for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", BOTH_SIDES, ids=str)
def test_gradients_on_sets(options, pair):
    """Of the value, padded ids included; none for the teacher."""
    student, teacher = (jnp.append(jnp.asarray(x), -jnp.inf) for x in pair)
    options = options | {"support_top_k": 3}

    def of_live(x):
        return value(jnp.append(x, -jnp.inf), teacher, **options)

    check_grads(of_live, (student[:-1],), order=1, modes=["rev"], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: value(x, teacher, **options))(student)).all()
    np.testing.assert_array_equal(jax.grad(lambda t: value(student, t, **options))(teacher), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("support", ["union", "intersection"])
@pytest.mark.parametrize(
    ("divergence", "exact"), [("reverse", reverse_kl), ("forward", forward_kl)]
)
@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_sets_of_all_ids_are_the_full_divergence(support, divergence, exact, kind, pair):
    student, teacher = (np.append(x, -np.inf) for x in pair)
    for k in (V + 1, V + 9):
        found = value(
            student, teacher, support=support, support_top_k=k, divergence=divergence, **kind
        )
        np.testing.assert_allclose(found, exact(tile(student), tile(teacher))[0], rtol=1e-12)


EMPTY = [
    *[
        {**kind, "divergence": divergence}
        for kind in KINDS
        for divergence in ("reverse", "forward")
    ],
    *[{"weight": weight} for weight in ("p_student", "p_teacher", "none")],
    {"renormalize": "none", "clamp_at_zero": True},
]


@pytest.mark.parametrize("options", EMPTY, ids=str)
def test_an_empty_support_has_no_loss_and_no_gradient(options, pair):
    """Exactly 0: no id in common at k = 1, and none that differs where student and teacher are one."""
    student = jnp.asarray(pair[0]).at[0].set(9)
    apart, same = student.at[0].set(0).at[1].set(9), student
    for support, teacher, k in (
        ("intersection", apart, 1),
        ("symmetric_difference", same, 3),
        ("symmetric_difference", apart, V),
    ):
        found, gradient = jax.value_and_grad(
            lambda x, o=options, t=teacher, s=support, k=k: value(
                x, t, support=s, support_top_k=k, **o
            )
        )(student)
        assert found == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weight", ["p_student", "p_teacher", "none"])
@pytest.mark.parametrize("support", SUPPORTS_OF_BOTH)
def test_weights_are_normalised_on_the_set(support, weight, pair):
    p, q = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in pair)
    ids = kept_by_hand(p, q, support, 3)
    w = {
        "p_student": p[ids] / p[ids].sum(),
        "p_teacher": q[ids] / q[ids].sum(),
        "none": np.ones(len(ids)),
    }[weight]
    gradient = jax.grad(
        lambda x: value(x, pair[1], support=support, support_top_k=3, weight=weight)
    )(jnp.asarray(pair[0]))
    np.testing.assert_allclose(
        gradient, -(w * np.log(q[ids] / p[ids])) @ (np.eye(V)[ids] - p), atol=1e-12
    )


@pytest.mark.parametrize("weight", ["p_student", "p_teacher"])
def test_an_id_of_no_weight_costs_nothing(weight, pair):
    """The teacher cannot draw the student's second id, nor the student the teacher's: 0 times
    infinity is 0.
    """
    student, teacher = (jnp.asarray(x) for x in pair)
    student, teacher = (
        student.at[:2].set(jnp.array([9.0, -jnp.inf])),
        teacher.at[:2].set(jnp.array([9.0, 8.0])),
    )
    teacher = (
        teacher
        if weight == "p_student"
        else teacher.at[int(jnp.argsort(-student)[1])].set(-jnp.inf)
    )
    found, gradient = jax.value_and_grad(
        lambda x: value(x, teacher, support="union", support_top_k=2, weight=weight)
    )(student)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


# What `drop` and the floor do to a student that is its teacher: the page of the recipe, in numbers


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("support", ["student", "teacher", *SUPPORTS_OF_BOTH])
def test_the_stated_gradient_of_drop(support, rng):
    """`none`: reverse sum_K p (log p/q + 1) (e - p), forward -sum_K q (e - p), over seven ids."""
    student, teacher = (2 * rng.normal(size=7) for _ in range(2))
    p, q = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in (student, teacher))
    own = {"student": p, "teacher": q}
    ids = np.argsort(-own[support])[:3] if support in own else kept_by_hand(p, q, support, 3)
    scores = np.eye(7)[ids] - p
    for divergence, stated in (
        ("reverse", (p * (np.log(p / q) + 1))[ids] @ scores),
        ("forward", -q[ids] @ scores),
    ):
        options = {
            "support": support,
            "support_top_k": 3,
            "renormalize": "none",
            "divergence": divergence,
        }
        found = jax.grad(lambda x, options=options: value(x, teacher, **options))(
            jnp.asarray(student)
        )
        np.testing.assert_allclose(found, stated, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("support", ["union", "intersection"])
def test_sets_where_student_and_teacher_are_one(support, pair):
    """`both` and `tail` rest; `drop` and the floor have the gradients that the page states."""
    student = jnp.asarray(pair[0])
    p = jax.nn.softmax(student)
    mass, outward = topk_mass(student, 3), np.ones(V)
    outward[np.asarray(jax.lax.top_k(p, 3)[1])] = 0
    of_mass = jax.grad(topk_mass)(student, 3)
    of_floor = (outward * p * (jnp.log(p) + 100)) @ (np.eye(V) - p)
    stated = {
        ("both", "drop", "reverse"): 0 * p,
        ("both", "drop", "forward"): 0 * p,
        ("none", "tail", "reverse"): 0 * p,
        ("none", "tail", "forward"): 0 * p,
        ("none", "drop", "reverse"): of_mass,
        ("none", "drop", "forward"): -of_mass,
        ("teacher", "drop", "reverse"): (1 + jnp.log(mass)) * of_mass,
        ("teacher", "drop", "forward"): -of_mass / mass,
        ("none", "floor", "reverse"): of_floor,
        ("none", "floor", "forward"): -of_mass,
    }
    for (renormalize, outside, divergence), expected in stated.items():
        options = {
            "renormalize": renormalize,
            "outside": outside,
            "divergence": divergence,
            "support": support,
            "support_top_k": 3,
        }
        found = jax.grad(lambda x, options=options: value(x, student, **options))(student)
        np.testing.assert_allclose(found, expected, atol=1e-10, err_msg=str(options))


class TestSetVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_sets_over_a_batch(self):
        rng = np.random.default_rng(1)
        student, teacher = (jnp.asarray(rng.normal(size=(3, 4, V)), jnp.float32) for _ in range(2))
        for support in SUPPORTS_OF_BOTH:
            for kind in ({"renormalize": "both"}, {"renormalize": "none", "outside": "tail"}):

                def batched(s, t, kind=kind, support=support):
                    return topk_kl(
                        VocabTile(s),
                        VocabTile(t),
                        TokenInputs(jnp.zeros(4, int)),
                        support=support,
                        support_top_k=3,
                        **kind,
                    )[0]

                losses = self.variant(jax.vmap(batched))(student, teacher)
                expected = np.stack([batched(*rows) for rows in zip(student, teacher)])
                np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("support", SUPPORTS_OF_BOTH)
def test_sets_through_the_tiled_pass_with_garbage_where_nothing_counts(support, rng):
    """NaN in a slot that does not count changes neither loss nor gradient, and the tile changes
    neither.
    """
    hidden, taught = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32) for _ in range(2))
    kernel, taught_kernel = (jnp.asarray(rng.normal(size=(V, 6)), jnp.float32) for _ in range(2))
    columns, weights = (
        TokenInputs(jnp.zeros((2, 5), jnp.int32)),
        jnp.ones((2, 5)).at[:, jnp.array([0, 2])].set(0),
    )

    def loss(hidden, kernel, taught, tile):
        def token_loss(s, t, row):
            return topk_kl(
                s, t, row, support=support, support_top_k=3, renormalize="none", outside="tail"
            )

        return tiled_loss(
            token_loss,
            hidden,
            Head(kernel),
            weights,
            columns,
            (taught, Head(taught_kernel)),
            tile=tile,
        )[0]

    whole, tiled = (
        jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, taught, tile) for tile in (10, 3)
    )
    chex.assert_trees_all_close(whole, tiled, rtol=1e-5, atol=1e-6)
    # The state of column 1 speaks of column 2, and the last one of no column.
    hidden, taught = (x.at[:, jnp.array([1, 4])].set(jnp.nan) for x in (hidden, taught))
    chex.assert_trees_all_equal(
        tiled, jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, taught, 3)
    )


@pytest.mark.parametrize("options", [*KINDS, {"weight": "p_student"}, {"weight": "none"}], ids=str)
def test_a_broken_student_is_seen(options, pair):
    """NaN that counts stays NaN, so that the step is skipped; it does not pass for an id that
    cannot be drawn.
    """
    student, teacher = pair
    assert np.isnan(
        value(np.where(np.arange(V) == 4, np.nan, student), teacher, support_top_k=3, **options)
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_page(name):
    """The same paragraphs in the same order, within 120 columns, and a line for each option."""
    page = inspect.getdoc(TOKEN_LOSSES[name])
    heads = [
        page.index(f"\n\n{head}")
        for head in ("Equation:", "Detached:", "Cost:", "Use it when", "Options:\n")
    ]
    assert heads == sorted(heads)
    assert max(map(len, page.splitlines())) <= 120
    listed = [
        line.split()[0]
        for line in page[heads[-1] :].splitlines()
        if line.startswith("  ") and line[2] != " "
    ]
    base = re.search(r"\.\.\. +and all of (\w+)", page)
    inherited = RECIPES[base[1]].options if base else ()
    assert set(listed) - {"...", "none"} | {*inherited} == set(RECIPES[name].options)


@pytest.mark.usefixtures("x64")
def test_sft_is_cross_entropy_and_in_expectation_the_forward_kl(pair):
    student, teacher = (jnp.asarray(x) for x in pair)

    def expected(x):
        losses = sft(VocabTile(jnp.tile(x, (V, 1))), None, TokenInputs(jnp.arange(V)))[0]
        return jax.nn.softmax(teacher) @ losses

    np.testing.assert_allclose(
        sft(tile(student), None, ROW)[0][0], -jax.nn.log_softmax(student)[2], rtol=1e-14
    )
    exact = jax.grad(lambda x: forward_kl(tile(x), tile(teacher))[0])(student)
    np.testing.assert_allclose(jax.grad(expected)(student), exact, atol=1e-12)
