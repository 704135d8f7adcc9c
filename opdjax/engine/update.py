"""The training state, and the jitted `update(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from opdjax.config import OptimizerConfig
from opdjax.config.run import Config
from opdjax.config.train import AdamLike
from opdjax.engine.scorer import token_scores
from opdjax.engine.step_metrics import observed, step_metrics
from opdjax.estimators import Estimator, estimator_of, importance
from opdjax.estimators.advantage import batch_totals
from opdjax.estimators.losses import aggregation_weights, count_denominators
from opdjax.models.decoder import DecoderConfig, Params, Remat, forward, head_of
from opdjax.models.lora import combine
from opdjax.models.partitioning import constrain, shardings_of
from opdjax.ops.masked import masked_mean
from opdjax.ops.sharding import scan_parts
from opdjax.ops.tile import Head, sum_dtype
from opdjax.ops.vocab import TokenInputs, tiled_loss, tiled_stats
from opdjax.types import TeacherScores, TrainBatch

# Adam's other constants, those of its paper (arXiv 1412.6980): moments are float32, so the usual
# reason to raise epsilon does not apply.
_ADAM_B1, _ADAM_EPSILON = 0.9, 1e-8
_MUON_RMS = 0.2  # root mean square of Muon's updates, about that of AdamW's (arXiv 2502.16982)
_DECAYED = ("kernel", "embedding", "head", "lora_a", "lora_b")  # endings of the names of matrices


@struct.dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    step: Int[Array, ""]  # batches so far, including skipped ones
    params: Params  # the trained ones, float32: bfloat16 would round Adam's small steps away
    opt_state: Any
    num_skipped: Int[Array, ""]  # steps with a loss or gradient that was not finite
    nonfinite_streak: Int[Array, ""]  # the last such steps in a row


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """The settings of an update; static under jit."""

    model: DecoderConfig
    estimator: Estimator
    dtype: str  # of the forward pass
    max_completion_length: int
    gradient_accumulation_steps: int = 1
    temperature: float = 1.0  # the student is scored at the temperature it was sampled at
    valid_vocab: int | None = None
    remat: Remat = "none"
    diagnostics_every: int = 0  # steps between diagnostics of whole distributions; 0: never
    mesh: Mesh | None = None


class VocabularyInputs(NamedTuple):
    """What the tiled pass over the vocabulary reads: hidden states, head, token inputs, teacher."""

    hidden: Float[Array, "B T D"]
    head: Head
    row: TokenInputs
    teacher: tuple[Float[Array, "B T E"], Head] | None


def learning_rate_at(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then constant or down to its share at `num_steps`."""
    rest = max(num_steps - config.warmup_steps, 1)
    peak, ratio = config.learning_rate, config.min_lr_ratio
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, ratio * peak, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, ratio),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    warm_up = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warm_up, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then the optimizer of the config; norms and biases are not decayed."""
    clip = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    is_decayed = lambda path, _: path[-1].key.endswith(_DECAYED)
    mask = partial(jax.tree_util.tree_map_with_path, is_decayed)
    rate, decay, name = learning_rate_at(config, num_steps), config.weight_decay, config.name
    average = [_average_weights(config.teacher_ema_decay)] if config.teacher_ema_decay else []
    if name == "adamw":
        adam = _ADAM_B1, config.b2, _ADAM_EPSILON
        adamw = optax.adamw(rate, *adam, weight_decay=decay, mask=mask)
        return optax.chain(*clip, adamw, *average)
    make = getattr(optax, name, None) or getattr(optax.contrib, name)
    own = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(make).parameters else {}
    if name in get_args(AdamLike):
        own["b2"] = config.b2
    elif name == "adafactor":
        own["multiply_by_parameter_scale"] = False
    elif name == "muon":
        own |= {"adam_b2": config.b2, "consistent_rms": _MUON_RMS}
        own["muon_weight_dimension_numbers"] = _muon_matrices
    # AdamW's decay for all: optax's own leave it out, or do not multiply it by the learning rate.
    decayed = optax.add_decayed_weights(lambda count: -decay * rate(count), mask)
    return optax.chain(*clip, make(rate, **own), *([decayed] if decay else []), *average)


def _muon_matrices(params: Params) -> Any:
    """The axes of Muon's matrices, of each layer alone; None for what its NAdamW updates."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    is_matrix = lambda path: path[-1].key.endswith(("kernel", "lora_a", "lora_b"))
    axes_at = lambda path, _: axes if is_matrix(path) else None
    return jax.tree_util.tree_map_with_path(axes_at, params)


class AverageState(NamedTuple):
    """The part of the optimizer's state that a teacher is made of."""

    teacher_ema: Params


def _average_weights(decay: float) -> optax.GradientTransformation:
    """Keep the exponential moving average of the updated parameters; updates stay as they are."""

    def update(updates, state, params):
        add = lambda old, param, step: decay * old + (1 - decay) * (param + step)
        return updates, AverageState(jax.tree.map(add, state.teacher_ema, params, updates))

    return optax.GradientTransformation(lambda params: AverageState(params), update)


def teacher_weights(state: TrainState) -> Params:
    """The trained parameters of a teacher that is the student: their moving average if it is kept,
    else the current ones.
    """
    return optax.tree.get(state.opt_state, "teacher_ema", state.params)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step; parameters are copied to float32. On a mesh it is sharded as
    `update` returns it.
    """
    copy = lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True)

    def start(params):
        params = jax.tree.map(copy, params)
        # One array per counter: the state is donated, and a buffer can be donated only once.
        step, *skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(step, params, optimizer.init(params), *skipped)

    layout = None if mesh is None else shardings_of(jax.eval_shape(start, params), mesh)
    return jax.jit(start, out_shardings=layout)(params)


def make_update(
    spec: UpdateSpec, config: OptimizerConfig, num_steps: int, layout: TrainState | None = None
) -> Callable:
    """The jitted `update(state, batch, teacher_head=None, frozen=None) -> (state, metrics)`.

    `state` is donated. `layout`: the shardings of the state, before and after the update; None:
    they are inferred, and may then differ and need another program at the next step. `frozen`: the
    parameters that are not trained, if the state holds adapters, in the dtype of the forward pass.
    A batch whose loss or gradient is not finite is counted and leaves parameters and optimizer
    unchanged; the schedule counts applied steps only.
    """
    optimizer, schedule = make_optimizer(config, num_steps), learning_rate_at(config, num_steps)

    @partial(jax.jit, donate_argnums=0, out_shardings=None if layout is None else (layout, None))
    def update(state, batch, teacher_head=None, frozen=None):
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
        new_state = constrain(new_state, spec.mesh)
        metrics = {
            "loss/objective": loss,
            "grad/norm": norm,
            "grad/skipped_steps": new_state.num_skipped,
            "optimizer/learning_rate": schedule(state.step - state.num_skipped),
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
    skipped. `is_observed`: whether the outputs hold diagnostics; they are zeros if it is False and
    missing if it is None. Loss and gradient do not depend on it.
    """
    denominators = count_denominators(batch.mask, batch.segment_ids, spec.max_completion_length)
    kind = spec.estimator.aggregation
    weights = aggregation_weights(batch.mask, batch.segment_ids, kind, denominators)
    parts, totals = spec.gradient_accumulation_steps, None
    if parts > 1 and spec.estimator.needs_totals:
        totals = _totals(combine(frozen, params), batch, teacher_head, spec)

    def batch_loss(params: Params, part: TrainBatch, weights: Float[Array, "B T"]):
        inputs = vocabulary_inputs(combine(frozen, params), part, teacher_head, spec)
        if is_observed is not None:
            observed_tokens = jnp.broadcast_to(is_observed, part.mask.shape)
            row = dataclasses.replace(inputs.row, is_observed=observed_tokens)
            inputs = inputs._replace(row=row)
        return vocabulary_loss(inputs, part, weights, spec, totals=totals, head_grad=frozen is None)

    value_and_grad = jax.value_and_grad(batch_loss, has_aux=True)
    if parts == 1:
        (loss, outputs), grads = value_and_grad(params, batch, weights)
        return loss, grads, outputs, None

    def accumulate(carry, part):
        (loss, outputs), grads = value_and_grad(params, *part)
        grads = constrain(grads, spec.mesh)
        found = loss, grads, optax.tree.norm(grads, squared=True)
        return jax.tree.map(jnp.add, carry, found), outputs

    zero = jnp.zeros((), weights.dtype)
    start = (zero, jax.tree.map(jnp.zeros_like, params), zero)
    sums, outputs, num_visited = scan_parts(accumulate, start, (batch, weights), batch.mask, parts)
    loss, grads, squares = sums
    return loss, grads, outputs, (squares, num_visited)


def noise_and_signal(norm: Array, squares: Array, parts: int | Int[Array, ""]) -> dict[str, Array]:
    """Unbiased estimates of the variance of the batch's gradient, and of the squared norm of its
    expectation.

    With M micro-batches of gradients g_m, each an estimate of the whole gradient, and their mean g:
    noise = (sum |g_m|^2 - M |g|^2) / (M (M - 1)), signal = |g|^2 - noise. The signal of one step
    may be negative: average both over steps, then divide. `norm` is |g|, `squares` is the sum of
    |g_m / M|^2. NaN if fewer than two micro-batches held a token.

    The estimate assumes independent micro-batches. With num_generations > 1 they share prompts
    (`split_rows`): the variance between prompts counts as signal, and noise is that of the draws
    only. Unequal numbers of tokens in packed micro-batches count as noise.
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

    `token_loss` (None: the estimator's, with the outputs of diagnostics) replaces the recipe.
    """
    token_loss = token_loss or observed(spec.estimator.token_loss)
    operands = inputs.hidden, inputs.head, weights, prepared(inputs, batch, spec, totals)
    options = {"tile": spec.estimator.tile, "head_grad": head_grad, "mesh": spec.mesh}
    return tiled_loss(token_loss, *operands, inputs.teacher, **options)


def prepared(
    inputs: VocabularyInputs,
    batch: TrainBatch,
    spec: UpdateSpec,
    totals: tuple[Array, Array] | None = None,
) -> TokenInputs:
    """The token inputs, with those that couple tokens of a sequence if the options need them."""
    if not spec.estimator.is_coupled:
        return inputs.row
    stats = _stats(inputs, batch, spec)
    return spec.estimator.prepare(inputs.row, stats, batch.mask, batch.segment_ids, totals)


def vocabulary_inputs(
    params: Params, batch: TrainBatch, teacher_head: Head | None, spec: UpdateSpec
) -> VocabularyInputs:
    """Run the student's forward pass, and collect the batch's fields that a recipe may read."""
    is_wider = lambda x: x.dtype.itemsize > jnp.dtype(spec.dtype).itemsize
    params = jax.tree.map(lambda x: x.astype(spec.dtype) if is_wider(x) else x, params)
    rows = batch.tokens, batch.segment_ids
    hidden = forward(params, spec.model, *rows, remat=spec.remat, mesh=spec.mesh)
    head = head_of(params, valid_vocab=spec.valid_vocab, temperature=spec.temperature)
    scores = batch.teacher or TeacherScores()
    teacher = None if scores.hidden is None else (scores.hidden, teacher_head)
    # A field has one name in the batch, in the scores and here; `prepared` adds the others.
    read = lambda name: getattr(batch, name, getattr(scores, name, None))
    row = TokenInputs(**{field.name: read(field.name) for field in dataclasses.fields(TokenInputs)})
    return VocabularyInputs(hidden, head, row, teacher)


def _stats(
    inputs: VocabularyInputs, batch: TrainBatch, spec: UpdateSpec
) -> dict[str, Float[Array, "B T"]]:
    """The statistics that `Estimator.prepare` reads: a pass of their own, without gradient."""
    operands = *jax.lax.stop_gradient((inputs.hidden, inputs.head)), batch.mask, inputs.row
    options = {"tile": spec.estimator.tile, "mesh": spec.mesh}
    return tiled_stats(spec.estimator.token_stats, *operands, inputs.teacher, **options)


def _totals(
    params: Params, batch: TrainBatch, teacher_head: Head | None, spec: UpdateSpec
) -> tuple[Array, Array]:
    """(sum of rewards, number of tokens) of the whole batch, by one more forward pass."""

    def add_part(totals, part: TrainBatch):
        stats = _stats(vocabulary_inputs(params, part, teacher_head, spec), part, spec)
        return jax.tree.map(jnp.add, totals, batch_totals(stats["rewards"], part.mask)), None

    zero = jnp.zeros((), sum_dtype(spec.dtype))
    parts = spec.gradient_accumulation_steps
    totals, *_ = scan_parts(add_part, (zero, zero), batch, batch.mask, parts)
    return totals


def make_examine(spec: UpdateSpec, num_alternatives: int) -> Callable:
    """The jitted `examine(params, batch, teacher_head) -> outputs [B, T, ...]`, for samples.jsonl.

    The outputs of the estimator and, if the batch holds the teacher's hidden states,
    `teacher_logprobs` and the teacher's most likely `alternatives` (ids) with their
    `alternative_logprobs`.
    """

    def explained(student, teacher, row):
        loss, outputs = spec.estimator.token_loss(student, teacher, row)
        if teacher is not None:
            ids = teacher.top_k(num_alternatives)
            outputs |= {"teacher_logprobs": teacher.logprob(row.tokens)}
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
    def behavior_kl(params, batch, frozen=None) -> Float[Array, ""]:
        inputs = vocabulary_inputs(combine(frozen, params), batch, None, spec)
        options = {"tile": spec.estimator.tile, "mesh": spec.mesh}
        logprobs = token_scores(inputs.hidden, inputs.head, batch, **options).teacher_logprobs
        return masked_mean(importance.kl_to_behavior(logprobs, batch.behavior_logprobs), batch.mask)

    return behavior_kl


def spec_of(
    config: Config, model: DecoderConfig, dtype: str, valid_vocab: int | None, mesh: Mesh
) -> UpdateSpec:
    """The update settings of a run."""
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
    )


def scored_temperature(config: Config) -> float:
    """The temperature of both models in the loss, so that it is 0 for a student that equals its
    teacher: that of sampling, or 1 for given answers.
    """
    return config.sampling.temperature if config.sampling.student_samples else 1.0
