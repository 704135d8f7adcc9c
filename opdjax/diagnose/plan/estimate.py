"""The estimate of `opdjax plan`: the bytes that a run holds on a device, and the time of a step.

The bytes follow the programs as they are written. The few factors that XLA chooses are named below;
they were read from its buffer assignments for TPU v5e and v6e. `--aot` compares both. An expert's
work is counted for its own tokens, as TPUs do it.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opdjax.diagnose.plan.workload import Workload, bytes_of
from opdjax.engine.divergence import DIVERGENCE_SLOTS, ROWS_AT_A_TIME
from opdjax.engine.evaluate import EVALUATION_SLOTS
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.engine.update import make_optimizer
from opdjax.models.decoder import DecoderConfig, forward
from opdjax.models.lora import combine
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES, shardings_of
from opdjax.ops.sharding import abstract_like, make_mesh
from opdjax.ops.vocab import TILE
from opdjax.types import TeacherScores

# The update has two moments of most memory: the vocabulary pass and the layers' backward pass.
_SAMPLER, _UPDATE = ("prefill", "sample"), ("loss", "backward")
PHASES = (*_SAMPLER, "teacher", *_UPDATE, "evaluate", "divergence", "save")
PROGRAMS = {name: (name,) for name in (*_SAMPLER, "teacher")} | {"update": _UPDATE}
# Arrays [tile, V] in float32 that exist at once in the loss, by what is read from the teacher.
_TILES = {"none": 1, "token": 1, "top_k": 1, "vocabulary": 4}
_DIVERGENCE_TILES = 3  # the same in an evaluation of the divergence; 2.3 of them on a CPU
# Arrays [rows, V] in float32 when a token is sampled: logits, weights, their running sums.
_SAMPLING_COPIES = 3


class Item(NamedTuple):
    """Something held on each device."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]  # the phases in which it is held
    received_by: tuple[str, ...] | None = None  # by these phases' programs; None: they make it


class Bound(NamedTuple):
    """The work of a program in a step, and the least time it takes if nothing is sent."""

    flops: float  # of all devices
    seconds: float
    is_by_memory: bool  # the memory bandwidth sets the time, not the arithmetic


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on a topology."""

    workload: Workload
    items: tuple[Item, ...]
    bounds: dict[str, Bound]  # by program

    @property
    def capacity(self) -> int:
        """Bytes of memory of a device."""
        return self.workload.topology.chip.hbm_bytes

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of this run."""
        evaluation = self.workload.config.evaluation
        runs = {"evaluate": evaluation.source is not None, "divergence": evaluation.measures}
        runs["save"] = self.workload.topology.backend == "cpu"  # others copy to their hosts
        return tuple(phase for phase in PHASES if runs.get(phase, True))

    def items_in(self, phase: str) -> list[Item]:
        """Return the items held in a phase."""
        return [item for item in self.items if phase in item.phases]

    def held(self, phase: str) -> int:
        """Return the bytes that a device holds in a phase."""
        return sum(item.num_bytes for item in self.items_in(phase))

    def outside_bytes(self, phase: str) -> int:
        """Return the bytes held in a phase that its program does not receive."""
        given = [item for item in self.items_in(phase) if item.received_by is not None]
        return sum(item.num_bytes for item in given if phase not in item.received_by)

    def program_bytes(self, name: str) -> int:
        """Return the most bytes of a program: its arguments and what it makes."""
        return max(self.held(phase) - self.outside_bytes(phase) for phase in PROGRAMS[name])


def estimate(workload: Workload) -> Plan:
    """Count what a run holds and computes."""
    chip, bounds, devices = workload.topology.chip, {}, workload.layout.size
    for name, (flops, traffic) in _work_of(workload).items():
        arithmetic = flops / devices / chip.peak_flops
        memory = traffic / chip.hbm_bandwidth
        bounds[name] = Bound(flops, max(arithmetic, memory), memory > arithmetic)
    items = [*_permanent(workload), *_rollouts(workload), *_scoring(workload)]
    items += [*_updating(workload), *_evaluating(workload)]
    return Plan(workload, tuple(item for item in items if item.num_bytes), bounds)


def _layer_flops(model: DecoderConfig, tokens: float, context: float) -> float:
    """Return the layers' operations; each token attends to `context` columns, masked or not. Only
    splash attention skips columns before a layer's window.
    """
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size * model.hidden_size
    mlp = 3 * (model.experts_per_token or 1) * model.intermediate_size + model.num_experts
    kernels = attention + mlp * model.hidden_size
    skips = model.attention == "splash"
    columns = sum(min(window, context) if skips else context for window in model.windows)
    scores = 4 * columns * model.num_heads * model.head_size
    return tokens * (2 * model.num_layers * kernels + scores)


def _unfused(model: DecoderConfig) -> DecoderConfig:
    """Return the model as the sampler runs it: its attention is always that of XLA."""
    return dataclasses.replace(model, attention="xla")


def _head_flops(model: DecoderConfig, tokens: float) -> float:
    return 2.0 * tokens * model.vocab_size * model.hidden_size


def _work_of(workload: Workload) -> dict[str, tuple[float, float]]:
    """Return of each program (operations of all devices, bytes that each device moves)."""
    config, student, scoring = workload.config, workload.student, workload.scoring_model
    prompt, length = workload.prompt_columns, config.sampling.max_completion_length
    completions = config.rows_per_step * length  # tokens that pass through the head
    tokens, columns = config.rows_per_step * workload.columns, workload.columns
    parts, work = config.train.gradient_accumulation_steps, dict.fromkeys(PROGRAMS, (0.0, 0.0))
    weights_of = lambda model: bytes_of(workload.params(model, workload.dtype, SAMPLER_AXES))
    if workload.writer != "none":
        model = _unfused(workload.sampled_model)
        weights = weights_of(model)
        # A prompt is read once for all of its completions.
        flops = _layer_flops(model, config.train.prompts_per_step * prompt, prompt)
        work["prefill"] = flops, -(-workload.rows * BLOCKS_PER_FILL // workload.slots) * weights
        # Every token reads the weights and the cache again; all rows reach the maximum length. With
        # fewer slots than rows the weights are read more often.
        flops = _layer_flops(model, completions, prompt + length / 2)
        shape = (workload.rows, prompt + length // 2, workload.layout.shape["tensor"])
        moved = weights * workload.rows / workload.slots
        moved += cache_bytes(model, workload.cache_dtype, *shape)
        work["sample"] = flops + _head_flops(model, completions), length * moved
    if workload.needs != "none":
        flops = _layer_flops(scoring, tokens, columns)
        flops += _head_flops(scoring, completions) * (workload.needs != "vocabulary")
        work["teacher"] = flops, parts * weights_of(scoring)
    # A forward pass, the backward pass (two forward passes, or one without gradients of kernels)
    # and, with remat `layer`, a second forward pass; what remat `dots` repeats is negligible. The
    # student's head has three products, or two if it is frozen, the teacher's head one.
    repeats, products = config.train.remat == "layer", 2 if config.lora.rank else 3
    flops = (products + repeats) * _layer_flops(student, tokens, columns)
    flops += products * _head_flops(student, completions)
    flops += _head_flops(scoring, completions) * (workload.needs == "vocabulary")
    trained = bytes_of(workload.trained("float32", WEIGHT_AXES))
    has_average = config.optimizer.teacher_ema_decay > 0
    state = (1 + has_average) * trained + _optimizer_bytes(workload)
    work["update"] = flops, 2 * state + (2 + repeats) * parts * weights_of(student)
    return work


def _permanent(workload: Workload) -> list[Item]:
    needs_head = workload.needs == "vocabulary"
    has_average = workload.config.optimizer.teacher_ema_decay > 0  # which is the teacher then
    is_own = workload.config.teacher_is_student and not has_average
    head = "embedding" if workload.scoring_model.ties_embeddings else "head"
    trained, published = bytes_of(workload.trained("float32", WEIGHT_AXES)), workload.published
    head_bytes = bytes_of(published[head]) if is_own and needs_head else 0
    frozen_readers = _UPDATE + ("teacher",) * workload.has_reference
    readers = _SAMPLER * (workload.writer == "student") + ("evaluate",) + ("teacher",) * is_own
    optimizer = _optimizer_bytes(workload)
    saved = trained * (1 + has_average) + optimizer
    items = [
        Item("student's trained parameters, float32", trained, PHASES, _UPDATE),
        Item("optimizer's state", optimizer, PHASES, _UPDATE),
        Item("student's frozen parameters", bytes_of(workload.frozen), PHASES, frozen_readers),
        Item("published copy, its head", head_bytes, PHASES, readers + _UPDATE),
        Item("published copy of the student", bytes_of(published) - head_bytes, PHASES, readers),
        Item("moving average of the student", trained * has_average, PHASES, _UPDATE),
        Item("checkpoint, a copy and its encoded form", 2 * saved, ("save",)),
    ]
    if workload.teacher is not None or has_average:
        role = "reference" if workload.has_reference else "teacher"
        head_bytes = bytes_of(workload.scoring[head]) if needs_head else 0
        readers = _SAMPLER * (workload.writer == "teacher") + ("teacher",)
        rest = bytes_of(workload.scoring) - head_bytes
        items += [
            Item("teacher's head", head_bytes, PHASES, readers + _UPDATE),
            Item(f"{role}'s parameters", rest, PHASES, readers),
        ]
    return items


def _optimizer_bytes(workload: Workload) -> int:
    """Return the bytes of the optimizer's arrays: two moments of AdamW, fewer or more of others."""
    alone = dataclasses.replace(workload.config.optimizer, teacher_ema_decay=0.0)
    optimizer = make_optimizer(alone, num_steps=1)
    state = jax.eval_shape(optimizer.init, workload.trained("float32", WEIGHT_AXES))
    state = abstract_like(state, shardings_of(state, workload.layout, WEIGHT_AXES))
    return bytes_of([leaf for leaf in jax.tree.leaves(state) if leaf.ndim])


def _muon_bytes(workload: Workload) -> int:
    """Return the bytes in which Muon makes the largest parameter orthogonal: two copies, sharded
    like it, and three products with its transpose, which are not. 0 of other optimizers.
    """
    if workload.config.optimizer.name != "muon":
        return 0
    leaves = jax.tree.leaves(workload.trained("float32", WEIGHT_AXES)["layers"])
    matrices = [leaf for leaf in leaves if leaf.ndim >= 3]
    number = lambda x: math.prod(x.shape[:-2])
    return max(2 * bytes_of(x) + 3 * 4 * number(x) * min(x.shape[-2:]) ** 2 for x in matrices)


def _gathered_table(workload: Workload, model: DecoderConfig, split_over: tuple[str, ...]) -> int:
    """Return the bytes of an embedding or head gathered along `fsdp`; 0 if it is not sharded."""
    is_sharded = workload.layout.shape["fsdp"] > 1 and "fsdp" in split_over
    rows = model.vocab_size // workload.layout.shape["tensor"] * is_sharded
    return rows * model.hidden_size * workload.itemsize


def _gathered_experts(workload: Workload, model: DecoderConfig, split_over: tuple[str, ...]) -> int:
    """Return the bytes of a layer's experts, most of its weights, gathered along `fsdp`; 0 if they
    are not sharded.
    """
    is_sharded = workload.layout.shape["fsdp"] > 1 and "fsdp" in split_over
    experts = model.num_experts // workload.layout.shape["tensor"] * is_sharded
    return 3 * experts * model.intermediate_size * model.hidden_size * workload.itemsize


def _rollouts(workload: Workload) -> list[Item]:
    """Count the rows that a step samples."""
    sampling, rows = workload.config.sampling, workload.slots
    if workload.writer == "none":
        return []
    tokens = (rows + workload.rows) * sampling.max_completion_length * 12
    held = Item("sampled tokens and their log-probabilities", tokens, _SAMPLER, _SAMPLER[-1:])
    how = (workload.sampled_model, workload.cache_dtype, rows)
    sizes = (sampling.num_generations, sampling.max_completion_length)
    return [*_generating(workload, _SAMPLER, *how, *sizes), held]


def _evaluating(workload: Workload) -> list[Item]:
    """Count the held-out rows that are decoded at a time, and those whose divergence is measured:
    each model's forward pass, then their distributions.
    """
    evaluation, given = workload.config.evaluation, workload.config.sampling.slots
    if evaluation.source is None:
        return []
    pair = (workload.student, workload.scoring_model)
    sizes = (evaluation.num_samples, evaluation.max_completion_length)
    answers = evaluation.num_prompts * evaluation.num_samples
    on_device = lambda rows: -(-min(rows, answers) // workload.row_shards)
    draws = [(workload.student, EVALUATION_SLOTS)] * evaluation.grades
    draws += [(model, DIVERGENCE_SLOTS) for model in pair] * evaluation.measures
    drawn = [
        _generating(
            workload, ("evaluate",), model, workload.dtype, on_device(given or rows), *sizes
        )
        for model, rows in draws
    ]
    items = max(drawn, key=lambda items: sum(item.num_bytes for item in items))
    if evaluation.measures:
        rows, phases = on_device(ROWS_AT_A_TIME), ("divergence",)
        columns = workload.prompt_columns + sizes[1]
        width = sum(model.hidden_size for model in pair)
        layer = max(_forward_bytes(workload, model, rows, columns) for model in pair)
        tiles = _DIVERGENCE_TILES * _tile_bytes(workload, rows * columns)
        items += [
            Item(
                "hidden states of both models", rows * columns * width * workload.itemsize, phases
            ),
            Item("a layer's activations, or vocabulary tiles", max(layer, tiles), phases),
        ]
    return items


def _generating(
    workload: Workload,
    phases: tuple[str, ...],
    model: DecoderConfig,
    stored: str,
    rows: int,
    group: int,
    length: int,
) -> list[Item]:
    """Count rows that are decoded at a time, in groups of one prompt, and the next prompts."""
    tensor, prompt, decoding = workload.layout.shape["tensor"], workload.prompt_columns, phases[-1:]
    waiting = -(-rows // (group * BLOCKS_PER_FILL))
    logits = _SAMPLING_COPIES * (rows * model.vocab_size // tensor * 4)
    cache = cache_bytes(model, stored, rows, prompt + length, tensor)
    prefix = cache_bytes(model, stored, waiting, prompt, tensor)
    # A slot may receive a prompt that another device has read, so all waiting prompts are gathered;
    # the branch that places rows writes into a copy of the cache. Both, and half a cache of chosen
    # prompts (the keys, then the values), are in the buffer assignment of `advance` for v5e.
    gathered = prefix * workload.row_shards if workload.row_shards > 1 else 0
    chosen = cache_bytes(model, stored, rows, prompt, tensor) // 2
    activations = _forward_bytes(workload, _unfused(model), waiting, prompt)
    return [
        Item("KV cache, prompt and completion", cache, phases, decoding),
        Item("KV cache of waiting prompts", prefix, phases),
        Item("KV cache, copied when rows are placed", cache, decoding),
        Item("KV cache of waiting prompts, gathered", gathered + chosen, decoding),
        Item(f"logits of the sampled tokens, {_SAMPLING_COPIES} arrays", logits, decoding),
        Item("KV cache of prompts, as it is written", prefix, phases[:1]),
        Item("a layer's activations of the prompts", activations, phases[:1]),
    ]


def cache_bytes(model: DecoderConfig, dtype: str, rows: int, columns: int, tensor: int = 1) -> int:
    """Return the bytes of keys and values of `rows` rows of `columns` columns in all layers."""
    vector = model.head_size * jnp.dtype(dtype).itemsize + 4 * (dtype == "int8")  # its scale
    return 2 * model.num_layers * rows * columns * model.num_kv_heads // tensor * vector


def _forward_bytes(workload: Workload, model: DecoderConfig, rows: int, columns: int) -> int:
    """Return the most that a layer of a forward pass holds: attention scores in float32 or the MLP,
    and the residual stream.
    """
    tensor, cells = workload.layout.shape["tensor"], rows * columns
    scores = cells * columns * (model.num_heads // tensor) * 4 * (model.attention == "xla")
    mlp = cells * _mlp_width(model, tensor) * workload.itemsize
    return max(scores, mlp) + 2 * cells * model.hidden_size * 4


def _mlp_width(model: DecoderConfig, tensor: int) -> int:
    """Return the numbers that a layer's MLP holds of a token. Experts hold those of each that it
    uses, with input and output, on all devices of `tensor`: which one has them is not known before.
    """
    if not model.num_experts:
        return 3 * (model.intermediate_size // tensor)
    return model.experts_per_token * (3 * model.intermediate_size + 2 * model.hidden_size)


def _tile_bytes(workload: Workload, tokens: int | None = None) -> int:
    """Return the bytes of one array [tile, V] in float32, of a micro-batch or of some tokens."""
    tokens = min(TILE, tokens or workload.micro_rows * workload.columns)
    return tokens * workload.student.vocab_size // workload.layout.shape["tensor"] * 4


def _scoring(workload: Workload) -> list[Item]:
    if workload.needs == "none":
        return []
    model, batch, phases = workload.scoring_model, workload.scored_batch(), ("teacher", *_UPDATE)
    scores = batch.teacher or TeacherScores()
    hidden = bytes_of(scores.hidden)
    top = bytes_of((scores.teacher_top_ids, scores.teacher_top_logprobs))
    # The embedding is freed after the lookup.
    table = _gathered_table(workload, model, workload.scoring_split)
    layer = _forward_bytes(workload, model, workload.micro_rows, workload.columns)
    experts = _gathered_experts(workload, model, workload.scoring_split)
    applies_head = workload.needs != "vocabulary"  # otherwise the update does
    head = table * (applies_head and not model.ties_embeddings)
    tiles, rest = 2 * _tile_bytes(workload) * applies_head, bytes_of(batch) - hidden - top
    return [
        Item("batch: ids, mask, log-probabilities", rest, phases, phases),
        Item("teacher's embedding, gathered, or a layer", max(table, layer), ("teacher",)),
        Item("teacher's hidden states, whole batch", hidden, phases, phases),
        Item("teacher's most likely ids, with log-probabilities", top, phases, phases),
        Item("teacher's head, gathered", head, ("teacher",)),
        Item("teacher's experts of a layer, gathered", experts, ("teacher",)),
        Item("vocabulary tiles of the teacher", tiles, ("teacher",)),
    ]


def _updating(workload: Workload) -> list[Item]:
    """Count loss, gradient and optimizer; the optimizer works in place."""
    config, student, dtype, teacher_head = workload.config, workload.student, workload.dtype, 0
    trained = bytes_of(workload.trained("float32", WEIGHT_AXES))
    cast = bytes_of(workload.trained(dtype, WEIGHT_AXES)) if dtype != "float32" else 0
    student_head = _gathered_table(workload, student, WEIGHT_AXES)
    # The head has no gradient if adapters are trained.
    table = student.vocab_size // workload.layout.shape["tensor"] * student.hidden_size
    table *= not config.lora.rank
    if workload.needs == "vocabulary":
        teacher_head = _gathered_table(workload, workload.scoring_model, workload.scoring_split)
    experts = _gathered_experts(workload, student, WEIGHT_AXES)
    tiles, loss, backward = _TILES[workload.needs], ("loss",), ("backward",)
    gradient = cast or trained * (config.train.gradient_accumulation_steps > 1)
    return [
        Item("student's parameters, cast", cast, _UPDATE),
        Item("gradient, float32", trained, _UPDATE),
        Item("activations kept for the backward pass", kept_activations(workload), _UPDATE),
        Item("student's head, gathered", student_head, loss),
        Item("head's gradient, summed in float32", table * 4, loss),
        Item("teacher's head, gathered", teacher_head, loss),
        Item(f"vocabulary tiles, {tiles} of them", tiles * _tile_bytes(workload), loss),
        Item("head's gradient", table * workload.itemsize, backward),
        Item("gradient of a micro-batch", gradient, backward),
        Item("a layer's activations, backward", _backward_bytes(workload), backward),
        Item("experts of a layer, gathered, and their gradient", 2 * experts, backward),
        Item("Muon's products of a matrix, all layers", _muon_bytes(workload), backward),
    ]


def kept_activations(workload: Workload) -> int:
    """Return the bytes that a micro-batch's forward pass keeps for the backward pass, without the
    parameters, as JAX counts them.
    """
    model = workload.student
    plain = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    frozen, trained = plain(workload.frozen), plain(workload.trained(workload.dtype, ()))
    ids = jax.ShapeDtypeStruct((workload.micro_rows, workload.columns), jnp.int32)
    # Without a mesh the decoder cannot use splash attention, which keeps far less.
    mesh = make_mesh(1) if model.attention == "splash" else None
    run = partial(forward, config=model, remat=workload.config.train.remat, mesh=mesh)

    def residuals(frozen, trained, tokens, segments):
        apply = lambda trained: run(combine(frozen, trained), tokens=tokens, segment_ids=segments)
        return jax.vjp(apply, trained)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, frozen, trained, ids, ids))
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    weights = {kind(leaf) for leaf in jax.tree.leaves((frozen, trained))}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if kind(leaf) not in weights)


def _backward_bytes(workload: Workload) -> int:
    """Return the bytes of a layer in the backward pass: scores and their cotangents in float32,
    probabilities, the MLP and its cotangents.
    """
    model, rows, columns = workload.student, workload.micro_rows, workload.columns
    tensor, size = workload.layout.shape["tensor"], workload.itemsize
    scores = rows * model.num_heads // tensor * columns * columns * (2 * 4 + size)
    width = 2 * _mlp_width(model, tensor) + 8 * model.hidden_size
    return scores * (model.attention == "xla") + rows * columns * width * size
