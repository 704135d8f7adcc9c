"""The bytes of everything that a run holds on a device.

The counts follow the programs as they are written (engine/update.py, ops/vocab.py,
models/decoder.py). The few factors that XLA chooses are named below; they were read from its buffer
assignments for TPU v5e and v6e. `opdjax plan --aot` compares both.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from opdjax.diagnose.plan.workload import Workload, bytes_of
from opdjax.engine.evaluate import EVALUATION_SLOTS
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig, forward
from opdjax.models.lora import combine
from opdjax.models.partitioning import SAMPLER_AXES, WEIGHT_AXES
from opdjax.ops.sharding import make_mesh
from opdjax.ops.vocab import TILE

# The update has two moments of most memory: the pass over the vocabulary, and the backward pass of
# the layers.
_SAMPLER, _UPDATE = ("prefill", "sample"), ("loss", "backward")
PHASES = (*_SAMPLER, "teacher", *_UPDATE, "evaluate")
PROGRAMS = {name: (name,) for name in (*_SAMPLER, "teacher")} | {"update": _UPDATE}
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
    # The phases whose program takes it as an argument; None: the programs make it.
    received_by: tuple[str, ...] | None = None

    def is_outside(self, phase: str) -> bool:
        """Whether it is held in a phase by others than the phase's program."""
        given = self.phases if self.received_by is None else self.received_by
        return phase in self.phases and phase not in given


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


def _permanent(workload: Workload) -> list[Item]:
    """Count what is held during the whole step."""
    config = workload.config
    split, sampled_split = WEIGHT_AXES, SAMPLER_AXES
    trained, frozen = bytes_of(workload.trained("float32", split)), bytes_of(workload.frozen)
    # Frozen parameters with the same sharding for training and sampling are one array.
    is_one = bool(frozen) and set(sampled_split) == set(split)
    sampling = (*_SAMPLER, "evaluate") if is_one else ()
    readers = (*_UPDATE, *sampling, *(("teacher",) if workload.has_reference else ()))
    items = [
        Item("student's trained parameters, float32", trained, PHASES, _UPDATE),
        Item("optimizer's two moments", 2 * trained, PHASES, _UPDATE),
        Item("student's frozen parameters", frozen, PHASES, readers),
    ]
    published, shared = workload.published, frozen if is_one else 0
    needs_head = workload.needs == "vocabulary"
    head = "embedding" if workload.scoring_model.ties_embeddings else "head"
    is_apart = config.teacher_is_student and needs_head and not is_one
    head_bytes = bytes_of(published[head]) if is_apart else 0
    readers = (*(_SAMPLER if workload.writer == "student" else ()), "evaluate")
    readers += ("teacher",) if config.teacher_is_student else ()
    rest = bytes_of(published) - shared - head_bytes
    items += [
        Item("published copy, its head", head_bytes, PHASES, (*readers, *_UPDATE)),
        Item("published copy of the student", rest, PHASES, readers),
    ]
    if workload.teacher is not None:
        role = "reference" if workload.has_reference else "teacher"
        head_bytes = bytes_of(workload.scoring[head]) if needs_head else 0
        readers = (*(_SAMPLER if workload.writer == "teacher" else ()), "teacher")
        rest = bytes_of(workload.scoring) - head_bytes
        items += [
            Item("teacher's head", head_bytes, PHASES, (*readers, *_UPDATE)),
            Item(f"{role}'s parameters", rest, PHASES, readers),
        ]
    return items


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


# Sampling and evaluation


def storage_dtype(kv_dtype: str, dtype: str) -> str:
    """Return the type in which keys and values are stored."""
    return dtype if kv_dtype == "auto" else kv_dtype


def _sampling(workload: Workload) -> list[Item]:
    """Count prefill and decoding of a step's rollouts."""
    sampling = workload.config.sampling
    if workload.writer == "none":
        return []
    model, dtype = workload.sampled_model
    length, stored = sampling.max_completion_length, storage_dtype(sampling.kv_dtype, dtype)
    sizes = (workload.slots, length, sampling.num_generations)
    tokens = (workload.slots + workload.rows) * length * 12
    return [
        *_generating(workload, _SAMPLER, (model, dtype, stored), *sizes),
        Item("sampled tokens and their log-probabilities", tokens, _SAMPLER, ("sample",)),
    ]


def _evaluating(workload: Workload) -> list[Item]:
    """Count answers to held-out prompts."""
    evaluation, dtype = workload.config.evaluation, workload.dtype
    if evaluation.source is None:
        return []
    slots = workload.config.sampling.slots or EVALUATION_SLOTS
    rows = -(-slots // workload.row_shards)
    sizes = (rows, evaluation.max_completion_length, evaluation.num_samples)
    return _generating(workload, ("evaluate",), (workload.student, dtype, dtype), *sizes)


def _generating(
    workload: Workload,
    phases: tuple[str, ...],
    source: tuple[DecoderConfig, str, str],
    rows: int,
    length: int,
    group: int,
) -> list[Item]:
    """Count `rows` rows that are decoded, and the next prompts, each shared by a group.

    `source`: the model, the type of its forward pass, and that of its stored keys and values.
    """
    (model, dtype, stored), tensor = source, workload.mesh["tensor"]
    prompt, decoding = workload.prompt_columns, phases[-1:]
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
        Item("KV cache, prompt and completion", cache, phases, decoding),
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


def _tile_bytes(workload: Workload) -> int:
    """Return the bytes of one array [tile, V] in float32."""
    tokens = min(TILE, workload.micro_rows * workload.columns)
    return tokens * workload.student.vocab_size // workload.mesh["tensor"] * 4


def _scoring(workload: Workload) -> list[Item]:
    """Count the teacher's pass."""
    if workload.needs == "none":
        return []
    mesh, model, dtype = workload.mesh, workload.scoring_model, workload.dtype
    phases, batch = ("teacher", *_UPDATE), workload.scored_batch()
    hidden, top = 0, 0
    if batch.teacher is not None:
        hidden = bytes_of(batch.teacher.hidden)
        top = bytes_of((batch.teacher.teacher_top_ids, batch.teacher.teacher_top_logprobs))
    # The embedding is freed after the lookup.
    table = _gathered_table(model, dtype, mesh, workload.scoring_split)
    layer = _forward_bytes(model, dtype, workload.micro_rows, workload.columns, mesh["tensor"])
    head, tiles = 0 if model.ties_embeddings else table, 2 * _tile_bytes(workload)
    if workload.needs == "vocabulary":  # then the update applies the head
        head = tiles = 0
    rest = bytes_of(batch) - hidden - top
    return [
        Item("batch: ids, mask, log-probabilities", rest, phases, phases),
        Item("teacher's embedding, gathered, or a layer", max(table, layer), ("teacher",)),
        Item("teacher's hidden states, whole batch", hidden, phases, phases),
        Item("teacher's most likely ids, with log-probabilities", top, phases, phases),
        Item("teacher's head, gathered", head, ("teacher",)),
        Item("vocabulary tiles of the teacher", tiles, ("teacher",)),
    ]


def _updating(workload: Workload) -> list[Item]:
    """Count loss, gradient and optimizer; the optimizer works in place."""
    config, mesh, student = workload.config, workload.mesh, workload.student
    split, dtype, teacher_head = WEIGHT_AXES, workload.dtype, 0
    trained = bytes_of(workload.trained("float32", split))
    cast = bytes_of(workload.trained(dtype, split)) if dtype != "float32" else 0
    # The head has no gradient if adapters are trained.
    table = 0 if config.lora.rank else student.vocab_size // mesh["tensor"] * student.hidden_size
    if workload.needs == "vocabulary":
        layout = (workload.dtype, mesh, workload.scoring_split)
        teacher_head = _gathered_table(workload.scoring_model, *layout)
    tiles, loss, backward = _TILES[workload.needs], ("loss",), ("backward",)
    is_summed = config.train.gradient_accumulation_steps > 1
    return [
        Item("student's parameters, cast", cast, _UPDATE),
        Item("gradient, float32", trained, _UPDATE),
        Item("activations kept for the backward pass", kept_activations(workload), _UPDATE),
        Item("student's head, gathered", _gathered_table(student, dtype, mesh, split), loss),
        Item("head's gradient, summed in float32", table * 4, loss),
        Item("teacher's head, gathered", teacher_head, loss),
        Item(f"vocabulary tiles, {tiles} of them", tiles * _tile_bytes(workload), loss),
        Item("head's gradient", table * size_of(dtype), backward),
        Item("gradient of a micro-batch", cast or trained * is_summed, backward),
        Item("a layer's activations, backward", _backward_bytes(workload), backward),
    ]


def kept_activations(workload: Workload) -> int:
    """Return the bytes that a micro-batch's forward pass keeps for the backward pass.

    JAX itself counts them, without the parameters.
    """
    model = workload.student
    plain = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    frozen, trained = plain(workload.frozen), plain(workload.trained(workload.dtype, ()))
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
