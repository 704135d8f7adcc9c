"""The student being trained, and the one jitted function that changes it: `update(state, batch) ->
(state, metrics)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.config import EstimatorConfig, OptimizerConfig
from opdjax.config.run import Config
from opdjax.engine.step_metrics import observed, step_metrics
from opdjax.estimators import Recipe, bind, coupling, importance
from opdjax.estimators.advantage import batch_totals
from opdjax.estimators.divergence import reverse_kl
from opdjax.estimators.grpo import clipping
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
    estimator: EstimatorConfig
    dtype: str  # of the forward pass
    max_completion_length: int
    gradient_accumulation_steps: int = 1
    temperature: float = 1.0  # the student is scored at the temperature it was sampled at
    valid_vocab: int | None = None
    remat: Remat = "none"
    diagnostics_every: int = (
        0  # steps between those that measure what takes whole distributions; 0: never
    )
    mesh: Mesh | None = None
    split_over: tuple[str, ...] = (
        WEIGHT_AXES  # mesh axes that the trained parameters lie split over
    )


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
    """The jitted `update(state, batch, teacher_head=None, frozen=None) -> (state, metrics)`;
    `state` is donated.

    `layout`: the shardings of the state, which it then also returns; inferred ones may differ from
    step to step, each with another program. None: inferred. `frozen`: the parameters that are not
    trained, where those of the state are adapters; read only, in the type of the forward pass. A
    batch whose loss or gradient is not finite leaves parameters and optimizer as they were, and is
    counted; the schedule counts the steps that were applied.
    """
    optimizer, learning_rate = (
        make_optimizer(config, num_steps),
        learning_rate_at(config, num_steps),
    )
    recipe, options = bind(spec.estimator.recipe, spec.estimator.options)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if layout is None else (layout, None))
    def update(
        state: TrainState,
        batch: TrainBatch,
        teacher_head: Head | None = None,
        frozen: Params | None = None,
    ):
        is_observed = state.step % spec.diagnostics_every == 0 if spec.diagnostics_every else None
        loss, grads, outputs, shares = loss_and_grad(
            state.params, batch, teacher_head, spec, recipe, options, is_observed, frozen
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
        corrected = options if recipe.reward == "none" else clipping(options)
        told = step_metrics(
            outputs,
            batch,
            is_observed,
            spec.max_completion_length,
            corrected,
            recipe.is_policy_gradient,
        )
        return new_state, metrics | told

    return update


def loss_and_grad(
    params: Params,
    batch: TrainBatch,
    teacher_head: Head | None,
    spec: UpdateSpec,
    recipe: Recipe,
    options: dict,
    is_observed: Bool[Array, ""] | None = None,
    frozen: Params | None = None,
):
    """(loss, gradient of `params`, per-token outputs [B, T], shares) of a batch; none but the last
    depends on how the batch is cut.

    `shares`: the sum of the squared norms of the micro-batches' shares of the gradient, and how
    many there were, from which `noise_and_signal` tells how much of it is chance; None where one
    micro-batch is all. Those after the last that holds a sampled token cost nothing. `is_observed`:
    whether the outputs hold diagnostics, which are zeros where it is False and missing where it is
    None; loss and gradient do not depend on it.
    """
    recipe = dataclasses.replace(recipe, token_loss=observed(recipe.token_loss))
    denominators = count_denominators(batch.mask, batch.segment_ids, spec.max_completion_length)
    weights = aggregation_weights(
        batch.mask, batch.segment_ids, spec.estimator.aggregation, denominators
    )
    parts = spec.gradient_accumulation_steps
    totals = (
        _totals(combine(frozen, params), batch, teacher_head, spec, options)
        if parts > 1 and coupling.needs_totals(options)
        else None
    )
    batch_loss = partial(
        _batch_loss,
        spec=spec,
        recipe=recipe,
        options=options,
        totals=totals,
        is_observed=is_observed,
    )
    value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
    if parts == 1:
        (loss, outputs), grads = value_and_grad(params, batch, weights, teacher_head, frozen)
        return loss, grads, outputs, None

    def accumulate(carry, part):
        (loss, outputs), grads = value_and_grad(params, *part, teacher_head, frozen)
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


def _batch_loss(
    params,
    batch: TrainBatch,
    weights,
    teacher_head,
    frozen=None,
    *,
    spec: UpdateSpec,
    recipe: Recipe,
    options: dict,
    totals=None,
    is_observed=None,
):
    hidden, head, columns, teacher = passes(combine(frozen, params), batch, teacher_head, spec)
    if is_observed is not None:
        columns = dataclasses.replace(
            columns, is_observed=jnp.broadcast_to(is_observed, batch.mask.shape)
        )
    loss = partial(
        vocabulary_loss,
        spec=spec,
        recipe=recipe,
        options=options,
        totals=totals,
        head_grad=frozen is None,
    )
    return loss(hidden, head, columns, teacher, batch, weights)


def vocabulary_loss(
    hidden,
    head: Head,
    columns: TokenInputs,
    teacher,
    batch: TrainBatch,
    weights,
    *,
    spec: UpdateSpec,
    recipe: Recipe,
    options: dict,
    totals=None,
    head_grad: bool = True,
):
    """(loss, per-token outputs) of a batch from what `passes` made of it: all of the vocabulary,
    nothing of the trunk.
    """
    columns = prepared(
        hidden,
        head,
        columns,
        teacher,
        batch,
        spec=spec,
        recipe=recipe,
        options=options,
        totals=totals,
    )
    token_loss = partial(recipe.token_loss, **options)
    return tiled_loss(
        token_loss,
        hidden,
        head,
        weights,
        columns,
        teacher,
        tile=spec.estimator.tile,
        head_grad=head_grad,
        mesh=spec.mesh,
    )


def prepared(
    hidden,
    head: Head,
    columns: TokenInputs,
    teacher,
    batch: TrainBatch,
    *,
    spec: UpdateSpec,
    recipe: Recipe,
    options: dict,
    totals=None,
) -> TokenInputs:
    """The columns with what couples the tokens of a sequence, where the options ask for it."""
    if not coupling.is_coupled(options):
        return columns
    stats = _stats(hidden, head, columns, teacher, batch, spec, options)
    coupled = partial(coupling.prepare, is_policy_gradient=recipe.is_policy_gradient, totals=totals)
    return coupled(columns, stats, batch.mask, batch.segment_ids, options)


def passes(params, batch: TrainBatch, teacher_head, spec: UpdateSpec):
    """What the tiled pass reads of a batch: hidden states, head, columns, and the teacher's hidden
    states with its head.
    """
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
    columns = TokenInputs(
        batch.tokens,
        teacher_logprob=scores.token_logprobs,
        behavior_logprob=batch.behavior_logprobs,
        advantage=batch.advantages,
        reference_logprob=batch.reference_logprobs,
        uniform=batch.uniforms,
        teacher_ids=scores.top_ids,
        teacher_top_logprob=scores.top_logprobs,
    )
    return hidden, head, columns, teacher


def _stats(
    hidden, head, columns: TokenInputs, teacher, batch: TrainBatch, spec: UpdateSpec, options: dict
) -> dict[str, Float[Array, "B T"]]:
    """What couples the tokens of a sequence is computed in a pass of its own first, without
    gradient.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    stat = partial(coupling.token_stats, options=options)
    return tiled_stats(
        stat, hidden, head, batch.mask, columns, teacher, tile=spec.estimator.tile, mesh=spec.mesh
    )


def _totals(params, batch: TrainBatch, teacher_head, spec: UpdateSpec, options: dict):
    """(sum of rewards, tokens) of the whole batch, before any micro-batch is differentiated: one
    more forward pass.
    """

    def add_part(totals, part: TrainBatch):
        stats = _stats(*passes(params, part, teacher_head, spec), part, spec, options)
        return jax.tree.map(jnp.add, totals, batch_totals(stats["reward"], part.mask)), None

    zero = jnp.zeros((), sum_dtype(spec.dtype))
    return scan_parts(add_part, (zero, zero), batch, batch.mask, spec.gradient_accumulation_steps)[
        0
    ]


def make_examine(spec: UpdateSpec, num_alternatives: int) -> Callable:
    """The jitted `examine(params, batch, teacher_head) -> outputs [B, T, ...]`: what a recipe makes
    of each token, for people.

    Beside the recipe's own outputs, where the batch holds the teacher's hidden states:
    `teacher_logprob`, `kl` (exact), and the teacher's most likely `alternatives` (ids) with their
    `alternative_logprobs`.
    """
    recipe, options = bind(spec.estimator.recipe, spec.estimator.options)

    def explained(student, teacher, row, **options):
        loss, outputs = recipe.token_loss(student, teacher, row, **options)
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
        weights = batch.mask.astype(jnp.float32)
        told = dataclasses.replace(recipe, token_loss=explained)
        return _batch_loss(
            params, batch, weights, teacher_head, spec=spec, recipe=told, options=options
        )[1]

    return examine


def make_behavior_kl(spec: UpdateSpec) -> Callable:
    """The jitted `behavior_kl(params, batch, frozen=None)`: KL(student || behaviour) on a batch's
    tokens, nats, without gradient.
    """

    @jax.jit
    def behavior_kl(
        params: Params, batch: TrainBatch, frozen: Params | None = None
    ) -> Float[Array, ""]:
        hidden, head, columns, _ = passes(
            combine(frozen, params), dataclasses.replace(batch, teacher=None), None, spec
        )
        take = lambda student, _, row: student.logprob(row.token)
        logprobs = tiled_stats(
            take, hidden, head, batch.mask, columns, tile=spec.estimator.tile, mesh=spec.mesh
        )
        return masked_mean(importance.kl_to_behavior(logprobs, batch.behavior_logprobs), batch.mask)

    return behavior_kl


def spec_of(
    config: Config, model: DecoderConfig, dtype: str, valid_vocab: int | None, mesh: Mesh
) -> UpdateSpec:
    """`update_spec` of a run of which no more is known than these."""
    return UpdateSpec(
        model=model,
        estimator=config.estimator,
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
