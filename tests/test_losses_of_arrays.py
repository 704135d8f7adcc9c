"""The recipes on plain arrays: what a loop of one's own calls."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import opdjax
from opdjax import losses
from opdjax.config.recipes import RECIPES

V, SHAPE = 7, (2, 5)
_RNG = np.random.default_rng(0)
STUDENT, TEACHER = (_RNG.normal(size=(*SHAPE, V)).astype(np.float32) for _ in range(2))
TOKENS = _RNG.integers(0, V, SHAPE)
MASK = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]], bool)
_LOGP, _LOGQ = map(jax.nn.log_softmax, (STUDENT, TEACHER))
_take = lambda logprobs: np.take_along_axis(np.asarray(logprobs), TOKENS[..., None], -1)[..., 0]
BEHAVIOR = _take(_LOGP) + _RNG.normal(size=SHAPE).astype(np.float32) / 3
ADVANTAGES = _RNG.normal(size=SHAPE).astype(np.float32)
REWARDED = {"advantages": ADVANTAGES, "behavior_logprobs": BEHAVIOR}


def call(name, student=STUDENT, teacher=TEACHER, tokens=TOKENS, mask=MASK, **keywords):
    """A recipe with what it needs."""
    if RECIPES[name].teacher != "none":
        return getattr(losses, name)(student, teacher, tokens, mask, **keywords)
    more = REWARDED if RECIPES[name].is_rewarded else {}
    return getattr(losses, name)(student, tokens, mask, **(more | keywords))


def by_hand():
    """The loss of each token, of the recipes whose equation is one line."""
    p, reward = np.exp(_LOGP), _take(_LOGQ) - _take(_LOGP)
    kl = (p * (_LOGP - _LOGQ)).sum(-1)
    return {
        "opd": -reward * _take(_LOGP),
        "vopd": -(reward + kl) * _take(_LOGP),
        "full_kl": kl,
        "sft": -_take(_LOGP),
    }


@pytest.mark.parametrize("name", by_hand())
def test_losses_by_hand(name):
    loss, metrics = call(name)
    np.testing.assert_allclose(loss, np.where(MASK, by_hand()[name], 0), rtol=2e-5, atol=1e-6)
    chex.assert_tree_shape_prefix(metrics, SHAPE)


@pytest.mark.parametrize("name", RECIPES)
def test_garbage_outside_of_the_mask_changes_neither_value_nor_gradient(name):
    @jax.jit
    @jax.value_and_grad
    def total(student, teacher):
        return call(name, student, teacher)[0].sum()

    garbage = [np.where(MASK[..., None], x, np.nan) for x in (STUDENT, TEACHER)]
    value, gradient = jax.device_get(total(STUDENT, TEACHER))
    chex.assert_trees_all_equal((value, gradient), jax.device_get(total(*garbage)))
    assert np.abs(gradient).sum() > 0
    assert np.abs(gradient[~MASK]).sum() == 0


@pytest.mark.parametrize("name", RECIPES)
def test_jit_vmap_and_forward_mode_agree(name):
    """Of all recipes without jit too."""
    plain = call(name)
    chex.assert_trees_all_close(jax.jit(lambda x: call(name, x))(STUDENT), plain, rtol=1e-5)
    columns = REWARDED if RECIPES[name].is_rewarded else {}

    def row(student, teacher, tokens, mask, columns):
        return call(name, student, teacher, tokens, mask, **columns)

    mapped = jax.jit(jax.vmap(row))(STUDENT, TEACHER, TOKENS, MASK, columns)
    chex.assert_trees_all_close(mapped, plain, rtol=1e-5)
    total = lambda x: call(name, x)[0].sum()
    direction = (np.ones_like(STUDENT) * np.arange(V)).astype(np.float32)

    @jax.jit
    def derivatives(student):
        return jax.jvp(total, (student,), (direction,))[1], jax.grad(total)(student)

    along, gradient = jax.device_get(derivatives(STUDENT))
    np.testing.assert_allclose(along, np.vdot(gradient, direction), rtol=1e-4)


@pytest.mark.parametrize("name", ["opd", "full_kl", "topk_kl", "grpo"])
def test_bfloat16_logits_are_summed_in_float32(name):
    low = [jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER)]
    loss, _ = call(name, *low)
    assert loss.dtype == jnp.float32
    chex.assert_trees_all_close(loss, call(name, *(x.astype(jnp.float32) for x in low))[0])


def test_no_gradient_reaches_the_teacher():
    gradient = jax.grad(lambda x: call("full_kl", STUDENT, x)[0].sum())(TEACHER)
    assert not np.asarray(gradient).any()


def test_a_teacher_may_be_known_by_its_log_probs_alone():
    plain, _ = call("opd")
    loss, _ = losses.opd(STUDENT, None, TOKENS, MASK, teacher_logprobs=_take(_LOGQ))
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    ids = np.argsort(-TEACHER)[..., :3]
    kept = np.take_along_axis(np.asarray(_LOGQ), ids, -1)
    stored = {"teacher_top_ids": ids, "teacher_top_logprobs": kept, "support_top_k": 3}
    loss, _ = losses.npd(STUDENT, None, TOKENS, MASK, **stored)
    np.testing.assert_allclose(loss, call("npd", support_top_k=3)[0], rtol=1e-5)


def test_options_that_couple_tokens_read_the_whole_sequence():
    loss, _ = call("opd", discount=1.0)
    reward = np.where(MASK, _take(_LOGQ) - _take(_LOGP), 0)
    togo = np.flip(np.cumsum(np.flip(reward, 1), 1), 1)
    np.testing.assert_allclose(loss, np.where(MASK, -togo * _take(_LOGP), 0), rtol=1e-4, atol=1e-5)
    segments = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    packed, _ = call("opd", discount=1.0, segment_ids=segments)
    assert not np.allclose(packed[0], loss[0])
    np.testing.assert_allclose(packed[1], loss[1], rtol=1e-5)


def test_aggregate_makes_one_number():
    loss, _ = call("full_kl")
    np.testing.assert_allclose(losses.aggregate(loss, MASK), loss.sum() / MASK.sum(), rtol=1e-6)
    fixed = losses.aggregate(loss, MASK, "fixed_denominator", max_length=8)
    np.testing.assert_allclose(fixed, loss.sum() / 16, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": STUDENT[0, 0]}, r"student_logits has shape \(7,\)"),
        ({"student": STUDENT.astype(int)}, "expected .* a floating dtype"),
        ({"teacher": TEACHER[..., :6]}, r"teacher_logits has shape \(2, 5, 6\).*cut both"),
        ({"teacher": None}, "vopd reads teacher_logits"),
        ({"tokens": TOKENS + V}, r"tokens holds the id \d+; expected ids from 0 to 6"),
        ({"tokens": TOKENS[:, :4]}, r"tokens has shape \(2, 4\)"),
        ({"mask": MASK.astype(np.float32)}, "mask has .*float32; expected .* bool"),
        ({"advantages": ADVANTAGES}, "would not read advantages under these options"),
        ({"behavior_logprobs": BEHAVIOR}, "would not read behavior_logprobs"),
        ({"importance": "token_mask"}, "vopd reads behavior_logprobs under these options"),
        ({"importance": "token_mask", "behavior_logprobs": BEHAVIOR[0]}, "has shape .5,."),
        ({"beta": 2.0}, "recipe 'vopd' has no option 'beta'"),
        ({"baseline": "zero"}, "estimator.baseline is 'zero'; expected full or student_topk"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call("vopd", **change)
    with pytest.raises(ValueError, match="estimator.beta is 2.0; expected from 0 to 1"):
        call("full_kl", divergence="jsd", beta=2.0)
    with pytest.raises(ValueError, match="grpo does not take 'advantage' here"):
        call("grpo", advantage="mean_std")


def test_the_package_offers_its_names_lazily():
    assert opdjax.losses is losses
    assert opdjax.Config is opdjax.config.Config
    assert {"load", "sample", "score", "train", "losses", "EstimatorConfig"} <= set(dir(opdjax))
    with pytest.raises(AttributeError, match="opdjax has no 'trainer'; it has ApiConfig"):
        _ = opdjax.trainer
