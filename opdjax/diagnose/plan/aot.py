"""Compile the programs of training for a machine that need not be present, and report their sizes.

AOT: ahead of time.
"""

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
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0  # the part of the output that overwrites donated arguments
    peak_bytes: int = 0  # the most that arguments, outputs and temporaries hold at once
    flops: float = 0.0  # of one device; a loop of unknown trip count counts once
    compile_seconds: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    most_logit_rows: int = 0  # tokens whose logits are in one array
    problem: str | None = None  # why it did not compile: it does not fit

    @property
    def temp_bytes(self) -> int:
        """Bytes at the peak without arguments and outputs.

        XLA's own figure counts donated arguments twice on TPU.
        """
        return self.peak_bytes - self.argument_bytes - self.output_bytes + self.alias_bytes


def describe(topology: Topology) -> list[Any]:
    """Return the devices of a topology; NoCompilerError if no compiler for it is installed."""
    if topology.backend == "cpu":
        return jax.devices("cpu")
    if topology.jax_name is None:
        raise NoCompilerError(
            f"{topology.name}: XLA compiles for a GPU only on a machine with one; plan without "
            "--aot"
        )
    # Without these libtpu waits for a metadata server, and refuses a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # The two cores of a v4 chip act as one device.
    more = {"chip_config_name": "megacore"} if topology.chip.jax_name == "v4" else {}
    try:
        name, host = topology.jax_name, topology.host_shape
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=host, **more
        )
    except (RuntimeError, ValueError) as error:
        raise NoCompilerError(
            f"no compiler for {topology.name} is installed ({str(error).splitlines()[0]}); install "
            f"libtpu for this jax: pip install 'jax[tpu]=={jax.__version__}'"
        ) from error
    return found.devices


def compile_programs(workload: Workload) -> list[Program]:
    """Compile the programs of a step that the run has: the sampler's two, the teacher's pass, the
    update.
    """
    mesh = make_mesh(**workload.mesh, devices=describe(workload.topology))
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
    """Return the shapes of a call's results with the shardings of its compiled program."""
    return abstract_like(function.eval_shape(*inputs, **options), compiled.output_shardings)


def measure(name: str, lowered: jax.stages.Lowered, workload: Workload) -> tuple[Program, Any]:
    """Compile a program; return (what the compiler reports, the program or None if too large)."""
    began = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds, problem = time.monotonic() - began, str(error).partition("\n")[0]
        return Program(name, compile_seconds=seconds, problem=problem), None
    seconds, memory = time.monotonic() - began, compiled.memory_analysis()
    text, peak = compiled.as_text(), memory.peak_memory_in_bytes
    if workload.topology.backend == "cpu":  # where XLA leaves temporaries out of the peak
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak = held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    models, splits = (workload.student, workload.scoring_model), (1, workload.mesh["tensor"])
    widths = {model.vocab_size // split for model in models for split in splits}
    found = Program(
        name=name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        peak_bytes=peak,
        flops=compiled.cost_analysis().get("flops", 0.0),
        compile_seconds=seconds,
        collectives=collectives(text),
        most_logit_rows=most_rows(text, widths, {model.hidden_size for model in models}),
    )
    return found, compiled
