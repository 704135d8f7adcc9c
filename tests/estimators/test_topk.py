"""Divergences on a few ids: hand numbers, what each convention is made of, gradients and fixed
points in float64.
"""

import inspect
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
EPSILON = 1e-6  # of finite differences in float64
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
# Each support, divergence and kind with one of the sizes.
PAIRWISE = [o for n, o in enumerate(EVERY) if (n // 12 - n // 36 - n // 6 % 2 - n % 6) % 3 == 0]


def tile(logits):
    return VocabTile(jnp.asarray(logits)[None])


def evaluate(cases, students, teachers):
    """For each case (options): values [n] and the gradients [n, V] of student and teacher, of n
    pairs of logits. One program for all cases.
    """
    cases = tuple(tuple(options.items()) for options in cases)
    found = _evaluate(cases, *map(jnp.asarray, np.broadcast_arrays(students, teachers)))
    return jax.tree.map(np.asarray, found)


@partial(jax.jit, static_argnums=0)
def _evaluate(cases, students, teachers):
    row = TokenInputs(jnp.full(len(students), 2))

    def of(options):
        def total(student, teacher):
            values = topk_kl(VocabTile(student), VocabTile(teacher), row, **dict(options))[0]
            return jnp.sum(values), values

        gradients, values = jax.grad(total, (0, 1), has_aux=True)(students, teachers)
        return values, *gradients

    return [of(options) for options in cases]


def zip_cases(cases, students, teachers):
    """(options, results) of each case."""
    return list(zip(cases, evaluate(cases, students, teachers)))


def values_of(student, teacher, *cases):
    """The value of one pair in each case."""
    rows = (np.asarray(x)[None] for x in (student, teacher))
    return [values[0] for values, _, _ in evaluate(cases, *rows)]


def with_neighbours(x):
    """Rows x, x + EPSILON e_i, x - EPSILON e_i, for each finite entry i."""
    steps = EPSILON * np.eye(len(x))[np.isfinite(x)]
    return np.concatenate([x[None], x + steps, x - steps])


def assert_gradient(values, gradients, count):
    """The gradient of row 0 is that of finite differences over `with_neighbours`."""
    numeric = (values[1 : 1 + count] - values[1 + count : 1 + 2 * count]) / (2 * EPSILON)
    np.testing.assert_allclose(gradients[0][:count], numeric, rtol=1e-5, atol=1e-7)


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


@pytest.fixture(
    scope="module",
    params=["pairwise", pytest.param("all", marks=pytest.mark.long)],
)
def every(request):
    """(pair, options and results): of the pair and its neighbours, then of the student twice."""
    rng = np.random.default_rng(0)
    cases = EVERY if request.param == "all" else PAIRWISE
    student, teacher = (2 * rng.normal(size=V) for _ in range(2))
    students = np.concatenate([with_neighbours(student), student[None]])
    teachers = np.tile(teacher, (len(students), 1))
    teachers[-1] = student
    with jax.enable_x64(True):
        return (student, teacher), zip_cases(cases, students, teachers)


def test_value_and_gradient(every):
    (student, teacher), results = every
    for options, (values, of_student, of_teacher) in results:
        name = str(options)
        expected = by_hand(student, teacher, **options)
        np.testing.assert_allclose(values[0], expected, rtol=1e-9, atol=1e-12, err_msg=name)
        assert_gradient(values, of_student, V)
        np.testing.assert_array_equal(of_teacher, 0, err_msg=name)


def test_where_student_and_teacher_are_one(every):
    """No gradient for `both` and `tail`; a stated one for `drop` (that of the kept mass)."""
    (student, _), results = every
    for options, (_, of_student, _) in results:
        name, gradient, k = str(options), of_student[-1], options["support_top_k"]
        if options["renormalize"] == "both" or options.get("outside") == "tail":
            np.testing.assert_allclose(gradient, 0, atol=1e-12, err_msg=name)
        elif options["renormalize"] == "none" and options.get("outside") is None:
            # forward pulls mass onto the support, reverse pushes it off
            sign = 1 if options["divergence"] == "reverse" else -1
            mass, of_mass = topk_mass(student, k)
            np.testing.assert_allclose(gradient, sign * of_mass, atol=1e-12, err_msg=name)
            assert mass < 1
            assert np.abs(gradient).max() > 1e-4


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def topk_mass(logits, k):
    """(mass of the k most likely ids, its gradient)."""
    p = softmax(logits)
    inside = np.isin(np.arange(len(p)), np.argsort(-p)[:k])
    mass = p[inside].sum()
    return mass, p * (inside - mass)


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), the student's top 1: what each convention
    makes of it.
    """
    student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    at_one = {"support": "student", "support_top_k": 1}
    cases = {
        "both": (at_one | {"renormalize": "both"}, 0),
        "none": (at_one | {"renormalize": "none"}, 0.5 * np.log(2)),
        "tail": (
            at_one | {"renormalize": "none", "outside": "tail"},
            0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75),
        ),
        "floor": (
            at_one | {"renormalize": "none", "outside": "floor"},
            0.5 * np.log(2) + 2 * 0.25 * (np.log(0.25) + 100),
        ),
        "teacher": (at_one | {"renormalize": "teacher"}, 0.5 * np.log(0.5)),
        "clamped": (at_one | {"renormalize": "teacher", "clamp_at_zero": True}, 0),
    }
    found = values_of(student, teacher, *(options for options, _ in cases.values()))
    expected = [number for _, number in cases.values()]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found[-1] == 0


ALL_IDS = [
    {"support": support, "support_top_k": k, "divergence": divergence, **kind}
    for support, k in (("student", V + 3), ("union", V + 1), ("intersection", V + 9))
    for divergence in ("reverse", "forward")
    for kind in (
        {"renormalize": "both"},
        {"renormalize": "none"},
        {"renormalize": "none", "outside": "tail"},
    )
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "cases",
    # Pairwise: each support and each kind with both divergences, each support with each kind.
    [ALL_IDS[::2], pytest.param(ALL_IDS, marks=pytest.mark.long)],
    ids=["pairwise", "all"],
)
def test_all_ids_are_the_full_divergence(cases, pair):
    """Padding included: an id of no token changes neither value nor gradient."""
    student, teacher = (np.append(x, -np.inf) for x in pair)
    exact = {}
    for divergence, function in (("reverse", reverse_kl), ("forward", forward_kl)):
        both = jax.jit(jax.value_and_grad(lambda x, f=function: f(tile(x), tile(teacher))[0]))
        exact[divergence] = both(student)
    for options, (values, gradients, _) in zip_cases(cases, student[None], teacher[None]):
        value, gradient = exact[options["divergence"]]
        np.testing.assert_allclose(values[0], value, rtol=1e-12, err_msg=str(options))
        np.testing.assert_allclose(gradients[0], gradient, atol=1e-12, err_msg=str(options))


@pytest.mark.usefixtures("x64")
def test_one_tail_bucket_is_a_lower_bound(pair):
    sizes = (1, 2, 4, 7, V)
    for divergence in ("reverse", "forward"):
        tail = {"divergence": divergence, "renormalize": "none", "outside": "tail"}
        *values, full = values_of(
            *pair,
            *(tail | {"support_top_k": k} for k in sizes),
            {"divergence": divergence, "support_top_k": V},
        )
        assert np.all(np.diff(values) >= -1e-12)
        assert 0 <= values[0] < full


WEIGHTS = ("p_student", "p_teacher", "none")


@pytest.mark.usefixtures("x64")
def test_the_weighted_form_is_a_policy_gradient_over_the_kept_ids(pair):
    """The weights are normalised on the kept ids, whatever the support."""
    p, q = map(softmax, pair)
    cases = [
        {"support": support, "support_top_k": 3, "weight": weight}
        for support in ("student", *SUPPORTS_OF_BOTH)
        for weight in WEIGHTS
    ]
    results = evaluate(cases, pair[0][None], pair[1][None])
    for options, (_, gradients, _) in zip(cases, results):
        support = options["support"]
        ids = np.argsort(-p)[:3] if support == "student" else kept_by_hand(p, q, support, 3)
        w = {
            "p_student": p[ids] / p[ids].sum(),
            "p_teacher": q[ids] / q[ids].sum(),
            "none": np.ones(len(ids)),
        }[options["weight"]]
        expected = -(w * np.log(q[ids] / p[ids])) @ (np.eye(V)[ids] - p)
        np.testing.assert_allclose(gradients[0], expected, atol=1e-12, err_msg=str(options))


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
def test_a_convention_is_what_its_system_computes(pair):
    student, teacher = map(softmax, pair)
    cases = [{"convention": name, "support_top_k": 3} for name in TOP_K_CONVENTIONS]
    for name, found in zip(TOP_K_CONVENTIONS, values_of(*pair, *cases)):
        is_students = TOP_K_CONVENTIONS[name]["support"] == "student"
        inside = np.argsort(-(student if is_students else teacher))[:3]
        outside = np.setdiff1d(np.arange(V), inside)
        parts = student[inside], teacher[inside], student[outside], teacher[outside]
        np.testing.assert_allclose(found, SHIPPED[name](*parts), rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("name", TOP_K_CONVENTIONS)
def test_the_config_takes_a_convention_whole(name):
    """Spelled out it is the same; beside it no option of its row may be given."""
    assert EstimatorConfig(recipe="topk_kl", convention=name, support_top_k=3).options == {
        "convention": name,
        "support_top_k": 3,
    }
    # clamp_at_zero is no option of its own: only a convention sets it.
    known = {o: v for o, v in TOP_K_CONVENTIONS[name].items() if o in RECIPES["topk_kl"].options}
    EstimatorConfig(recipe="topk_kl", **known)
    for option, setting in known.items():
        with pytest.raises(ConfigError, match=f"estimator.{option} is "):
            EstimatorConfig(recipe="topk_kl", convention=name, **{option: setting})
    if "divergence" not in TOP_K_CONVENTIONS[name]:
        EstimatorConfig(recipe="topk_kl", convention=name, divergence="forward")


def test_the_floor_stands_for_what_lies_outside(pair):
    with_floor, without = (
        {"support": "teacher", "support_top_k": 2, "renormalize": "teacher", "outside": o}
        for o in ("floor", "drop")
    )
    forward = {"divergence": "forward"}
    found = values_of(*pair, with_floor, without, with_floor | forward, without | forward)
    assert found[0] > found[1] + 10
    np.testing.assert_allclose(found[2], found[3], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weight": "none", "divergence": "forward"},
            "estimator.divergence is 'forward'; expected reverse where weight is none",
        ),
        (
            {"weight": "none", "renormalize": "both"},
            "estimator.renormalize is 'both'; expected none where weight is none",
        ),
        (
            {"outside": "tail"},
            "estimator.outside is 'tail'; expected another value unless renormalize is none",
        ),
        (
            {"outside": "tail", "renormalize": "teacher"},
            "estimator.outside is 'tail'; expected another value unless renormalize is none",
        ),
        (
            {"divergence": "jsd"},
            "estimator.divergence is 'jsd'; expected reverse or forward where the recipe is "
            "topk_kl",
        ),
        (
            {"divergence": "skew_reverse"},
            "estimator.divergence is 'skew_reverse'; expected reverse or forward where the recipe "
            "is topk_kl",
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
            "no support 'both'; expected one of \\['student', 'teacher', 'union', 'intersection', "
            "'symmetric_difference'\\]",
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
        values_of(*pair, options)


def test_a_tiny_tail_is_resolved_in_float32():
    """Mass 1e-9 outside: one minus the kept mass would be 0, the logarithm infinite."""
    student, teacher = np.float32([0, -21, -22, -25]), np.float32([0, -20, -22, -24])
    options = {"support_top_k": 1, "renormalize": "none", "outside": "tail"}
    ((values, gradients, _),) = evaluate([options], student[None], teacher[None])
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()
    assert np.abs(gradients).max() > 0


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
        options = {"support_top_k": 3, "renormalize": "none", "outside": "tail"}
        rows = (np.reshape(x, (-1, V)) for x in (student, teacher))
        expected = evaluate([options], *rows)[0][0].reshape(8, 4)
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


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
    a = a / a.sum() if renormalize == "both" else a
    b = b / b.sum() if renormalize != "none" else b
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
    base = {"support": support, "support_top_k": 2}
    cases = base | {"renormalize": "none"}, base | {"divergence": "forward"}
    found = values_of(student, teacher, *cases)
    p, q = {
        "union": ([8, 4, 2], [1, 4, 8]),
        "intersection": ([4], [4]),
        "symmetric_difference": ([8, 2], [1, 8]),
    }[support]
    p, q = np.divide(p, np.sum(p)), np.divide(q, np.sum(q))
    assert len(p) == expected
    forward = np.sum(q * np.log(q / p))
    np.testing.assert_allclose(found, [terms[support] / 16, forward], rtol=1e-5, atol=1e-6)


SIZES = (1, 2, 3, 4, V, V + 3)


def sets(sizes_of):
    """Values and gradients of BOTH_SIDES at the k of `sizes_of(number)`: for random pairs with ties
    and ids that neither side can draw, and for one pair and its neighbours.
    """
    rng, rows = np.random.default_rng(0), []
    for _ in range(6):
        student, teacher = (2 * rng.normal(size=V + 2) for _ in range(2))
        student[rng.permutation(V)[:3]] = 0.5
        student[V:], teacher[V:] = -np.inf, -np.inf
        rows.append((student, teacher))
    student, teacher = (np.append(2 * rng.normal(size=V), [-np.inf] * 2) for _ in range(2))
    neighbours = with_neighbours(student)
    students = np.concatenate([neighbours, [student for student, _ in rows]])
    teachers = np.concatenate(
        [np.tile(teacher, (len(neighbours), 1)), [teacher for _, teacher in rows]]
    )
    cases = [
        options | {"support_top_k": k}
        for number, options in enumerate(BOTH_SIDES)
        for k in sizes_of(number)
    ]
    with jax.enable_x64(True):
        for options, result in zip(cases, evaluate(cases, students, teachers)):
            assert_sets(options, students, teachers, *result)


def assert_sets(options, students, teachers, values, of_student, of_teacher):
    name = str(options)
    for row in (0, *range(1 + 2 * V, len(students))):
        expected = on_sets(students[row], teachers[row], **options)
        np.testing.assert_allclose(values[row], expected, rtol=1e-9, atol=1e-12, err_msg=name)
    assert_gradient(values, of_student, V)
    assert np.isfinite(of_student).all(), name
    np.testing.assert_array_equal(of_teacher, 0, err_msg=name)


def test_sets_against_brute_force():
    """Padded ids included; the teacher has no gradient."""
    sets(lambda number: [SIZES[(number + number // 6) % 6]])


@pytest.mark.long
def test_sets_of_every_size_against_brute_force():
    sets(lambda number: SIZES)


EMPTY = [
    *[
        {**kind, "divergence": divergence}
        for kind in KINDS
        for divergence in ("reverse", "forward")
    ],
    *[{"weight": weight} for weight in ("p_student", "p_teacher", "none")],
    {"renormalize": "none", "clamp_at_zero": True},
]


EMPTY_SUPPORTS = [  # (support, whether the teacher is the student, k)
    ("intersection", False, 1),
    ("symmetric_difference", True, 3),
    ("symmetric_difference", False, V),
]


@pytest.mark.parametrize(
    "is_pairwise", [True, pytest.param(False, marks=pytest.mark.long)], ids=["pairwise", "all"]
)
def test_an_empty_support_has_no_loss_and_no_gradient(is_pairwise, pair):
    """Exactly 0: no common id at k = 1, and no differing id where student equals teacher."""
    student = np.float32(pair[0])
    student[0] = 9
    apart = student.copy()
    apart[:2] = 0, 9
    for number, (support, is_same, k) in enumerate(EMPTY_SUPPORTS):
        teacher = student if is_same else apart
        options = EMPTY[number::3] if is_pairwise else EMPTY
        cases = [{"support": support, "support_top_k": k} | each for each in options]
        for case, (values, gradients, _) in zip(
            cases, evaluate(cases, student[None], teacher[None])
        ):
            assert values == 0, case
            np.testing.assert_array_equal(gradients, 0, err_msg=str(case))


@pytest.mark.parametrize("weight", ["p_student", "p_teacher"])
def test_an_id_of_no_weight_costs_nothing(weight, pair):
    """The teacher cannot draw the student's second id, nor the student the teacher's: 0 times
    infinity is 0.
    """
    student, teacher = (x.copy() for x in pair)
    student[:2] = 9.0, -np.inf
    teacher[:2] = 9.0, 8.0
    if weight == "p_teacher":
        teacher[np.argsort(-student)[1]] = -np.inf
    options = {"support": "union", "support_top_k": 2, "weight": weight}
    ((values, gradients, _),) = evaluate([options], student[None], teacher[None])
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()


# What `drop` and the floor do to a student that is its teacher: the page of the recipe, in numbers


@pytest.mark.usefixtures("x64")
def test_the_stated_gradient_of_drop(rng):
    """`none`: reverse sum_K p (log p/q + 1) (e - p), forward -sum_K q (e - p), over seven ids."""
    student, teacher = (2 * rng.normal(size=7) for _ in range(2))
    p, q = softmax(student), softmax(teacher)
    own = {"student": p, "teacher": q}
    cases = [
        {"support": s, "support_top_k": 3, "renormalize": "none", "divergence": divergence}
        for s in ("student", "teacher", *SUPPORTS_OF_BOTH)
        for divergence in ("reverse", "forward")
    ]
    for options, (_, gradients, _) in zip(cases, evaluate(cases, student[None], teacher[None])):
        support = options["support"]
        ids = np.argsort(-own[support])[:3] if support in own else kept_by_hand(p, q, support, 3)
        scores = np.eye(7)[ids] - p
        weights = p * (np.log(p / q) + 1) if options["divergence"] == "reverse" else -q
        np.testing.assert_allclose(
            gradients[0], weights[ids] @ scores, atol=1e-10, err_msg=str(options)
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "is_pairwise", [True, pytest.param(False, marks=pytest.mark.long)], ids=["pairwise", "all"]
)
def test_sets_where_student_and_teacher_are_one(is_pairwise, pair):
    """`both` and `tail` rest; `drop` and the floor have the gradients that the page states."""
    student = pair[0]
    p = softmax(student)
    mass, of_mass = topk_mass(student, 3)
    outward = ~np.isin(np.arange(V), np.argsort(-p)[:3])
    of_floor = (outward * p * (np.log(p) + 100)) @ (np.eye(V) - p)
    stated = {
        ("both", "drop", "reverse"): 0 * p,
        ("both", "drop", "forward"): 0 * p,
        ("none", "tail", "reverse"): 0 * p,
        ("none", "tail", "forward"): 0 * p,
        ("none", "drop", "reverse"): of_mass,
        ("none", "drop", "forward"): -of_mass,
        ("teacher", "drop", "reverse"): (1 + np.log(mass)) * of_mass,
        ("teacher", "drop", "forward"): -of_mass / mass,
        ("none", "floor", "reverse"): of_floor,
        ("none", "floor", "forward"): -of_mass,
    }
    names = ("renormalize", "outside", "divergence")
    cases = [
        dict(zip(names, key)) | {"support": support, "support_top_k": 3}
        for number, support in enumerate(("union", "intersection"))
        for at, key in enumerate(stated)
        if not is_pairwise or (at // 2 + at + number) % 2 == 0
    ]
    for options, (_, gradients, _) in zip(cases, evaluate(cases, student[None], student[None])):
        expected = stated[tuple(options[name] for name in names)]
        np.testing.assert_allclose(gradients[0], expected, atol=1e-10, err_msg=str(options))


def test_sets_under_vmap(rng):
    student, teacher = (rng.normal(size=(3, 4, V)).astype(np.float32) for _ in range(2))
    cases = [
        {"support": support, "support_top_k": 3, **kind}
        for support in SUPPORTS_OF_BOTH
        for kind in ({"renormalize": "both"}, {"renormalize": "none", "outside": "tail"})
    ]

    @jax.jit
    @jax.vmap
    def batched(s, t):
        row = TokenInputs(jnp.zeros(4, int))
        return [topk_kl(VocabTile(s), VocabTile(t), row, **options)[0] for options in cases]

    rows = (x.reshape(-1, V) for x in (student, teacher))
    expected = [values.reshape(3, 4) for values, _, _ in evaluate(cases, *rows)]
    chex.assert_trees_all_close(batched(student, teacher), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "support",
    [
        "union",
        *(pytest.param(s, marks=pytest.mark.long) for s in ("teacher", *SUPPORTS_OF_BOTH[1:])),
    ],
)
def test_through_the_tiled_pass_with_garbage_where_nothing_counts(support, rng):
    """NaN in a slot that does not count changes neither loss nor gradient, and the tile changes
    neither.
    """
    hidden, taught = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32) for _ in range(2))
    kernel, taught_kernel = (jnp.asarray(rng.normal(size=(V, 6)), jnp.float32) for _ in range(2))
    columns = TokenInputs(jnp.zeros((2, 5), jnp.int32))
    weights = jnp.ones((2, 5)).at[:, jnp.array([0, 2])].set(0)

    @partial(jax.jit, static_argnums=3)
    @partial(jax.value_and_grad, argnums=(0, 1))
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

    whole, tiled = (loss(hidden, kernel, taught, tile) for tile in (10, 3))
    chex.assert_trees_all_close(whole, tiled, rtol=1e-5, atol=1e-6)
    # The state of column 1 speaks of column 2, and the last one of no column.
    hidden, taught = (x.at[:, jnp.array([1, 4])].set(jnp.nan) for x in (hidden, taught))
    chex.assert_trees_all_equal(tiled, loss(hidden, kernel, taught, 3))


def test_a_broken_student_is_seen(pair):
    """NaN that counts stays NaN, so that the step is skipped; it does not pass for an id that
    cannot be drawn.
    """
    broken = np.where(np.arange(V) == 4, np.nan, pair[0])
    cases = [*KINDS, {"weight": "p_student"}, {"weight": "none"}]
    cases = [{"support_top_k": 3} | options for options in cases]
    assert np.isnan(values_of(broken, pair[1], *cases)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_page(name):
    """The same paragraphs in the same order, within 100 columns, and a line for each option."""
    page = inspect.getdoc(TOKEN_LOSSES[name])
    heads = [
        page.index(f"\n\n{head}")
        for head in ("Equation:", "Detached:", "Cost:", "Use it ", "Options:\n")
    ]
    assert heads == sorted(heads)
    assert max(map(len, page.splitlines())) <= 100
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

    @jax.jit
    def found(x):
        exact = lambda x: forward_kl(tile(x), tile(teacher))[0]
        return sft(tile(x), None, ROW)[0][0], jax.grad(expected)(x), jax.grad(exact)(x)

    value, gradient, exact = found(student)
    np.testing.assert_allclose(value, -np.log(softmax(pair[0])[2]), rtol=1e-12)
    np.testing.assert_allclose(gradient, exact, atol=1e-12)
