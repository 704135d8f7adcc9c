"""The audit of one context: closed forms against enumeration, and properties known by proof."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opdjax.diagnose.audit.contexts import (
    audit_vocabulary,
    enumerate_draws,
    forward_gradient,
    measure,
    random_contexts,
    reverse_gradient,
)
from opdjax.diagnose.audit.subjects import DEFAULT, Subject, choose, subject
from opdjax.estimators.divergence import forward_kl, reverse_kl
from opdjax.ops.tile import VocabTile


@pytest.fixture
def tiles(x64):
    """Twelve contexts of eleven tokens, the last of which pads the vocabulary."""
    pad = lambda x: np.concatenate([x, np.full((12, 1), -np.inf)], axis=1)
    return tuple(VocabTile(jnp.asarray(pad(x))) for x in random_contexts(12, 10, 3))


def left_to_the_long_tests(each):
    """Two of the many subjects that sample no token are enough."""
    return not each.is_sampled and each.name not in (
        "full_kl divergence=jsd",
        "topk_kl convention=verl support_top_k=8",
    )


@pytest.mark.parametrize(
    "each",
    [pytest.param(s, marks=pytest.mark.long if left_to_the_long_tests(s) else ()) for s in DEFAULT],
    ids=lambda each: each.name,
)
def test_closed_forms_equal_the_loss_enumerated_over_every_token(each, tiles):
    closed, drawn = (jax.jit(partial(of, each))(*tiles, 0.3) for of in (measure, enumerate_draws))
    for name in drawn:
        np.testing.assert_allclose(closed[name], drawn[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_exact_gradients_are_those_of_autodiff(tiles):
    student, teacher = tiles
    for divergence, closed in ((reverse_kl, reverse_gradient), (forward_kl, forward_gradient)):
        found = jax.grad(lambda x, of=divergence: jnp.sum(of(VocabTile(x), teacher)))(
            student.logits
        )
        np.testing.assert_allclose(closed(student, teacher), found, atol=1e-13)


def test_the_audit_finds_what_is_known_by_proof():
    """1,000 random contexts of 50 tokens, float64."""
    names = (
        "opd",
        "vopd baseline=full",
        "vopd baseline=optimal",
        "k1_direct",
        "k3_direct",
        "topk_value_advantage",
    )
    rows = audit_vocabulary([each for each in DEFAULT if each.name in names])["rows"]
    for name in names[:3]:
        assert rows[name]["bias"]["reverse"] < 1e-12, name
    assert rows["vopd baseline=full"]["variance_ratio"] < 0.75
    assert (
        rows["vopd baseline=optimal"]["variance_ratio"]
        < rows["vopd baseline=full"]["variance_ratio"]
    )
    assert rows["vopd baseline=optimal"]["worse"] == 0
    assert rows["k3_direct"]["bias"]["forward"] < 1e-12
    assert rows["k3_direct"]["cosine"]["forward"] > 0.999
    assert rows["k3_direct"]["bias"]["reverse"] > 0.5
    for name in ("k1_direct", "topk_value_advantage"):
        assert rows[name]["bias"]["reverse"] == pytest.approx(1, abs=1e-9), name
        assert rows[name]["cosine"]["reverse"] is None, name
        assert rows[name]["variance"] > 0.1, name


def test_subjects_are_chosen_by_name_and_the_experiments_own_comes_first():
    # opd, the subject of every comparison, is always included.
    assert [each.name for each in choose(["sft"])] == ["sft", "opd"]
    assert choose(["k1_direct"]) == [Subject("k1_direct"), subject("opd")]
    own = choose(["opd"], {"reward_floor": -3.0}, "opd")[0]
    assert own.options == {"reward_floor": -3.0}
    assert own.name == "opd reward_floor=-3"
    assert own.is_own
    assert choose(None, {}, "opd") == choose(None)
    assert [each.is_own for each in choose(["sft"], {}, "opd")] == [True, False]
    # vopd without options, the first one, has this baseline.
    assert "vopd baseline=full" not in [each.name for each in choose(["vopd"], {}, "vopd")]
    for options in (
        {},
        {"divergence": "forward", "kd_weight": 0.9, "importance": "none"},
        {"kd_weight": 1.0, "support_top_k": 10},
    ):
        assert len(choose(["npd"], options, "npd")) == len(choose(["npd"]))
    assert len(choose(["npd"], {"kd_weight": 0.0}, "npd")) == len(choose(["npd"])) + 1
    with pytest.raises(ValueError, match="estimator.task_reward_coef is 0.5"):
        choose(None, {"task_reward_coef": 0.5}, "opd")
    with pytest.raises(
        ValueError, match="estimator.recipe is 'ropd'; expected one that a teacher supervises"
    ):
        choose(None, {}, "ropd")
    with pytest.raises(ValueError, match=r"cannot audit \['vodp'\]"):
        choose(["vodp"])


def test_what_a_subject_advertises():
    found = {each.name: each.advertises for each in DEFAULT}
    assert (
        found["opd"]
        == found["vopd baseline=optimal"]
        == found["full_kl divergence=reverse"]
        == found["k3_direct"]
        == "reverse"
    )
    assert found["sft"] == found["full_kl divergence=forward"] == "forward"
    assert found["opd reward_floor=-2"] == found["full_kl divergence=jsd"] == found["npd"] == "own"
    assert [subject("npd", kd_weight=weight).is_sampled for weight in (0.0, 0.9, 1.0)] == [
        True,
        True,
        False,
    ]
    assert subject("opd", discount=1.0).is_coupled
    assert not subject("vopd", baseline="batch_mean").is_coupled
