"""Compile the programs of training ahead of time (AOT), for a machine that need not be present."""

from __future__ import annotations

import dataclasses
import os
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from opdjax.config.topology import Topology
from opdjax.diagnose.plan.hlo import Collective, collectives, most_rows
from opdjax.diagnose.plan.workload import Workload
from opdjax.engine.decoding import Decoding
from opdjax.engine.sampler import advance, prefill, split_layers, start
from opdjax.engine.scheduling import Assignments, block_size, num_slots
from opdjax.engine.scorer import score
from opdjax.engine.update import init_state, make_optimizer, make_update, spec_of
from opdjax.models.decoder import head_of
from opdjax.models.partitioning import WEIGHT_AXES, shardings_of
from opdjax.ops.sharding import abstract_like, make_mesh, replicated
from opdjax.ops.vocab import TILE


class NoCompilerError(RuntimeError):
    """No compiler for the topology is installed."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA reports of a compiled program; bytes are those of one device."""

    name: str
    compile_seconds: float = 0.0
    argument_bytes: int = 0
    temp_bytes: int = 0  # at the peak, without arguments and outputs
    peak_bytes: int = 0  # the most that arguments, outputs and temporaries hold at once
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    most_logit_rows: int = 0  # tokens whose logits are in one array
    problem: str | None = None  # why it did not compile: it does not fit


def describe(topology: Topology) -> list[Any]:
    """Return the devices of a topology; NoCompilerError if no compiler for it is installed."""
    if topology.backend == "cpu":
        return jax.devices("cpu")
    if topology.jax_name is None:
        found = f"{topology.name}: XLA compiles for a GPU only on a machine with one"
        raise NoCompilerError(f"{found}; plan without --aot")
    # Without these libtpu waits for a metadata server, and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a v4 chip act as one device.
    more = {"chip_config_name": "megacore"} if topology.chip.jax_name == "v4" else {}
    try:
        more |= {"chips_per_host_bounds": topology.host_shape}
        return topologies.get_topology_desc(topology.jax_name, "tpu", **more).devices
    except (RuntimeError, ValueError) as error:
        found = f"no compiler for {topology.name} is installed ({str(error).splitlines()[0]})"
        advice = f"install libtpu for this jax: pip install 'jax[tpu]=={jax.__version__}'"
        raise NoCompilerError(f"{found}; {advice}") from error


def compile_programs(workload: Workload) -> list[Program]:
    """Compile the programs that a step has: the sampler's two, the teacher's pass, the update."""
    mesh = make_mesh(**workload.layout.shape, devices=describe(workload.topology))
    workload = dataclasses.replace(workload, layout=mesh)
    programs = [] if workload.writer == "none" else _compile_sampler(workload)
    if workload.needs != "none":
        params, model, needs = workload.scoring, workload.scoring_model, workload.needs
        static = {"top_k": workload.top_k, "tile": TILE, "mesh": mesh}
        static["parts"] = workload.config.train.gradient_accumulation_steps
        inputs = (params, head_of(params), workload.batch())
        lowered = score.lower(*inputs, config=model, needs=needs, **static)
        programs.append(measure("teacher", lowered, workload)[0])
    return [*programs, measure("update", lower_update(workload), workload)[0]]


def lower_update(workload: Workload) -> jax.stages.Lowered:
    """Lower the update of a workload whose layout is a mesh of devices."""
    config, mesh = workload.config, workload.layout
    spec = spec_of(config, workload.student, workload.dtype, None, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.num_steps)
    params = workload.trained("float32", WEIGHT_AXES)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
    state = abstract_like(state, shardings_of(state, mesh, WEIGHT_AXES))
    head = head_of(workload.scoring) if workload.needs == "vocabulary" else None
    update = make_update(spec, config.optimizer, config.train.num_steps)
    return update.lower(state, workload.scored_batch(), head, workload.frozen)


def _compile_sampler(workload: Workload) -> list[Program]:
    """Compile prefill, and decoding with the longest cache, which needs most."""
    config, mesh = workload.config, workload.layout
    sampling, width, rows = config.sampling, workload.prompt_columns, config.rows_per_step
    params = workload.published if workload.writer == "student" else workload.scoring
    length, filters = sampling.max_completion_length, (sampling.top_k, sampling.top_p)
    decoding = Decoding(length, (0,), sampling.temperature, *filters, kv_dtype=sampling.kv_dtype)
    static = {"config": workload.sampled_model, "decoding": decoding, "mesh": mesh}
    slots = num_slots(sampling.slots, rows, mesh)
    shape = (block_size(slots, sampling.num_generations, mesh), width)
    prompts = partial(jax.ShapeDtypeStruct, shape, sharding=replicated(mesh))
    inputs = (params["layers"], static["config"])
    layer_params = _results(split_layers, inputs, {}, split_layers.lower(*inputs).compile())
    inputs = (params, layer_params, prompts(jnp.int32), prompts(jnp.bool_))
    options = {"prompt_columns": width, **static}
    program, compiled = measure("prefill", prefill.lower(*inputs, **options), workload)
    if compiled is None:
        return [program]
    prefix = _results(prefill, inputs, options, compiled)
    options = {"slots": slots, "rows": rows, "columns": width + length, **static}
    state = _results(start, (params,), options, start.lower(params, **options).compile())
    assignments, number = Assignments(*[np.zeros(slots, np.int32)] * 4), np.int32(0)
    schedule = (assignments, np.zeros(3, np.int32), number, number)
    inputs = (params, layer_params, state, prefix, *schedule)
    lowered = advance.lower(*inputs, prompt_columns=width, **static)
    return [program, measure("sample", lowered, workload)[0]]


def _results(function: Any, inputs: tuple, options: dict[str, Any], compiled: Any) -> Any:
    return abstract_like(function.eval_shape(*inputs, **options), compiled.output_shardings)


def measure(name: str, lowered: jax.stages.Lowered, workload: Workload) -> tuple[Program, Any]:
    """Compile a program; return (what the compiler reports, the program or None if too large)."""
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = str(error).partition("\n")[0]
        return Program(name, time.monotonic() - began, problem=problem), None
    seconds, memory, text = time.monotonic() - began, compiled.memory_analysis(), compiled.as_text()
    # Donated arguments are overwritten by outputs. XLA's own figure of temporaries counts them
    # twice on TPU; on a CPU its peak leaves the temporaries out.
    arguments, is_cpu = memory.argument_size_in_bytes, workload.topology.backend == "cpu"
    held = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = held + memory.temp_size_in_bytes if is_cpu else memory.peak_memory_in_bytes
    models, tensor = (workload.student, workload.scoring_model), workload.layout.shape["tensor"]
    widths = {model.vocab_size // split for model in models for split in (1, tensor)}
    rows = most_rows(text, widths, {model.hidden_size for model in models})
    sizes = arguments, peak - held, peak
    return Program(name, seconds, *sizes, collectives(text), rows), compiled
