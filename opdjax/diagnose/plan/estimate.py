"""The estimate of `opdjax plan`: memory by phase and a lower bound on the time of a step."""

from __future__ import annotations

import dataclasses

from opdjax.diagnose.plan.memory import (
    PHASES,
    PROGRAMS,
    Item,
    cache_bytes,
    items_of,
    parameter_bytes,
    storage_dtype,
)
from opdjax.diagnose.plan.workload import Arguments, Workload, abstract_mesh, bytes_of
from opdjax.engine.scheduling import BLOCKS_PER_FILL
from opdjax.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Bound:
    """The work of a program in a step, and the least time it can take.

    The time assumes that every device works at its peak and that nothing is sent.
    """

    flops: float  # of all devices
    traffic: float  # bytes that each device must read or write
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
    work = dict.fromkeys(PROGRAMS, (0.0, 0.0))
    if workload.writer != "none":
        work |= {"prefill": _prefill_work(workload), "sample": _sample_work(workload)}
    if workload.needs != "none":
        work["teacher"] = _teacher_work(workload)
    work["update"] = _update_work(workload)
    for name, (flops, traffic) in work.items():
        arithmetic = flops / workload.devices / chip.peak_flops
        memory = traffic / chip.hbm_bandwidth
        bounds[name] = Bound(flops, traffic, max(arithmetic, memory), memory > arithmetic)
    return Plan(workload, items_of(workload), bounds)


# Work of a program: (floating-point operations of all devices, bytes that each device moves)


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


def _prefill_work(workload: Workload) -> tuple[float, float]:
    """A prompt is read once for all of its completions."""
    model, dtype = workload.sampled_model
    prompts, columns = workload.config.train.prompts_per_step, workload.prompt_columns
    blocks = -(-workload.rows * BLOCKS_PER_FILL // workload.slots)
    flops = _forward_flops(model, prompts * columns, columns)
    return flops, blocks * _weight_bytes(workload, model, dtype)


def _sample_work(workload: Workload) -> tuple[float, float]:
    """Every token reads the weights and the cache again; all rows reach the maximum length."""
    config, (model, dtype) = workload.config, workload.sampled_model
    prompt, length = workload.prompt_columns, config.sampling.max_completion_length
    tokens = config.rows_per_step * length
    flops = _forward_flops(model, tokens, prompt + length / 2) + _head_flops(model, tokens)
    stored = storage_dtype(config.sampling.kv_dtype, dtype)
    mean_length = prompt + length // 2
    cache = cache_bytes(model, stored, workload.rows, mean_length, workload.mesh["tensor"])
    # With fewer slots than rows the weights are read more often.
    weights = _weight_bytes(workload, model, dtype) * workload.rows / workload.slots
    return flops, length * (weights + cache)


def _teacher_work(workload: Workload) -> tuple[float, float]:
    config, model = workload.config, workload.scoring_model
    flops = _forward_flops(model, config.rows_per_step * workload.columns, workload.columns)
    if workload.needs in ("token", "top_k"):
        flops += _head_flops(model, config.rows_per_step * config.sampling.max_completion_length)
    weights = _weight_bytes(workload, model, workload.scoring_dtype)
    return flops, config.train.gradient_accumulation_steps * weights


def _update_work(workload: Workload) -> tuple[float, float]:
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
    arguments = Arguments(workload, abstract_mesh(workload.mesh))
    state = 3 * bytes_of(arguments.trained("float32", config.student.split_over))
    passes = (2 + repeats) * config.train.gradient_accumulation_steps
    return flops, 2 * state + passes * _weight_bytes(workload, student, workload.dtype)
