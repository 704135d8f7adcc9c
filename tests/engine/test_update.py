"""One update: its gradient does not depend on the number of micro-batches, and its optimizer is
that of the config.
"""

import dataclasses
import functools
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    MODEL,
    gradient,
    in_tiles,
    make_batch,
    make_models,
    relative_difference,
    scored,
)

from opdjax.config import EstimatorConfig, OptimizerConfig
from opdjax.config.train import OptimizerName
from opdjax.engine.scorer import score
from opdjax.engine.update import (
    UpdateSpec,
    init_state,
    learning_rate_at,
    loss_and_grad,
    make_optimizer,
    make_update,
    noise_and_signal,
    teacher_weights,
)
from opdjax.estimators.losses import AGGREGATIONS
from opdjax.models.decoder import head_of
from opdjax.ops.sharding import make_mesh, shard_rows
from opdjax.types import TeacherScores

RECIPES = [
    EstimatorConfig(recipe="opd", discount=0.5),
    EstimatorConfig(recipe="vopd"),
    EstimatorConfig(recipe="full_kl", divergence="jsd", beta=0.4),
]


def few_of(names, *kept):
    """All names; those that are not `kept` run with the long tests."""
    return [name if name in kept else pytest.param(name, marks=pytest.mark.long) for name in names]


COUPLED = {  # a token's advantage depends on other tokens, or on more than its own draw
    "batch_mean": EstimatorConfig(recipe="vopd", baseline="batch_mean"),
    "expected": EstimatorConfig(
        recipe="vopd",
        baseline="optimal",
        discount=0.7,
        return_to_go="expected",
        task_reward_coef=0.5,
        extra_draws=2,
    ),
    "prefix": EstimatorConfig(
        recipe="opd",
        importance="prefix_truncate",
        prefix_weight=0.5,
        power_alpha=0.5,
        discount=0.3,
    ),
    "exclusive": EstimatorConfig(recipe="full_kl", importance="prefix_truncate"),
}


def with_credit(batch, rng):
    """The batch with advantages of a task reward, uniforms for extra draws, and stale tokens."""
    shape = batch.tokens.shape
    advantages = jnp.where(batch.mask, rng.normal(size=(shape[0], 1)), 0)
    behavior = jnp.where(batch.mask, -np.log(MODEL.vocab_size) + 0.4 * rng.normal(size=shape), 0)
    return dataclasses.replace(
        batch,
        advantages=advantages,
        behavior_logprobs=behavior,
        uniforms=jnp.asarray(rng.random((*shape, 2))),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("estimator", "aggregation"),
    [
        *((RECIPES[1], kind) for kind in AGGREGATIONS[:2]),
        *(pytest.param(RECIPES[1], kind, marks=pytest.mark.long) for kind in AGGREGATIONS[2:]),
        *(pytest.param(e, "token_mean", marks=pytest.mark.long) for e in (RECIPES[0], RECIPES[2])),
    ],
    ids=lambda x: getattr(x, "recipe", x),
)
def test_the_gradient_does_not_depend_on_the_number_of_micro_batches(estimator, aggregation, rng):
    student, teacher = make_models(jnp.float64)
    estimator = dataclasses.replace(estimator, aggregation=aggregation)
    batch, head = scored(make_batch(rng), teacher, estimator)
    loss, whole, outputs = gradient(student, batch, head, estimator, "float64")
    parts = 8 if aggregation == "token_mean" else 2
    part_loss, cut, part_outputs = gradient(
        student, batch, head, estimator, "float64", gradient_accumulation_steps=parts
    )
    np.testing.assert_allclose(part_loss, loss, rtol=1e-12)
    assert relative_difference(whole, cut) < 1e-10
    chex.assert_trees_all_close(part_outputs, outputs, rtol=1e-10)


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_tokens_does_not_depend_on_the_number_of_micro_batches(name, rng):
    student, teacher = make_models(jnp.float64)
    estimator, batch = COUPLED[name], make_batch(rng)
    # The mean over a batch couples without credit; the program without it is that of vopd above.
    batch = batch if name == "batch_mean" else with_credit(batch, rng)
    batch, head = scored(batch, teacher, estimator)
    loss, whole, outputs = gradient(student, batch, head, estimator, "float64")
    plain = EstimatorConfig("opd" if head is None else estimator.recipe)
    _, without, _ = gradient(student, batch, head, plain, "float64")
    assert relative_difference(without, whole) > 0.01  # the options do something
    part_loss, cut, part_outputs = gradient(
        student, batch, head, estimator, "float64", gradient_accumulation_steps=2
    )
    np.testing.assert_allclose(part_loss, loss, rtol=1e-12)
    assert relative_difference(whole, cut) < 1e-10
    chex.assert_trees_all_close(part_outputs, outputs, rtol=1e-10, atol=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_tokens_is_the_same_on_eight_devices(name, rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(with_credit(make_batch(rng), rng), teacher, COUPLED[name])
    _, one, _ = gradient(student, batch, head, COUPLED[name], "float32")
    mesh = make_mesh(8)
    _, eight, _ = gradient(
        student, shard_rows(batch, mesh), head, COUPLED[name], "float32", mesh=mesh
    )
    assert relative_difference(one, eight) < 1e-5


@pytest.mark.usefixtures("x64")
def test_noise_and_signal_are_those_of_the_micro_batches_gradients(rng):
    """With the fixed denominator, a micro-batch (every fourth row) estimates the whole gradient."""
    student, teacher = make_models(jnp.float64)
    estimator = EstimatorConfig(recipe="opd", discount=0.5, aggregation="fixed_denominator")
    batch, _ = scored(make_batch(rng), teacher, estimator)
    spec = UpdateSpec(MODEL, in_tiles(estimator), "float64", 7, gradient_accumulation_steps=4)
    _, grads, _, shares = jax.jit(lambda p, b: loss_and_grad(p, b, None, spec))(student, batch)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    found = noise_and_signal(jnp.asarray(np.linalg.norm(flat(grads))), *shares)
    batch = jax.device_get(batch)
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    each = np.stack(
        [flat(gradient(student, part, None, estimator, "float64")[1]) for part in parts]
    )
    mean = each.mean(axis=0)
    np.testing.assert_allclose(flat(grads), mean, atol=1e-12)
    noise = np.sum(np.square(each - mean)) / (4 * 3)
    np.testing.assert_allclose(found["grad/noise_squared"], noise, rtol=1e-9)
    np.testing.assert_allclose(
        found["grad/signal_squared"], np.sum(np.square(mean)) - noise, rtol=1e-9
    )


def test_noise_and_signal_are_unbiased(rng):
    """Gradients g + e of three micro-batches, |g|^2 = 5 and E|e|^2 = 6: the mean has noise 2 and
    signal 5.
    """
    each = np.array([2.0, 1.0]) + np.sqrt(3) * rng.normal(size=(40_000, 3, 2))
    norm = np.linalg.norm(each.mean(axis=1), axis=1)
    squares = np.sum(np.square(each / 3), axis=(1, 2))
    found = noise_and_signal(jnp.asarray(norm), jnp.asarray(squares), 3)
    np.testing.assert_allclose(np.mean(found["grad/noise_squared"]), 2, atol=0.05)
    np.testing.assert_allclose(np.mean(found["grad/signal_squared"]), 5, atol=0.15)


@pytest.mark.parametrize(
    "estimator",
    [RECIPES[0], *(pytest.param(e, marks=pytest.mark.long) for e in RECIPES[1:])],
    ids=lambda e: e.recipe,
)
def test_eight_devices_give_the_gradient_of_one(estimator, rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(make_batch(rng), teacher, estimator)
    _, one, _ = gradient(student, batch, head, estimator, "float32")
    mesh = make_mesh(8)
    _, eight, _ = gradient(student, shard_rows(batch, mesh), head, estimator, "float32", mesh=mesh)
    assert relative_difference(one, eight) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("estimator", RECIPES, ids=lambda e: e.recipe)
def test_remat_changes_no_gradient_of_an_update(estimator, rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(make_batch(rng), teacher, estimator)
    _, plain, _ = gradient(student, batch, head, estimator, "float32")
    _, remat, _ = gradient(student, batch, head, estimator, "float32", remat="layer")
    assert relative_difference(plain, remat) < 1e-5


@pytest.mark.parametrize("needs", ["token", "vocabulary"])
def test_scoring_in_parts_changes_nothing(needs, rng):
    _, teacher = make_models(jnp.float32)
    batch = make_batch(rng)
    one, four = (
        score(teacher, head_of(teacher), batch, config=MODEL, needs=needs, tile=8, parts=parts)
        for parts in (1, 4)
    )
    chex.assert_trees_all_close(one, four, atol=1e-5)


@pytest.mark.long
def test_pmap_over_eight_devices_gives_the_gradient_of_jit_over_the_mesh(rng):
    """pmap is a wrapper of shard_map; jit over a mesh is the core because it also shards what pmap
    would replicate.
    """
    estimator = EstimatorConfig(recipe="vopd", aggregation="fixed_denominator")
    student, teacher = make_models(jnp.float32)
    batch, head = scored(make_batch(rng), teacher, estimator)
    _, core, _ = gradient(student, batch, head, estimator, "float32")
    spec = UpdateSpec(MODEL, in_tiles(estimator), "float32", max_completion_length=7)
    shards = jax.tree.map(lambda x: x.reshape(8, 1, *x.shape[1:]), batch)

    def one_row(params, row):
        _, grads, _, _ = loss_and_grad(params, row, head, spec)
        return jax.lax.pmean(grads, "rows")

    mapped = jax.pmap(one_row, axis_name="rows", in_axes=(None, 0))(student, shards)
    assert relative_difference(core, jax.tree.map(lambda x: x[0], mapped)) < 1e-5


def test_a_batch_that_is_not_finite_changes_nothing_but_the_counters(rng):
    estimator = EstimatorConfig(recipe="opd")
    student, teacher = make_models(jnp.float32)
    batch, _ = scored(make_batch(rng), teacher, estimator)
    config = OptimizerConfig(learning_rate=1e-2)
    optimizer = make_optimizer(config, 10)
    update = make_update(UpdateSpec(MODEL, in_tiles(estimator), "float32", 7), config, 10)
    poisoned = dataclasses.replace(
        batch, teacher=TeacherScores(teacher_logprobs=batch.teacher.teacher_logprobs * jnp.nan)
    )
    state = init_state(student, optimizer)
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = update(state, poisoned)
    assert not np.isfinite(metrics["loss/objective"])
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, (state.params, state.opt_state)), kept)
    assert (int(state.step), int(state.num_skipped), int(state.nonfinite_streak)) == (1, 1, 1)
    state, _ = update(state, poisoned)
    assert (int(state.num_skipped), int(state.nonfinite_streak)) == (2, 2)
    state, metrics = update(state, batch)
    assert (int(state.step), int(state.num_skipped), int(state.nonfinite_streak)) == (3, 2, 0)
    assert metrics["optimizer/learning_rate"] == pytest.approx(
        1e-2
    )  # the first step that is applied
    assert np.isfinite(metrics["loss/objective"])
    assert relative_difference(kept[0], state.params) > 0


def test_the_teachers_moving_average_follows_the_applied_updates(rng):
    """average = decay x average + (1 - decay) x weights, sharded as the weights are; a skipped
    batch changes nothing.
    """
    estimator, mesh = EstimatorConfig(recipe="full_kl"), make_mesh(2, 4, 1)
    student, teacher = make_models(jnp.float32)
    batch, head = scored(make_batch(rng), teacher, estimator)
    config = OptimizerConfig(learning_rate=1e-2, teacher_ema_decay=0.75)
    state = init_state(student, make_optimizer(config, 10), mesh)
    layout = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, teacher_weights(layout), layout.params))
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(layout.params))
    expected = jax.tree.map(np.asarray, state.params)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, teacher_weights(state)), expected)
    spec = UpdateSpec(MODEL, in_tiles(estimator), "float32", 7)
    update = make_update(spec, config, 10)
    bad = dataclasses.replace(batch.teacher, hidden=batch.teacher.hidden * jnp.nan)
    for each in (batch, dataclasses.replace(batch, teacher=bad), batch):
        state, metrics = update(state, each, head)
        if np.isfinite(metrics["loss/objective"]):
            params = jax.device_get(state.params)
            expected = jax.tree.map(lambda a, x: 0.75 * a + 0.25 * x, expected, params)
        chex.assert_trees_all_close(teacher_weights(state), expected, rtol=1e-6)
    assert int(state.num_skipped) == 1
    assert relative_difference(teacher_weights(state), state.params) > 1e-3
    plain = init_state(student, make_optimizer(OptimizerConfig(), 10))
    assert teacher_weights(plain) is plain.params


def test_a_bfloat16_forward_keeps_float32_parameters_and_small_steps(rng):
    """A step of 1e-6 on weights near 1 would vanish in bfloat16."""
    estimator = EstimatorConfig(recipe="full_kl")
    student, teacher = make_models(jnp.bfloat16)
    batch, head = scored(make_batch(rng), teacher, estimator)
    config = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    update = make_update(UpdateSpec(MODEL, in_tiles(estimator), "bfloat16", 7), config, 10)
    state, _ = update(init_state(student, make_optimizer(config, 10)), batch, head)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moved = np.abs(np.asarray(state.params["final_norm"]) - 1)
    assert moved.max() == pytest.approx(1e-6, rel=0.1)


def test_learning_rate_by_hand():
    cosine = learning_rate_at(
        OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4), 12
    )
    np.testing.assert_allclose(
        [cosine(s) for s in (0, 1, 4, 8, 12)], [0, 0.25, 1, 0.5, 0], atol=1e-6
    )
    linear = learning_rate_at(OptimizerConfig(learning_rate=1.0, schedule="linear"), 10)
    np.testing.assert_allclose([linear(s) for s in (0, 5, 10)], [1, 0.5, 0], atol=1e-6)
    constant = learning_rate_at(
        OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=2), 10
    )
    np.testing.assert_allclose([constant(s) for s in (1, 2, 9)], [0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55)])
def test_the_learning_rate_falls_to_its_minimum(schedule, middle):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=2, min_lr_ratio=0.1)
    rate = learning_rate_at(config, 12)
    found = [rate(step) for step in (0, 1, 2, 7, 12, 20)]
    np.testing.assert_allclose(found, [0, 1, 2, 2 * middle, 0.2, 0.2], atol=1e-6)


def test_weight_decay_leaves_norms_alone_and_clipping_can_be_off():
    student, _ = make_models(jnp.float32)
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.5, max_grad_norm=0.0
    )
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(np.zeros_like, jax.device_get(student))
    updates, _ = jax.jit(lambda x: optimizer.update(zeros, optimizer.init(x), x))(student)
    np.testing.assert_array_equal(updates["final_norm"], 0)
    np.testing.assert_array_equal(updates["layers"]["q_norm"], 0)
    np.testing.assert_allclose(updates["embedding"], -0.05 * student["embedding"], rtol=1e-6)
    np.testing.assert_allclose(
        updates["layers"]["q_kernel"], -0.05 * student["layers"]["q_kernel"], rtol=1e-6
    )


def stepped(config, params, grads, mesh=None):
    """Parameters after one update with each of the gradients."""
    optimizer = make_optimizer(config, 10)
    state = init_state(params, optimizer, mesh)
    params, opt_state = state.params, state.opt_state
    for grad in grads:
        updates, opt_state = jax.jit(optimizer.update)(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def wide_params(rng):
    """Two layers of a kernel with sides that Adafactor factors, an embedding and a norm."""
    shapes = {"embedding": (12, 8), "final_norm": (8,)}
    layers = {"q_kernel": (2, 128, 136), "input_norm": (2, 8)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(draw, {**shapes, "layers": layers}, is_leaf=is_shape)


# The first update for gradients of 1, by hand, in units of the learning rate. Of nadamw: the mean
# of the next step, and the gradient. adabelief divides by the root of 0.9^2, the squared difference
# of gradient and mean; rmsprop by that of 1 - 0.9, the share of a new square.
FIRST = {
    "nadamw": 0.9 * 0.1 / (1 - 0.9**2) + 1,
    "adabelief": 1.0 / 0.9,
    "adan": 1.0,
    "lion": 1.0,
    "sgd": 1.0,
    "adafactor": 1.0,
    "rmsprop": 10**0.5,
}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_update_of_each_optimizer_by_hand(name, rng):
    params = wide_params(rng)
    ones = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(0.01, "constant", name=name, weight_decay=0.5, max_grad_norm=0.0)
    found = stepped(config, params, [ones])
    moved = lambda tree: tree["layers"]["q_kernel"], lambda tree: tree["final_norm"]
    for read, decay in zip(moved, (0.5, 0.0)):
        expected = read(params) - 0.01 * (FIRST[name] + decay * read(params))
        np.testing.assert_allclose(read(found), expected, rtol=1e-3, atol=1e-5)


def test_muon_updates_the_kernel_of_each_layer_alone_and_the_rest_as_nadamw(rng):
    """Orthogonal updates: all singular values near 0.2 times the root of the longer side."""
    params = wide_params(rng)
    grads = [wide_params(rng)]
    config = OptimizerConfig(0.01, "constant", name="muon", max_grad_norm=0.0)
    found = stepped(config, params, grads)
    adam = stepped(dataclasses.replace(config, name="nadamw"), params, grads)
    for layer in range(2):
        moved = found["layers"]["q_kernel"][layer] - params["layers"]["q_kernel"][layer]
        values = np.linalg.svd(moved / (0.01 * 0.2 * 136**0.5), compute_uv=False)
        assert 0.4 < values.min() < values.max() < 1.3
        alone = optax.contrib.muon(0.01, consistent_rms=0.2)  # of x W, for W [in, out]
        grad = grads[0]["layers"]["q_kernel"][layer].T
        update, _ = alone.update({"w": grad}, alone.init({"w": grad}), {"w": grad})
        np.testing.assert_allclose(moved, update["w"].T, atol=1e-5)
    for name in ("embedding", "final_norm"):
        np.testing.assert_allclose(found[name], adam[name], rtol=1e-6)


@pytest.mark.parametrize("name", few_of(get_args(OptimizerName), "muon", "adafactor"))
def test_every_optimizer_has_a_state_on_the_mesh_and_no_other_result(name, rng):
    params, grads = wide_params(rng), [wide_params(rng), wide_params(rng)]
    config = OptimizerConfig(1e-3, "linear", min_lr_ratio=0.5, name=name, weight_decay=0.1)
    one, eight = (stepped(config, params, grads, mesh) for mesh in (None, make_mesh(2, 2, 2)))
    assert {x.dtype for x in jax.tree.leaves(one)} == {jnp.dtype("float32")}
    chex.assert_trees_all_close(one, eight, rtol=1e-4, atol=1e-6)
    assert relative_difference(params, one) > 1e-6


IMPORTANCE = EstimatorConfig(
    recipe="vopd", baseline="student_topk", support_top_k=3, importance="prefix_truncate"
)
update_of = functools.cache(make_update)  # one program for all tests of a specification


def diagnosed(student, batch, head, estimator, every, **spec):
    """(parameters, metrics) after one update."""
    config = OptimizerConfig(learning_rate=1e-2)
    spec = UpdateSpec(
        MODEL, in_tiles(estimator), "float32", 7, diagnostics_every=every, valid_vocab=9, **spec
    )
    state = init_state(student, make_optimizer(config, 10))
    state, metrics = update_of(spec, config, 10)(state, batch, head)
    return jax.device_get((state.params, metrics))


def drawn(batch):
    """Tokens that the model can sample, with log-probs of a similar policy."""
    behavior = -2 - jnp.abs(jnp.sin(jnp.arange(batch.tokens.size, dtype=jnp.float32))).reshape(
        batch.tokens.shape
    )
    return dataclasses.replace(batch, tokens=batch.tokens % 9, behavior_logprobs=behavior)


@pytest.mark.long
@pytest.mark.parametrize(
    "estimator",
    [*(pytest.param(r, marks=pytest.mark.long) for r in (RECIPES[0], RECIPES[2])), IMPORTANCE],
    ids=lambda e: e.recipe,
)
def test_diagnostics_do_not_change_an_update(estimator, rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(drawn(make_batch(rng)), teacher, estimator)
    params, metrics = diagnosed(student, batch, head, estimator, 1)
    without, fewer = diagnosed(student, batch, head, estimator, 0)
    # Two programs: XLA may fuse them differently, which moves last bits; Adam enlarges those of
    # small gradients.
    assert relative_difference(params, without) < 1e-6
    chex.assert_trees_all_close({name: metrics[name] for name in fewer}, fewer, rtol=1e-5)
    assert {"entropy/student"} <= metrics.keys() - fewer.keys()
    assert ("overlap/ratio" in metrics) == (head is not None)
    assert ("importance/clip_fraction" in metrics) == (estimator.importance is not None)
    assert all(np.isfinite(value) for name, value in metrics.items() if "position" not in name)


@pytest.mark.long
def test_diagnostics_do_not_depend_on_how_the_batch_is_cut(rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(drawn(make_batch(rng)), teacher, IMPORTANCE)
    _, metrics = diagnosed(student, batch, head, IMPORTANCE, 1)
    mesh = make_mesh(8)
    for rows, spec in (
        (batch, {"gradient_accumulation_steps": 2}),
        (shard_rows(batch, mesh), {"mesh": mesh}),
    ):
        _, found = diagnosed(student, rows, head, IMPORTANCE, 1, **spec)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_masked_slots_change_no_diagnostic(rng):
    student, teacher = make_models(jnp.float32)
    batch, head = scored(drawn(make_batch(rng)), teacher, IMPORTANCE)
    hidden = jnp.where(batch.segment_ids[:, :, None] > 0, batch.teacher.hidden, jnp.nan)
    spoilt = dataclasses.replace(
        batch,
        behavior_logprobs=jnp.where(batch.mask, batch.behavior_logprobs, jnp.nan),
        teacher=TeacherScores(hidden=hidden),
    )
    chex.assert_trees_all_equal(
        *(diagnosed(student, rows, head, IMPORTANCE, 1)[1] for rows in (batch, spoilt))
    )


def test_kl_is_exact_whenever_the_whole_teacher_is_read(rng):
    """A baseline on the student's top k does not change the KL metric."""
    student, teacher = make_models(jnp.float32)
    batch, head = scored(drawn(make_batch(rng)), teacher, RECIPES[1])
    metrics = [
        diagnosed(student, batch, head, estimator, 0)[1]["kl/student_teacher"]
        for estimator in (RECIPES[1], IMPORTANCE)
    ]
    np.testing.assert_allclose(*metrics, rtol=1e-6)


@pytest.mark.long
def test_diagnostics_are_computed_every_n_steps(rng):
    estimator = RECIPES[1]
    student, teacher = make_models(jnp.float32)
    batch, head = scored(drawn(make_batch(rng)), teacher, estimator)
    config = OptimizerConfig()
    update = make_update(
        UpdateSpec(MODEL, in_tiles(estimator), "float32", 7, diagnostics_every=2), config, 10
    )
    names = ("entropy/student", "reward/p05", "overlap/ratio", "kl/k3")
    state, is_finite = init_state(student, make_optimizer(config, 10)), []
    for _ in range(3):
        state, metrics = update(state, batch, head)
        is_finite.append([bool(np.isfinite(metrics[name])) for name in names])
    assert is_finite == [[True] * 4, [False, False, False, True], [True] * 4]
