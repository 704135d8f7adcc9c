"""The student being trained, and the one jitted function that changes it: `update(state, batch) ->
(state, metrics)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.config import OptimizerConfig
from opdjax.config.run import Config
from opdjax.engine.step_metrics import observed, step_metrics
from opdjax.estimators import Estimator, estimator_of, importance
from opdjax.estimators.advantage import batch_totals
from opdjax.estimators.divergence import reverse_kl
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.models.decoder import DecoderConfig, Params, Remat, forward, head_of
from opdjax.models.lora import combine
from opdjax.models.partitioning import WEIGHT_AXES, constrain, shardings_of
from opdjax.ops.masked import masked_mean
from opdjax.ops.sharding import scan_parts
from opdjax.ops.tile import Head, sum_dtype
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats
from opdjax.types import TeacherScores, TrainBatch

_DECAYED = ("kernel", "embedding", "head", "lora_a", "lora_b")  # how the names of matrices end


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    step: Int[Array, ""]  # batches seen, those skipped included
    params: Params  # those that are trained, float32: bfloat16 would swallow Adam's small steps
    opt_state: Any
    num_skipped: Int[Array, ""]  # steps whose loss or gradient was not finite
    nonfinite_streak: Int[Array, ""]  # of them, those in a row up to now


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """What an update is made of; static under jit."""

    model: DecoderConfig
    estimator: Estimator
    dtype: str  # of the forward pass
    max_completion_length: int
    gradient_accumulation_steps: int = 1
    temperature: float = 1.0  # the student is scored at the temperature it was sampled at
    valid_vocab: int | None = None
    remat: Remat = "none"
    diagnostics_every: int = 0  # steps between those that observe whole distributions; 0: never
    mesh: Mesh | None = None
    split_over: tuple[str, ...] = WEIGHT_AXES  # mesh axes that shard the trained parameters


class VocabularyInputs(NamedTuple):
    """What the tiled pass over the vocabulary reads of a batch."""

    hidden: Float[Array, "B T D"]
    head: Head
    row: TokenInputs
    teacher: tuple[Float[Array, "B T E"], Head] | None


def learning_rate_at(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then constant or down to 0 at `num_steps`."""
    rest = max(num_steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warm_up = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warm_up, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; norms and biases are not decayed."""
    clip = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    adamw = optax.adamw(
        learning_rate_at(config, num_steps),
        config.b1,
        config.b2,
        config.epsilon,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )
    return optax.chain(*clip, adamw)


def _is_decayed(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.endswith(_DECAYED), params)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    split_over: tuple[str, ...] = WEIGHT_AXES,
) -> TrainState:
    """The state before the first step; the parameters are copied to float32. On a mesh it is laid
    out as `update` returns it.
    """

    def start(params):
        params = jax.tree.map(
            lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True), params
        )
        # One array a counter: the state is donated, and a buffer can be given away only once.
        counters = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(
            next(counters), params, optimizer.init(params), next(counters), next(counters)
        )

    layout = None if mesh is None else shardings_of(jax.eval_shape(start, params), mesh, split_over)
    return jax.jit(start, out_shardings=layout)(params)


def make_update(
    spec: UpdateSpec, config: OptimizerConfig, num_steps: int, layout: TrainState | None = None
) -> Callable:
    """The jitted `update(state, batch, teacher_head=None, frozen=None) -> (state, metrics)`.

    `state` is donated. `layout`: the shardings of the state, which the update returns too; None:
    inferred, which may give another program at each step. `frozen`: the parameters that are not
    trained, where those of the state are adapters; read only, in the dtype of the forward pass.
    A batch whose loss or gradient is not finite leaves parameters and optimizer unchanged and is
    counted; the schedule counts the steps that were applied.
    """
    optimizer, learning_rate = (
        make_optimizer(config, num_steps),
        learning_rate_at(config, num_steps),
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=None if layout is None else (layout, None))
    def update(
        state: TrainState,
        batch: TrainBatch,
        teacher_head: Head | None = None,
        frozen: Params | None = None,
    ):
        is_observed = state.step % spec.diagnostics_every == 0 if spec.diagnostics_every else None
        loss, grads, outputs, shares = loss_and_grad(
            state.params, batch, teacher_head, spec, is_observed, frozen
        )
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(is_finite, new, old))
        skipped = jnp.where(is_finite, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(optax.apply_updates(state.params, updates), state.params),
            opt_state=keep(opt_state, state.opt_state),
            num_skipped=state.num_skipped + skipped,
            nonfinite_streak=(state.nonfinite_streak + 1) * skipped,
        )
        new_state = constrain(new_state, spec.mesh, spec.split_over)
        metrics = {
            "loss/objective": loss,
            "grad/norm": norm,
            "grad/skipped_steps": new_state.num_skipped,
            "optimizer/learning_rate": learning_rate(state.step - state.num_skipped),
        }
        if shares is not None:
            metrics |= noise_and_signal(norm, *shares)
        return new_state, metrics | step_metrics(
            outputs, batch, is_observed, spec.max_completion_length, spec.estimator
        )

    return update


def loss_and_grad(
    params: Params,
    batch: TrainBatch,
    teacher_head: Head | None,
    spec: UpdateSpec,
    is_observed: Bool[Array, ""] | None = None,
    frozen: Params | None = None,
):
    """(loss, gradient of `params`, per-token outputs [B, T], shares) of a batch.

    Only `shares` depends on how the batch is split: the sum of the squared norms of the
    micro-batches' gradients, and the number of micro-batches, which `noise_and_signal` reads; None
    for a single micro-batch. Micro-batches after the last one that holds a sampled token are
    skipped. `is_observed`: whether the outputs hold diagnostics, which are zeros where it is False
    and missing where it is None; loss and gradient do not depend on it.
    """
    denominators = count_denominators(batch.mask, batch.segment_ids, spec.max_completion_length)
    weights = aggregation_weights(
        batch.mask, batch.segment_ids, spec.estimator.aggregation, denominators
    )
    parts, totals = spec.gradient_accumulation_steps, None
    if parts > 1 and spec.estimator.needs_totals:
        totals = _totals(combine(frozen, params), batch, teacher_head, spec)

    def batch_loss(params: Params, part: TrainBatch, weights: Float[Array, "B T"]):
        inputs = vocabulary_inputs(combine(frozen, params), part, teacher_head, spec)
        if is_observed is not None:
            observed_rows = jnp.broadcast_to(is_observed, part.mask.shape)
            row = dataclasses.replace(inputs.row, is_observed=observed_rows)
            inputs = inputs._replace(row=row)
        return vocabulary_loss(inputs, part, weights, spec, totals=totals, head_grad=frozen is None)

    value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
    if parts == 1:
        (loss, outputs), grads = value_and_grad(params, batch, weights)
        return loss, grads, outputs, None

    def accumulate(carry, part):
        (loss, outputs), grads = value_and_grad(params, *part)
        grads = constrain(grads, spec.mesh, spec.split_over)
        return jax.tree.map(
            jnp.add, carry, (loss, grads, optax.tree.norm(grads, squared=True))
        ), outputs

    zero = jnp.zeros((), weights.dtype)
    start = (zero, jax.tree.map(jnp.zeros_like, params), zero)
    (loss, grads, squares), outputs, num_visited = scan_parts(
        accumulate, start, (batch, weights), batch.mask, parts
    )
    return loss, grads, outputs, (squares, num_visited)


def noise_and_signal(norm: Array, squares: Array, parts: int | Int[Array, ""]) -> dict[str, Array]:
    """Unbiased estimates of the variance of the batch's gradient, and of the squared norm of its
    expectation.

    With M micro-batches of gradient g_m, each estimating the whole one, and their mean g: noise =
    (sum |g_m|^2 - M |g|^2) / (M (M - 1)), signal = |g|^2 - noise. A single step's signal may be
    negative: average both over steps, then divide. `norm` is |g|, `squares` the sum of |g_m / M|^2:
    no gradient is kept. The micro-batches are taken as independent. With num_generations > 1 they
    are not: `split_rows` deals neighbouring rows, which share a prompt, to different parts, so that
    the variance between prompts is common to them and counts as signal: noise is then that of the
    draws alone. Packed micro-batches hold unequal numbers of tokens and of prompts; what differs
    between them for that alone counts as noise. NaN where fewer than two held a token.
    """
    noise = jnp.where(parts > 1, (parts * squares - jnp.square(norm)) / (parts - 1), jnp.nan)
    return {"grad/noise_squared": noise, "grad/signal_squared": jnp.square(norm) - noise}


def vocabulary_loss(
    inputs: VocabularyInputs,
    batch: TrainBatch,
    weights: Float[Array, "B T"],
    spec: UpdateSpec,
    *,
    token_loss: Callable | None = None,
    totals: tuple[Array, Array] | None = None,
    head_grad: bool = True,
):
    """(loss, per-token outputs) of a batch from `vocabulary_inputs`: the pass over the vocabulary.

    `token_loss`: in place of the estimator's own with the outputs that metrics are made of.
    """
    row = prepared(inputs, batch, spec, totals)
    return tiled_loss(
        token_loss or observed(spec.estimator.token_loss),
        inputs.hidden,
        inputs.head,
        weights,
        row,
        inputs.teacher,
        tile=spec.estimator.tile,
        head_grad=head_grad,
        mesh=spec.mesh,
    )


def prepared(
    inputs: VocabularyInputs,
    batch: TrainBatch,
    spec: UpdateSpec,
    totals: tuple[Array, Array] | None = None,
) -> TokenInputs:
    """The columns, with those that couple the tokens of a sequence where the options need them."""
    if not spec.estimator.is_coupled:
        return inputs.row
    stats = _stats(inputs, batch, spec)
    return spec.estimator.prepare(inputs.row, stats, batch.mask, batch.segment_ids, totals)


def vocabulary_inputs(
    params: Params, batch: TrainBatch, teacher_head: Head | None, spec: UpdateSpec
) -> VocabularyInputs:
    """The student's forward pass, and the batch's columns beside it."""
    cast = jax.tree.map(
        lambda x: x.astype(spec.dtype) if jnp.dtype(spec.dtype).itemsize < x.dtype.itemsize else x,
        params,
    )
    hidden = forward(
        cast, spec.model, batch.tokens, batch.segment_ids, remat=spec.remat, mesh=spec.mesh
    )
    head = head_of(cast, valid_vocab=spec.valid_vocab, temperature=spec.temperature)
    scores = batch.teacher or TeacherScores()
    teacher = None if scores.hidden is None else (scores.hidden, teacher_head)
    row = TokenInputs(
        batch.tokens,
        teacher_logprob=scores.token_logprobs,
        behavior_logprob=batch.behavior_logprobs,
        advantage=batch.advantages,
        reference_logprob=batch.reference_logprobs,
        uniform=batch.uniforms,
        teacher_ids=scores.top_ids,
        teacher_top_logprob=scores.top_logprobs,
    )
    return VocabularyInputs(hidden, head, row, teacher)


def _stats(
    inputs: VocabularyInputs, batch: TrainBatch, spec: UpdateSpec
) -> dict[str, Float[Array, "B T"]]:
    """What the coupling columns are made of: a pass of its own, without gradient."""
    hidden, head = jax.lax.stop_gradient((inputs.hidden, inputs.head))
    return tiled_stats(
        spec.estimator.token_stats,
        hidden,
        head,
        batch.mask,
        inputs.row,
        inputs.teacher,
        tile=spec.estimator.tile,
        mesh=spec.mesh,
    )


def _totals(
    params: Params, batch: TrainBatch, teacher_head: Head | None, spec: UpdateSpec
) -> tuple[Array, Array]:
    """(sum of rewards, tokens) of the whole batch before any micro-batch is differentiated: one
    more forward pass.
    """

    def add_part(totals, part: TrainBatch):
        stats = _stats(vocabulary_inputs(params, part, teacher_head, spec), part, spec)
        return jax.tree.map(jnp.add, totals, batch_totals(stats["reward"], part.mask)), None

    zero = jnp.zeros((), sum_dtype(spec.dtype))
    parts = spec.gradient_accumulation_steps
    totals, *_ = scan_parts(add_part, (zero, zero), batch, batch.mask, parts)
    return totals


def make_examine(spec: UpdateSpec, num_alternatives: int) -> Callable:
    """The jitted `examine(params, batch, teacher_head) -> outputs [B, T, ...]`, for samples.jsonl.

    Beside the recipe's own outputs, where the batch holds the teacher's hidden states:
    `teacher_logprob`, `kl` (exact), and the teacher's most likely `alternatives` (ids) with their
    `alternative_logprobs`.
    """

    def explained(student, teacher, row):
        loss, outputs = spec.estimator.token_loss(student, teacher, row)
        if teacher is not None:
            ids = teacher.top_k(num_alternatives)
            outputs |= {
                "teacher_logprob": teacher.logprob(row.token),
                "kl": reverse_kl(student, teacher),
            }
            outputs |= {"alternatives": ids, "alternative_logprobs": teacher.logprob(ids)}
        return loss, outputs

    @jax.jit
    def examine(params: Params, batch: TrainBatch, teacher_head: Head | None = None):
        inputs = vocabulary_inputs(params, batch, teacher_head, spec)
        weights = batch.mask.astype(jnp.float32)
        return vocabulary_loss(inputs, batch, weights, spec, token_loss=explained)[1]

    return examine


def make_behavior_kl(spec: UpdateSpec) -> Callable:
    """The jitted `behavior_kl(params, batch, frozen=None)`: KL(student || behaviour) on a batch's
    tokens, nats, without gradient.
    """

    @jax.jit
    def behavior_kl(
        params: Params, batch: TrainBatch, frozen: Params | None = None
    ) -> Float[Array, ""]:
        untaught = dataclasses.replace(batch, teacher=None)
        inputs = vocabulary_inputs(combine(frozen, params), untaught, None, spec)
        logprobs = tiled_stats(
            lambda student, _, row: student.logprob(row.token),
            inputs.hidden,
            inputs.head,
            batch.mask,
            inputs.row,
            tile=spec.estimator.tile,
            mesh=spec.mesh,
        )
        return masked_mean(importance.kl_to_behavior(logprobs, batch.behavior_logprobs), batch.mask)

    return behavior_kl


def spec_of(
    config: Config, model: DecoderConfig, dtype: str, valid_vocab: int | None, mesh: Mesh
) -> UpdateSpec:
    """`update_spec` of a run of which no more is known than these."""
    return UpdateSpec(
        model=model,
        estimator=estimator_of(config.estimator),
        dtype=dtype,
        max_completion_length=config.sampling.max_completion_length,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        temperature=scored_temperature(config),
        valid_vocab=valid_vocab,
        remat=config.train.remat,
        diagnostics_every=config.log.diagnostics_every,
        mesh=mesh,
        split_over=config.student.split_over,
    )


def scored_temperature(config: Config) -> float:
    """Student and teacher are compared at the temperature the student was sampled at; given answers
    are scored at 1.

    Both at the same one: a student that equals its teacher has nothing to learn at any.
    """
    return config.sampling.temperature if config.sampling.completions_from == "student" else 1.0
