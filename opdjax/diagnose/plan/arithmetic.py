"""What a run takes, by counting: bytes a device of everything that is held, floating-point
operations, a lower bound of the time.

The counts follow the programs as they are written (train_state.py, ops/vocab.py,
models/decoder.py); the few factors that are XLA's choice are named below and were read from its
buffer assignments for TPU v5e and v6e. `opdjax plan --aot` compares the two.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from opdjax.diagnose.plan.workload import Workload, has_advantages
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig, abstract_params, forward
from opdjax.models.lora import combine, init_adapters
from opdjax.models.partitioning import specs_of
from opdjax.ops.sharding import make_mesh

# The update is looked at in the two moments when it may hold most: the pass over the vocabulary,
# and the backward pass of the layers.
PHASES = ("prefill", "sample", "teacher", "loss", "backward", "evaluate")
PROGRAMS = {
    "prefill": ("prefill",),
    "sample": ("sample",),
    "teacher": ("teacher",),
    "update": ("loss", "backward"),
}
_UPDATE = PROGRAMS["update"]
# Arrays [tile, V] in float32 that stand at once in the loss: of the student alone, and where the
# teacher's distribution is read too.
_TILES = {"none": 1, "token": 1, "top_k": 1, "vocabulary": 4}
# Arrays [rows, V] in float32 when a token is drawn: logits, weights, their running sums.
_DRAW_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Item:
    """Something held on each device."""

    name: str
    num_bytes: int
    phases: tuple[str, ...]  # in which it is held
    is_argument: bool = False  # of the phase's program, not something made on the way
    outside: tuple[str, ...] = ()  # of the phases, those whose program is not given it


@dataclasses.dataclass(frozen=True)
class Bound:
    """The work of a phase, a step, and the least time it can take: every device at its peak,
    nothing sent.
    """

    flops: float  # of all devices
    traffic: float  # bytes that each device must read or write
    seconds: float
    is_by_memory: bool  # the bandwidth of the memory sets it, not the arithmetic


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on a topology."""

    workload: Workload
    items: tuple[Item, ...]
    bounds: dict[str, Bound]

    @property
    def capacity(self) -> int:
        """Bytes that a device offers."""
        return self.workload.topology.chip.hbm_bytes

    def held(self, phase: str) -> int:
        """Bytes that a device holds in a phase."""
        return sum(item.num_bytes for item in self.items if phase in item.phases)

    def of_program(self, name: str) -> int:
        """Bytes of a program of the step when it holds most: its arguments and what it makes on the
        way.
        """
        return max(self.held(phase) - self.beside(phase) for phase in PROGRAMS[name])

    def beside(self, phase: str) -> int:
        """Bytes that a device holds in a phase without its program being given them."""
        return sum(
            item.num_bytes for item in self.items if phase in item.phases and phase in item.outside
        )

    @property
    def phases(self) -> tuple[str, ...]:
        """Those that the run has."""
        return tuple(
            phase
            for phase in PHASES
            if phase != "evaluate" or self.workload.config.evaluation.source is not None
        )

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return all(self.held(phase) <= self.capacity for phase in self.phases)

    def first_over(self, phase: str) -> Item | None:
        """The first item, in the order of the table, that does not fit beside those before it."""
        total = 0
        for item in self.items:
            total += item.num_bytes if phase in item.phases else 0
            if total > self.capacity:
                return item
        return None

    def largest(self, phase: str) -> Item:
        """The item of a phase that takes most."""
        return max(
            (item for item in self.items if phase in item.phases), key=lambda item: item.num_bytes
        )


def foresee(workload: Workload) -> Plan:
    """Count everything that a run holds and does."""
    items = [
        *_standing(workload),
        *_sampling(workload),
        *_scoring(workload),
        *_updating(workload),
        *_evaluating(workload),
    ]
    bounds = {
        "prefill": _prefill_bound(workload),
        "sample": _sample_bound(workload),
        "teacher": _teacher_bound(workload),
        "update": _update_bound(workload),
    }
    return Plan(workload, tuple(item for item in items if item.num_bytes), bounds)


def parameter_bytes(
    model: DecoderConfig,
    dtype: str,
    mesh: dict[str, int],
    split_over: tuple[str, ...],
    only: str | None = None,
) -> int:
    """Bytes of a model's parameters on one device, or of the one called `only`."""
    leaves = abstract_params(model, dtype)
    return _tree_bytes(leaves if only is None else {only: leaves[only]}, dtype, mesh, split_over)


def _tree_bytes(tree: Any, dtype: str, mesh: dict[str, int], split_over: tuple[str, ...]) -> int:
    def on_device(leaf: Any, spec: Any) -> int:
        return (
            leaf.size // math.prod(mesh[axis] for axis in spec if axis is not None) * _size(dtype)
        )

    return sum(jax.tree.leaves(jax.tree.map(on_device, tree, specs_of(tree, split_over))))


def _adapters(workload: Workload) -> Any:
    """Shapes of the student's adapters; None where all of its parameters are trained."""
    lora = workload.config.lora
    return jax.eval_shape(partial(init_adapters, workload.student, lora, 0)) if lora.rank else None


def _trained_bytes(workload: Workload, dtype: str, split_over: tuple[str, ...]) -> int:
    """Bytes of what is trained on one device: the adapters, or all of the student."""
    adapters = _adapters(workload)
    if adapters is None:
        return parameter_bytes(workload.student, dtype, workload.mesh, split_over)
    return _tree_bytes(adapters, dtype, workload.mesh, split_over)


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _head_name(model: DecoderConfig) -> str:
    return "embedding" if model.ties_embeddings else "head"


def _whole_table(
    model: DecoderConfig, dtype: str, mesh: dict[str, int], split_over: tuple[str, ...]
) -> int:
    """Bytes of an embedding or an unembedding gathered along `fsdp`; 0 where it lies whole already."""
    if mesh["fsdp"] == 1 or "fsdp" not in split_over:
        return 0
    return model.vocab_size // mesh["tensor"] * model.hidden_size * _size(dtype)


def _tile(workload: Workload, rows: int) -> int:
    """Bytes of one array [tile, V] in float32."""
    tokens = min(workload.config.estimator.tile, rows * workload.columns)
    return tokens * workload.student.vocab_size // workload.mesh["tensor"] * 4


def _standing(workload: Workload) -> list[Item]:
    """What is held from one end of a step to the other."""
    config, mesh, student = workload.config, workload.mesh, workload.student
    kept, sampled_over = (
        _trained_bytes(workload, "float32", config.student.split_over),
        config.sampling.split_over,
    )
    frozen = (
        parameter_bytes(student, workload.dtype, mesh, config.student.split_over)
        if config.lora.rank
        else 0
    )
    published = _trained_bytes(workload, workload.dtype, sampled_over)
    # Frozen parameters that lie alike for training and for sampling are one array.
    is_one = bool(config.lora.rank) and set(sampled_over) == set(config.student.split_over)
    if config.lora.rank and not is_one:
        published += parameter_bytes(student, workload.dtype, mesh, sampled_over)
    unsampled = ("prefill", "sample", "teacher", "evaluate")
    items = [
        Item("student's trained parameters, float32", kept, PHASES, True, unsampled),
        Item("optimizer's two moments", 2 * kept, PHASES, True, unsampled),
        Item(
            "student's frozen parameters",
            frozen,
            PHASES,
            True,
            _not_given_frozen(workload, is_one, unsampled),
        ),
    ]
    samples = config.sampling.completions_from == "student"
    outside = (
        *(() if samples else ("prefill", "sample")),
        *(() if config.teacher_is_student else ("teacher",)),
    )
    head = _head_name(workload.scoring_model)
    wants_head = workload.needs == "vocabulary"
    if config.teacher_is_student and wants_head and not is_one:
        published_head = parameter_bytes(student, workload.dtype, mesh, sampled_over, head)
        items.append(Item("published copy, its head", published_head, PHASES, True, outside))
        published -= published_head
    items.append(
        Item("published copy of the student", published, PHASES, True, (*outside, *_UPDATE))
    )
    if workload.teacher is not None:
        split, role = workload.scoring_split, "reference" if workload.has_reference else "teacher"
        head_bytes = (
            parameter_bytes(workload.teacher, workload.teacher_dtype, mesh, split, head)
            if wants_head
            else 0
        )
        rest = parameter_bytes(workload.teacher, workload.teacher_dtype, mesh, split) - head_bytes
        unseen = (
            ("evaluate",)
            if config.sampling.completions_from == "teacher"
            else ("prefill", "sample", "evaluate")
        )
        items.append(Item("teacher's head", head_bytes, PHASES, True, unseen))
        items.append(Item(f"{role}'s parameters", rest, PHASES, True, (*unseen, *_UPDATE)))
    return items


def _not_given_frozen(
    workload: Workload, is_one: bool, unsampled: tuple[str, ...]
) -> tuple[str, ...]:
    """The phases whose programs are not given the student's frozen parameters; `is_one`: one array
    for training and sampling.
    """
    outside = ("teacher",) if is_one else unsampled
    return tuple(phase for phase in outside if phase != "teacher" or not workload.has_reference)


def _columns_bytes(workload: Workload) -> int:
    """Of the batch's columns on one device: ids, segments, log-probabilities (4 bytes each), the
    mask.
    """
    options, tokens = workload.config.estimator.options, workload.rows * workload.columns
    config = workload.config
    wide = (
        2
        + (config.sampling.completions_from == "student")
        + has_advantages(config.estimator)
        + (options.get("extra_draws") or 0)
    )
    return tokens * (4 * wide + 1 + 4 * (workload.needs in ("token", "top_k")))


def _sampling(workload: Workload) -> list[Item]:
    """Prefill and decode of a step's rollouts."""
    sampling = workload.config.sampling
    if sampling.completions_from == "references":
        return []
    model, dtype = _sampled_model(workload)
    kept = _storage(sampling.kv_dtype, dtype)
    drawn = (workload.slots + workload.rows) * sampling.max_completion_length * 12
    how = (
        model,
        dtype,
        kept,
        workload.slots,
        sampling.max_completion_length,
        sampling.num_generations,
    )
    return [
        *_generating(workload, ("prefill", "sample"), *how),
        Item(
            "drawn tokens and their log-probabilities",
            drawn,
            ("prefill", "sample"),
            True,
            ("prefill",),
        ),
    ]


def _storage(kv_dtype: str, dtype: str) -> str:
    return dtype if kv_dtype == "auto" else kv_dtype


def _sampled_model(workload: Workload) -> tuple[DecoderConfig, str]:
    """Who writes the completions."""
    is_student = workload.config.sampling.completions_from == "student" or workload.teacher is None
    return (
        (workload.student, workload.dtype)
        if is_student
        else (workload.teacher, workload.teacher_dtype)
    )


def _evaluating(workload: Workload) -> list[Item]:
    """Answers to held-out prompts."""
    config = workload.config
    if config.evaluation.source is None:
        return []
    rows, length = (
        -(-config.evaluation.batch_size // workload.row_shards),
        config.evaluation.max_completion_length,
    )
    how = (
        workload.student,
        workload.dtype,
        workload.dtype,
        rows,
        length,
        config.evaluation.num_samples,
    )
    return _generating(workload, ("evaluate",), *how)


def _generating(
    workload: Workload,
    phases: tuple[str, ...],
    model: DecoderConfig,
    dtype: str,
    kept: str,
    rows: int,
    length: int,
    group: int,
) -> list[Item]:
    """`rows` rows in decoding, and the prompts of the next ones, each of which a group of
    completions shares.
    """
    prompt, tensor, decoding = workload.prompt_columns, workload.mesh["tensor"], phases[-1:]
    waiting = -(-rows // (group * BLOCKS_PER_FILL))
    logits = rows * model.vocab_size // tensor * 4
    cache, prefix = (
        cache_bytes(model, kept, rows, prompt + length, tensor),
        cache_bytes(model, kept, waiting, prompt, tensor),
    )
    # A slot may be given a prompt that another device has read, so all of them are gathered; and
    # the branch that places rows writes into a copy of the cache. Both were seen in the buffer
    # assignment of `advance` for v5e, with half a cache of prompts (the keys, then the values) that
    # were chosen.
    unfused = dataclasses.replace(model, attention="xla")  # the sampler's always is
    everyones = prefix * workload.row_shards if workload.row_shards > 1 else 0
    return [
        Item("KV cache, prompt and completion", cache, phases, True, phases[:-1]),
        Item("KV cache of prompts that wait", prefix, phases),
        Item("KV cache, as rows are placed in it", cache, decoding),
        Item(
            "prompts that wait on all devices, chosen of",
            everyones + cache_bytes(model, kept, rows, prompt, tensor) // 2,
            decoding,
        ),
        Item(f"logits of the drawn tokens, {_DRAW_COPIES} arrays", _DRAW_COPIES * logits, decoding),
        Item("KV cache of prompts, as it is written", prefix, phases[:1]),
        Item(
            "a layer's activations of the prompts",
            _forward_bytes(unfused, dtype, waiting, prompt, tensor),
            phases[:1],
        ),
    ]


def cache_bytes(model: DecoderConfig, dtype: str, rows: int, columns: int, tensor: int = 1) -> int:
    """Keys and values of `rows` rows of `columns` columns, all layers; int8 ones with a float32
    scale each.
    """
    each = model.head_size * _size(dtype) + 4 * (dtype == "int8")
    return 2 * model.num_layers * rows * columns * model.num_kv_heads // tensor * each


def _forward_bytes(model: DecoderConfig, dtype: str, rows: int, columns: int, tensor: int) -> int:
    """The most that one layer of a forward pass holds: the scores of the attention in float32, or
    the MLP; and the residual stream.
    """
    heads, width = model.num_heads // tensor, model.intermediate_size // tensor
    scores = rows * heads * columns * columns * 4 if model.attention == "xla" else 0
    return (
        max(scores, rows * columns * 3 * width * _size(dtype))
        + 2 * rows * columns * model.hidden_size * 4
    )


def _scoring(workload: Workload) -> list[Item]:
    """The teacher's pass."""
    if workload.needs == "none":
        return []
    mesh, model = workload.mesh, workload.scoring_model
    dtype = workload.teacher_dtype if workload.teacher else workload.dtype
    split = workload.scoring_split
    # The embedding is let go once it has been looked up in.
    layer = _forward_bytes(model, dtype, workload.micro_rows, workload.columns, mesh["tensor"])
    working = max(_whole_table(model, dtype, mesh, split), layer)
    items = [
        Item(
            "batch: ids, mask, log-probabilities",
            _columns_bytes(workload),
            ("teacher", *_UPDATE),
            True,
        ),
        Item("teacher's embedding, gathered, or a layer", working, ("teacher",)),
    ]
    if workload.needs == "vocabulary":
        hidden = workload.rows * workload.columns * model.hidden_size * _size(dtype)
        return [
            *items,
            Item("teacher's hidden states, whole batch", hidden, ("teacher", *_UPDATE), True),
        ]
    top = workload.rows * workload.columns * workload.top_k * 8  # an id and a float32 each
    items.append(
        Item("teacher's most likely ids, with log-probabilities", top, ("teacher", *_UPDATE), True)
    )
    gathered = 0 if model.ties_embeddings else _whole_table(model, dtype, mesh, split)
    tiles = 2 * _tile(workload, workload.micro_rows)
    return [
        *items,
        Item("teacher's head, gathered", gathered, ("teacher",)),
        Item("vocabulary tiles of the teacher", tiles, ("teacher",)),
    ]


def _updating(workload: Workload) -> list[Item]:
    """Loss, gradient and optimizer, which works in place."""
    config, mesh, student = workload.config, workload.mesh, workload.student
    split, parts = config.student.split_over, config.train.gradient_accumulation_steps
    kept, is_whole = _trained_bytes(workload, "float32", split), not config.lora.rank
    cast = _trained_bytes(workload, workload.dtype, split) if workload.dtype != "float32" else 0
    table = student.vocab_size // mesh["tensor"] * student.hidden_size
    head, loss, backward = (
        _whole_table(student, workload.dtype, mesh, split),
        ("loss",),
        ("backward",),
    )
    items = [
        Item("student's parameters as computed with", cast, _UPDATE),
        Item("gradient, float32", kept, _UPDATE),
        Item("activations kept for the backward pass", kept_activations(workload), _UPDATE),
        Item("student's head, gathered", head, loss),
        Item("head's gradient, summed in float32", table * 4 * is_whole, loss),
    ]
    if workload.needs == "vocabulary":
        dtype = workload.teacher_dtype if workload.teacher else workload.dtype
        items.append(
            Item(
                "teacher's head, gathered",
                _whole_table(workload.scoring_model, dtype, mesh, workload.scoring_split),
                loss,
            )
        )
    tiles = _TILES[workload.needs]
    items.append(
        Item(
            f"vocabulary tiles, {tiles} of them", tiles * _tile(workload, workload.micro_rows), loss
        )
    )
    return [
        *items,
        Item("head's gradient", table * _size(workload.dtype) * is_whole, backward),
        Item("gradient of a micro-batch", cast if cast else kept * (parts > 1), backward),
        Item("a layer's activations, backward", _backward_bytes(workload), backward),
    ]


def kept_activations(workload: Workload) -> int:
    """What the forward pass of a micro-batch keeps for the backward pass, as JAX itself counts it;
    parameters aside.
    """
    model, adapters = workload.student, _adapters(workload)
    whole = abstract_params(model, workload.dtype)
    frozen, trained = (None, whole) if adapters is None else (whole, adapters)
    trained = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, workload.dtype), trained)
    ids = jax.ShapeDtypeStruct((workload.micro_rows, workload.columns), jnp.int32)
    # Without a mesh the decoder computes no splash attention, which keeps far less.
    mesh = make_mesh(1) if model.attention == "splash" else None

    def residuals(frozen, trained, tokens, segment_ids):
        pass_over = partial(
            forward,
            config=model,
            tokens=tokens,
            segment_ids=segment_ids,
            remat=workload.config.train.remat,
            mesh=mesh,
        )
        return jax.vjp(lambda trained: pass_over(combine(frozen, trained)), trained)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, frozen, trained, ids, ids))
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((frozen, trained))}
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in kept if (leaf.shape, leaf.dtype) not in weights
    )


def _backward_bytes(workload: Workload) -> int:
    """One layer as the backward pass sees it: scores and their cotangents in float32,
    probabilities, the MLP and its cotangents.
    """
    model, rows, columns = workload.student, workload.micro_rows, workload.columns
    tensor, size = workload.mesh["tensor"], _size(workload.dtype)
    scores = (
        rows * model.num_heads // tensor * columns * columns * (2 * 4 + size)
        if model.attention == "xla"
        else 0
    )
    return (
        scores
        + rows * columns * (6 * model.intermediate_size // tensor + 8 * model.hidden_size) * size
    )


def _forward_flops(model: DecoderConfig, tokens: float, context: float) -> float:
    """Of the trunk: two a multiplication; every token attends to `context` columns, the masked ones
    computed too.
    """
    layers = model.num_layers * _layer_kernels(model)
    return tokens * (
        2 * layers + 4 * model.num_layers * context * model.num_heads * model.head_size
    )


def _layer_kernels(model: DecoderConfig) -> int:
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size * model.hidden_size
    return attention + 3 * model.intermediate_size * model.hidden_size


def _head_flops(model: DecoderConfig, tokens: float) -> float:
    return 2.0 * tokens * model.vocab_size * model.hidden_size


def _bound(workload: Workload, flops: float, traffic: float) -> Bound:
    chip = workload.topology.chip
    by_flops, by_memory = flops / workload.devices / chip.peak_flops, traffic / chip.hbm_bandwidth
    return Bound(flops, traffic, max(by_flops, by_memory), by_memory > by_flops)


def _prefill_bound(workload: Workload) -> Bound:
    """A prompt is read once for all its completions."""
    config, prompt = workload.config, workload.prompt_columns
    if config.sampling.completions_from == "references":
        return _bound(workload, 0.0, 0.0)
    model, dtype = _sampled_model(workload)
    weights = parameter_bytes(model, dtype, workload.mesh, ("tensor",))
    blocks = -(-workload.rows * BLOCKS_PER_FILL // workload.slots)
    return _bound(
        workload,
        _forward_flops(model, config.train.prompts_per_step * prompt, prompt),
        blocks * weights,
    )


def _sample_bound(workload: Workload) -> Bound:
    """Decoding reads weights and cache anew for every token; rows that end early are not foreseen."""
    config = workload.config
    if config.sampling.completions_from == "references":
        return _bound(workload, 0.0, 0.0)
    model, dtype = _sampled_model(workload)
    rows, prompt, length = (
        config.rows_per_step,
        workload.prompt_columns,
        config.sampling.max_completion_length,
    )
    flops = _forward_flops(model, rows * length, prompt + length / 2) + _head_flops(
        model, rows * length
    )
    weights = parameter_bytes(model, dtype, workload.mesh, ("tensor",))
    kept = _storage(config.sampling.kv_dtype, dtype)
    mean_cache = cache_bytes(
        model, kept, workload.rows, prompt + length // 2, workload.mesh["tensor"]
    )
    # With fewer slots than rows the weights are read that much oftener.
    return _bound(workload, flops, length * (weights * workload.rows / workload.slots + mean_cache))


def _teacher_bound(workload: Workload) -> Bound:
    if workload.needs == "none":
        return _bound(workload, 0.0, 0.0)
    config, model = workload.config, workload.scoring_model
    tokens = config.rows_per_step * workload.columns
    flops = _forward_flops(model, tokens, workload.columns)
    if workload.needs in ("token", "top_k"):
        flops += _head_flops(model, config.rows_per_step * config.sampling.max_completion_length)
    dtype = workload.teacher_dtype if workload.teacher else workload.dtype
    weights = parameter_bytes(model, dtype, workload.mesh, ("tensor",))
    return _bound(workload, flops, config.train.gradient_accumulation_steps * weights)


def _update_bound(workload: Workload) -> Bound:
    """Forward once, backward twice as much (once without gradients of kernels), and the forward
    again where it is recomputed.

    Of the head three products, or two where it is frozen; of the teacher's one. What `dots`
    recomputes is next to nothing.
    """
    config, student = workload.config, workload.student
    again, products = config.train.remat == "layer", 2 if config.lora.rank else 3
    tokens, live = (
        config.rows_per_step * workload.columns,
        config.rows_per_step * config.sampling.max_completion_length,
    )
    flops = (products + again) * _forward_flops(
        student, tokens, workload.columns
    ) + products * _head_flops(student, live)
    if workload.needs == "vocabulary":
        flops += _head_flops(workload.scoring_model, live)
    state = 3 * _trained_bytes(workload, "float32", config.student.split_over)
    weights = parameter_bytes(student, workload.dtype, workload.mesh, ("tensor",))
    passes = (2 + again) * config.train.gradient_accumulation_steps
    return _bound(workload, flops, 2 * state + passes * weights)
