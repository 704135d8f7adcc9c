"""Packed rows train as padded rows do: loss, gradient and metrics agree for any number of
micro-batches, and empty micro-batches cost nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import opdjax.train
from opdjax.config import (
    Config,
    DataConfig,
    EstimatorConfig,
    EvaluationConfig,
    LogConfig,
    MeshConfig,
    SamplingConfig,
    TrainConfig,
)
from opdjax.config.validation import ConfigError
from opdjax.data.packing import pack, to_train_batch
from opdjax.diagnose.doctor import examine
from opdjax.engine.scorer import score
from opdjax.engine.step_metrics import step_metrics
from opdjax.engine.update import UpdateSpec, loss_and_grad, make_update, noise_and_signal
from opdjax.estimators.losses import AGGREGATIONS
from opdjax.models.decoder import head_of, init_params
from opdjax.ops.sharding import make_mesh, num_row_shards, scan_parts, shard_rows
from opdjax.rollouts.setup import prepare
from opdjax.runs.workdir import read_lines
from opdjax.types import PromptBatch, Rollouts

MODEL = dataclasses.replace(tiny_models.MODEL, num_layers=1)
PROMPT, ANSWER, LENGTH = 4, 6, 17  # two of the longest rollouts do not fit into a row
COUPLED = EstimatorConfig(
    "vopd",
    baseline="batch_mean",
    discount=0.7,
    prefix_weight=0.5,
    importance="sequence_mask",
    importance_cap=9.0,
    task_reward_coef=0.5,
)
EXPECTED = EstimatorConfig(
    "vopd", baseline="optimal", discount=0.7, return_to_go="expected", extra_draws=2
)
PREFIX = EstimatorConfig("full_kl", importance="prefix_truncate")
STORED = EstimatorConfig("npd", support_top_k=3, kd_weight=0.7, importance="prefix_truncate")


def make_batch(rng, dtype, rows):
    """Rollouts of many lengths with every field that a recipe may read; the teacher's prompts are
    longer.
    """
    student, teacher = rng.integers(1, PROMPT + 1, rows), rng.integers(1, PROMPT + 3, rows)
    left = lambda lengths, width: np.arange(width) >= width - lengths[:, None]
    ids = lambda mask: np.where(mask, rng.integers(0, MODEL.vocab_size, mask.shape), 0).astype(
        np.int32
    )
    before = left(student, PROMPT)
    answer = np.arange(ANSWER) < np.minimum(rng.geometric(0.4, rows), ANSWER)[:, None]
    prompts = PromptBatch(
        ids(before),
        before,
        np.arange(rows),
        ids(left(teacher, PROMPT + 2)),
        left(teacher, PROMPT + 2),
    )
    tokens = np.concatenate([prompts.tokens, ids(answer)], axis=1)
    mask = np.concatenate([before & False, answer], axis=1)
    behavior = np.where(
        mask, -np.log(MODEL.vocab_size) + 0.4 * rng.normal(size=mask.shape), 0
    ).astype(dtype)
    segments = np.concatenate([before, answer], axis=1).astype(np.int32)
    zero = np.zeros(rows, np.int32)
    batch = to_train_batch(
        Rollouts(tokens, mask, segments, behavior, behavior, zero, zero, zero, zero > 0), prompts
    )
    advantages = np.where(mask, rng.normal(size=(rows, 1)), 0).astype(dtype)
    return dataclasses.replace(
        batch, advantages=advantages, uniforms=rng.random((*mask.shape, 2)).astype(dtype)
    )


@functools.cache
def make_models(dtype):
    init = jax.jit(lambda seed: init_params(MODEL, jax.random.key(seed), dtype))
    return init(0), init(1)


def spec_of(estimator, dtype, parts, mesh=None):
    return UpdateSpec(
        MODEL,
        tiny_models.in_tiles(estimator),
        dtype,
        max_completion_length=ANSWER,
        gradient_accumulation_steps=parts,
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="spec")
def trained(params, batch, head, spec):
    """(loss, gradient, token metrics, noise and signal or None)."""
    loss, grads, outputs, shares = loss_and_grad(params, batch, head, spec, jnp.bool_(True))
    metrics = step_metrics(outputs, batch, jnp.bool_(True), ANSWER, spec.estimator)
    noise = None if shares is None else noise_and_signal(jnp.float32(1), *shares)
    return loss, grads, metrics, noise


def result(batch, estimator, dtype, parts=1, *, is_packed=False, mesh=None, is_stored=False):
    """`trained` of the batch after packing (optional), placing on the mesh, and scoring in `parts`.

    With `is_stored` the teacher's scores of the padded rows are packed and placed with the rows.
    """
    student, teacher = make_models(jnp.dtype(dtype))
    recipe = tiny_models.in_tiles(estimator)
    of_teacher = functools.partial(
        score,
        teacher,
        head_of(teacher),
        config=MODEL,
        needs=recipe.teacher,
        top_k=recipe.top_k,
        tile=8,
    )
    if is_stored:
        batch = dataclasses.replace(batch, teacher=of_teacher(batch))
    if is_packed:
        batch, _ = pack(batch, LENGTH, parts=parts, shards=num_row_shards(mesh))
    batch = batch if mesh is None else shard_rows(batch, mesh)
    if not is_stored:
        batch = dataclasses.replace(batch, teacher=of_teacher(batch, parts=parts, mesh=mesh))
    head = head_of(teacher) if recipe.teacher == "vocabulary" else None
    return trained(student, batch, head, spec_of(estimator, dtype, parts, mesh))


def assert_same_lesson(expected, found, tolerance):
    (loss, whole, metrics, _), (other_loss, other, other_metrics, _) = expected, found
    np.testing.assert_allclose(other_loss, loss, rtol=tolerance)
    left, right = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (whole, other)
    )
    assert np.linalg.norm(left - right) / np.linalg.norm(left) < tolerance
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(
            other_metrics[name], value, rtol=10 * tolerance, atol=tolerance, err_msg=name
        )


EVERY = [(False, 2), (True, 1), (True, 2), (True, 8)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("estimator", "aggregation", "forms"),
    [
        (COUPLED, "token_mean", [(True, 8)]),
        *(
            pytest.param(e, kind, EVERY, marks=pytest.mark.long)
            for e, kinds in (
                (COUPLED, AGGREGATIONS),
                (EXPECTED, AGGREGATIONS[:2]),
                (PREFIX, ("token_mean",)),
            )
            for kind in kinds
        ),
    ],
    ids=lambda x: str(getattr(x, "baseline", x)),
)
def test_packing_and_cutting_change_neither_loss_nor_gradient_nor_metrics(
    estimator, aggregation, forms, rng
):
    batch = make_batch(rng, np.float64, 8)
    estimator = dataclasses.replace(estimator, aggregation=aggregation)
    expected = result(batch, estimator, "float64")
    for is_packed, parts in forms:
        assert_same_lesson(
            expected, result(batch, estimator, "float64", parts, is_packed=is_packed), 1e-10
        )


STORED_FORMS = [
    {"parts": 2, "is_packed": True, "is_stored": True},
    {"parts": 2, "is_stored": True},
    {"parts": 2, "is_packed": True},
]


@pytest.mark.long
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_teacher_scores_are_packed_and_cut_with_the_rows(aggregation, rng):
    """The teacher's top k, stored with the padded rows or computed from the packed rows, gives the
    same loss and gradient.
    """
    batch = make_batch(rng, np.float64, 8)
    estimator = dataclasses.replace(STORED, aggregation=aggregation)
    expected = result(batch, estimator, "float64")
    for form in STORED_FORMS:
        assert_same_lesson(expected, result(batch, estimator, "float64", **form), 1e-10)


@pytest.mark.long
def test_eight_devices_train_on_stored_columns(rng):
    batch = make_batch(rng, np.float32, 64)
    sharded = result(batch, STORED, "float32", 2, is_packed=True, mesh=make_mesh(8), is_stored=True)
    assert_same_lesson(result(batch, STORED, "float32"), sharded, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("estimator", [COUPLED, EXPECTED, PREFIX], ids=lambda e: str(e.baseline))
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_eight_devices_on_packed_rows_equal_one_on_padded_rows(estimator, parts, rng):
    batch = make_batch(rng, np.float32, 64)
    expected = result(batch, estimator, "float32")
    assert_same_lesson(
        expected,
        result(batch, estimator, "float32", parts, is_packed=True, mesh=make_mesh(8)),
        1e-5,
    )


def test_one_program_visits_only_the_micro_batches_that_hold_a_token(rng):
    """Sixteen rollouts, short or long: the same compiled functions run one or three micro-batches
    of eight.
    """
    full = make_batch(rng, np.float32, 16)
    few = jax.tree.map(
        lambda x: x * (np.arange(16) < 2).reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype),
        jax.tree.map(np.asarray, full),
    )
    estimator = EstimatorConfig("opd")
    noise, programs = [], []
    for batch in (few, full):
        noise.append(
            result(batch, estimator, "float32", 8, is_packed=True)[3]["grad/noise_squared"]
        )
        programs.append((trained._cache_size(), score._cache_size()))
    assert programs[0] == programs[1]
    np.testing.assert_array_equal(
        np.isnan(noise), [True, False]
    )  # a single micro-batch gives no estimate of the noise


def test_parts_after_the_last_live_one_are_skipped():
    """Rows 0 and 3 of six rows in three parts are part 0; a token in row 4 makes it two parts."""

    @jax.jit
    def run(mask):
        return scan_parts(lambda total, part: (total + 1, 10 * part), 0, jnp.arange(6), mask, 3)

    for row, outputs in ((3, [0, 0, 0, 30, 0, 0]), (4, [0, 10, 0, 30, 40, 0]), (None, [0] * 6)):
        mask, count = np.zeros((6, 2), bool), 0 if row is None else row % 3 + 1
        mask[row if count else [], 1] = True
        total, found, visited = run(mask)
        assert (int(total), int(visited)) == (count, count)
        np.testing.assert_array_equal(found, outputs)


def run_of(pack_length, **train):
    """The mini pair; the teacher's prompts hold more than the student's."""
    return Config(
        data=DataConfig(
            "arithmetic:train[:64]", max_prompt_length=32, format="raw", teacher_format="chat"
        ),
        sampling=SamplingConfig(max_completion_length=20),
        estimator=EstimatorConfig("vopd"),
        train=TrainConfig(
            **{"num_steps": 1, "prompts_per_step": 8} | train, pack_length=pack_length
        ),
        evaluation=EvaluationConfig(source=None),
        log=LogConfig(samples_every=1),
        mesh=MeshConfig(1),
    )


@pytest.mark.long
def test_a_packed_run_learns_what_a_padded_one_does(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        opdjax.train,
        "make_update",
        lambda *arguments: made.append(make_update(*arguments)) or made[-1],
    )
    opdjax.train.train(run_of(None), tmp_path / "padded")
    opdjax.train.train(run_of(64, num_steps=2, gradient_accumulation_steps=4), tmp_path / "packed")
    assert [update._cache_size() for update in made] == [1, 1]
    (padded,), (packed, _) = (
        read_lines(tmp_path / name / "metrics.jsonl") for name in ("padded", "packed")
    )
    assert 1 < packed["perf/packed_rows"] < 8
    assert (
        0.3 < packed["perf/packing_efficiency"] < 1
    )  # of the student's columns, whose prompts are shorter
    # Schedules differ with the number of steps; seconds always differ.
    for name in (
        name for name in padded if not name.startswith(("time/", "perf/tokens_per", "optimizer/"))
    ):
        if padded[name] is None:  # no token has these positions
            assert packed[name] is None
        else:
            np.testing.assert_allclose(
                packed[name], padded[name], rtol=1e-4, atol=1e-6, err_msg=name
            )
    samples = [
        [row for row in read_lines(tmp_path / name / "samples.jsonl") if row["step"] == 1]
        for name in ("padded", "packed")
    ]
    assert samples[0] == samples[1]


@pytest.mark.long
def test_the_doctor_examines_packed_rows():
    found = {
        finding.name: finding
        for finding in examine(prepare(run_of(64, gradient_accumulation_steps=4)))
    }
    assert {name for name, finding in found.items() if finding.status == "fault"} == set()
    assert "packed rows" in found["repeated_scores"].message


def test_a_row_too_short_for_a_rollout_is_refused():
    with pytest.raises(
        ConfigError,
        match="train.pack_length is 20; expected more than sampling.max_completion_length, 20",
    ):
        run_of(20)
    with pytest.raises(
        ConfigError,
        match=r"train.pack_length is 30; expected at least \d\d: the longest prompt of "
        "arithmetic:train",
    ):
        prepare(run_of(30))
