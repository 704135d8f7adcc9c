"""Divergences on a few ids: hand numbers, what each convention is made of, gradients and fixed points in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from opdjax.config import ConfigError, EstimatorConfig
from opdjax.estimators import RECIPES
from opdjax.estimators.divergence import FLOOR, TOP_K_CONVENTIONS, TOP_K_OPTIONS, forward_kl, reverse_kl, topk_kl
from opdjax.estimators.losses import sft
from opdjax.ops.vocab import Columns, Head, VocabTile, tiled_loss

V = 9
ROW = Columns(jnp.asarray([2]))
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
    np.testing.assert_allclose(value(student, teacher, **options), by_hand(student, teacher, **options), rtol=1e-9, atol=1e-12)
    check_grads(lambda x: value(x, teacher, **options), (jnp.asarray(student),), order=1, modes=["rev"], rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda t: value(student, t, **options))(jnp.asarray(teacher)), 0)


def test_hand_worked_numbers():
    """Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), the student's top 1: what each convention makes of it."""
    student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    at_one = {"support": "student", "support_top_k": 1}
    assert value(student, teacher, **at_one, renormalize="both") == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(value(student, teacher, **at_one, renormalize="none"), 0.5 * np.log(2), rtol=1e-5)
    tail = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(value(student, teacher, **at_one, renormalize="none", outside="tail"), tail, rtol=1e-5)
    floor = 0.5 * np.log(2) + 2 * 0.25 * (np.log(0.25) + 100)
    np.testing.assert_allclose(value(student, teacher, **at_one, renormalize="none", outside="floor"), floor, rtol=1e-5)
    np.testing.assert_allclose(value(student, teacher, **at_one, renormalize="teacher"), 0.5 * np.log(0.5), rtol=1e-5)
    assert value(student, teacher, **at_one, renormalize="teacher", clamp_at_zero=True) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("divergence", "exact"), [("reverse", reverse_kl), ("forward", forward_kl)])
@pytest.mark.parametrize("kind", [{"renormalize": "both"}, {"renormalize": "none"}, {"renormalize": "none", "outside": "tail"}], ids=str)
@pytest.mark.parametrize("k", [V, V + 3])
def test_all_ids_are_the_full_divergence(divergence, exact, kind, k, pair):
    """Padding included: an id of no token changes neither value nor gradient."""
    student, teacher = (np.append(x, -np.inf) for x in pair)

    def topk(x):
        return value(x, teacher, support_top_k=k, divergence=divergence, **kind)

    np.testing.assert_allclose(topk(jnp.asarray(student)), exact(tile(student), tile(teacher))[0], rtol=1e-12)
    np.testing.assert_allclose(
        jax.grad(topk)(jnp.asarray(student)), jax.grad(lambda x: exact(tile(x), tile(teacher))[0])(jnp.asarray(student)), atol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_one_tail_bucket_is_a_lower_bound(divergence, pair):
    full = value(*pair, support_top_k=V, divergence=divergence)
    values = [value(*pair, support_top_k=k, divergence=divergence, renormalize="none", outside="tail") for k in range(1, V + 1)]
    assert np.all(np.diff(values) >= -1e-12)
    assert 0 <= values[0] < full


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", EVERY, ids=NAMES)
def test_where_student_and_teacher_are_one(options, pair):
    """No gradient for `both` and `tail`; a stated one for `drop` (that of the kept mass) and for the floor."""
    student = jnp.asarray(pair[0])
    gradient = np.asarray(jax.grad(lambda x: value(x, student, **options))(student))
    is_fixed = options["renormalize"] == "both" or options.get("outside") == "tail"
    if is_fixed:
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
    elif options["renormalize"] == "none" and options.get("outside") is None:
        kept = topk_mass(student, options["support_top_k"])
        sign = 1 if options["divergence"] == "reverse" else -1  # forward pulls mass onto the support, reverse pushes it off
        np.testing.assert_allclose(
            gradient, sign * np.asarray(jax.grad(lambda x: topk_mass(x, options["support_top_k"]))(student)), atol=1e-12
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
    w = {"p_student": p[ids] / p[ids].sum(), "p_teacher": q[ids] / q[ids].sum(), "none": np.ones(3)}[weight]
    gradient = jax.grad(lambda x: value(x, teacher, support_top_k=3, weight=weight))(jnp.asarray(student))
    scores = np.eye(V)[ids] - p
    np.testing.assert_allclose(gradient, -(w * np.log(q[ids] / p[ids])) @ scores, atol=1e-12)


# Each system's formula written out once more, from probabilities p (student), q (teacher) inside and outside the kept ids.
SHIPPED = {
    "tunix": lambda p, q, p_rest, q_rest: np.sum(q / q.sum() * np.log(q / q.sum() / (p / p.sum()))),
    "verl": lambda p, q, p_rest, q_rest: max(np.sum(q * np.log(q / p)), 0),
    "nemo_rl": lambda p, q, p_rest, q_rest: np.sum(p / p.sum() * np.log(p / p.sum() / (q / q.sum()))),
    "nemo_rl_floor": lambda p, q, p_rest, q_rest: np.sum(p * np.log(p / (q / q.sum()))) + np.sum(p_rest * (np.log(p_rest) + 100)),
    "easydel": lambda p, q, p_rest, q_rest: np.sum(q / q.sum() * np.log(q / q.sum() / p)),
    "trl": lambda p, q, p_rest, q_rest: np.sum(p * np.log(p / q)) + p_rest.sum() * np.log(p_rest.sum() / q_rest.sum()),
    "distillkit": lambda p, q, p_rest, q_rest: (
        np.sum(p * np.log(p / q)) + np.sum(np.full(6, p_rest.sum() / 6) * np.log(p_rest.sum() / q_rest.sum()))
    ),
    "thunlp": lambda p, q, p_rest, q_rest: -np.sum(p / p.sum() * np.log(q / p) * np.log(p)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TOP_K_CONVENTIONS)
def test_a_convention_is_what_its_system_computes(name, pair):
    student, teacher = (np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in pair)
    inside = np.argsort(-(student if TOP_K_CONVENTIONS[name]["support"] == "student" else teacher))[:3]
    outside = np.setdiff1d(np.arange(V), inside)
    expected = SHIPPED[name](student[inside], teacher[inside], student[outside], teacher[outside])
    np.testing.assert_allclose(value(*pair, convention=name, support_top_k=3), expected, rtol=1e-10)


@pytest.mark.parametrize("name", TOP_K_CONVENTIONS)
def test_the_config_takes_a_convention_whole(name):
    """Spelled out it is the same; beside it no option of its row may be given."""
    assert EstimatorConfig(recipe="topk_kl", convention=name, support_top_k=3).options == {"convention": name, "support_top_k": 3}
    EstimatorConfig(recipe="topk_kl", **TOP_K_CONVENTIONS[name])
    for option, setting in TOP_K_CONVENTIONS[name].items():
        with pytest.raises(ConfigError, match=f"estimator.{option} is .* convention {name} sets it"):
            EstimatorConfig(recipe="topk_kl", convention=name, **{option: setting})
    if "divergence" not in TOP_K_CONVENTIONS[name]:
        EstimatorConfig(recipe="topk_kl", convention=name, divergence="forward")


def test_the_floor_stands_for_what_lies_outside(pair):
    with_floor, without = ({"support": "teacher", "support_top_k": 2, "renormalize": "teacher", "outside": o} for o in ("floor", "drop"))
    assert value(*pair, **with_floor) > value(*pair, **without) + 10
    forward = {"divergence": "forward"}
    np.testing.assert_allclose(value(*pair, **with_floor, **forward), value(*pair, **without, **forward), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "none", "clamp_at_zero": True}, "estimator.clamp_at_zero is True; expected false where weight is given"),
        ({"weight": "none", "divergence": "forward"}, "estimator.divergence is 'forward'; expected reverse where weight is given"),
        ({"weight": "none", "renormalize": "both"}, "estimator.renormalize is 'both'; expected none where weight is given"),
        ({"outside": "tail"}, "estimator.outside is 'tail'; expected drop where renormalize is both"),
        ({"outside": "tail", "renormalize": "teacher"}, "estimator.outside is 'tail'; expected drop where renormalize is teacher"),
        ({"divergence": "jsd"}, "estimator.divergence is 'jsd'; expected reverse or forward where the recipe is topk_kl"),
        ({"support_top_k": 0}, "estimator.support_top_k is 0; expected at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EstimatorConfig(recipe="topk_kl", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": "both"}, "no support 'both'; expected one of \\['student', 'teacher'\\]"),
        ({"renormalize": "all"}, "no renormalize 'all'"),
        ({"outside": "keep", "renormalize": "none"}, "no outside 'keep'"),
        ({"outside": "tail"}, "outside 'tail' with renormalize 'both'; expected renormalize 'none'"),
        ({"divergence": "jsd"}, "no divergence 'jsd'"),
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
    gradient = jax.grad(lambda x: value(x, teacher, support_top_k=1, renormalize="none", outside="tail"))(jnp.asarray(student))
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
                VocabTile(s), VocabTile(t), Columns(jnp.zeros(4, jnp.int32)), support_top_k=3, renormalize="none", outside="tail"
            )[0]

        losses = self.variant(jax.vmap(batched))(student, teacher)
        expected = np.stack([batched(*rows) for rows in zip(student, teacher)])
        np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-6)


def test_through_the_tiled_pass(rng):
    """The same loss and gradient whether the logits exist at once or a tile at a time."""
    hidden, kernel = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32), jnp.asarray(rng.normal(size=(V, 6)), jnp.float32)
    teacher = (jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32), Head(jnp.asarray(rng.normal(size=(V, 6)), jnp.float32)))
    columns, weights = Columns(jnp.zeros((2, 5), jnp.int32)), jnp.ones((2, 5)).at[:, 0].set(0)

    def loss(hidden, kernel, tile):
        def token_loss(s, t, row):
            return topk_kl(s, t, row, support="teacher", support_top_k=3, divergence="forward")

        return tiled_loss(token_loss, hidden, Head(kernel), weights, columns, teacher, tile=tile)[0]

    whole, tiled = (jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, tile) for tile in (10, 3))
    chex.assert_trees_all_close(whole, tiled, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_sft_is_cross_entropy_and_in_expectation_the_forward_kl(pair):
    student, teacher = (jnp.asarray(x) for x in pair)

    def expected(x):
        losses = sft(VocabTile(jnp.tile(x, (V, 1))), None, Columns(jnp.arange(V)))[0]
        return jax.nn.softmax(teacher) @ losses

    np.testing.assert_allclose(sft(tile(student), None, ROW)[0][0], -jax.nn.log_softmax(student)[2], rtol=1e-14)
    exact = jax.grad(lambda x: forward_kl(tile(x), tile(teacher))[0])(student)
    np.testing.assert_allclose(jax.grad(expected)(student), exact, atol=1e-12)
    assert RECIPES["sft"].options == ()
    assert set(TOP_K_OPTIONS) < set(RECIPES["topk_kl"].options)
