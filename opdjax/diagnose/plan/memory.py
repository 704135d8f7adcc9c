"""The bytes of everything that a run holds on a device.

The counts follow the programs as they are written (engine/update.py, ops/vocab.py,
models/decoder.py). The few factors that XLA chooses are named below; they were read from its buffer
assignments for TPU v5e and v6e. `opdjax plan --aot` compares both.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opdjax.diagnose.plan.workload import Workload, has_advantages
from opdjax.engine.evaluate import EVALUATION_SLOTS
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig, abstract_params, forward
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES, specs_of
from opdjax.ops.sharding import make_mesh
from opdjax.ops.vocab import TILE

# The update has two moments of most memory: the pass over the vocabulary, and the backward pass of
# the layers.
PHASES = ("prefill", "sample", "teacher", "loss", "backward", "evaluate")
_UPDATE = ("loss", "backward")
PROGRAMS = {
    "prefill": ("prefill",),
    "sample": ("sample",),
    "teacher": ("teacher",),
    "update": _UPDATE,
}
# Arrays [tile, V] in float32 that exist at once in the loss, by what is read from the teacher.
_TILES = {"none": 1, "token": 1, "top_k": 1, "vocabulary": 4}
# Arrays [rows, V] in float32 when a token is sampled: logits, weights, their running sums.
_SAMPLING_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Item:
    """Something held on each device."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]  # the phases in which it is held
    is_argument: bool = False  # of the phase's program; otherwise the program makes it
    outside: tuple[str, ...] = ()  # the phases whose program does not receive it


def items_of(workload: Workload) -> tuple[Item, ...]:
    """Return everything that the run holds, in the order of the table."""
    items = [
        *_permanent(workload),
        *_sampling(workload),
        *_scoring(workload),
        *_updating(workload),
        *_evaluating(workload),
    ]
    return tuple(item for item in items if item.num_bytes)


# Parameters


def parameter_bytes(
    model: DecoderConfig,
    dtype: str,
    mesh: dict[str, int],
    split_over: tuple[str, ...],
    only: str | None = None,
) -> int:
    """Return the bytes of a model's parameters on one device, or of the parameter `only`."""
    leaves = abstract_params(model, dtype)
    return _tree_bytes(leaves if only is None else {only: leaves[only]}, dtype, mesh, split_over)


def _tree_bytes(tree: Any, dtype: str, mesh: dict[str, int], split_over: tuple[str, ...]) -> int:
    def on_device(leaf: Any, spec: Any) -> int:
        shards = math.prod(mesh[axis] for axis in spec if axis is not None)
        return leaf.size // shards * size_of(dtype)

    return sum(jax.tree.leaves(jax.tree.map(on_device, tree, specs_of(tree, split_over))))


def _adapters(workload: Workload) -> Any:
    """Return the shapes of the student's adapters; None if all of its parameters are trained."""
    lora = workload.config.lora
    return jax.eval_shape(partial(init_adapters, workload.student, lora, 0)) if lora.rank else None


def trained_bytes(workload: Workload, dtype: str, split_over: tuple[str, ...]) -> int:
    """Return the bytes on one device of what is trained: the adapters, or the whole student."""
    adapters = _adapters(workload)
    if adapters is None:
        return parameter_bytes(workload.student, dtype, workload.mesh, split_over)
    return _tree_bytes(adapters, dtype, workload.mesh, split_over)


def size_of(dtype: str) -> int:
    """Return the bytes of one element."""
    return jnp.dtype(dtype).itemsize


def _gathered_table(
    model: DecoderConfig, dtype: str, mesh: dict[str, int], split_over: tuple[str, ...]
) -> int:
    """Return the bytes of an embedding or head gathered along `fsdp`; 0 if it is not sharded."""
    if mesh["fsdp"] == 1 or "fsdp" not in split_over:
        return 0
    return model.vocab_size // mesh["tensor"] * model.hidden_size * size_of(dtype)


def _permanent(workload: Workload) -> list[Item]:
    """Count what is held during the whole step."""
    config, mesh, student = workload.config, workload.mesh, workload.student
    student_over, sampled_over = WEIGHT_AXES, SAMPLER_AXES
    has_adapters = bool(config.lora.rank)
    trained, frozen = trained_bytes(workload, "float32", student_over), 0
    published = trained_bytes(workload, workload.dtype, sampled_over)
    # Frozen parameters with the same sharding for training and sampling are one array.
    is_one = has_adapters and set(sampled_over) == set(student_over)
    if has_adapters:
        frozen = parameter_bytes(student, workload.dtype, mesh, student_over)
        published += 0 if is_one else parameter_bytes(student, workload.dtype, mesh, sampled_over)
    only_update = ("prefill", "sample", "teacher", "evaluate")
    outside = _without_frozen(workload, is_one, only_update)
    items = [
        Item("student's trained parameters, float32", trained, PHASES, True, only_update),
        Item("optimizer's two moments", 2 * trained, PHASES, True, only_update),
        Item("student's frozen parameters", frozen, PHASES, True, outside),
    ]
    is_sampled = config.sampling.completions_from == "student"
    outside = () if is_sampled else ("prefill", "sample")
    outside += () if config.teacher_is_student else ("teacher",)
    head = "embedding" if workload.scoring_model.ties_embeddings else "head"
    needs_head = workload.needs == "vocabulary"
    if config.teacher_is_student and needs_head and not is_one:
        published_head = parameter_bytes(student, workload.dtype, mesh, sampled_over, head)
        items.append(Item("published copy, its head", published_head, PHASES, True, outside))
        published -= published_head
    outside += _UPDATE
    items.append(Item("published copy of the student", published, PHASES, True, outside))
    if workload.teacher is not None:
        role = "reference" if workload.has_reference else "teacher"
        layout = (workload.teacher, workload.teacher_dtype, mesh, workload.scoring_split)
        head_bytes = parameter_bytes(*layout, head) if needs_head else 0
        rest = parameter_bytes(*layout) - head_bytes
        is_writer = config.sampling.completions_from == "teacher"
        outside = ("evaluate",) if is_writer else ("prefill", "sample", "evaluate")
        items.append(Item("teacher's head", head_bytes, PHASES, True, outside))
        items.append(Item(f"{role}'s parameters", rest, PHASES, True, (*outside, *_UPDATE)))
    return items


def _without_frozen(
    workload: Workload, is_one: bool, only_update: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the phases whose program does not receive the student's frozen parameters.

    `is_one`: training and sampling share them.
    """
    outside = ("teacher",) if is_one else only_update
    return tuple(phase for phase in outside if phase != "teacher" or not workload.has_reference)


# Sampling and evaluation


def storage_dtype(kv_dtype: str, dtype: str) -> str:
    """Return the type in which keys and values are stored."""
    return dtype if kv_dtype == "auto" else kv_dtype


def sampled_model(workload: Workload) -> tuple[DecoderConfig, str]:
    """Return the model that writes the completions, and the type of its forward pass."""
    is_student = workload.config.sampling.completions_from == "student" or workload.teacher is None
    if is_student:
        return workload.student, workload.dtype
    return workload.teacher, workload.teacher_dtype


def _sampling(workload: Workload) -> list[Item]:
    """Count prefill and decoding of a step's rollouts."""
    sampling, phases = workload.config.sampling, ("prefill", "sample")
    if sampling.completions_from == "references":
        return []
    model, dtype = sampled_model(workload)
    length = sampling.max_completion_length
    generated = _generating(
        workload,
        phases,
        model,
        dtype,
        storage_dtype(sampling.kv_dtype, dtype),
        rows=workload.slots,
        length=length,
        group=sampling.num_generations,
    )
    tokens = (workload.slots + workload.rows) * length * 12
    return [
        *generated,
        Item("sampled tokens and their log-probabilities", tokens, phases, True, ("prefill",)),
    ]


def _evaluating(workload: Workload) -> list[Item]:
    """Count answers to held-out prompts."""
    evaluation, slots = workload.config.evaluation, workload.config.sampling.slots
    if evaluation.source is None:
        return []
    return _generating(
        workload,
        ("evaluate",),
        workload.student,
        workload.dtype,
        workload.dtype,
        rows=-(-(slots or EVALUATION_SLOTS) // workload.row_shards),
        length=evaluation.max_completion_length,
        group=evaluation.num_samples,
    )


def _generating(
    workload: Workload,
    phases: tuple[str, ...],
    model: DecoderConfig,
    dtype: str,
    stored: str,
    *,
    rows: int,
    length: int,
    group: int,
) -> list[Item]:
    """Count `rows` rows that are decoded, and the next prompts, each shared by a group."""
    prompt, tensor, decoding = workload.prompt_columns, workload.mesh["tensor"], phases[-1:]
    waiting = -(-rows // (group * BLOCKS_PER_FILL))
    logits = _SAMPLING_COPIES * (rows * model.vocab_size // tensor * 4)
    cache = cache_bytes(model, stored, rows, prompt + length, tensor)
    prefix = cache_bytes(model, stored, waiting, prompt, tensor)
    # A slot may receive a prompt that another device has read, so all waiting prompts are gathered;
    # the branch that places rows writes into a copy of the cache. Both, and half a cache of chosen
    # prompts (the keys, then the values), are in the buffer assignment of `advance` for v5e.
    gathered = prefix * workload.row_shards if workload.row_shards > 1 else 0
    chosen = cache_bytes(model, stored, rows, prompt, tensor) // 2
    unfused = dataclasses.replace(model, attention="xla")  # the sampler's attention always is
    activations = _forward_bytes(unfused, dtype, waiting, prompt, tensor)
    return [
        Item("KV cache, prompt and completion", cache, phases, True, phases[:-1]),
        Item("KV cache of waiting prompts", prefix, phases),
        Item("KV cache, copied when rows are placed", cache, decoding),
        Item("KV cache of waiting prompts, gathered", gathered + chosen, decoding),
        Item(f"logits of the sampled tokens, {_SAMPLING_COPIES} arrays", logits, decoding),
        Item("KV cache of prompts, as it is written", prefix, phases[:1]),
        Item("a layer's activations of the prompts", activations, phases[:1]),
    ]


def cache_bytes(model: DecoderConfig, dtype: str, rows: int, columns: int, tensor: int = 1) -> int:
    """Return the bytes of keys and values of `rows` rows of `columns` columns in all layers.

    int8 vectors have a float32 scale each.
    """
    vector = model.head_size * size_of(dtype) + 4 * (dtype == "int8")
    return 2 * model.num_layers * rows * columns * model.num_kv_heads // tensor * vector


def _forward_bytes(model: DecoderConfig, dtype: str, rows: int, columns: int, tensor: int) -> int:
    """Return the most that one layer of a forward pass holds.

    That is the larger of the attention scores in float32 and the MLP, plus the residual stream.
    """
    heads, width = model.num_heads // tensor, model.intermediate_size // tensor
    scores = rows * heads * columns * columns * 4 if model.attention == "xla" else 0
    mlp = rows * columns * 3 * width * size_of(dtype)
    return max(scores, mlp) + 2 * rows * columns * model.hidden_size * 4


# Scoring and update


def _batch_bytes(workload: Workload) -> int:
    """Return the bytes of the batch on one device.

    Ids, segments and log-probabilities take 4 bytes a token, the mask takes 1.
    """
    config, tokens = workload.config, workload.rows * workload.columns
    wide = 2 + (config.sampling.completions_from == "student") + has_advantages(config.estimator)
    wide += config.estimator.options.get("extra_draws") or 0
    return tokens * (4 * wide + 1 + 4 * (workload.needs in ("token", "top_k")))


def _tile_bytes(workload: Workload) -> int:
    """Return the bytes of one array [tile, V] in float32."""
    tokens = min(TILE, workload.micro_rows * workload.columns)
    return tokens * workload.student.vocab_size // workload.mesh["tensor"] * 4


def _scoring(workload: Workload) -> list[Item]:
    """Count the teacher's pass."""
    if workload.needs == "none":
        return []
    mesh, model, split = workload.mesh, workload.scoring_model, workload.scoring_split
    dtype, phases = scoring_dtype(workload), ("teacher", *_UPDATE)
    # The embedding is freed after the lookup.
    table = _gathered_table(model, dtype, mesh, split)
    layer = _forward_bytes(model, dtype, workload.micro_rows, workload.columns, mesh["tensor"])
    tokens = workload.rows * workload.columns
    items = [
        Item("batch: ids, mask, log-probabilities", _batch_bytes(workload), phases, True),
        Item("teacher's embedding, gathered, or a layer", max(table, layer), ("teacher",)),
    ]
    if workload.needs == "vocabulary":
        hidden = tokens * model.hidden_size * size_of(dtype)
        return [*items, Item("teacher's hidden states, whole batch", hidden, phases, True)]
    top, name = tokens * workload.top_k * 8, "teacher's most likely ids, with log-probabilities"
    head = 0 if model.ties_embeddings else table
    return [
        *items,
        Item(name, top, phases, True),
        Item("teacher's head, gathered", head, ("teacher",)),
        Item("vocabulary tiles of the teacher", 2 * _tile_bytes(workload), ("teacher",)),
    ]


def scoring_dtype(workload: Workload) -> str:
    """Return the type of the forward pass that scores."""
    return workload.teacher_dtype if workload.teacher else workload.dtype


def _updating(workload: Workload) -> list[Item]:
    """Count loss, gradient and optimizer; the optimizer works in place."""
    config, mesh, student = workload.config, workload.mesh, workload.student
    split, parts = WEIGHT_AXES, config.train.gradient_accumulation_steps
    loss, backward = ("loss",), ("backward",)
    trained, trains_head = trained_bytes(workload, "float32", split), not config.lora.rank
    cast = trained_bytes(workload, workload.dtype, split) if workload.dtype != "float32" else 0
    table = student.vocab_size // mesh["tensor"] * student.hidden_size * trains_head
    head, teacher_head = _gathered_table(student, workload.dtype, mesh, split), 0
    if workload.needs == "vocabulary":
        layout = (scoring_dtype(workload), mesh, workload.scoring_split)
        teacher_head = _gathered_table(workload.scoring_model, *layout)
    tiles = _TILES[workload.needs]
    micro_gradient = cast if cast else trained * (parts > 1)
    return [
        Item("student's parameters, cast", cast, _UPDATE),
        Item("gradient, float32", trained, _UPDATE),
        Item("activations kept for the backward pass", kept_activations(workload), _UPDATE),
        Item("student's head, gathered", head, loss),
        Item("head's gradient, summed in float32", table * 4, loss),
        Item("teacher's head, gathered", teacher_head, loss),
        Item(f"vocabulary tiles, {tiles} of them", tiles * _tile_bytes(workload), loss),
        Item("head's gradient", table * size_of(workload.dtype), backward),
        Item("gradient of a micro-batch", micro_gradient, backward),
        Item("a layer's activations, backward", _backward_bytes(workload), backward),
    ]


def kept_activations(workload: Workload) -> int:
    """Return the bytes that a micro-batch's forward pass keeps for the backward pass.

    JAX itself counts them, without the parameters.
    """
    model, adapters = workload.student, _adapters(workload)
    whole = abstract_params(model, workload.dtype)
    frozen, trained = (None, whole) if adapters is None else (whole, adapters)
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, workload.dtype), trained)
    ids = jax.ShapeDtypeStruct((workload.micro_rows, workload.columns), jnp.int32)
    # Without a mesh the decoder cannot use splash attention, which keeps far less.
    mesh = make_mesh(1) if model.attention == "splash" else None
    run = partial(forward, config=model, remat=workload.config.train.remat, mesh=mesh)

    def residuals(frozen, trained, tokens, segment_ids):
        inputs = {"tokens": tokens, "segment_ids": segment_ids}
        return jax.vjp(lambda trained: run(combine(frozen, trained), **inputs), trained)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, frozen, trained, ids, ids))
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    weights = {kind(leaf) for leaf in jax.tree.leaves((frozen, trained))}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if kind(leaf) not in weights)


def _backward_bytes(workload: Workload) -> int:
    """Return the bytes of one layer in the backward pass.

    Scores and their cotangents are float32; then probabilities, the MLP and its cotangents.
    """
    model, rows, columns = workload.student, workload.micro_rows, workload.columns
    tensor, size = workload.mesh["tensor"], size_of(workload.dtype)
    scores = rows * model.num_heads // tensor * columns * columns * (2 * 4 + size)
    scores = scores if model.attention == "xla" else 0
    width = 6 * model.intermediate_size // tensor + 8 * model.hidden_size
    return scores + rows * columns * width * size
