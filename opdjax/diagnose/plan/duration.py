"""A lower bound on the time of a step, from floating-point operations and memory traffic."""

from __future__ import annotations

import dataclasses

from opdjax.diagnose.plan.memory import (
    cache_bytes,
    parameter_bytes,
    sampled_model,
    scoring_dtype,
    storage_dtype,
    trained_bytes,
)
from opdjax.diagnose.plan.workload import Workload
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig
from opdjax.models.partitioning import WEIGHT_AXES


@dataclasses.dataclass(frozen=True)
class Bound:
    """The work of a program in a step, and the least time it can take.

    The time assumes that every device works at its peak and that nothing is sent.
    """

    flops: float  # of all devices
    traffic: float  # bytes that each device must read or write
    seconds: float
    is_by_memory: bool  # the memory bandwidth sets the time, not the arithmetic


def bounds_of(workload: Workload) -> dict[str, Bound]:
    """Return the bound of each program of a step."""
    return {
        "prefill": _prefill_bound(workload),
        "sample": _sample_bound(workload),
        "teacher": _teacher_bound(workload),
        "update": _update_bound(workload),
    }


def _bound(workload: Workload, flops: float, traffic: float) -> Bound:
    chip = workload.topology.chip
    by_flops, by_memory = flops / workload.devices / chip.peak_flops, traffic / chip.hbm_bandwidth
    return Bound(flops, traffic, max(by_flops, by_memory), by_memory > by_flops)


def _forward_flops(model: DecoderConfig, tokens: float, context: float) -> float:
    """Return the operations of the layers: two a multiplication.

    Every token attends to `context` columns; masked ones are computed too.
    """
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size * model.hidden_size
    kernels = attention + 3 * model.intermediate_size * model.hidden_size
    scores = 4 * model.num_layers * context * model.num_heads * model.head_size
    return tokens * (2 * model.num_layers * kernels + scores)


def _head_flops(model: DecoderConfig, tokens: float) -> float:
    return 2.0 * tokens * model.vocab_size * model.hidden_size


def _weight_bytes(workload: Workload, model: DecoderConfig, dtype: str) -> int:
    return parameter_bytes(model, dtype, workload.mesh, ("tensor",))


def _prefill_bound(workload: Workload) -> Bound:
    """A prompt is read once for all of its completions."""
    config, prompt = workload.config, workload.prompt_columns
    if config.sampling.completions_from == "references":
        return _bound(workload, 0.0, 0.0)
    model, dtype = sampled_model(workload)
    blocks = -(-workload.rows * BLOCKS_PER_FILL // workload.slots)
    flops = _forward_flops(model, config.train.prompts_per_step * prompt, prompt)
    return _bound(workload, flops, blocks * _weight_bytes(workload, model, dtype))


def _sample_bound(workload: Workload) -> Bound:
    """Every token reads the weights and the cache again; all rows reach the maximum length."""
    config = workload.config
    if config.sampling.completions_from == "references":
        return _bound(workload, 0.0, 0.0)
    model, dtype = sampled_model(workload)
    prompt, length = workload.prompt_columns, config.sampling.max_completion_length
    tokens = config.rows_per_step * length
    flops = _forward_flops(model, tokens, prompt + length / 2) + _head_flops(model, tokens)
    stored = storage_dtype(config.sampling.kv_dtype, dtype)
    mean_length = prompt + length // 2
    cache = cache_bytes(model, stored, workload.rows, mean_length, workload.mesh["tensor"])
    # With fewer slots than rows the weights are read more often.
    weights = _weight_bytes(workload, model, dtype) * workload.rows / workload.slots
    return _bound(workload, flops, length * (weights + cache))


def _teacher_bound(workload: Workload) -> Bound:
    if workload.needs == "none":
        return _bound(workload, 0.0, 0.0)
    config, model = workload.config, workload.scoring_model
    flops = _forward_flops(model, config.rows_per_step * workload.columns, workload.columns)
    if workload.needs in ("token", "top_k"):
        flops += _head_flops(model, config.rows_per_step * config.sampling.max_completion_length)
    weights = _weight_bytes(workload, model, scoring_dtype(workload))
    return _bound(workload, flops, config.train.gradient_accumulation_steps * weights)


def _update_bound(workload: Workload) -> Bound:
    """Count one forward pass, the backward pass and, with remat `layer`, a second forward pass.

    The backward pass takes two forward passes, or one without gradients of kernels. The student's
    head has three products, or two if it is frozen, the teacher's head one. The work that remat
    `dots` repeats is negligible.
    """
    config, student = workload.config, workload.student
    repeats, products = config.train.remat == "layer", 2 if config.lora.rank else 3
    tokens = config.rows_per_step * workload.columns
    live = config.rows_per_step * config.sampling.max_completion_length
    flops = (products + repeats) * _forward_flops(student, tokens, workload.columns)
    flops += products * _head_flops(student, live)
    if workload.needs == "vocabulary":
        flops += _head_flops(workload.scoring_model, live)
    state = 3 * trained_bytes(workload, "float32", WEIGHT_AXES)
    passes = (2 + repeats) * config.train.gradient_accumulation_steps
    weights = _weight_bytes(workload, student, workload.dtype)
    return _bound(workload, flops, 2 * state + passes * weights)
