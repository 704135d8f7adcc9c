"""The estimate of `opdjax plan`: memory by phase and a lower bound on the time of a step."""

from __future__ import annotations

import dataclasses

from opdjax.diagnose.plan.memory import (
    PHASES,
    PROGRAMS,
    Item,
    cache_bytes,
    items_of,
    storage_dtype,
)
from opdjax.diagnose.plan.workload import Workload, bytes_of
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig
from opdjax.models.partitioning import WEIGHT_AXES


@dataclasses.dataclass(frozen=True)
class Bound:
    """The work of a program in a step, and the least time it can take.

    The time assumes that every device works at its peak and that nothing is sent.
    """

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
        evaluates = self.workload.config.evaluation.source is not None
        return tuple(phase for phase in PHASES if phase != "evaluate" or evaluates)

    def items_in(self, phase: str) -> list[Item]:
        """Return the items held in a phase."""
        return [item for item in self.items if phase in item.phases]

    def held(self, phase: str) -> int:
        """Return the bytes that a device holds in a phase."""
        return sum(item.num_bytes for item in self.items_in(phase))

    def outside_bytes(self, phase: str) -> int:
        """Return the bytes held in a phase that its program does not receive."""
        return sum(item.num_bytes for item in self.items if item.is_outside(phase))

    def program_bytes(self, name: str) -> int:
        """Return the most bytes of a program: its arguments and what it makes."""
        return max(self.held(phase) - self.outside_bytes(phase) for phase in PROGRAMS[name])

    def first_overflow(self, phase: str) -> Item | None:
        """Return the first item, in the order of the table, that does not fit after the others."""
        total = 0
        for item in self.items_in(phase):
            total += item.num_bytes
            if total > self.capacity:
                return item
        return None


def estimate(workload: Workload) -> Plan:
    """Count what a run holds and computes."""
    chip, bounds = workload.topology.chip, {}
    for name, (flops, traffic) in _work_of(workload).items():
        arithmetic = flops / workload.devices / chip.peak_flops
        memory = traffic / chip.hbm_bandwidth
        bounds[name] = Bound(flops, max(arithmetic, memory), memory > arithmetic)
    return Plan(workload, items_of(workload), bounds)


def _layer_flops(model: DecoderConfig, tokens: float, context: float) -> float:
    """Return the operations of the layers: two a multiplication.

    Every token attends to `context` columns; masked ones are computed too.
    """
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_size * model.hidden_size
    kernels = attention + 3 * model.intermediate_size * model.hidden_size
    scores = 4 * model.num_layers * context * model.num_heads * model.head_size
    return tokens * (2 * model.num_layers * kernels + scores)


def _head_flops(model: DecoderConfig, tokens: float) -> float:
    return 2.0 * tokens * model.vocab_size * model.hidden_size


def _work_of(workload: Workload) -> dict[str, tuple[float, float]]:
    """Return of each program (operations of all devices, bytes that each device moves)."""
    config, student, scoring = workload.config, workload.student, workload.scoring_model
    prompt, length = workload.prompt_columns, config.sampling.max_completion_length
    completions = config.rows_per_step * length  # tokens that pass through the head
    tokens, columns = config.rows_per_step * workload.columns, workload.columns
    parts, work = config.train.gradient_accumulation_steps, dict.fromkeys(PROGRAMS, (0.0, 0.0))
    if workload.writer != "none":
        model, dtype = workload.sampled_model
        weights = bytes_of(workload.params(model, dtype, ("tensor",)))
        # A prompt is read once for all of its completions.
        flops = _layer_flops(model, config.train.prompts_per_step * prompt, prompt)
        work["prefill"] = flops, -(-workload.rows * BLOCKS_PER_FILL // workload.slots) * weights
        # Every token reads the weights and the cache again; all rows reach the maximum length. With
        # fewer slots than rows the weights are read more often.
        flops = _layer_flops(model, completions, prompt + length / 2)
        stored = storage_dtype(config.sampling.kv_dtype, dtype)
        shape = (workload.rows, prompt + length // 2, workload.mesh["tensor"])
        moved = weights * workload.rows / workload.slots + cache_bytes(model, stored, *shape)
        work["sample"] = flops + _head_flops(model, completions), length * moved
    if workload.needs != "none":
        flops = _layer_flops(scoring, tokens, columns)
        flops += _head_flops(scoring, completions) * (workload.needs != "vocabulary")
        weights = bytes_of(workload.params(scoring, workload.dtype, ("tensor",)))
        work["teacher"] = flops, parts * weights
    # A forward pass, the backward pass (two forward passes, or one without gradients of kernels)
    # and, with remat `layer`, a second forward pass; what remat `dots` repeats is negligible. The
    # student's head has three products, or two if it is frozen, the teacher's head one.
    repeats, products = config.train.remat == "layer", 2 if config.lora.rank else 3
    flops = (products + repeats) * _layer_flops(student, tokens, columns)
    flops += products * _head_flops(student, completions)
    flops += _head_flops(scoring, completions) * (workload.needs == "vocabulary")
    state = 3 * bytes_of(workload.trained("float32", WEIGHT_AXES))
    weights = bytes_of(workload.params(student, workload.dtype, ("tensor",)))
    work["update"] = flops, 2 * state + (2 + repeats) * parts * weights
    return work
